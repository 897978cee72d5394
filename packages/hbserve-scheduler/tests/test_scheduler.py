"""What CpuScheduler asks of instances, in which order, and what its clients read."""

import asyncio
import contextlib
from array import array
from collections.abc import Iterator
from typing import Any

import pytest

from hbserve_rpc import InvalidRequest, Overloaded, RemoteError, RequestTimeout, SamplingParams, Unavailable
from hbserve_rpc.messages import GenerateRequest, LatencySummary, RequestFinished, TokenEvent
from hbserve_rpc.records import AttemptRecord
from hbserve_scheduler import CpuScheduler
from hbserve_scheduler.request import ScheduledRequest
from hbserve_testing.narrowing import of_type

# ---- the flow of one request -------------------------------------------------------------------------------------


async def test_the_decode_instance_reserves_before_the_prefill_begins(
    make_scheduler, pair, journal, ask, collect, until
):
    # Known elsewhere: vLLM #42839; SGLang #25063.
    prefill, decode = pair
    decode.hold = {"grant"}
    scheduler = await make_scheduler(*pair)
    events = scheduler.submit(ask())
    await until(lambda: ("d0", "grant") in journal)
    assert prefill.requests == []
    decode.release()
    tokens, end = await collect(events)
    assert tokens == [100, 101, 102, 103]
    assert journal.index(("d0", "grant")) < journal.index(("p0", "first"))
    assert prefill.requests[0].grant == f"d0:{decode.requests[0].transfer_id}".encode()
    assert prefill.requests[0].transfer_id == decode.requests[0].transfer_id
    assert (end.finish_reason, end.num_prompt_tokens, end.num_output_tokens) == ("length", 4, 4)
    assert (end.prefill_instance, end.decode_instance, end.num_attempts) == ("p0", "d0", 1)
    assert (end.kv_bytes, end.kv_transfer_time_s, end.num_cached_tokens) == (1000, 0.5, 1)
    assert 0 <= end.queue_time_s <= end.ttft_s <= end.e2e_s


async def test_the_first_token_of_prefill_is_delivered_before_those_of_decode(
    make_scheduler, pair, journal, ask, collect, until
):
    prefill, _ = pair
    prefill.hold = {"first"}
    scheduler = await make_scheduler(*pair)
    events = scheduler.submit(ask())
    await until(lambda: ("d0", "closed") in journal)  # decode has sent all of its tokens
    prefill.release()
    first = await anext(events)
    assert first == TokenEvent(0, [100])
    tokens, _ = await collect(events)
    assert tokens == [101, 102, 103]


async def test_the_first_token_arrives_while_decode_has_not_begun(make_scheduler, pair, ask, collect):
    pair[1].hold = {"tokens"}
    scheduler = await make_scheduler(*pair)
    events = scheduler.submit(ask())
    async with asyncio.timeout(30):
        assert await anext(events) == TokenEvent(0, [100])
    pair[1].release()
    assert (await collect(events))[0] == [101, 102, 103]


async def test_tokens_that_come_twice_are_dropped_by_their_index(make_scheduler, pair, ask, collect):
    # Known elsewhere: vllm-ascend #14980.
    pair[1].repeats = True
    scheduler = await make_scheduler(*pair)
    tokens, end = await collect(scheduler.submit(ask()))
    assert tokens == [100, 101, 102, 103]
    assert end.num_output_tokens == 4


async def test_logprobs_come_once_with_their_tokens_over_attempts(make_scheduler, pair):
    pair[1].repeats = True
    pair[1].fail["tokens"] = [RemoteError("at the second token")]
    scheduler = await make_scheduler(*pair)
    events = [each async for each in scheduler.submit(GenerateRequest("r", (7,), SamplingParams(0, 4, logprobs=0)))]
    assert events[-1].num_attempts == 2
    assert [token for event in events[:-1] for token in event.token_ids] == [100, 101, 102, 103]
    for event in events[:-1]:
        assert event.logprobs == [{token: -float(token)} for token in event.token_ids]


async def test_prompt_logprobs_come_once_over_attempts_and_with_the_first_token(make_scheduler, pair):
    pair[1].fail["tokens"] = [RemoteError("at the second token")]
    scheduler = await make_scheduler(*pair)
    params = SamplingParams(0, 4, prompt_logprobs=0)
    events = [each async for each in scheduler.submit(GenerateRequest("r", (7, 8, 9), params))]
    assert events[-1].num_attempts == 2
    first, *others = events[:-1]
    assert (first.index, first.prompt_logprobs) == (0, [{8: -1.0}, {9: -1.0}])
    assert not any(event.prompt_logprobs for event in others)


async def test_prompt_logprobs_are_waited_for_where_decode_knows_the_last_token_first(make_scheduler, pair, until):
    prefill, decode = pair
    prefill.hold = {"first"}
    prefill.stop_at = decode.stop_at = 0
    scheduler = await make_scheduler(*pair)
    events = scheduler.submit(GenerateRequest("r", (7, 8), SamplingParams(0, 4, prompt_logprobs=0)))
    await until(lambda: (decode.instance_id, "closed") in decode.journal)
    prefill.release()
    found = [each async for each in events]
    assert [each for event in found[:-1] for each in event.prompt_logprobs] == [{8: -1.0}]
    assert [token for event in found[:-1] for token in event.token_ids] == [100]


async def test_a_request_that_ends_with_its_first_token_closes_the_decode_stream(
    make_scheduler, pair, ask, collect, until
):
    prefill, decode = pair
    prefill.stop_at = 0
    decode.hold = {"tokens"}
    scheduler = await make_scheduler(*pair)
    tokens, end = await collect(scheduler.submit(ask()))
    assert (tokens, end.finish_reason) == ([100], "stop")
    await until(lambda: decode.open == 0)


async def test_one_token_needs_no_decode_instance(make_scheduler, pair, ask, collect):
    prefill, decode = pair
    scheduler = await make_scheduler(*pair)
    tokens, end = await collect(scheduler.submit(ask(max_tokens=1)))
    assert tokens == [100]
    assert decode.requests == []
    assert prefill.requests[0].grant == b""
    assert (end.prefill_instance, end.decode_instance) == ("p0", "")


async def test_a_hybrid_instance_serves_alone(make_scheduler, make_instance, ask, collect):
    hybrid = await make_instance("hybrid", "h0")
    scheduler = await make_scheduler(hybrid)
    tokens, end = await collect(scheduler.submit(ask()))
    assert tokens == [100, 101, 102, 103]
    assert (end.prefill_instance, end.decode_instance) == ("h0", "h0")


async def test_a_request_goes_on_after_tokens_that_the_client_has(make_scheduler, pair, ask, collect):
    scheduler = await make_scheduler(*pair)
    events = scheduler.submit(ask(output_token_ids=[100, 101]))
    assert await anext(events) == TokenEvent(2, [102])
    tokens, end = await collect(events)
    assert (tokens, end.num_output_tokens) == ([103], 4)


async def test_many_requests_at_once_all_get_their_own_tokens(make_scheduler, make_instance, ask, collect):
    instances = [await make_instance(role, f"{role}{i}") for role in ("prefill", "decode") for i in range(2)]
    scheduler = await make_scheduler(*instances)
    streams = [scheduler.submit(ask(f"r{i}", max_tokens=1 + i % 5)) for i in range(50)]
    results = await asyncio.gather(*map(collect, streams))
    assert [len(tokens) for tokens, _ in results] == [1 + i % 5 for i in range(50)]
    assert scheduler.stats().completed_requests == 50


# ---- places ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded"])
async def test_both_instances_of_a_role_are_used(make_scheduler, make_instance, ask, collect, policy):
    instances = [await make_instance(role, f"{role}{i}") for role in ("prefill", "decode") for i in range(2)]
    scheduler = await make_scheduler(*instances, prefill_policy=policy, decode_policy=policy)
    for i in range(4):  # one after the other, so that the loads are equal each time
        await collect(scheduler.submit(ask(f"r{i}")))
    assert [len(instance.requests) for instance in instances] == [2, 2, 2, 2]


async def test_least_loaded_avoids_the_busy_instance(make_scheduler, make_instance, ask, collect, until):
    busy, idle, decode = [
        await make_instance(*each) for each in (("prefill", "p0"), ("prefill", "p1"), ("decode", "d0"))
    ]
    busy.hold, idle.hold = {"first"}, {"first"}
    scheduler = await make_scheduler(busy, idle, decode)
    long = scheduler.submit(ask("long", length=50))
    await until(lambda: busy.requests or idle.requests)
    if idle.requests:
        busy, idle = idle, busy
    idle.release()
    for i in range(3):
        await collect(scheduler.submit(ask(f"short{i}")))
    assert (len(busy.requests), len(idle.requests)) == (1, 3)
    busy.release()
    await collect(long)


class ShortestFirst(CpuScheduler):
    async def _schedule_waiting_requests(self) -> None:
        while self.waiting_requests and self.has_room():
            self.start_request(min(self.waiting_requests, key=lambda entry: entry.num_prompt_tokens))


@pytest.mark.parametrize(("kind", "order"), [(CpuScheduler, [9, 7, 3, 5]), (ShortestFirst, [9, 3, 5, 7])])
async def test_an_overridden_schedule_reorders_requests_when_places_are_scarce(
    make_scheduler, pair, ask, collect, until, kind, order
):
    prefill, _ = pair
    prefill.hold = {"first"}
    scheduler = await make_scheduler(*pair, kind=kind, max_inflight_prefills=1)
    streams = [scheduler.submit(ask("r9", length=9))]
    await until(lambda: prefill.requests)
    streams += [scheduler.submit(ask(f"r{length}", length=length)) for length in (7, 3, 5)]
    prefill.release()
    await asyncio.gather(*map(collect, streams))
    assert [len(request.prompt_token_ids) for request in prefill.requests] == order


class Broken(CpuScheduler):
    async def _schedule_waiting_requests(self) -> None:
        raise ValueError("a mistake")


async def test_a_broken_override_falls_back_to_first_come_first_served(make_scheduler, pair, ask, collect, caplog):
    scheduler = await make_scheduler(*pair, kind=Broken)
    tokens, _ = await collect(scheduler.submit(ask()))
    assert len(tokens) == 4
    assert "_schedule_waiting_requests failed" in caplog.text


async def test_a_decode_instance_without_room_holds_back_only_its_share(make_scheduler, pair, ask, collect, until):
    # Known elsewhere: SGLang #6860, #9266.
    _, decode = pair
    decode.hold = {"grant"}
    scheduler = await make_scheduler(*pair, max_pending_reservations=2)
    streams = [scheduler.submit(ask(f"r{i}")) for i in range(5)]
    await until(lambda: len(decode.requests) == 2)
    assert (scheduler.stats().running_requests, scheduler.stats().waiting_requests) == (2, 3)
    decode.release()
    await asyncio.gather(*map(collect, streams))


async def test_a_grant_makes_room_for_the_next_reservation_at_once(
    make_scheduler, pair, ask, collect, until, monkeypatch
):
    """And not at the scheduler's next look at its queue."""
    monkeypatch.setattr("hbserve_scheduler.cpu_scheduler.TICK_S", 1000)
    pair[0].hold = {"first"}
    scheduler = await make_scheduler(*pair, max_pending_reservations=1)
    streams = [scheduler.submit(ask("r0")), scheduler.submit(ask("r1"))]
    await until(lambda: len(pair[1].requests) == 2)
    pair[0].release()
    for stream in streams:
        await collect(stream)


async def test_a_hybrid_instance_without_room_lets_requests_wait(make_scheduler, make_instance, ask, collect, until):
    hybrid = await make_instance("hybrid", "h0")
    hybrid.hold = {"tokens"}
    scheduler = await make_scheduler(hybrid, max_inflight_requests=2)
    streams = [scheduler.submit(ask(f"r{i}")) for i in range(3)]
    await until(lambda: len(hybrid.requests) == 2)
    assert (scheduler.stats().running_requests, scheduler.stats().waiting_requests) == (2, 1)
    hybrid.release()
    await asyncio.gather(*map(collect, streams))


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "output", "text"),
    [
        ([], [], "at least one token"),
        ([7] * 65, [], "65 tokens; the instances take at most 64"),
        ([7] * 60, [7] * 5, "65 tokens"),
        ([7, 1000], [], r"token 1000 is outside the vocabulary \[0, 1000\)"),
        ([7], [1000], r"token 1000 is outside the vocabulary \[0, 1000\)"),
        ([7, -1], [], r"prompt\[1\]=-1: expected a token id"),
        ([7], [1] * 8, "output_token_ids: 8 tokens"),
    ],
)
async def test_a_request_that_can_never_run_is_refused_at_once(make_scheduler, pair, prompt, output, text):
    # Known elsewhere: SGLang #30233.
    scheduler = await make_scheduler(*pair)
    with pytest.raises(InvalidRequest, match=text):
        scheduler.submit(GenerateRequest("r", prompt, SamplingParams(max_tokens=8), output))
    assert (scheduler.stats().rejected_requests, scheduler.stats().total_requests) == (1, 0)
    assert scheduler.stats().success_rate == 1.0


async def test_an_id_in_use_is_refused_and_free_again_afterwards(make_scheduler, pair, ask, collect, until):
    # Known elsewhere: SGLang #40125.
    pair[0].hold = {"first"}
    scheduler = await make_scheduler(*pair)
    waiting = scheduler.submit(ask())
    with pytest.raises(InvalidRequest, match="'r' is in use"):
        scheduler.submit(ask())
    await until(lambda: pair[0].requests)
    with pytest.raises(InvalidRequest, match="'r' is in use"):
        scheduler.submit(ask())
    pair[0].release()
    await collect(waiting)
    await collect(scheduler.submit(ask()))


async def test_requests_beyond_the_queue_are_refused_as_overload(make_scheduler, pair, ask, collect, until):
    pair[0].hold = {"first"}
    scheduler = await make_scheduler(*pair, max_queue_size=2, max_inflight_prefills=1)
    streams = [scheduler.submit(ask("r0"))]
    await until(lambda: pair[0].requests)
    streams += [scheduler.submit(ask("r1")), scheduler.submit(ask("r2"))]
    for waited_s, after_s in ((0, 1), (16, 8), (1000, 60)):  # half of what the first one has waited, within bounds
        scheduler.waiting_requests[0].submitted_s = asyncio.get_running_loop().time() - waited_s
        with pytest.raises(Overloaded, match=r"2 requests are waiting, which is scheduler\.max_queue_size") as refused:
            scheduler.submit(ask("r3"))
        assert refused.value.retry_after_s == pytest.approx(after_s, abs=2)
    with pytest.raises(Overloaded):  # nobody looks at it while there is no room: to refuse must cost least
        scheduler.submit(GenerateRequest("r4", (), ask().params))
    pair[0].release()
    await asyncio.gather(*map(collect, streams))


async def test_tokens_that_the_client_does_not_take_wait_as_one_event(make_scheduler, pair, ask, until):
    scheduler = await make_scheduler(*pair)
    params = SamplingParams(max_tokens=20, logprobs=1, prompt_logprobs=1)
    events = scheduler.submit(GenerateRequest("r", (7,) * 4, params))
    first = await anext(events)
    assert (first.index, first.token_ids[0]) == (0, 100)
    await until(lambda: scheduler.stats().completed_requests)
    rest = [each async for each in events]
    assert len(rest) <= 2, "of the tokens one, and the end"
    both = [first, *rest[:-1]]
    assert [token for each in both for token in each.token_ids] == list(range(100, 120))
    assert [place for each in both for place in each.logprobs] == [{token: -float(token)} for token in range(100, 120)]
    assert both[-1].finish_reason == rest[-1].finish_reason == "length"
    assert len(first.prompt_logprobs) == 3


# ---- aborts ------------------------------------------------------------------------------------------------------

PHASES = [("d0", "grant"), ("p0", "first"), ("p0", "done"), ("d0", "tokens")]


def hold(pair: Any, phase: tuple[str, str]) -> None:
    instance = pair[0] if phase[0] == "p0" else pair[1]
    instance.hold = {phase[1]}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", ["abort", "aclose"])
async def test_an_abort_closes_both_streams_in_every_phase(
    make_scheduler, pair, journal, ask, collect, until, phase, how
):
    # Known elsewhere: SGLang #18701, #36926, #33507, vLLM #50425.
    pair[1].hold = {"tokens"}
    hold(pair, phase) if phase[1] != "done" else pair[0].hold.add("done")
    scheduler = await make_scheduler(*pair)
    events = scheduler.submit(ask())
    await until(lambda: phase in journal)
    if how == "aclose":
        await events.aclose()
        assert [event async for event in events] == []
    else:
        assert await scheduler.abort("r")
        assert not await scheduler.abort("r")
        assert (await collect(events))[1].finish_reason == "abort"
    await until(lambda: pair[0].open == pair[1].open == 0)
    assert scheduler.stats().aborted_requests == 1


async def test_a_client_that_leaves_after_the_last_token_does_not_abort(make_scheduler, pair, ask, until):
    pair[0].hold = {"done"}
    scheduler = await make_scheduler(*pair)
    events = scheduler.submit(ask())
    async with asyncio.timeout(30):
        while (await anext(events)).finish_reason is None:
            pass
    assert not await scheduler.abort("r")
    await events.aclose()
    pair[0].release()
    await until(lambda: not scheduler.running_requests)
    assert scheduler.stats().completed_requests == 1


async def test_a_waiting_request_can_be_aborted(make_scheduler, pair, ask, collect, until):
    pair[0].hold = {"first"}
    scheduler = await make_scheduler(*pair, max_inflight_prefills=1)
    running = scheduler.submit(ask("running"))
    await until(lambda: pair[0].requests)
    waiting = scheduler.submit(ask("waiting"))
    assert await scheduler.abort("waiting")
    assert not await scheduler.abort("waiting")
    tokens, end = await collect(waiting)
    assert (tokens, end.finish_reason, end.num_attempts) == ([], "abort", 0)
    pair[0].release()
    await collect(running)
    assert len(pair[0].requests) == 1


async def test_an_abort_right_after_the_start_gives_the_places_back(make_scheduler, pair, ask, collect):
    """The request's task is then cancelled before its first step."""
    scheduler = await make_scheduler(*pair)
    events = scheduler.submit(ask())
    scheduler.start_request(scheduler.waiting_requests[0])
    assert await scheduler.abort("r")
    assert (await collect(events))[1].finish_reason == "abort"


async def test_an_abort_for_a_stop_string_counts_as_completed(make_scheduler, pair, ask, collect):
    pair[1].hold = {"tokens"}
    scheduler = await make_scheduler(*pair)
    events = scheduler.submit(ask())
    await anext(events)
    assert await scheduler.abort("r", "stop")
    _, end = await collect(events)
    assert (end.finish_reason, end.num_output_tokens) == ("stop", 1)
    stats = scheduler.stats()
    assert (stats.completed_requests, stats.aborted_requests, stats.success_rate) == (1, 0, 1.0)


async def test_an_abort_of_nothing_finds_nothing(make_scheduler, pair, ask, collect):
    scheduler = await make_scheduler(*pair)
    assert not await scheduler.abort("r")
    await collect(scheduler.submit(ask()))
    assert not await scheduler.abort("r")
    assert scheduler.stats().aborted_requests == 0


# ---- ends --------------------------------------------------------------------------------------------------------


async def test_a_request_ends_with_an_error_after_its_timeout(make_scheduler, pair, ask, collect):
    # Known elsewhere: vLLM #35943, #55870, #46283, #53250, SGLang #10110, #31800, #10204, #11648, #6857.
    pair[1].hold = {"tokens"}
    scheduler = await make_scheduler(*pair, request_timeout_s=0.5)
    with pytest.raises(RequestTimeout, match=r"request_timeout_s=0\.5"):
        await collect(scheduler.submit(ask()))
    assert scheduler.stats().failed_requests == 1


async def test_the_timeout_counts_the_time_in_the_queue(make_scheduler, pair, ask, collect, until):
    pair[0].hold = {"first"}
    scheduler = await make_scheduler(*pair, max_inflight_prefills=1, request_timeout_s=2.0)
    running = asyncio.create_task(collect(scheduler.submit(ask("running"))))
    await until(lambda: pair[0].requests)
    waiting = scheduler.submit(ask("waiting"))
    await until(lambda: running.done())
    with pytest.raises(RequestTimeout, match=r"request_timeout_s=2\.0"):
        await collect(waiting)
    with pytest.raises(RequestTimeout, match=r"request_timeout_s=2\.0"):
        await running


@pytest.mark.parametrize("phase", PHASES)
async def test_stop_ends_requests_and_leaves_no_task(make_scheduler, pair, journal, ask, collect, until, phase):
    hold(pair, phase)
    before = asyncio.all_tasks()
    scheduler = await make_scheduler(*pair, max_inflight_prefills=1)
    streams = [scheduler.submit(ask("r0")), scheduler.submit(ask("r1"))]
    await until(lambda: phase in journal)
    async with asyncio.timeout(30):
        await scheduler.stop()
    servers = {task for task in asyncio.all_tasks() if "RpcServer" in repr(task.get_coro())}
    assert asyncio.all_tasks() - before - servers == set()
    for stream in streams:
        _, end = await collect(stream)
        assert isinstance(end, RequestFinished)
    with pytest.raises(Unavailable, match="stopped"):
        scheduler.submit(ask("late"))


async def test_stop_after_the_last_token_aborts_nothing(make_scheduler, pair, ask, collect):
    pair[0].hold = {"done"}
    scheduler = await make_scheduler(*pair)
    events = scheduler.submit(ask())
    async with asyncio.timeout(30):
        while (await anext(events)).finish_reason is None:
            pass
        await scheduler.stop()
    assert (await collect(events))[1].finish_reason == "length"
    stats = scheduler.stats()
    assert (stats.completed_requests, stats.aborted_requests) == (1, 0)


@contextlib.contextmanager
def clock(now_s: float) -> Iterator[None]:
    """The event loop's, of which all of the scheduler's times are, stands at `now_s`; nothing may be awaited then."""
    loop = asyncio.get_running_loop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "time", lambda: now_s)
        yield


async def test_the_times_of_a_request_are_of_its_submission_and_its_tokens(ask):
    entry = ScheduledRequest(ask(), submitted_s=10, arrivals=array("d", [13]), output=[100, 101, 102, 103])
    entry.attempts.append(AttemptRecord(2, "p0"))
    with clock(19):
        entry.finish("length")
    end = of_type(RequestFinished, entry.events.popleft())
    # Three tokens come after the first, in six seconds.
    assert (end.queue_time_s, end.ttft_s, end.tpot_s, end.e2e_s) == (2, 3, 2, 9)


@pytest.mark.parametrize(
    ("events", "handoff_s"),
    [
        ([(1, [100]), (4, [101]), (9, [102])], 3),
        ([(1, [100]), (4, [100, 101])], 3),
        ([(1, [100]), (2, [100]), (4, [101])], 3),
        ([(1, [100, 101]), (4, [102])], 0),
        ([(1, [100])], None),
        ([], None),
    ],
    ids=["one by one", "the first again with the second", "the first twice", "both at once", "no second", "none"],
)
@pytest.mark.parametrize("known", [0, 2])
async def test_the_handoff_is_from_the_first_token_that_a_client_gets_to_the_second(ask, events, handoff_s, known):
    """Whether or not it has `known` tokens of an earlier attempt already."""
    entry = ScheduledRequest(ask(max_tokens=9, output_token_ids=[100 + i for i in range(known)]))
    for now_s, tokens in events:
        with clock(now_s):
            entry.deliver(TokenEvent(tokens[0] - 100 + known, [token + known for token in tokens]))
    assert entry.record().handoff_s == handoff_s
    entry.finish("length")
    while not isinstance(end := entry.events.popleft(), RequestFinished):
        pass
    assert end.handoff_s == (handoff_s or 0)


async def test_the_stats_sum_up_the_handoffs_of_those_requests_that_ended_last(
    make_scheduler, pair, ask, collect, monkeypatch
):
    monkeypatch.setattr("hbserve_scheduler.figures.RECENT_REQUESTS", 200)
    scheduler = await make_scheduler(*pair)
    assert scheduler.stats().handoff == LatencySummary()
    await collect(scheduler.submit(ask("one-token", max_tokens=1)))
    assert scheduler.stats().handoff.count == 0
    _, end = await collect(scheduler.submit(ask("two-tokens", max_tokens=2)))
    assert end.handoff_s > 0
    assert scheduler.stats().handoff == LatencySummary(1, end.handoff_s, end.handoff_s)
    for i in range(1000):
        scheduler.figures.num_submitted += 1
        ScheduledRequest(ask(str(i)), scheduler.figures, arrivals=array("d", [0, i])).finish("length")
    assert scheduler.stats().handoff == LatencySummary(200, 899, 997)


async def test_which_instance_has_how_many_requests_is_known_without_asking(make_scheduler, pair, ask, collect):
    prefill, decode = pair
    scheduler = await make_scheduler(*pair, heartbeat_interval_s=60.0, heartbeat_timeout_s=120.0)
    prefill.hold, decode.hold = {"done"}, {"tokens"}
    events = scheduler.submit(ask("r", max_tokens=3))
    await anext(events)
    await scheduler.refresh()
    assert scheduler.active_requests() == {"p0": 1, "d0": 1}
    prefill.release()
    decode.release()
    await collect(events)
    assert scheduler.active_requests() == {}
    assert scheduler.stats().instances[1].active_requests == 1, "which is what it said last"
    decode.hold = {"tokens"}
    stopped = scheduler.submit(ask("s", max_tokens=3))
    await anext(stopped)
    assert scheduler.active_requests()["d0"] == 1
    assert await scheduler.abort("s", "stop")
    assert (scheduler.active_requests(), scheduler.stats().running_requests) == ({}, 0)
    decode.release()
