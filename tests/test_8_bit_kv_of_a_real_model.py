"""KV in 8-bit floats beside KV in float32, on SmolLM2: a text is read, and the likeliest tokens are compared."""

from pathlib import Path

import pytest
import torch

from hbserve.models.demo_model import demo_model_path
from hbserve_core import Engine, InstanceConfig, ModelRunner
from hbserve_rpc import SamplingParams

NUM_TOKENS = 128
NEAR_TIE = 0.4
"""Largest difference of the two likeliest tokens' log-probabilities at which rounding may decide which comes first.
There, 2 of 100 tokens in bfloat16 differ from float32, and 4 in 8-bit floats."""


@pytest.fixture(scope="module")
def read():
    """Function that reads a text with a dtype of KV. Returns the likeliest token and the log-probabilities at each
    place of the text, and its keys and values."""
    from tokenizers import Tokenizer

    folder = demo_model_path()
    text = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[:NUM_TOKENS]
    assert len(ids) == NUM_TOKENS

    def one(kv_cache_dtype):
        config = InstanceConfig(
            model_path=str(folder), device="cpu", dtype="float32", num_blocks=32, kv_cache_dtype=kv_cache_dtype
        )
        runner = ModelRunner(config)
        engine = Engine(config, runner)
        engine.add("r", ids, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2), prefill_only=True)
        outputs = []
        while engine.has_work():
            outputs += engine.step()
        blocks = [runner.pool[block].float() for block in outputs[-1].block_table]
        return outputs[-1].prompt_logprobs, torch.cat(blocks, dim=2)[:, :, :NUM_TOKENS]

    return one("auto"), one("fp8")


def test_the_same_tokens_are_the_likeliest_but_for_near_ties(read):
    (wide, _), (narrow, _) = read
    num_same = num_clear = num_clear_same = 0
    for one, other in zip(wide, narrow, strict=True):
        (token, best), (_, second) = list(one.items())[:2]
        is_same, is_clear = next(iter(other)) == token, best - second > NEAR_TIE
        num_same, num_clear, num_clear_same = (
            num_same + is_same,
            num_clear + is_clear,
            num_clear_same + is_same * is_clear,
        )
    assert num_same >= 0.9 * len(wide)
    assert num_clear > len(wide) / 2
    # 2 or 3 of 113 differ, by the processor: its own order of sums decides on which side of a rounding keys fall.
    assert num_clear_same >= 0.96 * num_clear


def test_keys_and_values_of_every_layer_are_off_by_little_more_than_a_rounding_to_four_bits(read):
    """Rounding alone gives an error of 2.7 %; see docs/rationale.md."""
    (_, wide), (_, narrow) = read
    errors = (narrow - wide).flatten(2).norm(dim=-1) / wide.flatten(2).norm(dim=-1)
    assert errors[0].max() < 0.035
    assert errors.max() < 0.25
