"""The simulator: the decisions that the real clock gives, times that follow from a profile, faults, prefixes, plans."""

import asyncio
import gc
import json
import math
import random
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hbserve.__main__ import app
from hbserve.simulator import plan_report
from hbserve.simulator.client import SESSIONS
from hbserve.simulator.engine import DecodeWork, ModelledEngine, PromptWork
from hbserve.simulator.engine_limits import EngineLimits
from hbserve.simulator.instance import Fabric, ModelledInstance, Shape
from hbserve.simulator.plan import Layout, Plan, Question, Trial, make_plan, try_layout
from hbserve.simulator.prefix_cache import PrefixCache
from hbserve.simulator.profile import Line, Profile, StepLaw, load_profile, own_profiles
from hbserve.simulator.sessions import Decoding, Prefilling
from hbserve.simulator.simulation import Deployment, Fault, cell_of, roles_of, simulate
from hbserve.simulator.stream import Stream
from hbserve.simulator.workload import SimulatedRequest, conversations, poisson, trace
from hbserve_core.bench.device_limits import DeviceLimits
from hbserve_core.cuda_runner.step_packer import prefill_buckets
from hbserve_rpc import InvalidRequest, RpcServer, SamplingParams
from hbserve_rpc.messages import (
    CONNECT,
    DECODE,
    GENERATE,
    GRANT,
    PREFILL,
    ConnectRequest,
    DecodeRequest,
    Empty,
    GenerateRequest,
    GrantRequest,
    PrefillRequest,
)
from hbserve_rpc.reports import REPORTS
from hbserve_rpc.settings import EngineSettings
from hbserve_scheduler import CpuScheduler, SchedulerConfig
from hbserve_scheduler.virtual_time import VirtualTimeLoop
from hbserve_testing.narrowing import present

MESSAGE_S, HANDOFF_S = 0.0001, 0.001


def profile(**more: Any) -> Profile:
    """Make a profile in which a prompt's token takes 1 ms, a decode step 10 ms, and moving a megabyte 1 ms."""
    values: dict[str, Any] = {
        "name": "round numbers", "source": "made up", "device": "cpu",
        "kv_bytes_per_token": 1000, "kv_tokens": 100_000,
        "prefill": [(1, 0.001), (1000, 1.0)], "decode": [(1, 10, 0.01), (256, 10, 0.01)],
        "transfer": [(0, 0.0), (1_000_000, 0.001)], "handoff_s": HANDOFF_S, "message_s": MESSAGE_S,
    }  # fmt: skip
    return Profile(**(values | more))


WHOLE = EngineLimits(chunk_size=2048)
"""Limits with which every prompt is computed in one step."""


# ---- the same decisions --------------------------------------------------------------------------------------------

LENGTHS = [300, 200, 100, 700, 150, 420, 80, 640, 330, 510, 90, 260]
# Nothing is drawn by chance.
POLICIES: dict[str, Any] = {"prefill_policy": "least_loaded", "decode_policy": "least_loaded"}
SETTINGS = SchedulerConfig(max_inflight_prefills=1, heartbeat_interval_s=5, **POLICIES)


def serve(instance: ModelledInstance, server: RpcServer) -> None:
    """Let a modelled instance be reached over a socket."""

    async def connected(_: ConnectRequest) -> Empty:
        return Empty()

    async def granted(request: GrantRequest) -> None:
        instance.grant(request, instance.loop.time())

    def streaming(session: Any) -> Any:
        async def items(request: Any) -> Any:
            stream: Stream[Any] = Stream(asyncio.get_running_loop(), lambda _: None)
            stream.session = session(instance, request, stream)
            async with stream:
                async for item in stream:
                    yield item

        return items

    server.serve(CONNECT, connected)
    server.serve_notification(GRANT, granted)
    for method in (DECODE, PREFILL, GENERATE, REPORTS):
        server.serve_stream(method, streaming(SESSIONS[method.name]))


async def decided_on_the_real_clock(slower: float) -> list[tuple[str, str]]:
    """Return the decisions of a scheduler that reaches its instances over sockets."""
    fast = profile(prefill=[(1, 0.0002 * slower), (1000, 0.2 * slower)])
    fabric, law = Fabric(), StepLaw(fast)
    servers, scheduler = [], CpuScheduler(SETTINGS)
    for name, role in Deployment(fast, roles_of(3, 2)).instances():
        instance = ModelledInstance(name, role, law, WHOLE, fabric)
        server = RpcServer(epoch=instance.epoch)
        serve(instance, server)
        await server.start()
        servers.append(server)
        await scheduler.add_instance(name, role, server.address)
    await scheduler.start()
    await scheduler.wait_ready(30)
    handles = scheduler.fleet.handles.values()
    async with asyncio.timeout(30):
        while any(len(each.links) < 2 for each in handles if each.role == "prefill"):
            await asyncio.sleep(0.01)
    requests = [GenerateRequest(f"r{i}", (7,) * n, SamplingParams(0, 4)) for i, n in enumerate(LENGTHS)]
    streams = [scheduler.submit(each) for each in requests]
    for stream in streams:
        async for _ in stream:
            pass
    await scheduler.stop()
    for server in servers:
        await server.stop()
    return decided((each.request_id, each.attempts) for each in scheduler.figures.records)


def decided(ended: Any) -> list[tuple[str, str]]:
    """Return the prefill and decode instance of each request, in the order in which they came."""
    placed = {request_id: (each.prefill_instance, each.decode_instance) for request_id, (each,) in ended}
    return [placed[f"r{i}"] for i in range(len(LENGTHS))]


async def test_a_scenario_has_the_same_decisions_on_the_real_clock_and_in_the_simulator():
    requests = [SimulatedRequest(0.0, length, 4) for length in LENGTHS]

    def simulated() -> list[tuple[str, ...]]:
        deployment = Deployment(profile(), roles_of(3, 2), SETTINGS, WHOLE)
        (results,) = simulate(deployment, requests, keeps_decisions=True)
        placed = {request_id: where for _, request_id, *where in results.decisions}
        return [tuple(placed[f"r{i}"]) for i in range(len(LENGTHS))]

    expected = await asyncio.to_thread(simulated)  # its loop is another
    assert len(set(expected)) > 4, "a scenario in which there is something to decide"
    for slower in (1, 4, 10):  # what another process takes from this one must be little beside what is modelled
        if (found := await decided_on_the_real_clock(slower)) == expected:
            return
    assert found == expected


def test_the_same_simulation_has_the_same_results():
    by_chance = SchedulerConfig(prefill_policy="power_of_two", decode_policy="power_of_two")

    def run() -> Any:
        (results,) = simulate(
            Deployment(profile(), roles_of(4, 4, 1), by_chance, limits=WHOLE, faults=(Fault("decode-0", 2, 1),)),
            poisson(60, 4, 100, 20, spread=0.5, seed=3),
            keeps_decisions=True,
        )
        return results

    one = run()
    random.random()
    other = run()
    assert one == other
    assert len(one.ttfts_s) == 60


# ---- times ---------------------------------------------------------------------------------------------------------


def test_a_request_that_is_alone_takes_what_its_parts_take():
    (apart,) = simulate(Deployment(profile(), roles_of(1, 1), limits=WHOLE), [SimulatedRequest(0, 500, 11)])
    assert apart.ttfts_s[0] == pytest.approx(0.5 + MESSAGE_S)
    # 500 kB, the messages of a hand-off, a step, and the way of its token; the first token's way was the same.
    assert apart.handoffs_s[0] == pytest.approx(0.0005 + HANDOFF_S + 0.01)
    assert apart.e2els_s[0] == pytest.approx(0.5 + MESSAGE_S + 0.0005 + HANDOFF_S + 10 * 0.01)
    (hybrid,) = simulate(Deployment(profile(), roles_of(0, 0, 1), limits=WHOLE), [SimulatedRequest(0, 500, 11)])
    assert hybrid.handoffs_s[0] == pytest.approx(0.01)
    assert hybrid.e2els_s[0] == pytest.approx(0.5 + 10 * 0.01 + 3 * MESSAGE_S)
    (single,) = simulate(Deployment(profile(), roles_of(1, 1), limits=WHOLE), [SimulatedRequest(0, 500, 1)])
    assert single.e2els_s[0] == pytest.approx(0.5 + MESSAGE_S), "who wants one token needs no decode instance"


def test_a_decode_instance_that_has_nothing_to_do_launches_the_step_of_who_comes():
    ahead_s = 0.004
    deployment = Deployment(profile(launched_ahead_s=ahead_s), roles_of(1, 1), limits=WHOLE)
    (results,) = simulate(deployment, [SimulatedRequest(0, 500, 200), SimulatedRequest(0.1, 505, 5)])
    alone_s, beside_s = results.handoffs_s[1], results.handoffs_s[0]
    assert alone_s == pytest.approx(0.0005 + HANDOFF_S + ahead_s + 0.01)
    # In the step that begins next, 10 ms after the 51st of the other one has.
    assert beside_s == pytest.approx(0.5 + alone_s + 51 * 0.01 - 1.005)


def test_a_prompt_behind_another_takes_what_was_measured_of_its_length():
    launched_beside = profile(prefill_behind=[(1, 0.001), (500, 0.49), (1000, 0.9)])
    # The last one comes when nothing is computed; each of the others waits for the one before it.
    requests = [SimulatedRequest(at_s, count, 1) for at_s, count in ((0, 500), (0.1, 500), (0.6, 1000), (5, 1000))]
    (results,) = simulate(Deployment(launched_beside, roles_of(1, 1), limits=WHOLE), requests)
    ends_s = [0.5, 0.5 + 0.49, 0.5 + 0.49 + 0.9, 5 + 1.0]
    expected_s = [end_s - each.at_s + MESSAGE_S for end_s, each in zip(ends_s, requests, strict=True)]
    assert list(results.ttfts_s) == pytest.approx(expected_s)


@pytest.mark.parametrize(
    ("came_s", "ends_s"),
    [
        ([0.1, 0.15], [1.5, 1.5]),
        ([0.1, 0.4], [1.0, 1.5]),
        ([0.3, 0.4], [1.0, 1.5]),
        ([0.3, 0.4, 0.45], [1.0, 2.0, 2.0]),
    ],
)
def test_the_first_prompt_that_comes_late_is_launched_at_once_and_alone(came_s: list[float], ends_s: list[float]):
    """The next step is launched 0.3 s before the end of the current one, if there is work for it at that time."""
    deployment = Deployment(profile(launched_ahead_s=0.3), roles_of(1, 1), limits=WHOLE)
    (results,) = simulate(deployment, [SimulatedRequest(at_s, 500, 1) for at_s in (0, *came_s)])
    expected_s = [0.5, *(end_s - at_s for at_s, end_s in zip(came_s, ends_s, strict=True))]
    assert list(results.ttfts_s) == pytest.approx([each + MESSAGE_S for each in expected_s])


def test_prefill_instances_may_have_another_profile_than_decode_instances(tmp_path):
    file = tmp_path / "twice.json"
    file.write_bytes(msgspec.json.encode(profile(prefill=[(1, 0.0005), (1000, 0.5)])))
    slow, other = tmp_path / "slow.json", tmp_path / "results.json"
    slow.write_bytes(msgspec.json.encode(profile()))
    load = ["--num-requests", 1, "--input-len", 100, "--output-len", 3, "--json", other]
    found = []
    for more in ([], ["--prefill-profile", file]):
        options = ["simulate", "--profile", slow, *more, *load]
        result = CliRunner().invoke(app, [*map(str, options)])
        assert result.exit_code == 0, result.output
        found.append(json.loads(other.read_text()))
    assert found[0]["mean_ttft_ms"] - found[1]["mean_ttft_ms"] == pytest.approx(50, abs=1)
    assert found[0]["mean_tpot_ms"] == pytest.approx(found[1]["mean_tpot_ms"], rel=0.01)


def test_kv_moves_while_the_next_chunk_is_computed():
    chunks = EngineLimits(chunk_size=100)
    slow = profile(transfer=[(0, 0.0), (1_000_000, 0.5)])
    (results,) = simulate(Deployment(slow, roles_of(1, 1), limits=chunks), [SimulatedRequest(0, 1000, 3)])
    assert results.handoffs_s[0] == pytest.approx(0.05 + HANDOFF_S + 0.01), "only the last chunk is left to be moved"


def test_who_finds_no_room_on_the_decode_side_waits_for_it():
    small = profile(kv_tokens=1000)
    requests = [SimulatedRequest(0, 600, 100), SimulatedRequest(0.7, 600, 100)]
    (results,) = simulate(Deployment(small, roles_of(1, 1), limits=WHOLE), requests)
    first_ends_s = 0.6 + 99 * 0.01
    assert list(results.ttfts_s) == pytest.approx([0.6, first_ends_s - 0.7 + 0.6], abs=0.01)


class Reference:
    """A reference that computes decode steps one by one, with which an engine that skips them must agree."""

    def __init__(self, law: StepLaw, works: list[tuple[float, int, int]]) -> None:
        now, left = 0.0, sorted(enumerate(works), key=lambda each: each[1][0])
        running: dict[int, list[int]] = {}
        self.firsts: dict[int, float] = {}
        self.ends: dict[int, float] = {}
        while left or running:
            if not running and left[0][1][0] > now:
                now = left[0][1][0]
            while left and left[0][1][0] <= now:
                number, (_, context, tokens) = left.pop(0)
                running[number] = [context, tokens]
            now += law.step_s(len(running), 0, sum(context for context, _ in running.values()))
            for number, each in list(running.items()):
                each[0] += 1
                each[1] -= 1
                self.firsts.setdefault(number, now)
                if each[1] == 0:
                    self.ends[number] = now
                    del running[number]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    works=st.lists(
        st.tuples(st.integers(0, 2000).map(lambda n: n / 997), st.integers(1, 500), st.integers(1, 40)),
        min_size=1,
        max_size=12,
    )
)
def test_steps_that_are_jumped_over_are_those_one_by_one(works):
    law = StepLaw(profile(decode=[(1, 10, 0.01), (16, 10, 0.03), (1, 5000, 0.05), (16, 5000, 0.6)]))
    firsts: dict[int, float] = {}
    ends: dict[int, float] = {}
    gaps = Counter[float]()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        engine = ModelledEngine(law, EngineLimits())

        def add(number: int, context: int, tokens: int) -> None:
            engine.add(
                DecodeWork(
                    context,
                    tokens,
                    lambda at_s: firsts.setdefault(number, at_s),
                    lambda: ends.update({number: loop.time()}),
                )
            )

        for number, (at_s, context, tokens) in enumerate(works):
            loop.call_at(at_s, add, number, context, tokens)
        await asyncio.sleep(1000)
        assert (engine.batch, engine.keys) == (0, 0)
        gaps.update(engine.figures.gaps_s)

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(run())
    expected = Reference(law, works)
    assert ends == pytest.approx(expected.ends, abs=1e-6)
    for number, (_, _, tokens) in enumerate(works):
        if tokens > 1:
            assert firsts[number] == pytest.approx(expected.firsts[number], abs=1e-6)
    assert gaps.total() == sum(tokens for _, _, tokens in works)


def test_chunks_that_are_jumped_over_end_as_they_would_one_by_one():
    law = StepLaw(profile())
    ends_s: list[float] = []
    for prompts in ([(512, 0)], [(512, 512)], [(512, 1024), (300, 0)], [(464, 1536)]):
        new_tokens, pairs = (
            sum(count for count, _ in prompts),
            sum(count * (done + count / 2) for count, done in prompts),
        )
        ends_s.append((ends_s[-1] if ends_s else 0.0) + law.step_s(new_tokens, pairs, 0))
    told: list[float] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        engine = ModelledEngine(law, EngineLimits(chunk_size=512))
        engine.add(PromptWork(2000, 0, told.append, lambda: told.append(loop.time())))
        second = PromptWork(300, 0, None, lambda: told.append(loop.time()))
        loop.call_at((ends_s[0] + ends_s[1]) / 2, engine.add, second)
        await asyncio.sleep((ends_s[0] + ends_s[1]) / 2)
        assert told == pytest.approx(ends_s[:1]), "who depends on it can be told of what has ended"
        await asyncio.sleep(100)
        assert engine.figures.prompt_tokens == 2300
        assert engine.figures.busy_s == pytest.approx(ends_s[-1])

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(run())
    assert told == pytest.approx([*ends_s[:3], ends_s[2], ends_s[3]])


def test_a_step_with_prompts_has_as_many_rows_as_its_graph():
    for engine in (EngineSettings(), EngineSettings(max_num_batched_tokens=4096), EngineSettings(max_num_seqs=70)):
        most, limits = engine.most_graph_tokens, EngineLimits.of(engine)
        graphs = prefill_buckets(min(engine.cuda_graph_max_seq_len, engine.max_num_batched_tokens), most)
        assert graphs[-1] == most
        for tokens in range(2, most + 1):
            assert limits.graph_rows(tokens) == graphs[bisect_left(graphs, tokens)], tokens
        assert limits.graph_rows(most + 1) == most + 1


@pytest.mark.parametrize(("device", "rows"), [("cuda:0", 2176), ("cpu", 2049)])
def test_a_chunk_beside_a_decode_takes_as_long_as_the_rows_that_are_computed(device: str, rows: int):
    law = StepLaw(profile(device=device))

    async def run() -> float:
        engine = ModelledEngine(law, EngineLimits(2048, max_num_batched_tokens=4096, most_graph_tokens=2304))
        engine.add(DecodeWork(100, 2, lambda _: None, lambda: None))
        engine.add(PromptWork(2048, 0, None, lambda: None))
        await asyncio.sleep(0)
        return engine._end_s

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        assert runner.run(run()) == pytest.approx(law.step_s(rows, 2048**2 / 2, 100))


@pytest.mark.parametrize("most_graph_tokens", [256, 512])
def test_who_comes_after_the_launch_of_the_next_step_is_in_the_one_behind_it(most_graph_tokens: int):
    ahead_s = 0.004
    eager_s, mixed_s = (0.008, 0.0) if most_graph_tokens < 300 else (0.0, 0.008)
    law = StepLaw(profile(launched_ahead_s=ahead_s, launched_ahead_mixed_s=mixed_s, launched_ahead_eager_s=eager_s))
    first_s, joined_s = law.step_s(1, 0, 100), law.step_s(2, 0, 200)
    firsts: dict[str, float] = {}

    async def run() -> None:
        loop = asyncio.get_running_loop()
        engine = ModelledEngine(law, EngineLimits(chunk_size=512, most_graph_tokens=most_graph_tokens))

        def decode(name: str, tokens: int = 20) -> DecodeWork:
            return DecodeWork(100, tokens, lambda at_s: firsts.update({name: at_s}), lambda: None)

        engine.add(decode("alone"))
        loop.call_at(2.5 * first_s, engine.add, decode("in time"))
        loop.call_at(3 * first_s + 1.5 * joined_s + ahead_s, engine.add, decode("late"))
        gone = decode("gone")
        loop.call_at(3 * first_s + 1.9 * joined_s, engine.add, gone)
        loop.call_at(3 * first_s + 1.95 * joined_s, engine.remove, gone)
        await asyncio.sleep(10)
        assert list(firsts) == ["alone", "in time", "late"]
        ends_s: list[float] = []

        def prompt_has_ended() -> None:
            ends_s.append(loop.time())
            if len(ends_s) == 1:  # one such step of 200 may be late
                engine.add(PromptWork(300, 0, None, prompt_has_ended))
            else:
                engine.add(decode("of the prompt"))
                loop.call_later(0.4 * first_s, engine.add, decode("after steps with prompts"))

        engine.add(decode("beside prompts", 30))
        loop.call_later(0.5 * first_s, engine.add, PromptWork(300, 0, None, prompt_has_ended))
        await asyncio.sleep(10)
        assert firsts["of the prompt"] == pytest.approx(ends_s[1] + first_s), "it goes on at once"
        behind_s = firsts["after steps with prompts"] - ends_s[1]
        assert behind_s == pytest.approx(3 * first_s, rel=0.01), "6 ms before the end of a step are too late now"
        assert (engine.batch, engine.keys, len(engine.prompts)) == (0, 0, 0)

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(run())
    assert firsts["alone"] == pytest.approx(first_s)
    assert firsts["in time"] == pytest.approx(3 * first_s + joined_s, rel=0.01)
    assert firsts["late"] == pytest.approx(3 * first_s + 3 * joined_s + law.step_s(3, 0, 300), rel=0.01)


def test_work_that_is_aborted_leaves_nothing_in_the_engine():
    async def run() -> None:
        engine = ModelledEngine(StepLaw(profile()), EngineLimits(chunk_size=10))
        ended: list[str] = []

        def decode(name: str) -> DecodeWork:
            return DecodeWork(100, 50, lambda _: None, lambda: ended.append(name))

        kept, gone, joining = decode("kept"), decode("gone"), decode("joining")
        prompt = PromptWork(100, 0, None, lambda: ended.append("prompt"))
        engine.add(kept)
        engine.add(gone)
        await asyncio.sleep(0.105)
        engine.remove(gone)
        engine.remove(gone)
        engine.add(joining)
        engine.remove(joining)
        engine.add(prompt)
        await asyncio.sleep(0.015)
        engine.remove(prompt)
        await asyncio.sleep(10)
        assert ended == ["kept"]
        assert (engine.batch, engine.keys, len(engine.prompts)) == (0, 0, 0)

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(run())


@pytest.mark.parametrize(
    ("aborted_s", "ends_s"),
    [(0.015, 0.03), (0.095, 0.11)],  # in its second step, and in its last
)
def test_a_prompt_that_is_aborted_is_in_no_step_after_the_current_one(aborted_s: float, ends_s: float):
    """A step has one chunk, of 10 ms: ten steps are the first prompt's, and one is the second's."""
    ended: dict[str, float] = {}

    async def run() -> None:
        loop = asyncio.get_running_loop()
        engine = ModelledEngine(StepLaw(profile()), EngineLimits(chunk_size=10, max_chunk_prefill_tokens=10))

        def prompt(name: str, num_tokens: int) -> PromptWork:
            return PromptWork(num_tokens, 0, None, lambda: ended.update({name: loop.time()}))

        gone = prompt("gone", 100)
        engine.add(gone)
        loop.call_at(0.005, engine.add, prompt("next", 10))
        loop.call_at(aborted_s, engine.remove, gone)
        await asyncio.sleep(10)
        assert engine.is_idle

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(run())
    assert ended == {"next": pytest.approx(ends_s)}


@pytest.mark.parametrize(("aborted_s", "num_steps"), [(0.01, 1), (0.05, 3)])
def test_a_sequence_that_is_aborted_is_in_no_step_after_the_current_one(aborted_s: float, num_steps: int):
    """Both sequences have begun together. Steps of two take 20 ms, and steps of one 10 ms."""
    ends_s: list[float] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        engine = ModelledEngine(StepLaw(profile(decode=[(1, 10, 0.01), (2, 10, 0.02)])), WHOLE)
        gone = DecodeWork(100, 20, lambda _: None, lambda: ends_s.append(0))
        engine.add(gone)
        engine.add(DecodeWork(100, 10, lambda _: None, lambda: ends_s.append(loop.time())))
        loop.call_at(aborted_s, engine.remove, gone)
        await asyncio.sleep(10)
        assert (engine.batch, engine.keys) == (0, 0)

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(run())
    assert ends_s == [pytest.approx(num_steps * 0.02 + (10 - num_steps) * 0.01)]


def test_an_engine_that_has_died_calls_nobody_whatever_comes_afterwards():
    called: list[str] = []

    async def run() -> None:
        engine = ModelledEngine(StepLaw(profile()), EngineLimits(chunk_size=10))
        engine.add(DecodeWork(100, 50, lambda _: called.append("first"), lambda: called.append("done")))
        await asyncio.sleep(0.105)
        engine.stop()
        engine.add(DecodeWork(100, 50, lambda _: called.append("late first"), lambda: called.append("late done")))
        engine.add(PromptWork(100, 0, None, lambda: called.append("late prompt")))
        await asyncio.sleep(10)

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(run())
    assert called == ["first"]


@pytest.mark.parametrize("who_leaves", ["decode", "prefill"])
def test_a_session_that_is_closed_while_it_waits_does_nothing_more(who_leaves: str):
    """The decode side leaves while the KV is moved to it, and the prefill side between the grant's sending and its
    arrival."""
    mishaps: list[dict[str, Any]] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: mishaps.append(context))
        fabric, law, params = Fabric(), StepLaw(profile(handoff_s=1.0, message_s=1.0)), SamplingParams(0, 8)
        prefill = ModelledInstance("prefill-0", "prefill", law, WHOLE, fabric)
        decode = ModelledInstance("decode-0", "decode", law, WHOLE, fabric)
        answers: list[list[Any]] = [[], []]
        left, right = (Stream[Any](loop, lambda _: None) for _ in answers)
        decoding = Decoding(decode, DecodeRequest("r", "t", (7,) * 10, params), left)
        computing = Prefilling(prefill, PrefillRequest("r", "t", (7,) * 10, params, b"", [], True), right)
        await asyncio.sleep(0.1)
        prefill.grant(GrantRequest("r", b"t"), loop.time() + 1.0)
        await asyncio.sleep(0.5 if who_leaves == "prefill" else 1.5)
        (computing if who_leaves == "prefill" else decoding).close()
        await asyncio.sleep(10)
        assert decode.engine.figures.output_tokens == 0
        assert prefill.move(0, 0.0) == (0.0, 0.0) or who_leaves == "decode", "nothing was moved"

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(run())
    assert mishaps == []


def test_a_step_with_a_target_has_so_much_of_a_prompt_as_keeps_it():
    async def run() -> ModelledEngine:
        engine = ModelledEngine(StepLaw(profile()), EngineLimits(chunk_size="auto", itl_target_ms=200))
        engine.add(DecodeWork(10, 100, lambda _: None, lambda: None))
        await asyncio.sleep(0.05)
        engine.add(PromptWork(1000, 0, None, lambda: None))
        await asyncio.sleep(100)
        return engine

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        engine = runner.run(run())
    assert 0.19 < max(engine.figures.gaps_s) <= 0.2
    assert engine.figures.prompt_tokens == 1000


# ---- faults, prefixes, cells ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prefill-0", "decode-0", "hybrid-0"])
def test_requests_of_an_instance_that_is_killed_are_tried_again_elsewhere(name, caplog):
    hybrids = name.startswith("hybrid")
    deployment = Deployment(
        profile(), roles_of(0, 0, 2) if hybrids else roles_of(2, 2), limits=WHOLE, faults=(Fault(name, 3.0, 5.0),)
    )
    (results,) = simulate(deployment, poisson(80, 5, 100, 30))
    assert (len(results.ttfts_s), results.failed) == (80, 0)
    assert results.tried_again > 0
    assert results.output_tokens == 80 * 30
    assert f"{name} at {name}:1 is lost: it was killed" in caplog.text
    assert results.busy[name] > 0


def test_requests_that_no_instance_is_left_for_fail():
    scheduler = SchedulerConfig(instance_wait_s=5)
    deployment = Deployment(profile(), roles_of(1, 1), scheduler, WHOLE, (Fault("decode-0", 1.0),))
    (results,) = simulate(deployment, poisson(20, 5, 100, 30))
    assert results.failed > 10
    assert results.failed + len(results.ttfts_s) == 20


def test_a_prefix_that_was_computed_is_not_computed_again():
    shape = Shape((1, 2, 3), 100)
    requests = [
        SimulatedRequest(0, 350, 2, shape),
        SimulatedRequest(5, 350, 2, shape),
        SimulatedRequest(9, 300, 2, shape),
    ]
    (results,) = simulate(Deployment(profile(), roles_of(1, 1), limits=WHOLE), requests)
    assert sorted(results.ttfts_s) == pytest.approx([0.001, 0.05, 0.35], abs=0.001)
    assert (results.prefix_tokens, results.asked_tokens) == (300 + 299, 1000)


def test_the_block_that_was_not_used_for_longest_is_forgotten_with_its_end_first():
    cache = PrefixCache(4)
    cache.add((1, 2, 3))
    cache.add((1, 9))
    assert (cache.find((1, 2, 3)), cache.find((1, 9))) == (3, 2)
    cache.add((7,))
    assert (cache.find((1, 2, 3)), cache.find((7,))) == (2, 1)


def test_turns_of_a_conversation_begin_with_all_that_was_said():
    by_session: dict[int, list[SimulatedRequest]] = {}
    for each in conversations(3000, 2.0, seed=1):
        by_session.setdefault(each.session, []).append(each)
    several = [turns for turns in by_session.values() if len(turns) > 1]
    assert len(several) > 100
    for turns in several:
        for before, after in pairwise(turns):
            assert after.shape.hash_ids[: len(before.shape.hash_ids)] == before.shape.hash_ids
            assert after.input_len > before.input_len + before.output_len
            assert len(after.shape.hash_ids) == after.input_len // 512
    ids = Counter(hash_id for turns in by_session.values() for hash_id in turns[-1].shape.hash_ids)
    assert set(ids.values()) == {1}, "no two conversations say the same"


def test_a_trace_is_repeated_faster_and_with_other_prompts(tmp_path):
    path = tmp_path / "trace.jsonl"
    lines = [{"timestamp": at, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]} for at in (0, 8000)]
    path.write_text("\n".join(map(json.dumps, lines)))
    made = list(trace(path, block_size=512, unit_s=1e-3, speed=4, repeat=2))
    assert [each.at_s for each in made] == [0, 2, 2, 4]
    assert [len(each.shape.hash_ids) for each in made] == [2] * 4, "the last block is not full"
    assert made[0].shape == made[1].shape
    assert not set(made[0].shape.hash_ids) & set(made[2].shape.hash_ids)


@pytest.mark.parametrize("roles", [roles_of(1, 1), roles_of(0, 0, 1)], ids=["pairs", "hybrid"])
def test_what_a_request_leaves_behind_is_freed_without_the_garbage_collector(roles):
    asked, found = list(poisson(60, 2.0, 300, 20)), []

    def look(requests: list[SimulatedRequest]) -> Iterator[SimulatedRequest]:
        for number, request in enumerate(requests):
            if number in (20, 59):
                found.append(gc.collect())
            yield request

    gc.disable()
    try:
        (results,) = simulate(Deployment(profile(), roles), look(asked))
    finally:
        gc.enable()
    assert (results.failed, len(results.e2els_s)) == (0, 60)
    assert found[1:] == [0], "what there was before has been collected by then"


def test_cells_share_the_load_by_session_and_nothing_else():
    counts = Counter(cell_of(session, 10) for session in range(20_000))
    assert set(counts) == set(range(10))
    assert max(counts.values()) < 1.1 * min(counts.values())
    results = simulate(Deployment(profile(), roles_of(4, 4), limits=WHOLE), poisson(100, 10, 50, 10), cells=2)
    assert [len(each.busy) for each in results] == [4, 4]
    assert sum(len(each.ttfts_s) for each in results) == 100
    assert min(len(each.ttfts_s) for each in results) > 30


# ---- profiles ------------------------------------------------------------------------------------------------------


def test_a_cell_that_is_done_before_others_is_not_counted_as_idle_until_they_are():
    def results(cells: int, *requests: SimulatedRequest) -> Any:
        return simulate(Deployment(profile(), roles_of(cells, cells), limits=WHOLE), requests, cells=cells)

    first, second = (next(each for each in range(99) if cell_of(each, 2) == cell) for cell in (0, 1))
    short = SimulatedRequest(0.0, 100, 10, session=second)
    (alone,) = results(1, short)
    long, beside = results(2, SimulatedRequest(0.0, 100, 300, session=first), short)
    assert beside.duration_s == pytest.approx(alone.duration_s)
    assert long.duration_s > 10 * beside.duration_s
    assert list(beside.busy.values()) == pytest.approx(list(alone.busy.values()))


@pytest.mark.parametrize("name", own_profiles())
def test_a_profile_of_this_package_says_what_was_measured(name):
    found = load_profile(name)
    law = StepLaw(found)
    for tokens, time_s in found.prefill:
        assert law.step_s(tokens, tokens * tokens / 2, 0) == pytest.approx(time_s, rel=0.02)
    for batch, context, step_s in found.decode:
        assert law.step_s(batch, 0, batch * context) == pytest.approx(step_s, rel=0.15)


def test_a_line_goes_through_its_points_and_never_falls():
    line = Line([(10, 1.0), (20, 3.0), (30, 2.0), (40, 5.0)])
    assert [line.at(x) for x in (1, 10, 15, 20, 30, 40, 60)] == [1, 1, 2, 3, 3, 5, 9]


def test_what_is_no_profile_is_refused_by_name(tmp_path):
    with pytest.raises(InvalidRequest, match="h100-qwen3-8b"):
        load_profile("h100")
    path = tmp_path / "p.json"
    path.write_text("{}")
    with pytest.raises(InvalidRequest, match="missing required field"):
        load_profile(str(path))
    path.write_bytes(msgspec.json.encode(profile(decode=[])))
    with pytest.raises(InvalidRequest, match="decode has no rows"):
        load_profile(str(path))


# ---- plans ---------------------------------------------------------------------------------------------------------


def question(**more: Any) -> Question:
    cheap = profile(
        prefill=[(1, 0.006), (128, 0.008), (512, 0.013), (2048, 0.05), (8192, 0.2)],
        decode=[(1, 500, 0.006), (64, 500, 0.008), (256, 500, 0.015), (64, 4000, 0.018)],
        transfer=[(1, 0.0), (1_000_000_000, 0.005)], kv_tokens=400_000,
    )  # fmt: skip
    values: dict[str, Any] = {
        "profile": cheap, "input_len": 2000, "output_len": 20, "rate": 30, "ttft_s": 0.5, "tpot_s": 0.015,
    }  # fmt: skip
    return Question(**(values | more))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_len", 0), ("rate", 0.0), ("rate", math.nan), ("rate", -1.0), ("ttft_s", 0.0), ("tpot_s", -0.1),
        ("itl_s", 0.0), ("attainment", 0.0), ("attainment", 1.5), ("spread", -0.1), ("spread", math.inf),
        ("most_instances", 0), ("chunk_size", 0),
    ],
)  # fmt: skip
def test_a_question_that_no_plan_answers_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequest, match=f"^{field}="):
        question(**{field: value})


@pytest.fixture
def short_simulations(monkeypatch):
    monkeypatch.setattr("hbserve.simulator.plan.FEWEST_REQUESTS", 100)
    monkeypatch.setattr("hbserve.simulator.plan.SIMULATED_S", 4.0)
    monkeypatch.setattr("hbserve.simulator.plan_report.SHARES", (0.5, 1.0))


def test_a_plan_is_the_fewest_instances_that_keep_the_goals(short_simulations):
    plan = make_plan(question())
    assert plan.best is not None
    assert plan.apart is not None
    assert plan.apart.is_enough
    assert plan.apart.layout.prefill >= 2, "30 prompts of 50 ms a second are more than one computes"
    smaller = [each for each in plan.trials if each.layout.count < plan.best.layout.count]
    assert not any(each.is_enough for each in smaller)


def test_a_plan_keeps_the_goal_of_times_between_tokens_too(short_simulations):
    plan = make_plan(question(itl_s=0.02))
    assert {each.layout.describe() for each in plan.trials if each.layout.hybrid == 2} == {
        "2 hybrid", "2 hybrid, chunks for 20 ms"
    }  # fmt: skip
    kept = [each for each in plan.trials if each.is_enough]
    assert kept
    assert all(each.itl_p99_s <= 0.02 for each in kept)
    longer = [each for each in plan.trials if each.itl_p99_s > 0.02]
    assert any(each.attainment >= 0.9 for each in longer), "which would be enough but for that"


def test_answers_of_one_token_have_no_times_between_tokens(short_simulations):
    assert make_plan(question(output_len=1, tpot_s=0.001, itl_s=0.001, rate=5)).best is not None


def test_times_of_many_seconds_do_not_run_together_in_a_plans_table():
    trial = Trial(Layout(hybrid=1), 1.0, 0.5, 12.345678, 12.345678, 12.345678, {"hybrid": 0.9}, is_enough=False)
    row = next(each for each in plan_report.lines(Plan(question(), [trial], None, None)) if "12346 ms" in each)
    assert row.partition("50.0%")[2].split() == ["12346", "ms", "12345.7", "ms", "12345.7", "ms", "hybrid", "90%"]


def test_one_hybrid_instance_that_is_enough_is_not_to_be_split(short_simulations):
    plan = make_plan(question(rate=0.5))
    assert plan.best is plan.together
    assert present(plan.best).layout.hybrid == 1


@pytest.mark.parametrize(
    ("goals", "problem"),
    [
        ({"ttft_s": 0.01}, "--ttft-ms=10: a prompt of 2000 tokens alone takes 49 ms"),
        ({"tpot_s": 0.001}, "--tpot-ms=1: a decode step of one sequence takes"),
        ({"itl_s": 0.001}, "--itl-ms=1: a decode step of one sequence takes"),
        ({"rate": float("inf")}, "rate=inf: expected 0.001 to"),
        ({"rate": 1e6}, "--most-instances=64: the prompts of 1e.06 requests a second alone keep [0-9]+ instances busy"),
        ({"input_len": 500_000}, "--input-len: 500020 tokens; the profile's pool has 400000"),
    ],
)
def test_goals_that_nothing_can_keep_are_refused_with_the_reason(goals, problem):
    with pytest.raises(InvalidRequest, match=problem):
        make_plan(question(**goals))


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_plan_answers_on_the_command_line_with_a_table_and_a_picture(tmp_path, short_simulations):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "p.json", tmp_path / "plan.png"
    file.write_bytes(msgspec.json.encode(question().profile))
    load = ["--input-len", 2000, "--output-len", 5, "--rate", 5, "--ttft-ms", 500, "--tpot-ms", 30]
    result = invoke("plan", "--profile", file, *load, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "Do not disaggregate: 1 prefill + 1 decode would need 2 GPUs." in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("picture", "problem"),
    [
        ("plan.txt", "plan.txt: expected a name that ends with .png or .svg"),
        ("nowhere/plan.png", "there is no folder"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_simulated(picture, problem, tmp_path):
    pytest.importorskip("matplotlib")
    load = ["--input-len", 2000, "--output-len", 5, "--rate", 5, "--ttft-ms", 500, "--tpot-ms", 30]
    result = invoke("plan", *load, "--plot", tmp_path / picture)
    assert result.exit_code in (1, 2)
    assert problem in result.stderr.splitlines()[-1]
    assert "layout" not in result.output


def test_a_load_that_is_hardly_one_is_planned_in_seconds():
    trial = try_layout(question(rate=0.001), Layout(hybrid=1), 0.001)
    assert trial.is_enough
    assert trial.busy["hybrid"] < 0.001


def test_simulate_prints_its_figures_and_writes_all_of_them(tmp_path):
    file = tmp_path / "r.json"
    options = ["--prefill", 2, "--decode", 2, "--cells", 2, "--rate", 5, "--num-requests", 40, "--goodput", "ttft:300"]
    result = invoke("simulate", *options, "--fault", "decode-1@2+1", "--json", file)
    assert result.exit_code == 0, result.output
    assert "40 requests in" in result.output
    found = json.loads(file.read_text())
    assert (found["completed"], found["failed"], len(found["cells"])) == (40, 0, 2)
    assert 0 < found["p50_itl_ms"] < found["p50_ttft_ms"] < found["p50_e2el_ms"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--prefill", 1], "--prefill=1 --decode=0"),
        (["--cells", 2], "--cells=2"),
        (["--fault", "decode-7@1"], "--fault='decode-7'"),
        (["--fault", "decode-0"], "--fault='decode-0': expected INSTANCE@SECONDS"),
        (["--goodput", "itl:3"], "--goodput='itl'"),
        (["--profile", "x"], "--profile='x'"),
        (["--fault", "decode-0@1.2.3"], "--fault='decode-0@1.2.3': expected INSTANCE@SECONDS"),
        (["--goodput", "ttft:nan"], "--goodput='ttft:nan': expected milliseconds above 0"),
        (["--json", "/nowhere/r.json"], "--json=/nowhere/r.json: there is no folder /nowhere"),
        (["--trace", "/dev/null"], "--trace='/dev/null': is a device; expected a file"),
        (["--trace", "EMPTY"], "/empty: a timed trace without lines"),
        (["--trace", "/nowhere"], "/nowhere"),
    ],
)
def test_simulations_that_cannot_be_are_refused_in_one_line(options, problem, tmp_path):
    (tmp_path / "empty").touch()
    result = invoke("simulate", *(tmp_path / "empty" if each == "EMPTY" else each for each in options))
    assert result.exit_code in (1, 2)
    assert problem in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "line",
    [
        '{"timestamp": 1e400, "input_length": 9, "output_length": 5}',
        '{"timestamp": 0, "input_length": -1, "output_length": 5}',
        '{"timestamp": 0, "input_length": 1e400, "output_length": 5}',
        '{"timestamp": 0, "input_length": 9, "output_length": 5, "hash_ids": 7}',
        "[0, 9, 5]",
        "7",
    ],
)
def test_a_trace_may_have_empty_lines_and_what_is_no_line_of_one_is_refused_by_its_number(line, tmp_path):
    file = tmp_path / "trace.jsonl"
    good = '{"timestamp": 0, "input_length": 9, "output_length": 5, "hash_ids": [], "more": 1}'
    file.write_bytes(b"\xef\xbb\xbf" + f"{good}\r\n\n{good}\n".encode())
    assert "2 requests in" in invoke("simulate", "--trace", file).output
    with file.open("a") as trace:
        trace.write(f"{line}\n")
    refused = invoke("simulate", "--trace", file)
    assert refused.exit_code == 2
    assert f"{file}:4: not a line of a timed trace" in refused.stderr.splitlines()[-1]


def test_requests_that_are_all_refused_at_once_are_figures_too():
    result = invoke("simulate", "--input-len", 1 << 21, "--num-requests", 3, "--rate", "inf", "--goodput", "ttft:300")
    assert result.exit_code == 0, result.output
    assert "3 failed" in result.output


@pytest.mark.warm
def test_profile_measures_an_instance_into_a_file_that_simulations_read(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr("hbserve_core.bench.batch_sweep.measure_limits", lambda *_: DeviceLimits(1e9, 1e9, 1e9))
    monkeypatch.setattr("hbserve_core.bench.batch_sweep._NUM_STEPS", 4)
    file = tmp_path / "small.json"
    sizes = ["--prompt-lens", "8,32", "--batch-sizes", "1,2", "--contexts", "16,100000", "--megabytes", "1"]
    result = invoke("profile", "--model", small_model("qwen3"), "-o", file, *sizes)
    assert result.exit_code == 0, result.output
    found = load_profile(str(file))
    assert [tokens for tokens, _ in found.prefill] == [8, 32]
    assert [(batch, context) for batch, context, _ in found.decode] == [(1, 16), (2, 16)]
    assert "1 x 100000 skipped" in result.stderr
    parts = ["Loading the model", "Prompt of 32", "Decode step, 2 x 16", "Launches", "Transfer of 1 MiB", "Messages"]
    said = [result.stderr.find(part) for part in parts]
    assert -1 not in said, result.stderr
    assert said == sorted(said)
    assert "9/9" in result.stderr
    assert found.prefill_behind == found.prefill, "as is one behind another"
    ahead = (found.launched_ahead_s, found.launched_ahead_mixed_s, found.launched_ahead_eager_s)
    assert ahead == (0.0, 0.0, 0.0), "a CPU computes what it launches at once"
    assert min(found.handoff_s, found.message_s, found.kv_bytes_per_token, found.kv_tokens) > 0
    assert all(time_s > 0 for _, time_s in found.prefill + found.transfer)
    (results,) = simulate(Deployment(found, roles_of(1, 1)), poisson(20, 5, 20, 5))
    assert len(results.ttfts_s) == 20
    for option in ("--prompt-lens", "--batch-sizes", "--contexts", "--megabytes"):
        assert f"{option}='1,x'" in invoke("profile", "-o", file, "--model", small_model("qwen3"), option, "1,x").stderr


def test_a_profile_with_a_backend_that_is_none_is_refused_before_anything_is_measured(
    small_model, tmp_path, monkeypatch
):
    monkeypatch.setattr("hbserve.simulator.measuring._engine", lambda *_: pytest.fail("it has begun to measure"))
    model, file = small_model("qwen3"), tmp_path / "p.json"
    result = invoke("profile", "--model", model, "-o", file, "--kv-transfer-backend", "nccll")
    assert result.exit_code == 2
    assert "--kv-transfer-backend: kv_transfer.backend='nccll': there are" in result.stderr
    assert not file.exists()


def test_ranks_of_an_instance_move_their_parts_of_the_bytes_at_the_same_time(small_model, tmp_path, monkeypatch):
    async def transfers(*_):
        return [(1 << 20, 0.001), (8 << 20, 0.004)], 0.002

    async def message_s(_):
        return 0.0001

    fields = {
        "device": "cpu", "kv_bytes_per_token": 64, "kv_tokens": 1000,
        "prefill": [(8, 0.1)], "decode": [(1, 8, 0.1)],
    }  # fmt: skip
    monkeypatch.setattr("hbserve.simulator.measuring._engine", lambda *_: (fields, "float32"))
    monkeypatch.setattr("hbserve.simulator.measuring._transfers", transfers)
    monkeypatch.setattr("hbserve.simulator.measuring._message_s", message_s)
    file, model = tmp_path / "ranks.json", small_model("qwen3")
    result = invoke("profile", "--model", model, "-o", file, "--tensor-parallel-size", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert load_profile(str(file)).transfer == [(2 << 20, 0.001), (16 << 20, 0.004)], "of all ranks, as a token's KV is"


@pytest.mark.parametrize(
    ("kind", "values", "problem"),
    [
        (EngineLimits, [0], "chunk_size=0: expected at least 1"),
        (EngineLimits, [None, "8"], "itl_target_ms='8': expected `float | null`, got `str`"),
        (Layout, [-1, 1], "prefill=-1: expected at least 0"),
        (Question, [profile(), -5, 1, 1.0, 1.0, 1.0], "input_len=-5: expected at least 1"),
        (Fault, ["d0", -1.0], "at_s=-1.0: expected at least 0.0"),
        (Deployment, [profile(), ("both",)], "roles[0]='both': expected one of prefill, decode, hybrid"),
        (
            Deployment,
            [profile(), ("hybrid",), SETTINGS, {}],
            "limits={}: expected `EngineLimits`, got `dict`",
        ),
    ],
)
def test_what_is_asked_of_it_in_python_is_checked_where_it_is_made(kind, values, problem):
    with pytest.raises(InvalidRequest, match=f"^{re.escape(problem)}$"):
        kind(*values)
