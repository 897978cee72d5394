"""The simulator's engine computes in each step the same tokens of the same prompts as the real one."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hbserve.simulator.engine import ModelledEngine, PromptWork
from hbserve.simulator.engine_limits import EngineLimits
from hbserve.simulator.profile import StepLaw, load_profile
from hbserve_core import BlockManager, InstanceConfig
from hbserve_core.engine.batch_scheduler import BatchScheduler
from hbserve_core.engine.sequence import Phase, Sequence
from hbserve_core.engine.step_times import ChunkSizes, StepWork
from hbserve_rpc import SamplingParams
from hbserve_rpc.messages import Role
from hbserve_rpc.settings import EngineSettings

STEPS = 40
PARAMS = SamplingParams(0, 1000)


def predictions(token_s: float) -> Callable[[StepWork], float]:
    """Return a prediction of how long a step takes, which both engines use."""
    return lambda work: 0.004 + token_s * work.num_tokens + 2e-8 * work.num_keys + 1e-9 * work.num_pairs


class Real:
    """The scheduler of hbserve_core, whose steps are carried out by hand."""

    def __init__(self, config: InstanceConfig, predict_s: Callable[[StepWork], float]) -> None:
        self.scheduler = BatchScheduler(
            config, BlockManager(1 << 14, 16, prefix_caching=False), ChunkSizes(config, config.role, predict_s)
        )

    def add(self, name: str, count: int, *, prefill_only: bool) -> None:
        sequence = Sequence(name, [1] * count, count, PARAMS, prefill_only=prefill_only)
        self.scheduler.move(sequence, Phase.WAITING)

    def step(self) -> dict[str, int]:
        """Run a step, and return the number of tokens by prompt, without decodes."""
        found = {}
        for chunk in self.scheduler.schedule():
            sequence = chunk.sequence
            if chunk.first < sequence.num_prompt_tokens:
                found[sequence.request_id] = chunk.num_new_tokens
            samples = chunk.samples
            sequence.num_computed_tokens = chunk.first + chunk.num_new_tokens
            if samples:
                sequence.token_ids.append(7)
                if not sequence.request_id.startswith("decodes"):
                    self.scheduler.move(sequence, Phase.ENDING)
        return found


class Modelled:
    """The choices of the simulator's engine."""

    def __init__(self, limits: EngineLimits, role: Role, predict_s: Callable[[StepWork], float]) -> None:
        self.engine = ModelledEngine(StepLaw(load_profile("h100-qwen3-8b")), limits, role)
        self.engine._chunk_sizes = ChunkSizes(limits, role, predict_s)
        self.names: dict[PromptWork, str] = {}

    def add(self, name: str, count: int, *, prefill_only: bool) -> None:
        work = PromptWork(count, 0, (lambda _: None) if prefill_only else None, lambda: None)
        self.names[work] = name
        self.engine.prompts.append(work)

    def step(self) -> dict[str, int]:
        chunks = self.engine._choose_chunks()
        for work, count in chunks:
            work.num_computed_tokens += count
            if not work.num_uncomputed_tokens:
                self.engine.prompts.remove(work)
        return {self.names[work]: count for work, count in chunks}


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(st.integers(0, STEPS // 2), st.sampled_from([30, 500, 1500, 2048, 2500, 6000, 20_000])),
        min_size=1,
        max_size=30,
    ),
    role=st.sampled_from(["prefill", "hybrid"]),
    num_decodes=st.integers(0, 5),
    limits=st.fixed_dictionaries(
        {
            "chunk_size": st.sampled_from([None, "auto", "auto", 512]),
            "itl_target_ms": st.sampled_from([None, None, 5.0, 20.0]),
            "max_num_batched_tokens": st.sampled_from([2048, 8192]),
            "max_chunk_prefill_tokens": st.sampled_from([1500, 4096, 8192]),
            "chunked_prefill_enabled": st.sampled_from([True, True, True, False]),
        }
    ),
    token_s=st.sampled_from([2e-6, 9e-6, 24e-6]),
)
def test_steps_have_the_prompt_tokens_that_the_engine_gives_them(
    prompts: list[tuple[int, int]], role: Role, num_decodes: int, limits: dict[str, Any], token_s: float
):
    predict_s, num_decodes = predictions(token_s), num_decodes if role == "hybrid" else 0
    config = InstanceConfig(model_path="", role=role, prefix_caching=False, **limits)
    if not config.chunked_prefill_enabled:  # longer ones are refused
        prompts = [(step, min(count, config.max_num_batched_tokens)) for step, count in prompts]

    async def run() -> None:
        real, modelled = Real(config, predict_s), Modelled(EngineLimits.of(config), role, predict_s)
        for number in range(num_decodes):
            real.add(f"decodes {number}", 10, prefill_only=False)
        if num_decodes:
            real.step()
        modelled.engine.batch, modelled.engine.keys = num_decodes, 10 * num_decodes
        for step in range(STEPS):
            for number, (begin, count) in enumerate(prompts):
                if begin == step:
                    for each in (real, modelled):
                        each.add(str(number), count, prefill_only=role == "prefill")
            # The engine takes a prompt of which one token is left for a decode.
            assume(all(work.num_uncomputed_tokens != 1 for work in modelled.engine.prompts))
            assert modelled.step() == real.step()
            modelled.engine.keys += num_decodes

    asyncio.run(run())


def test_a_step_is_predicted_to_take_what_it_will():
    async def run() -> None:
        law = StepLaw(load_profile("h100-qwen3-8b"))
        engine = ModelledEngine(law, EngineLimits(most_graph_tokens=0))
        engine.batch, engine.keys = 3, 900
        predicted_s = engine._predict_s(engine._decode_work().with_chunk(1024, 512))
        assert predicted_s == pytest.approx(law.step_s(515, 512 * (1024 + 256), 900))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("role", "chunk_size", "sizes"),
    [
        ("prefill", None, [1536, 512]),
        ("hybrid", None, [512, 512, 512, 512]),
        ("prefill", 512, [512, 512, 512, 512]),
        ("hybrid", "auto", [1024, 1024]),
    ],
)
def test_without_a_size_prefill_instances_adapt_and_others_do_not(role: Role, chunk_size: Any, sizes: list[int]):
    """The model has 8B parameters, on one H100, where 1024 tokens take longer than the target of a step."""

    async def run() -> None:
        limits = EngineLimits.of(EngineSettings(chunk_size=chunk_size))
        law = StepLaw(load_profile("h100-qwen3-8b"))
        modelled = Modelled(limits, role, lambda work: law.step_s(work.num_tokens, work.num_pairs / 2, 0))
        modelled.add("one", 2048, prefill_only=role == "prefill")
        found: list[int] = []
        while modelled.engine.prompts:
            found += modelled.step().values()
        assert found == sizes

    asyncio.run(run())
