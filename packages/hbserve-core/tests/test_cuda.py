"""The engine on a CUDA device: the same tokens as transformers, with and without graphs, in overlapped steps."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from hbserve_core import Engine, InstanceConfig, ModelRunner, make_runner
from hbserve_core.model.kv_pool import _CUDA_CONTEXT_BYTES
from hbserve_rpc import SamplingParams
from hbserve_testing.narrowing import present

pytestmark = pytest.mark.gpu
BLOCK, CHUNK = 8, 24
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]


def make_engine(folder, **settings):
    chosen: dict[str, Any] = {
        "block_size": BLOCK, "num_blocks": 256, "chunk_size": CHUNK, "max_num_batched_tokens": 96, "max_num_seqs": 9,
        "device": "cuda", "cuda_graph_max_seq_len": 64,
    }  # fmt: skip
    config = InstanceConfig(model_path=str(folder), **(chosen | settings))
    return Engine(config, make_runner(config))


def generate(engine, prompts, count, **params):
    chosen = {"temperature": 0, "ignore_eos": True} | params
    for name, prompt in enumerate(prompts):
        engine.add(str(name), prompt, SamplingParams(max_tokens=count, **chosen))
    found: list[list[int]] = [[] for _ in prompts]
    while engine.has_work():
        for output in engine.step():
            found[int(output.request_id)] += output.token_ids
        engine.check_integrity()
    assert engine.blocks.num_free == engine.blocks.num_blocks
    return found


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize(
    "model_name", ["qwen3", "qwen2-sharded", "llama-9-heads", "llama3-rope", "llama-biases", "opt"]
)
def test_greedy_tokens_equal_transformers_in_float32(model_folder, model_name, greedy_tokens, prompt, graphs):
    engine = make_engine(model_folder(model_name), cuda_graph_enabled=graphs)
    prompts = [prompt(length, salt) for salt, length in enumerate([*LENGTHS, *LENGTHS])]
    expected = [greedy_tokens(model_name, given, 8) for given in prompts]
    assert generate(engine, prompts, 8) == expected
    # Now with their prefixes cached.
    assert generate(engine, prompts, 8) == expected
    assert engine.stats().num_cached_tokens > 0


def test_the_device_is_idle_when_its_step_has_been_read_and_not_before_it_can_be(model_folder, prompt):
    engine = make_engine(model_folder("qwen3"))
    engine.add("r", prompt(20), SamplingParams(0, 3, ignore_eos=True))
    assert engine.wait_s() == 0
    engine.step()
    while engine._runner.is_idle() is False:
        pass
    engine.release("r")
    assert engine.wait_s() == 0, "the step has ended, and nothing else is to be launched"
    engine.step()
    assert engine.wait_s() is None


def test_preempted_sequences_get_the_same_tokens(model_folder, greedy_tokens, prompt):
    engine = make_engine(model_folder("qwen3"), num_blocks=20)
    prompts = [prompt(30, salt) for salt in range(4)]
    assert generate(engine, prompts, 30) == [greedy_tokens("qwen3", given, 30) for given in prompts]
    assert engine.stats().num_preemptions > 0


def test_a_seed_gives_the_same_tokens_in_any_batch(model_folder, prompt):
    engine = make_engine(model_folder("qwen3"))
    params = {"temperature": 1.0, "seed": 5, "top_k": 40, "top_p": 0.9}
    (alone,) = generate(engine, [prompt(20)], 12, **params)
    together = generate(engine, [prompt(20), *(prompt(9, salt) for salt in range(1, 8))], 12, **params)
    assert together[0] == alone
    assert len(set(alone)) > 3


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_each_choice_is_the_request_with_the_next_seed(model_folder, prompt, graphs):
    """Prompts of one token are drawn from in steps of decodes, others in those of chunks; four of them at a time."""
    engine = make_engine(model_folder("qwen3"), cuda_graph_enabled=graphs)
    params = SamplingParams(temperature=1.5, seed=2**63 - 2, max_tokens=6, ignore_eos=True, n=4)
    for name, length in enumerate(LENGTHS):
        engine.add(str(name), prompt(length), params)
    found: list[list[list[int]]] = [[[] for _ in range(4)] for _ in LENGTHS]
    while engine.has_work():
        for output in engine.step():
            found[int(output.request_id)][output.choice] += output.token_ids
        engine.check_integrity()
    assert engine.blocks.num_free == engine.blocks.num_blocks
    prompts = [prompt(length) for length in LENGTHS]
    for choice in range(4):
        expected = generate(engine, prompts, 6, temperature=1.5, seed=params.of_choice(choice).seed)
        assert [each[choice] for each in found] == expected


ASKED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "penalties": {"repetition_penalty": 1.7, "presence_penalty": 1.1, "frequency_penalty": 0.6},
    "a bias and min_tokens": {"logit_bias": {2: 100.0, 7: 3.0}, "min_tokens": 5, "ignore_eos": False},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 2},
    "logprobs and penalties": {"logprobs": 0, "repetition_penalty": 3.0},
}


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_what_is_asked_of_sampling_is_answered_as_on_the_cpu(model_folder, prompt, graphs):
    """In overlapped steps, several kinds in one, some prompts in chunks; tests on the CPU have transformers beside."""

    def outputs(engine):
        found: dict[str, Any] = {}
        for name, asked in ASKED.items():
            for length in LENGTHS:
                params = SamplingParams(**({"temperature": 0, "max_tokens": 9, "ignore_eos": True} | asked))
                engine.add(f"{name} {length}", prompt(length), params)
        while engine.has_work():
            for output in engine.step():
                tokens, logprobs, of_prompt = found.setdefault(output.request_id, ([], [], []))
                tokens += output.token_ids
                logprobs += output.all_logprobs
                of_prompt += output.prompt_logprobs
            engine.check_integrity()
        return found

    ours = outputs(make_engine(model_folder("qwen3"), cuda_graph_enabled=graphs))
    theirs = outputs(make_engine(model_folder("qwen3"), device="cpu"))
    assert ours.keys() == theirs.keys()
    for name, (tokens, *logprobs) in ours.items():
        assert tokens == theirs[name][0], name
        for found, expected in zip(logprobs, theirs[name][1:], strict=True):
            assert [list(each) for each in found] == [list(each) for each in expected], name
            for each, other in zip(found, expected, strict=True):
                assert list(each.values()) == pytest.approx(list(other.values()), abs=1e-3)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """Layers of Qwen3-0.6B's sizes, few of them, as random as a model is before training."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=8192, hidden_size=1024, intermediate_size=3072, num_hidden_layers=6, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


WIDE: dict[str, Any] = {
    "block_size": 16, "num_blocks": 1024, "chunk_size": 512, "max_num_batched_tokens": 2048, "max_num_seqs": 16,
    "cuda_graph_max_seq_len": 512,
}  # fmt: skip


def test_the_first_bfloat16_token_that_differs_from_float32_was_nearly_as_likely(wide_model, prompt):
    import transformers

    prompts = [prompt(length, salt) for salt, length in enumerate((1, 15, 16, 17, 511, 512, 513, 1300))]
    exact_config = InstanceConfig(model_path=str(wide_model), dtype="float32", device="cuda", **WIDE)
    exact = generate(Engine(exact_config, ModelRunner(exact_config)), prompts, 24)
    assert generate(make_engine(wide_model, dtype="float32", **WIDE), prompts, 24) == exact
    rounded = generate(make_engine(wide_model, dtype="bfloat16", **WIDE), prompts, 24)
    reference = transformers.AutoModelForCausalLM.from_pretrained(wide_model, dtype=torch.float32).cuda().eval()  # type: ignore[call-arg]
    for given, ours, theirs in zip(prompts, rounded, exact, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if same is not None:
            with torch.inference_mode():
                logits = reference(torch.tensor([given + ours[:same]], device="cuda")).logits[0, -1]
            first, second = logits.topk(2).values.tolist()
            assert first - second < 0.05


HOLD_AN_ENGINE = """
import sys, torch
from hbserve_core import Engine, InstanceConfig, make_runner
config = InstanceConfig(
    model_path=sys.argv[1], block_size=8, max_num_seqs=16384, gpu_memory_utilization=0.08, num_on_gpu=2, device="cuda"
)
engine = Engine(config, make_runner(config))
print(engine.blocks.num_blocks, torch.cuda.memory_reserved(), flush=True)
sys.stdin.read()
"""


def test_two_engines_on_one_card_take_their_configured_shares(model_folder):
    """What each has of the card, with room for its context: the card knows only what all have, others' included."""
    command = [sys.executable, "-c", HOLD_AN_ENGINE, str(model_folder("qwen3-wide-heads"))]
    holders = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        held = [tuple(map(int, present(holder.stdout).readline().split())) for holder in holders]
    finally:
        for holder in holders:
            holder.communicate(timeout=60)
    (first, _), (second, _) = held
    assert first == pytest.approx(second, rel=0.1)
    total = torch.cuda.get_device_properties(0).total_memory
    for _, reserved_bytes in held:
        assert 0.03 * total < reserved_bytes + _CUDA_CONTEXT_BYTES <= 0.04 * total


def test_memory_does_not_grow_with_the_prompt_beyond_its_blocks(model_folder, prompt):
    engine = make_engine(model_folder("qwen3"), max_num_seqs=4)
    generate(engine, [prompt(2 * CHUNK)], 2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    generate(engine, [prompt(40)], 2)
    short = torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    generate(engine, [prompt(500)], 2)
    assert torch.cuda.max_memory_allocated() - before <= short


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("num_output", [0, 3])
def test_a_request_without_numbers_ends_and_the_others_get_their_tokens(
    broken_model, beside_a_broken_request, greedy_tokens, num_output, graphs
):
    """Meanwhile the device has begun to compute what would follow, from a token that is none."""
    # Known elsewhere: SGLang #33187, #28829.
    model = broken_model(num_output)
    engine = make_engine(model.folder, cuda_graph_enabled=graphs)
    # As cold as this is greedy.
    tokens, errors = beside_a_broken_request(engine, model, 8, temperature=1e-38)
    assert tokens.pop("broken", []) == model.output
    assert tokens == {name: greedy_tokens(model.whole, ids, 8) for name, ids in model.sound.items()}
    assert list(errors) == ["broken"]
