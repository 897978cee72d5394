"""ModelRunner: batches do not influence each other, settings are checked, and nothing global is touched."""

from typing import Any

import pytest
import torch

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.sequence import ScheduledChunk
from hbserve_core.errors import InvalidInstanceConfig
from hbserve_core.torch_runner.runner import ModelRunner

BLOCK = 8


def config(folder, **changes):
    given: dict[str, Any] = {"model_path": str(folder), "block_size": BLOCK, "num_blocks": 96, "device": "cpu"}
    return InstanceConfig(**(given | changes))


@pytest.fixture
def runner(model_folder):
    return ModelRunner(config(model_folder("llama")))


def test_a_chunk_that_stops_short_of_the_last_token_gives_none(runner, stepper, prompt):
    stepping = stepper(runner)
    whole, part = stepping.sequence(prompt(20)), stepping.sequence(prompt(20))
    whole.block_table, part.block_table = [0, 1, 2], [3, 4, 5]
    tokens = runner.run([ScheduledChunk(part, 19), ScheduledChunk(whole, 20)]).tokens
    assert tokens[0] is None
    assert isinstance(tokens[1], int)
    assert part.token_ids == prompt(20)
    assert part.num_computed_tokens == 0


def test_an_empty_batch_gives_nothing(runner):
    assert runner.run([]).tokens == []


def test_seeded_requests_give_the_same_tokens_alone_and_in_a_crowd(runner, stepper, prompt):
    kinds = [{"temperature": 0.8, "seed": 3}, {"temperature": 1.5, "top_k": 30, "seed": 3}, {"top_p": 0.9, "seed": 4}]
    alone = []
    for params in kinds:
        stepping = stepper(runner)
        sequence = stepping.sequence(prompt(13), **params)
        stepping.generate([sequence], 12)
        alone.append(sequence.output_token_ids)
    stepping = stepper(runner)
    same = [stepping.sequence(prompt(13), **params) for params in kinds]
    others = [stepping.sequence(prompt(3 + i, salt=i), temperature=1.0) for i in range(9)]
    stepping.generate([*others[:4], *same, *others[4:]], 12, chunk_size=5)
    assert [sequence.output_token_ids for sequence in same] == alone


def test_a_request_that_is_computed_again_goes_on_as_before(runner, stepper, prompt):
    stepping = stepper(runner)
    sequence = stepping.sequence(prompt(21), temperature=1.0, seed=11)
    stepping.generate([sequence], 10)
    again = stepping.sequence(prompt(21), temperature=1.0, seed=11)
    stepping.generate([again], 4)
    again.num_computed_tokens, again.block_table = 0, []
    stepping.generate([again], 10, chunk_size=6)
    assert again.output_token_ids == sequence.output_token_ids


def test_what_others_left_in_the_pool_cannot_reach_a_request(runner, stepper, prompt, greedy_tokens):
    runner.pool.fill_(float("nan"))
    stepping = stepper(runner)
    sequences = [stepping.sequence(prompt(length)) for length in (1, 7, 8, 9, 30, 30)]
    stepping.generate(sequences, 10, chunk_size=12)
    for sequence in sequences:
        given = sequence.token_ids[: sequence.num_prompt_tokens]
        assert sequence.output_token_ids == greedy_tokens("llama", given, 10)


def test_a_step_writes_no_block_but_those_of_its_sequences(runner, stepper, prompt):
    runner.pool.fill_(7)
    stepping = stepper(runner)
    sequences = [stepping.sequence(prompt(length)) for length in (5, 16, 21)]
    stepping.generate(sequences, 5, chunk_size=9)
    own = {block for sequence in sequences for block in sequence.block_table}
    others = [block for block in range(len(runner.pool)) if block not in own]
    assert bool((runner.pool[others] == 7).all())
    assert not bool((runner.pool[sorted(own)] == 7).all(dim=tuple(range(1, 6))).any())


def test_a_block_that_was_copied_elsewhere_serves_as_well(model_folder, stepper, prompt, greedy_tokens):
    """What a transfer between two instances does."""
    prefill, decode = (ModelRunner(config(model_folder("qwen3"), num_blocks=number)) for number in (40, 64))
    stepping = stepper(prefill)
    sequence = stepping.sequence(prompt(21))
    stepping.generate([sequence], 1, chunk_size=10)
    moved = [50 + i for i in range(len(sequence.block_table))]
    decode.pool[moved] = prefill.pool[list(sequence.block_table)]
    sequence.block_table = moved
    stepping.runner = decode
    stepping.generate([sequence], 12)
    assert sequence.output_token_ids == greedy_tokens("qwen3", prompt(21), 12)


def test_very_different_lengths_share_a_step(runner, stepper, prompt, greedy_tokens):
    stepping = stepper(runner)
    sequences = [stepping.sequence(prompt(length)) for length in (1, 2, 3, 200, 4, 190, 60)]
    stepping.generate(sequences, 8)
    for sequence in sequences:
        given = sequence.token_ids[: sequence.num_prompt_tokens]
        assert sequence.output_token_ids == greedy_tokens("llama", given, 8)


def test_a_step_of_many_tokens_gives_the_tokens_of_small_ones(model_folder, stepper, prompt, greedy_tokens):
    stepping = stepper(ModelRunner(config(model_folder("llama"), num_blocks=200)))
    sequences = [stepping.sequence(prompt(420 + i, salt=i)) for i in range(3)]
    stepping.generate(sequences, 3)
    for i, sequence in enumerate(sequences):
        assert sequence.output_token_ids == greedy_tokens("llama", prompt(420 + i, salt=i), 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_keeps_its_pool_in_it(model_folder, stepper, prompt, dtype):
    runner = ModelRunner(config(model_folder("qwen2"), dtype=dtype))
    assert runner.pool.dtype == getattr(torch, dtype)
    stepping = stepper(runner)
    sequences = [stepping.sequence(prompt(length)) for length in (1, 9, 30)]
    stepping.generate(sequences, 4, chunk_size=16)
    assert all(sequence.num_output_tokens == 4 for sequence in sequences)


def test_equal_fingerprints_mean_equal_models_and_block_layouts(model_folder):
    def fingerprint(name, **changes):
        return ModelRunner(config(model_folder(name), **changes)).fingerprint

    reference = fingerprint("llama")
    assert fingerprint("llama", num_blocks=50) == reference
    assert set(reference) == {"model", "dtype", "num_layers", "num_kv_heads", "head_dim", "block_size"}
    for other, differs in (
        (fingerprint("llama", dtype="bfloat16"), "dtype"),
        (fingerprint("llama", block_size=16), "block_size"),
        (fingerprint("llama-linear-rope"), "model"),
        (fingerprint("llama", load_format="dummy"), "model"),
    ):
        assert {key for key in reference if other[key] != reference[key]} == {differs}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"device": "tpu"}, "device='tpu': expected 'auto', 'cpu' or 'cuda:N'"),
        ({"device": "meta"}, "device='meta': expected"),
        ({"device": "cuda:99"}, "device='cuda:99': this host has"),
        ({"dtype": "int8"}, "dtype='int8': expected one of auto, float32"),
        ({"load_format": "gguf"}, "load_format='gguf': expected"),
        ({"max_model_len": 513}, "max_model_len=513: expected 1 to 512"),
        ({"max_model_len": 0}, "max_model_len=0: expected 1 to 512"),
        ({"block_size": 0}, "block_size=0: expected"),
        ({"num_blocks": 0}, "num_blocks=0: expected"),
    ],
)
def test_a_setting_that_cannot_be_is_named(model_folder, changes, message):
    with pytest.raises(InvalidInstanceConfig, match=message):
        ModelRunner(config(model_folder("llama"), **changes))


def test_max_model_len_shortens_the_limit(model_folder):
    assert ModelRunner(config(model_folder("llama"))).model_config.max_model_len == 512
    assert ModelRunner(config(model_folder("llama"), max_model_len=100)).model_config.max_model_len == 100


def test_process_wide_settings_stay_as_they_were(model_folder, stepper, prompt):
    def settings():
        return (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_num_threads(),
            torch.random.get_rng_state().tolist(),
            torch.is_inference_mode_enabled(),
            torch.get_float32_matmul_precision(),
        )

    before = settings()
    stepping = stepper(ModelRunner(config(model_folder("llama"), load_format="dummy", dtype="bfloat16")))
    stepping.generate([stepping.sequence(prompt(5), temperature=1.0)], 3)
    assert settings() == before


def test_the_number_of_threads_is_taken_from_the_config(model_folder):
    before = torch.get_num_threads()
    try:
        ModelRunner(config(model_folder("llama"), num_threads=before + 1))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
