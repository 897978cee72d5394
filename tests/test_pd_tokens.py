"""Greedy tokens are the same with prefill and decode apart, over each transfer backend, in one hybrid engine, and in
transformers."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hbserve import LLM, SamplingParams
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig

pytestmark = pytest.mark.warm

BLOCK, CHUNK = 16, 32
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
# The real model is a hundred times as large, and one thread computes it.
LENGTHS_OF_REAL = [BLOCK, 2 * CHUNK + 5]
GREEDY_OF_REAL = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def prompt(length: int, salt: int = 0) -> list[int]:
    return [3 + (7 * i * i + 11 * i + 13 * salt) % 250 for i in range(length)]


def many(lengths: list[int]) -> list[list[int]]:
    """Return four prompts of each length, or two for the real model, all different."""
    count = 2 if lengths is LENGTHS_OF_REAL else 4
    return [prompt(length, salt) for salt in range(2, 2 + count) for length in lengths]


def greedy(name: str) -> SamplingParams:
    return GREEDY_OF_REAL if name == "smollm2" else GREEDY


@pytest.fixture(scope="session")
def model_folder(small_model) -> Callable[[str], Path]:
    def folder(name: str) -> Path:
        if name != "smollm2":
            return small_model(name)
        from hbserve.models.demo_model import demo_model_path

        return demo_model_path()

    return folder


@pytest.fixture(scope="session")
def oracle(model_folder) -> Callable[[str, list[list[int]]], list[list[int]]]:
    """Function that returns transformers' greedy tokens in float32. Prompts of one length are a batch, because one by
    one they take minutes."""
    import torch
    import transformers

    @cache
    def model(name: str) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=torch.float32)

    @cache
    def tokens(name: str, prompts: tuple[tuple[int, ...], ...]) -> list[list[int]]:
        found: dict[tuple[int, ...], list[int]] = {}
        for length in {len(ids) for ids in prompts}:
            same = [ids for ids in prompts if len(ids) == length]
            given, count = torch.tensor(same), greedy(name).max_tokens
            out = model(name).generate(
                given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count,
                min_new_tokens=count, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            found |= dict(zip(same, out[:, length:].tolist(), strict=True))
        return [found[ids] for ids in prompts]

    return lambda name, prompts: tokens(name, tuple(map(tuple, prompts)))


def settings(folder: Path) -> dict:
    return {
        "model_path": str(folder),
        "dtype": "float32",
        "block_size": BLOCK,
        "chunk_size": CHUNK,
        "num_blocks": 400,
        "max_num_batched_tokens": 256,
    }


def token_ids(results: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    return [result["token_ids"] for result in results]


# What a backend moves is blocks, whatever the model: each carries one small model at least, and one the real one.
PAIRS = [
    *(("nccl", name) for name in ["smollm2", "qwen3", "gemma3", "qwen3-moe"]),
    ("mooncake", "gemma3"),
    ("ipc", "llama"),
    ("auto", "qwen2"),
]


@pytest.mark.parametrize(("backend", "name"), PAIRS)
async def test_pd_gives_the_tokens_of_transformers(name, backend, model_folder, oracle):
    # Known elsewhere: vLLM #52617.
    if backend == "mooncake":
        pytest.importorskip(
            "mooncake.engine", reason="Mooncake or its system libraries are missing", exc_type=ImportError
        )
    lengths = LENGTHS_OF_REAL if name == "smollm2" else LENGTHS
    params, prompts = greedy(name), [prompt(length) for length in lengths]
    expected = oracle(name, prompts)
    config = PdDisaggConfig(kv_transfer_backend=backend, **settings(model_folder(name)))
    async with DisaggregatedLLM(config) as llm:
        for ids, tokens in zip(prompts, expected, strict=True):
            cold = await llm.generate([ids], params)
            assert token_ids(cold) == [tokens], f"cold, alone, {len(ids)} tokens"

        again = await llm.generate(prompts, params)
        assert token_ids(again) == expected, "everything that fills a block is cached on D"
        full_blocks = [len(ids) // BLOCK * BLOCK for ids in prompts]
        assert [result["num_cached_tokens"] for result in again] == full_blocks
        assert [result["kv_bytes"] == 0 for result in again] == [len(ids) % BLOCK == 0 for ids in prompts]

        shared = [prompt(BLOCK + 1)[:BLOCK] + prompt(length, salt=1) for length in lengths]
        partly = await llm.generate(shared, params)
        assert token_ids(partly) == oracle(name, shared), "the first block is cached on D"
        assert all(result["num_cached_tokens"] == BLOCK for result in partly)

        at_once = many(lengths)
        assert token_ids(await llm.generate(at_once, params)) == oracle(name, at_once), f"{len(at_once)} at once"


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "qwen2", "llama"])
def test_a_hybrid_engine_gives_the_tokens_of_transformers(name, model_folder, oracle):
    options = settings(model_folder(name))
    llm = LLM(
        options["model_path"], dtype="float32", kvcache_block_size=BLOCK, chunk_size=CHUNK, num_kvcache_blocks=400,
        max_num_batched_tokens=256,
    )  # fmt: skip
    params, prompts = greedy(name), many(LENGTHS_OF_REAL if name == "smollm2" else LENGTHS)
    expected = oracle(name, prompts)
    for ids, tokens in zip(prompts[:8], expected, strict=False):
        assert token_ids(llm.generate([ids], params, use_tqdm=False)) == [tokens]
    assert token_ids(llm.generate(prompts, params, use_tqdm=False)) == expected
    llm.exit()
