"""Everything that a CUDA step runs, except CUDA: packed steps, our kernels in Triton's interpreter, and the engine over
them. Tokens equal those of transformers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hbserve_core_interpreted import SIZES, WHOLE_STEPS, InterpretedRunner, make_runner

from hbserve_core import Engine
from hbserve_core.ranks.distributed_group import DistributedRankGroup
from hbserve_rpc import SamplingParams

pytest.importorskip("triton", reason="torch has Triton on Linux only")
pytestmark = WHOLE_STEPS


# Steps in turn and of exact shapes, as without graphs; and overlapped, padded ones.
@pytest.mark.parametrize(
    ("name", "graphs"),
    [
        ("qwen3", True),
        ("llama-9-heads", False),
        ("qwen2", False),
        ("llama-biases", True),
    ],
)
def test_greedy_tokens_equal_transformers(generate, model_folder, greedy_tokens, prompt, name, graphs):
    runner = InterpretedRunner(
        model_folder(name), graphs, graphs, max_num_seqs=3, max_num_batched_tokens=40, chunk_size=20
    )
    engine = Engine(runner.config, runner)
    prompts = {str(i): prompt(length, salt=i) for i, length in enumerate((1, 8, 30, 4))}
    found = generate(engine, prompts, 3)
    assert found == {key: greedy_tokens(name, given, 3) for key, given in prompts.items()}
    assert engine.blocks.num_free == engine.blocks.num_blocks
    padded = {shape in (*runner.packer.shapes.decodes, *runner.packer.shapes.prefills) for shape in runner.used_shapes}
    assert padded == {graphs}


@pytest.mark.parametrize("name", ["olmo2", "gemma2", "qwen3-moe", "starcoder2"])
def test_greedy_tokens_of_other_families_equal_transformers(generate, model_folder, greedy_tokens, prompt, name):
    """A prompt in two chunks, and a decode."""
    runner = InterpretedRunner(
        model_folder(name), False, False, max_num_seqs=1, max_num_batched_tokens=16, chunk_size=6
    )
    found = generate(Engine(runner.config, runner), {"r": prompt(9)}, 2)
    assert found == {"r": greedy_tokens(name, prompt(9), 2)}


@pytest.mark.parametrize("name", ["qwen3", "llama-biases", "opt"])
def test_greedy_tokens_equal_transformers_where_products_are_skinny_and_share_their_norms(
    generate, model_folder, greedy_tokens, prompt, name, monkeypatch
):
    """As in 16 bits, which the interpreter cannot round: what is chosen there, for float32."""
    from hbserve_core.cuda_runner import products as cuda_products

    chosen, real = [], cuda_products.choose

    def choose(rows, weight, itemsize, *others):
        chosen.append(real(max(rows, 5), weight, 2, *others))
        return chosen[-1]

    monkeypatch.setattr(cuda_products, "_FEWEST_INPUTS", 32)
    monkeypatch.setattr(cuda_products, "choose", choose)
    runner = InterpretedRunner(model_folder(name), True, True, max_num_seqs=3, max_num_batched_tokens=32, chunk_size=20)
    prompts = {str(i): prompt(length, salt=i) for i, length in enumerate((5, 24))}
    found = generate(Engine(runner.config, runner), prompts, 3)
    assert found == {key: greedy_tokens(name, given, 3) for key, given in prompts.items()}
    assert {choice.kernel for choice in chosen} == {"skinny"}
    assert {choice.splits for choice in chosen} >= {1, 2}


@pytest.mark.parametrize("num_output", [0, 2])
def test_a_request_without_numbers_ends_and_the_others_get_their_tokens(
    broken_model, beside_a_broken_request, greedy_tokens, num_output
):
    """Meanwhile the device has begun to compute what would follow, from a token that is none."""
    # Known elsewhere: SGLang #33187, #28829.
    model = broken_model(num_output)
    runner = InterpretedRunner(model.folder, True, True, max_num_seqs=5, max_num_batched_tokens=48, chunk_size=20)
    tokens, errors = beside_a_broken_request(Engine(runner.config, runner), model, 4)
    assert tokens.pop("broken", []) == model.output
    assert tokens == {name: greedy_tokens(model.whole, ids, 4) for name, ids in model.sound.items()}
    assert list(errors) == ["broken"]
    assert f"not finite at output token {num_output}: " in errors["broken"]


@pytest.mark.usefixtures("one_kernel_at_a_time")
def test_a_request_without_numbers_ends_on_ranks_that_overlap(
    broken_model, beside_a_broken_request, ranks_in_threads, greedy_tokens
):
    # Known elsewhere: SGLang #33187, #28829.
    model = broken_model(2)
    settings = {"max_num_seqs": 5, "max_num_batched_tokens": 48, "chunk_size": 20, "tensor_parallel_size": 2}
    ranks = ranks_in_threads(lambda group: InterpretedRunner(model.folder, True, False, group=group, **settings), 2)
    tokens, errors = beside_a_broken_request(Engine(ranks.own.config, ranks.runner), model, 4)
    assert tokens.pop("broken") == model.output
    assert tokens == {name: greedy_tokens(model.whole, ids, 4) for name, ids in model.sound.items()}
    assert list(errors) == ["broken"]


def sum_and_norm(group, rows, partial, norm=None):
    rows += group.all_reduce(partial)
    return None if norm is None else F.rms_norm(rows, (rows.shape[1],), *norm)


@pytest.mark.usefixtures("one_kernel_at_a_time")
@pytest.mark.parametrize(
    ("name", "size", "sums_norm"), [("qwen3", 2, True), ("llama-biases", 4, False)], ids=["qwen3-2", "llama-biases-4"]
)
def test_ranks_that_overlap_give_the_tokens_of_one(
    generate, model_folder, ranks_in_threads, greedy_tokens, prompt, monkeypatch, name, size, sums_norm
):
    """What is summed has a place, as many rows have in mapped memory. sums_norm: whether sums do the next norm too."""
    monkeypatch.setattr(DistributedRankGroup, "partial", lambda group, shape, dtype: torch.full(shape, torch.nan))
    if sums_norm:
        monkeypatch.setattr(DistributedRankGroup, "add_sum", sum_and_norm)
    settings = {
        "max_num_seqs": 5, "max_num_batched_tokens": 48, "chunk_size": 20, "tensor_parallel_size": size,
    }  # fmt: skip
    folder = model_folder(name)
    ranks = ranks_in_threads(lambda group: InterpretedRunner(folder, True, False, group=group, **settings), size)
    prompts = {str(i): prompt(length, salt=i) for i, length in enumerate((1, 21))}
    found = generate(Engine(ranks.own.config, ranks.runner), prompts, 3)
    assert found == {key: greedy_tokens(name, given, 3) for key, given in prompts.items()}


@pytest.mark.usefixtures("one_kernel_at_a_time")
def test_ranks_that_overlap_draw_the_same_tokens(generate, model_folder, ranks_in_threads, prompt):
    """Without a seed too: a rank that drew another token would compute another context than the others."""
    settings = {"max_num_seqs": 5, "max_num_batched_tokens": 48, "chunk_size": 20}
    params = {"temperature": 0.9, "top_k": 20}
    folder = model_folder("qwen3")
    alone = InterpretedRunner(folder, True, False, seed=7, **settings)
    expected = generate(Engine(alone.config, alone), {"r": prompt(9)}, 3, **params)
    ranks = ranks_in_threads(
        lambda group: InterpretedRunner(folder, True, False, group=group, tensor_parallel_size=2, **settings), 2
    )
    assert generate(Engine(ranks.own.config, ranks.runner), {"r": prompt(9)}, 3, **params) == expected


@pytest.mark.parametrize("asked", [None, 0], ids=["tokens", "and scores"])
@pytest.mark.parametrize("kind", ["torch", "kernels", "kernels without graphs"])
def test_after_the_last_attention_a_prompt_has_no_rows_but_those_that_are_read(
    model_folder, prompt, monkeypatch, asked, kind
):
    from hbserve_core.cuda_runner.products import CudaProducts

    runner: Any
    if kind == "torch":
        runner = make_runner(model_folder("qwen3"), "torch")
    else:
        runner = InterpretedRunner(model_folder("qwen3"), graphs=kind == "kernels", **SIZES)
    decoder = getattr(runner, "_decoder", None) or runner.decoder
    last = decoder._weights.layers[-1].down
    seen = []

    def record(owner, name, *, linear_at):
        real = getattr(owner, name)

        def recorded(*given):
            linear, rows = given[linear_at], given[1]
            seen.extend([len(rows)] * (linear is last))
            return real(*given)

        monkeypatch.setattr(owner, name, recorded)

    record(type(last), "__call__", linear_at=0)
    record(CudaProducts, "_choose", linear_at=2)
    engine = Engine(runner.config, runner)
    engine.add("a", prompt(30), SamplingParams(0, 2, ignore_eos=True, prompt_logprobs=asked))
    while engine.has_work():
        engine.step()
    # Chunks are of 16 and 14 tokens; a step that is padded has as many samples as there may be.
    most = runner.config.max_num_seqs if asked is None else 32
    assert 0 < min(seen) <= max(seen) <= most
    assert (max(seen) > 13) == (asked is not None)
    # The first of them samples nothing. Who hears that rank 0 has computed it takes that for all ranks, because they
    # have a sum behind the last keys and values.
    assert len(seen) == engine.stats().num_steps
