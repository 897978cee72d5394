"""DisaggregatedLLM belongs to one event loop, but may be ended from anywhere, and leaves nothing behind."""

import asyncio
import gc
import logging
import os
import signal
import threading
import time
import warnings
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.sampling_params import SamplingParams
from hbserve_rpc import InvalidRequest
from hbserve_testing.processes import alive, state_of

pytestmark = pytest.mark.warm

GREEDY = SamplingParams(0, 3, True)
in_its_loop = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def llm(small_model, until_empty) -> AsyncIterator[DisaggregatedLLM]:
    config = PdDisaggConfig(small_model("qwen3"), num_blocks=200, scheduler={"max_queue_size": 16})
    async with DisaggregatedLLM(config) as llm:
        yield llm
        await until_empty(llm)


def make(small_model: Any) -> DisaggregatedLLM:
    return DisaggregatedLLM(PdDisaggConfig(small_model("qwen3"), num_blocks=20))


def pids(llm: DisaggregatedLLM) -> list[int]:
    assert llm._instances is not None
    return [process.pid for process in llm._instances.processes if process.pid is not None]


async def start_under_way(llm: DisaggregatedLLM) -> tuple[asyncio.Task[None], list[int]]:
    """Begin a start, and wait until its processes run. Returns the task of the start, and their pids."""
    starting = asyncio.create_task(llm.start())
    async with asyncio.timeout(30):
        while llm._instances is None or len(pids(llm)) < 2:
            await asyncio.sleep(0.01)
    return starting, pids(llm)


def assert_ended(processes: list[int]) -> None:
    """Wait until these processes have ended. A zombie has ended, too."""
    deadline_s = time.monotonic() + 5
    while left := [pid for pid in processes if alive(pid)]:
        assert time.monotonic() < deadline_s, f"{left} still run"
        time.sleep(0.02)


def test_another_event_loop_is_an_error_that_says_so_and_may_stop_it(small_model):
    # Known elsewhere: SGLang #1606, #5162, vLLM #17208.
    llm = make(small_model)
    asyncio.run(llm.start())
    processes = pids(llm)
    assert len(processes) == 2

    async def every_call() -> None:
        for call in (
            lambda: llm.generate("a", GREEDY), lambda: anext(llm.stream("a", GREEDY)), lambda: llm.abort("r"),
            llm.refresh_system_stats,
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="belongs to the event loop that ran start"):
                await call()
        with pytest.raises(RuntimeError, match="running already"):
            await llm.start()

    asyncio.run(every_call())
    with warnings.catch_warnings(record=True) as unclosed:
        warnings.simplefilter("always", ResourceWarning)
        asyncio.run(llm.stop())
        gc.collect()
    assert_ended(processes)
    assert [str(each.message) for each in unclosed] == []

    async def again() -> None:
        async with llm:
            assert len(await llm.generate("a", GREEDY)) == 1

    asyncio.run(again())


async def test_it_may_be_stopped_from_another_thread_and_twice_at_once(small_model):
    llm = make(small_model)
    await llm.start()
    processes = pids(llm)
    in_a_thread = asyncio.create_task(asyncio.to_thread(asyncio.run, llm.stop()))
    await asyncio.gather(in_a_thread, llm.stop(), llm.stop())
    assert_ended(processes)
    with pytest.raises(RuntimeError, match="not running"):
        await llm.generate("a")


async def test_it_may_be_stopped_while_it_starts_and_whoever_starts_it_hears_of_it(small_model):
    llm = make(small_model)
    starting, processes = await start_under_way(llm)
    with pytest.raises(RuntimeError, match="still starting"):
        await llm.generate("a")
    await llm.stop()
    with pytest.raises(RuntimeError, match=r"stop\(\) was called while it started"):
        await starting
    assert_ended(processes)


async def test_a_start_or_stop_that_is_cancelled_ends_the_processes_all_the_same(small_model):
    llm = make(small_model)
    starting, processes = await start_under_way(llm)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert_ended(processes)


def test_an_event_loop_that_ends_while_it_stops_leaves_no_process(small_model):
    llm = make(small_model)

    async def main() -> list[int]:
        await llm.start()
        task = asyncio.create_task(llm.stop())
        processes = pids(llm)
        await asyncio.sleep(0)
        task.cancel()
        return processes

    assert_ended(asyncio.run(main()))


async def test_after_the_death_of_an_instance_it_can_be_stopped_and_started_again(small_model):
    llm = make(small_model)
    async with llm:
        os.kill(pids(llm)[0], signal.SIGKILL)
        async with asyncio.timeout(30):
            while llm.get_system_stats()["gpu_instances"]["prefill-0"]["status"] == "ready":
                await asyncio.sleep(0.02)
    async with llm:
        assert len(await llm.generate("a", GREEDY)) == 1


async def until_collected(seen: "weakref.ref[Any]", processes: list[int]) -> None:
    """Wait until the object has been collected, its processes have ended, and none of its tasks is left."""
    gc.collect()
    assert seen() is None
    async with asyncio.timeout(30):
        while any(state_of(pid) for pid in processes) or len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("where", ["here", "another thread"])
async def test_one_that_nobody_has_any_more_is_collected_and_its_processes_end(small_model, where):
    llm = make(small_model)
    seen = weakref.ref(llm)
    await llm.start()
    assert len(await llm.generate("a", GREEDY)) == 1
    processes, held = pids(llm), [llm]
    del llm
    if where == "here":
        held.clear()
    else:
        await asyncio.to_thread(held.clear)
    await until_collected(seen, processes)


async def test_one_that_is_dropped_while_it_starts_lives_until_its_start_ends(small_model):
    llm = make(small_model)
    seen = weakref.ref(llm)
    starting, processes = await start_under_way(llm)
    del llm
    gc.collect()
    assert seen() is not None
    await starting
    del starting
    await until_collected(seen, processes)


async def test_one_that_is_dropped_lives_while_somebody_reads_an_answer(small_model):
    llm = make(small_model)
    seen = weakref.ref(llm)
    await llm.start()
    processes = pids(llm)
    stream, other = llm.stream("a", SamplingParams(0, 100, True)), llm.stream("b", SamplingParams(0, 400, True))
    generating = asyncio.create_task(llm.generate(["c", "d"], SamplingParams(0, 100, True)))
    begun = await asyncio.gather(anext(stream), anext(other))
    del llm, other  # what nobody reads any more is aborted
    gc.collect()
    assert [len(each["token_ids"]) for each in await generating] == [100, 100]
    del generating
    assert seen() is not None
    # Tokens that come together are one item, the first too.
    assert len(begun[0]["token_ids"]) + sum([len(delta["token_ids"]) async for delta in stream]) == 100
    await until_collected(seen, processes)


@pytest.mark.parametrize("dropped", ["with its event loop", "by a task that is cancelled then", "afterwards"])
def test_one_that_nobody_stops_before_its_event_loop_ends_leaves_no_process(small_model, dropped, caplog):
    found: list[Any] = []

    async def use(ready: asyncio.Event) -> None:
        llm = make(small_model)
        await llm.start()
        found.extend([pids(llm), weakref.ref(llm), llm if dropped == "afterwards" else None])
        ready.set()
        if dropped == "by a task that is cancelled then":
            await asyncio.Event().wait()

    async def main() -> None:
        ready = asyncio.Event()
        using = asyncio.create_task(use(ready))
        await (ready.wait() if dropped == "by a task that is cancelled then" else using)

    with warnings.catch_warnings(record=True) as unclosed:
        warnings.simplefilter("always", ResourceWarning)
        asyncio.run(main())
        del found[2]
        gc.collect()
    assert found[1]() is None
    assert_ended(found[0])
    assert [str(each.message) for each in unclosed] == []
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR], "asyncio says what is left behind"


@in_its_loop
async def test_a_call_that_is_cancelled_or_has_more_prompts_than_the_queue_holds_leaves_nothing(llm, until_empty):
    # Known elsewhere: vLLM #17738.
    results = await asyncio.gather(*(llm.generate([[5, i] for i in range(60)], GREEDY) for _ in range(3)))
    assert results[0][59]["token_ids"] == results[2][59]["token_ids"]
    for delay_s in (0, 0.001, 0.05, 0.3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(delay_s):
                await llm.generate([[5, i] for i in range(60)], SamplingParams(0, 400, True))
        await until_empty(llm)
    stats = llm.get_system_stats()["cpu_scheduler"]
    assert (stats["failed_requests"], stats["rejected_requests"]) == (0, 0)


@in_its_loop
async def test_what_is_changed_after_the_call_changes_nothing(llm):
    # Known elsewhere: vLLM #2881.
    ids, params = [5, 6, 7], SamplingParams(0, 5, True)
    stream = llm.stream(ids, params)
    ids.append(10**9)
    params.max_tokens = -1
    assert sum([len(delta["token_ids"]) async for delta in stream]) == 5


SIMPLE = st.none() | st.booleans() | st.integers(-3, 330) | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
HOSTILE = SIMPLE | st.sampled_from([10**5000, "half \ud83d", object(), range(600), "x" * 600, {"prompt": "a"}])
CALLS = st.tuples(
    st.lists(st.integers(0, 319), min_size=1, max_size=3) | HOSTILE | st.lists(HOSTILE, max_size=3),
    st.just(GREEDY) | st.just(GREEDY) | HOSTILE,
    st.just("an id") | HOSTILE,
)


@in_its_loop
async def test_whatever_is_given_is_answered_or_refused_and_another_call_is_unaffected(llm, until_empty):
    calls: list[Any] = []
    settings(derandomize=True, max_examples=100, database=None)(given(CALLS)(lambda call: calls.append(call)))()
    other = asyncio.create_task(llm.generate(["a", "b"], SamplingParams(0, 200, True)))
    num_answered, refusals = 0, []
    for prompt, params, request_id in calls:
        try:
            num_answered += len(await llm.generate(prompt, params))
        except InvalidRequest as error:
            refusals.append(str(error))
        try:
            async for _ in llm.stream(prompt, params, request_id=request_id):
                pass
        except InvalidRequest as error:
            refusals.append(str(error))
    assert num_answered > 2
    assert len(refusals) > 50
    assert max(len(each.encode()) for each in refusals) < 800
    assert [len(each["token_ids"]) for each in await other] == [200, 200]
    await until_empty(llm)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hbserve")]
