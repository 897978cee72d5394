"""Who is taken in, in which order they begin, and until when: most of it in virtual time."""

import asyncio
import gc
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hbserve_modelled_reports import Reports

from hbserve_rpc import InvalidRequest, Overloaded, RequestTimeout, SamplingParams
from hbserve_rpc.messages import GenerateRequest, InstanceInfo, TokenEvent
from hbserve_rpc.prompt_shape import PromptShape
from hbserve_rpc.reports import REPORTS
from hbserve_scheduler import CpuScheduler, SchedulerConfig
from hbserve_scheduler.admission import LATEST_RETRY_S, LEAST_S, MEMORY_S, BeginningRate
from hbserve_scheduler.instance_client import InstanceStream
from hbserve_scheduler.virtual_time import VirtualTimeLoop

RATE = 100.0
"""Prompt tokens a second of a modelled instance."""


class ModelledHybrid:
    """In place of an RpcClient: computes prompts one after the other, and says one token."""

    problem = ""

    def __init__(self, address: str, **_: object) -> None:
        self.instance_id = address.partition(":")[0]
        self.on_lost: Any = None
        self.on_doubt: Any = None
        self.turn = asyncio.Lock()

    async def start(self) -> None: ...

    async def close(self, why: str = "", **_: object) -> None: ...

    def notify(self, method: Any, request: Any) -> None: ...

    def stream(self, method: Any, request: Any) -> "Answer | Reports":
        if method is REPORTS:
            name = self.instance_id
            return Reports(InstanceInfo(name, "hybrid", "life", "ready", max_prompt_len=10**6, vocab_size=1000))
        return Answer(self, len(request.prompt_token_ids))


class Answer(InstanceStream[TokenEvent]):
    def __init__(self, instance: ModelledHybrid, num_tokens: int) -> None:
        self.instance, self.num_tokens, self.is_done = instance, num_tokens, False

    async def __aenter__(self) -> "Answer":
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def __anext__(self) -> TokenEvent:
        if self.is_done:
            raise StopAsyncIteration
        async with self.instance.turn:
            await asyncio.sleep(self.num_tokens / RATE)
        self.is_done = True
        return TokenEvent(0, [100], "length")


# As much of a client as a scheduler of these uses.
MODELLED_HYBRID: Any = ModelledHybrid


def in_virtual_time(job: Callable[[CpuScheduler], Any], **settings: Any) -> Any:
    """What `job` returns, of a scheduler of one instance that takes one request at a time."""

    async def run() -> Any:
        scheduler = CpuScheduler(SchedulerConfig(max_inflight_requests=1, **settings), client_factory=MODELLED_HYBRID)
        await scheduler.add_instance("h0", "hybrid", "h0:1")
        await scheduler.start()
        await scheduler.wait_ready(60)
        try:
            return await job(scheduler)
        finally:
            await scheduler.stop()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(run())


def request(name: object, length: int = 100, **params: Any) -> GenerateRequest:
    return GenerateRequest(str(name), (7,) * length, SamplingParams(0, 1, **params))


async def ttft_s(events: Any) -> float:
    return [event async for event in events][-1].ttft_s


# ---- the rate ----------------------------------------------------------------------------------------------------


def test_the_rate_is_of_the_time_in_which_requests_wait_and_is_not_known_before():
    rate, now_s = BeginningRate(), 0.0
    rate.begun(5000)  # nobody waits: it is as fast as requests come, and says nothing
    rate.update(now_s, some_wait=True)
    for _ in range(200):
        assert (rate.tokens_per_s is None) == (now_s < LEAST_S + 0.3), now_s
        now_s += 0.5
        rate.begun(50)
        rate.update(now_s, some_wait=True)
    assert rate.tokens_per_s == pytest.approx(100, rel=0.05)
    rate.update(now_s, some_wait=False)
    assert rate.tokens_per_s is None, "nobody waits: it bounds nothing"
    rate.update(now_s + 1e6, some_wait=True)
    assert rate.tokens_per_s == pytest.approx(100, rel=0.05), "the time between does not count"


def test_the_rate_follows_a_deployment_that_gets_slower():
    rate, now_s = BeginningRate(), 0.0
    for tokens in [100] * 100 + [10] * int(3 * MEMORY_S):
        rate.update(now_s, some_wait=True)
        rate.begun(tokens)
        now_s += 1.0
    rate.update(now_s, some_wait=True)
    assert rate.tokens_per_s == pytest.approx(10 + 90 * math.exp(-3), rel=0.1)


# ---- bounds ------------------------------------------------------------------------------------------------------


def test_at_twice_the_load_nobody_waits_longer_than_is_allowed_and_the_rest_is_refused_at_once():
    async def job(scheduler: CpuScheduler) -> None:
        loop, chance = asyncio.get_running_loop(), random.Random(1)
        waits, refusals = [], []
        for number in range(400):
            try:
                waits.append(asyncio.create_task(ttft_s(scheduler.submit(request(number, chance.randint(50, 150))))))
            except Overloaded as refused:
                refusals.append(refused)
            await asyncio.sleep(0.5)  # of which each takes 1 s
        began_s = loop.time()
        found = sorted(await asyncio.gather(*waits))
        assert loop.time() - began_s <= 10 + 2, "then all is as before"
        assert found[-1] <= 10 * 1.25 + 1.5, "the rate is measured, and not known"
        assert len(refusals) == pytest.approx(200, abs=25)
        assert all(3 <= each.retry_after_s <= 8 for each in refusals), "about half of the queue"
        assert "scheduler.max_queue_time_s=10" in str(refusals[-1])
        assert scheduler.stats().rejected_requests == len(refusals)

    in_virtual_time(job, max_queue_time_s=10)


def test_where_nothing_begins_at_all_a_request_that_would_wait_is_refused_with_a_time_to_come_back():
    async def job(scheduler: CpuScheduler) -> None:
        streams = [scheduler.submit(request(number, 20_000)) for number in range(2)]
        await asyncio.sleep(30)
        with pytest.raises(Overloaded, match="of which 0 a second are begun") as refused:
            scheduler.submit(request("late"))
        assert refused.value.retry_after_s == LATEST_RETRY_S
        for stream in streams:
            await stream.aclose()

    in_virtual_time(job, max_queue_time_s=5)


def test_a_burst_waits_where_nobody_knows_how_fast_it_goes_and_one_that_nobody_waits_before_is_taken():
    async def job(scheduler: CpuScheduler) -> None:
        streams = [scheduler.submit(request(number, 1000)) for number in range(20)]
        await asyncio.sleep(30)
        with pytest.raises(Overloaded, match="max_queue_time_s=5"):
            scheduler.submit(request("late"))
        await asyncio.gather(*map(ttft_s, streams))
        await ttft_s(scheduler.submit(request("longer than is allowed", 5000)))

    in_virtual_time(job, max_queue_time_s=5)


def test_what_was_measured_of_instances_that_are_gone_refuses_nobody():
    async def job(scheduler: CpuScheduler) -> None:
        streams = [scheduler.submit(request(number)) for number in range(50)]
        await asyncio.sleep(20)
        with pytest.raises(Overloaded):
            scheduler.submit(request("more"))
        await scheduler.remove_instance("h0")
        await asyncio.sleep(1)
        streams += [scheduler.submit(request(f"after-{number}")) for number in range(5)]
        await scheduler.add_instance("h1", "hybrid", "h1:1")
        await asyncio.gather(*map(ttft_s, streams))

    in_virtual_time(job, max_queue_time_s=5)


def test_requests_with_a_lower_priority_begin_first_and_are_not_refused_for_those_behind_them():
    async def job(scheduler: CpuScheduler) -> None:
        streams = [scheduler.submit(request(number, priority=5)) for number in range(40)]
        await asyncio.sleep(10.5)
        for priority in (5, 6):
            with pytest.raises(Overloaded):
                scheduler.submit(request("refused", priority=priority))
        urgent = scheduler.submit(request("urgent", priority=-1))
        scheduler.require_room(priority=4)
        assert scheduler.waiting_requests[0].request.request_id == "urgent"
        assert await ttft_s(urgent) <= 2, "it waits for the one that is running"
        for stream in streams:
            await stream.aclose()

    in_virtual_time(job, max_queue_time_s=5)


def test_who_would_rather_wait_than_be_refused_waits_for_half_of_the_time_too():
    async def job(scheduler: CpuScheduler) -> list[float]:
        waits = []
        for number in range(60):
            await scheduler.wait_for_room()
            waits.append(asyncio.create_task(ttft_s(scheduler.submit(request(number)))))
        assert scheduler.stats().rejected_requests == 0
        return await asyncio.gather(*waits)

    waits = in_virtual_time(job, max_queue_time_s=6, max_queue_size=40)
    assert max(waits) > 15, "nobody knew at first"
    assert max(waits[-20:]) <= 6, "others who come find the other half"


# ---- prompts -----------------------------------------------------------------------------------------------------


async def test_a_prompt_that_comes_with_its_shape_is_neither_looked_at_nor_copied(make_scheduler, pair, collect):
    class Unseen(tuple):
        def __iter__(self) -> Any:
            raise AssertionError("it was looked at")

        __contains__ = __getitem__ = __iter__  # type: ignore[assignment]

    scheduler = await make_scheduler(*pair)
    prompt = Unseen((7,) * 40)
    shaped = GenerateRequest("r", prompt, SamplingParams(max_tokens=2), shape=PromptShape(40, 7))
    assert scheduler.check(shaped).prompt_token_ids is prompt
    await collect(scheduler.submit(shaped))
    assert {tuple(request.prompt_token_ids) for instance in pair for request in instance.requests} == {(7,) * 40}
    assert scheduler.check(GenerateRequest("r", (7, 9), SamplingParams())).shape == PromptShape(2, 9)


async def test_the_collector_does_not_go_through_prompts_that_wait():
    """By integers a prompt of 4,000 tokens is 4,000 objects for it, at each full pass while the request waits."""
    scheduler = CpuScheduler(SchedulerConfig())
    prompts: list[Any] = [[7] * 4000, (7,) * 4000]
    for prompt in prompts:
        scheduler.submit(GenerateRequest(f"{type(prompt)}", prompt, SamplingParams()))
    gc.collect()
    assert not [each for each in scheduler.waiting_requests if gc.is_tracked(each.request.prompt_token_ids)]


@pytest.mark.parametrize(
    ("prompt", "shape", "problem"),
    [
        ((7, 8), PromptShape(3, 8), "shape: belongs to another prompt"),
        ([7, 8], PromptShape(2, 8), "shape: belongs to another prompt"),
        ((7, 8), "shape", "shape: belongs to another prompt"),
        ((7, 1000), PromptShape(2, 1000), r"prompt\[1\]: token 1000 is outside the vocabulary"),
        ((7,) * 65, PromptShape(65, 7), "prompt: 65 tokens; the instances take at most 64"),
    ],
)
async def test_a_shape_is_compared_with_what_there_is_and_with_what_instances_take(
    make_scheduler, pair, prompt, shape, problem
):
    scheduler = await make_scheduler(*pair)
    with pytest.raises(InvalidRequest, match=problem):
        scheduler.submit(GenerateRequest("r", prompt, SamplingParams(max_tokens=2), shape=shape))


# ---- deadlines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own_s", "all_s", "named", "length", "state"),
    [
        (3.25, None, r"timeout_s=3\.25", 1000, "finished"),
        (3.25, None, r"timeout_s=3\.25", 100, "started"),
        (3.25, 9.0, r" timeout_s=3\.25", 100, "started"),
        (9.0, 3.25, r"request_timeout_s=3\.25", 1000, "finished"),
    ],
)
def test_a_request_ends_at_its_own_deadline_or_at_everybodys_in_the_queue_and_after(own_s, all_s, named, length, state):
    async def job(scheduler: CpuScheduler) -> None:
        loop = asyncio.get_running_loop()
        busy = scheduler.submit(request("busy", 1000 if state == "started" else 1))
        await asyncio.sleep(0.02)
        began_s = loop.time()
        late = scheduler.submit(request("late", length, timeout_s=own_s))
        with pytest.raises(RequestTimeout, match=rf"not {state} within ?{named}"):
            await anext(late)
        assert loop.time() - began_s == pytest.approx(3.25)
        await busy.aclose()
        assert not scheduler.waiting_requests
        await ttft_s(scheduler.submit(request("next", 1)))

    in_virtual_time(job, request_timeout_s=all_s)


async def test_instances_hear_how_much_time_is_left_and_what_they_end_in_time_is_tried_on_no_other(
    make_scheduler, make_instance, collect
):
    instances = [await make_instance(*each) for each in (("prefill", "p0"), ("decode", "d0"), ("decode", "d1"))]
    scheduler = await make_scheduler(*instances)
    for decode in instances[1:]:
        decode.fail["tokens"] = [RequestTimeout("it was not done before its deadline")]
    with pytest.raises(RequestTimeout, match=r"d[01]: it was not done before its deadline"):
        await collect(scheduler.submit(GenerateRequest("r", (7,), SamplingParams(max_tokens=4, timeout_s=25))))
    asked = [request for instance in instances for request in instance.requests]
    assert len(asked) == 2
    assert all(0 < request.left_s <= 25 for request in asked)
    await collect(scheduler.submit(GenerateRequest("s", (7,), SamplingParams(max_tokens=1))))
    assert instances[0].requests[-1].left_s is None


async def test_what_has_all_of_its_tokens_at_its_deadline_has_not_failed(make_scheduler, pair, collect):
    pair[0].hold = {"done"}  # the token is told, the stream not ended
    scheduler = await make_scheduler(*pair)
    events = scheduler.submit(GenerateRequest("r", (7,), SamplingParams(max_tokens=1, timeout_s=0.3)))
    tokens, end = await collect(events)
    assert (tokens, end.finish_reason) == ([100], "length")
    assert scheduler.stats().failed_requests == 0
    pair[0].release()
