"""No kernel is compiled for a request: all that serving can run, in each specialisation, has been run before."""

import importlib.util
import random
from typing import Any

import pytest
import torch
from hbserve_core_interpreted import InterpretedRunner

from hbserve_core import Engine
from hbserve_core.cuda_runner.step_packer import StepView
from hbserve_rpc import SamplingParams

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def specialisation(argument: Any, name: str, kept: list[str]) -> Any:
    """What of an argument a kernel is compiled for."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, bool) or argument is None:
        return argument
    if isinstance(argument, int):
        is_long = not -(2**31) <= argument < 2**31
        return ("int", is_long) if name in kept else ("int", is_long, argument == 1, argument % 16 == 0)
    if isinstance(argument, float):
        return "float"
    return argument.base.dtype, tuple(argument.block_shape)


@pytest.fixture
def launched(monkeypatch):
    """What is launched, by specialisation; it is not run, so that whatever there is may be launched."""
    from triton.runtime.interpreter import InterpretedFunction

    found = set[Any]()

    def run(kernel, *arguments, grid, warmup, **options):
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        annotations, kept = kernel.fn.__annotations__, kernel.kwargs.get("do_not_specialize") or []
        key = [kernel.fn.__name__]
        for name, argument in given.items():
            is_constant = name not in kernel.arg_names or "constexpr" in str(annotations.get(name))
            key.append((name, argument if is_constant else specialisation(argument, name, kept)))
        found.add(tuple(key))
        if kernel.fn.__name__ == "_best_of_row":
            given["sampled"].zero_()  # or what is there would be looked up as a token

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return found


SPECIAL: list[dict[str, Any]] = [{}, {}, {}, {"logprobs": 2}, {"presence_penalty": 1.0}, {"prompt_logprobs": 1}]


def serve(engine: Engine, dice: random.Random, vocab_size: int, longest: int, most: int) -> None:
    """Requests of all lengths, alone and many at once, of which some ask for more than a token."""
    for number in range(12):
        for i in range(dice.choice([1, 1, 2, 3, 5, 17, 40, most])):
            length = dice.choice([1, 2, dice.randrange(1, 40), dice.randrange(1, longest)])
            special = dice.choice(SPECIAL)
            params = SamplingParams(dice.choice([0, 0.6]), dice.randrange(1, 5), ignore_eos=True, **special)
            engine.add(f"{number} {i}", [dice.randrange(3, vocab_size) for _ in range(length)], params)
            if dice.random() < 0.1:
                engine.step()
        while engine.has_work():
            engine.step()


@pytest.mark.parametrize(
    ("graphs", "dtype"), [(True, "bfloat16"), (False, "bfloat16"), (True, "float32")], ids=["graphs", "none", "float32"]
)
def test_serving_launches_nothing_that_was_not_launched_before_requests(
    model_folder, launched, monkeypatch, graphs, dtype
):
    from hbserve_core.cuda_runner import products
    from hbserve_core.cuda_runner.warm_up import run_steps_without_graph

    # As of large models: inputs are split in as many ways as there are shapes of weights.
    monkeypatch.setattr(products, "_FEWEST_INPUTS", 16)
    sizes = {"max_num_seqs": 140, "max_num_batched_tokens": 1300, "chunk_size": 700, "num_blocks": 3000}
    runner = InterpretedRunner(model_folder("qwen3"), graphs=graphs, dtype=dtype, seed=1, **sizes)
    shapes, memory = runner.packer.shapes, torch.from_numpy(runner.memory)
    largest = shapes.largest(1300, 140)
    with torch.inference_mode():
        steps = runner.decoder, shapes, largest, memory, runner.sampled, runner.pool
        last, hidden = run_steps_without_graph(*steps)
        rows = runner.special_rows.dummies(5)
        runner.special_rows.sample(
            rows,
            lambda places: runner.decoder.logits(hidden.index_select(0, places)),
            lambda *drawn: runner.decoder.draw(last, drawn[0], drawn[1], runner.sampled, drawn[2]),
        )
        for shape in shapes.decodes + shapes.prefills:
            view = StepView(memory, shape)
            view.clear()
            (runner.decoder.hidden if shape.tiles else runner.decoder.decode)(view, runner.sampled, runner.pool)
    before = launched.copy()
    serve(Engine(runner.config, runner), random.Random(1), 250, 400, 140)
    assert len(before) > 8
    assert sorted(map(str, launched - before)) == []


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_compiled_for_a_request(model_folder, monkeypatch):
    import triton

    from hbserve_core import InstanceConfig, ModelRunner

    sizes: Any = {"max_num_seqs": 140, "max_num_batched_tokens": 2600, "chunk_size": "auto", "num_blocks": 3000}
    config = InstanceConfig(model_path=str(model_folder("qwen3")), dtype="bfloat16", device="cuda", **sizes)
    runner, compiled = ModelRunner(config), []
    hook = lambda *_, **what: compiled.append(what["repr"])  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", hook)
    serve(Engine(config, runner), random.Random(1), 250, 400, 140)
    assert not compiled
