"""Greedy tokens and logits against the oracle: transformers, float32."""

import json
import shutil

import pytest
import torch

from hbserve_core.config import InstanceConfig
from hbserve_core.torch_runner.runner import ModelRunner

BLOCK, CHUNK = 8, 24
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]


@pytest.fixture
def runner(model_folder, model_name):
    folder = str(model_folder(model_name))
    return ModelRunner(InstanceConfig(model_path=folder, block_size=BLOCK, num_blocks=256, device="cpu"))


def test_prompts_around_block_and_chunk_sizes_one_at_a_time(runner, model_name, stepper, prompt, greedy_tokens):
    for length in LENGTHS:
        stepping = stepper(runner)
        sequence = stepping.sequence(prompt(length))
        stepping.generate([sequence], 6, CHUNK)
        assert sequence.output_token_ids == greedy_tokens(model_name, prompt(length), 6), f"prompt of {length} tokens"


def test_all_lengths_in_one_batch_mix_chunks_and_decodes(runner, model_name, stepper, prompt, greedy_tokens):
    stepping = stepper(runner)
    sequences = [stepping.sequence(prompt(length)) for length in LENGTHS for _ in range(2)]
    stepping.generate(sequences, 6, CHUNK)
    for sequence in sequences:
        given = sequence.token_ids[: sequence.num_prompt_tokens]
        assert sequence.output_token_ids == greedy_tokens(model_name, given, 6)


def test_logits_of_every_position_equal_the_reference(runner, model_name, stepper, prompt, reference_model):
    given = prompt(2 * CHUNK + 3)
    with torch.inference_mode():
        expected = reference_model(model_name)(torch.tensor([given])).logits[0]
    stepping = stepper(runner)
    sequence = stepping.sequence(given)
    captured = []
    sample = runner._sampler.sample

    def capture(logits, sequences):
        captured.append(logits.clone())
        return sample(logits, sequences)

    runner._sampler.sample = capture
    for end in range(1, len(given) + 1):
        sequence.token_ids = given[:end]
        sequence.num_prompt_tokens = end
        stepping.step([(sequence, 1)])
    torch.testing.assert_close(torch.cat(captured), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("max_model_len", "lengths"), [(64, (1, 24, 58)), (None, (65, 3 * CHUNK))])
def test_longrope_is_that_of_the_longest_sequence_that_the_engine_takes(
    model_folder, stepper, prompt, greedy_tokens, max_model_len, lengths
):
    """transformers changes it when a sequence gets longer than the original length, here 64."""
    folder = str(model_folder("phi3-longrope"))
    settings = {"block_size": BLOCK, "num_blocks": 64, "max_model_len": max_model_len}
    runner = ModelRunner(InstanceConfig(model_path=folder, device="cpu", **settings))
    for length in lengths:
        stepping = stepper(runner)
        sequence = stepping.sequence(prompt(length))
        stepping.generate([sequence], 6, CHUNK)
        assert sequence.output_token_ids == greedy_tokens("phi3-longrope", prompt(length), 6)


@pytest.mark.parametrize("length", [24, 65])
def test_longrope_of_layers_with_a_window_is_that_of_the_longest_sequence_too(
    model_folder, reference_model, stepper, prompt, length
):
    """Of Gemma 3, which has one RoPE for each kind of layers."""
    name = "gemma3-local-longrope"
    limit = 64 if length < 58 else None
    folder = str(model_folder(name))
    runner = ModelRunner(
        InstanceConfig(model_path=folder, block_size=BLOCK, num_blocks=64, max_model_len=limit, device="cpu")
    )
    stepping = stepper(runner)
    sequence = stepping.sequence(prompt(length))
    stepping.generate([sequence], 6, CHUNK)
    with torch.inference_mode():
        logits = reference_model(name)(torch.tensor([sequence.token_ids])).logits[0]
    assert sequence.output_token_ids == logits[length - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("key", ["full_attention", "sliding_attention"])
def test_instances_with_other_frequencies_in_one_kind_of_layers_refuse_each_others_blocks(model_folder, tmp_path, key):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("gemma3"), folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_parameters"][key]["rope_theta"] *= 2
    (folder / "config.json").write_text(json.dumps(raw))
    one, other = (
        ModelRunner(InstanceConfig(model_path=str(each), num_blocks=8, device="cpu"))
        for each in (model_folder("gemma3"), folder)
    )
    assert one.fingerprint["model"] != other.fingerprint["model"]


def test_instances_with_other_frequencies_refuse_each_others_blocks(model_folder):
    short, long = (
        ModelRunner(
            InstanceConfig(
                model_path=str(model_folder("phi3-longrope")), num_blocks=8, max_model_len=limit, device="cpu"
            )
        )
        for limit in (64, 65)
    )
    assert short.fingerprint["model"] != long.fingerprint["model"]
