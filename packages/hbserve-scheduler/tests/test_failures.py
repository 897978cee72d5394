"""Instances fail, are lost and come back; requests go on elsewhere, or say what happened."""

import asyncio
from typing import Any

import pytest

from hbserve_rpc import EngineFailed, InvalidRequest, LogitsNotFinite, Overloaded, RemoteError, Unavailable
from hbserve_rpc.messages import TokenEvent
from hbserve_scheduler import ConfigError, InstanceFailed, NotReady, RequestFailed
from hbserve_scheduler.attempt import VERDICT_TIMEOUT_S, Attempt
from hbserve_scheduler.request import ScheduledRequest
from hbserve_scheduler.retries import MOST_SUSPECTS, Retries


@pytest.fixture
async def four(make_instance) -> list[Any]:
    """Two prefill and two decode instances."""
    return [await make_instance(role, f"{role[0]}{i}") for role in ("prefill", "decode") for i in range(2)]


def by_use(instances: list[Any]) -> tuple[Any, Any]:
    """The instance that has the request, and the other."""
    first, second = instances
    return (first, second) if first.requests else (second, first)


# ---- another attempt ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["first", "done"])
async def test_a_failed_prefill_is_tried_on_another_instance(make_scheduler, four, ask, collect, until, phase):
    # Known elsewhere: vLLM #42839.
    for instance in four[:2]:
        instance.fail[phase] = [RemoteError("out of luck")]
    four[2].hold, four[3].hold = {"tokens"}, {"tokens"}
    scheduler = await make_scheduler(*four)
    events = scheduler.submit(ask())
    await until(lambda: scheduler.stats().retries == 2)
    for instance in four:
        instance.release()
    tokens, end = await collect(events)
    assert tokens == [100, 101, 102, 103]
    assert end.num_attempts == 3
    first, second = four[0].requests[0], four[1].requests[0]
    assert first.transfer_id != second.transfer_id
    assert first.request_id != second.request_id


async def test_a_failed_decode_goes_on_elsewhere_after_the_delivered_tokens(make_scheduler, four, ask, collect, until):
    # Known elsewhere: vllm-ascend #14980.
    decodes = four[2:]
    for instance in decodes:
        instance.hold = {"tokens"}
    scheduler = await make_scheduler(*four)
    events = scheduler.submit(ask(max_tokens=5))
    assert (await anext(events)).token_ids == [100]
    failing, other = by_use(decodes)
    failing.fail["tokens"] = [RemoteError("out of luck")]
    other.hold = set()
    failing.release()  # one more token is delivered, then it fails
    tokens, end = await collect(events)
    assert tokens == [101, 102, 103, 104]
    assert (end.num_attempts, end.decode_instance) == (2, other.instance_id)
    assert other.requests[0].output_token_ids == [100, 101]
    assert other.requests[0].transfer_id != failing.requests[0].transfer_id
    retried = next(each for p in four[:2] for each in p.requests if each.output_token_ids)
    assert retried.output_token_ids == [100, 101]
    assert scheduler.stats().retries == 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_lost_instance_is_replaced_by_another(make_scheduler, four, ask, collect, until, role):
    instances = four[:2] if role == "prefill" else four[2:]
    for instance in instances:
        instance.hold = {"first" if role == "prefill" else "tokens"}
    scheduler = await make_scheduler(*four)
    events = scheduler.submit(ask())
    await until(lambda: instances[0].requests or instances[1].requests)
    lost, other = by_use(instances)
    other.hold = set()
    await lost.server.stop()
    tokens, end = await collect(events)
    assert tokens == [100, 101, 102, 103]
    assert end.num_attempts == 2
    assert len(other.requests) == 1
    assert scheduler.fleet.handles[lost.instance_id].status == "lost"


async def test_an_instance_that_is_known_to_be_dead_is_left_at_once(
    make_scheduler, four, ask, collect, until, monkeypatch
):
    prefills = four[:2]
    for instance in prefills:
        instance.hold = {"first"}
    scheduler = await make_scheduler(*four, heartbeat_timeout_s=60.0)  # nothing here waits for heartbeats
    events = scheduler.submit(ask())
    await until(lambda: prefills[0].requests or prefills[1].requests)
    dead, other = by_use(prefills)
    other.hold = set()
    handle, said = scheduler.fleet.handles[dead.instance_id], list[str]()
    lost = handle.lost

    def say(why: str, **more: Any) -> None:
        said.append(why)
        lost(why, **more)

    monkeypatch.setattr(handle, "lost", say)
    await dead.server.stop()
    await scheduler.instance_died(dead.instance_id, "its process ended with code -9")
    tokens, end = await collect(events)
    assert (len(tokens), end.prefill_instance) == (4, other.instance_id)
    assert "its process ended with code -9" in said  # what else is heard of its end may come before or after


async def test_the_requests_of_a_removed_instance_go_elsewhere(make_scheduler, four, ask, collect, until):
    # Known elsewhere: dynamo #9344, #7319, #9345, SGLang #22200.
    prefills = four[:2]
    for instance in prefills:
        instance.hold = {"first"}
    scheduler = await make_scheduler(*four)
    events = scheduler.submit(ask())
    await until(lambda: prefills[0].requests or prefills[1].requests)
    removed, other = by_use(prefills)
    other.hold = set()
    await scheduler.remove_instance(removed.instance_id)
    assert (await collect(events))[1].prefill_instance == other.instance_id
    assert removed.instance_id not in scheduler.fleet.handles


@pytest.mark.parametrize("where", [("p0", "first"), ("d0", "grant"), ("d0", "tokens")])
async def test_after_the_last_attempt_the_error_tells_the_story_and_names_the_instances(
    make_scheduler, pair, ask, collect, where
):
    # Known elsewhere: SGLang #9726, #29482, aibrix #2289, llm-d #2433.
    instance = pair[0] if where[0] == "p0" else pair[1]
    instance.fail[where[1]] = [RemoteError(f"mishap {i}") for i in range(1, 4)]
    scheduler = await make_scheduler(*pair, max_attempts=3)
    with pytest.raises(RequestFailed) as caught:
        await collect(scheduler.submit(ask()))
    for i in range(1, 4):
        assert f"attempt {i}: {where[0]}: mishap {i}" in str(caught.value)
    assert len(instance.requests) == 3
    stats = scheduler.stats()
    assert (stats.failed_requests, stats.retries, stats.success_rate) == (1, 2, 0.0)


async def test_a_failure_after_the_last_token_is_not_tried_again(make_scheduler, pair, ask, collect):
    pair[0].fail["done"] = [RemoteError("too late to matter")]
    scheduler = await make_scheduler(*pair)
    tokens, end = await collect(scheduler.submit(ask(max_tokens=1)))
    assert (tokens, end.finish_reason, end.num_attempts) == ([100], "length", 1)
    stats = scheduler.stats()
    assert (stats.retries, stats.completed_requests) == (0, 1)


async def test_an_instance_that_failed_is_avoided_where_there_is_another(make_scheduler, four, ask):
    fleet = (await make_scheduler(*four)).fleet

    def chosen(avoid: set[str]) -> set[tuple[str, str]]:
        places = [fleet.place_request(ScheduledRequest(ask(), failed_on=avoid)) for _ in range(4)]
        for place in places:
            place.end()
        return {(place.prefill.instance_id, place.decode.instance_id) for place in places}

    assert chosen({"p0", "d1"}) == {("p1", "d0")}
    assert {decode for _, decode in chosen({"p0", "p1", "d1"})} == {"d0"}


async def test_a_place_for_a_retry_that_was_cancelled_in_that_moment_is_given_back(make_scheduler, pair, ask):
    scheduler = await make_scheduler(*pair)
    retries = Retries(scheduler.fleet, lambda: None)
    waiting = asyncio.create_task(retries.wait_for_place(ScheduledRequest(ask())))
    await asyncio.sleep(0)
    retries.place()
    assert scheduler.fleet.handles["d0"].load == 1
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not retries.waiting  # and the fixture sees to it that nothing is taken


async def test_an_overloaded_instance_is_tried_again(make_scheduler, pair, ask, collect):
    pair[1].fail["grant"] = [Overloaded("no room")]
    scheduler = await make_scheduler(*pair)
    tokens, end = await collect(scheduler.submit(ask()))
    assert (len(tokens), end.num_attempts, scheduler.stats().refusals) == (4, 1, 1)


async def test_an_invalid_request_is_not_tried_again(make_scheduler, pair, ask, collect):
    pair[1].fail["grant"] = [InvalidRequest("that cannot be")]
    scheduler = await make_scheduler(*pair)
    with pytest.raises(InvalidRequest, match="d0: that cannot be"):
        await collect(scheduler.submit(ask()))
    assert len(pair[1].requests) == 1
    assert scheduler.stats().retries == 0


@pytest.mark.parametrize(("where", "phase"), [("p0", "first"), ("d0", "tokens")])
async def test_a_request_for_which_the_model_gives_no_numbers_is_tried_on_no_other_instance(
    make_scheduler, four, ask, collect, where, phase
):
    for instance in four:
        if instance.instance_id[0] == where[0]:
            instance.fail[phase] = [LogitsNotFinite("not finite at output token 3")] * 9
    scheduler = await make_scheduler(*four)
    with pytest.raises(FloatingPointError, match=rf"^{where[0]}\d: not finite at output token 3$"):
        await collect(scheduler.submit(ask()))
    # The other side's may still be on its way when this one has failed.
    assert sum(len(each.requests) for each in four if each.instance_id[0] == where[0]) == 1
    assert sum(len(each.requests) for each in four) <= 2
    assert (scheduler.stats().failed_requests, scheduler.stats().retries) == (1, 0)


async def test_a_hybrid_instance_whose_model_gives_no_numbers_is_asked_once(
    make_scheduler, make_instance, ask, collect
):
    hybrid = await make_instance("hybrid", "h0")
    hybrid.fail["tokens"] = [LogitsNotFinite("not finite")]
    scheduler = await make_scheduler(hybrid)
    with pytest.raises(LogitsNotFinite, match=r"^h0: not finite$"):
        await collect(scheduler.submit(ask()))
    assert len(hybrid.requests) == 1
    assert len((await collect(scheduler.submit(ask())))[0]) == 4, "others go on"


async def test_where_both_legs_have_failed_the_prefill_side_says_why(make_scheduler, pair, ask):
    """Its end ends the transfer too, and that may be heard of in the same moment."""
    end = asyncio.Event()
    placement = (await make_scheduler(*pair)).fleet.place_request(ScheduledRequest(ask()))
    assert placement is not None

    async def leg(error: Exception) -> None:
        await end.wait()
        raise error

    for _ in range(20):
        attempt = Attempt(ScheduledRequest(ask()), placement)
        both = asyncio.create_task(attempt._both(leg(LogitsNotFinite("why")), leg(RemoteError("its transfer ended"))))
        await asyncio.sleep(0)
        end.set()
        with pytest.raises(LogitsNotFinite, match="why"):
            await both
    placement.end()


async def test_a_request_that_ends_at_its_first_token_has_not_failed_though_its_decode_leg_has(
    make_scheduler, pair, ask, collect, until
):
    """The end of the transfer may be heard of before the token that ended the request."""
    prefill, decode = pair
    prefill.stop_at, prefill.hold = 0, {"first"}
    decode.fail["tokens"] = [RemoteError("its transfer ended")]
    scheduler = await make_scheduler(*pair, max_attempts=1)
    events = scheduler.submit(ask(max_tokens=9))
    await until(lambda: ("d0", "closed") in decode.journal and prefill.requests)
    prefill.release()
    tokens, end = await collect(events)
    assert (tokens, end.finish_reason, end.num_attempts) == ([100], "stop", 1)
    assert scheduler.stats().failed_requests == 0


async def test_the_decode_side_alone_may_tell_that_a_request_ended_at_its_first_token(
    make_scheduler, pair, ask, collect
):
    """The prefill side has committed, and is lost before it is heard."""
    prefill, decode = pair
    prefill.hold, decode.stop_at = {"first"}, 0
    scheduler = await make_scheduler(*pair, max_attempts=1)
    tokens, end = await collect(scheduler.submit(ask(max_tokens=9)))
    assert (tokens, end.finish_reason, end.num_attempts) == ([100], "stop", 1)


async def test_a_prefill_side_that_fails_after_its_transfer_does_not_end_what_is_decoded(
    make_scheduler, pair, ask, collect, until, monkeypatch
):
    monkeypatch.setattr("hbserve_scheduler.attempt.VERDICT_TIMEOUT_S", 0)
    prefill, decode = pair
    prefill.hold, decode.hold = {"done"}, {"tokens"}
    scheduler = await make_scheduler(*pair, max_attempts=1)
    events = scheduler.submit(ask())
    assert (await anext(events)).token_ids == [100]
    decode.release()
    decode.hold = {"tokens"}
    assert (await anext(events)).token_ids == [101]
    await prefill.server.stop()
    await until(lambda: "p0" in scheduler.running_requests["r"].failed_on)
    with pytest.raises(TimeoutError):  # and no error
        async with asyncio.timeout(0.1):
            await anext(events)
    decode.release()
    tokens, end = await collect(events)
    assert (tokens, end.num_attempts) == ([102, 103], 1)


async def test_what_a_late_prefill_side_has_moved_is_in_the_record(make_scheduler, pair, ask, collect):
    """On a busy machine all tokens may be there before it is heard."""
    pair[0].hold = {"done"}
    scheduler = await make_scheduler(*pair)
    answer = asyncio.create_task(collect(scheduler.submit(ask())))
    while not (entry := scheduler.running_requests.get("r")) or entry.finish_reason is None:
        await asyncio.sleep(0.01)
    await asyncio.sleep(3 * VERDICT_TIMEOUT_S)
    pair[0].release()
    tokens, end = await answer
    assert (len(tokens), end.kv_bytes > 0, end.num_attempts) == (4, True, 1)


@pytest.mark.parametrize("failing", ["p0", "d0"])
async def test_when_one_leg_fails_the_other_is_closed(make_scheduler, pair, ask, collect, until, failing):
    # Known elsewhere: SGLang #9726, #29482, aibrix #2289, llm-d #2433.
    prefill, decode = pair
    if failing == "p0":
        prefill.fail["done"], decode.hold = [RemoteError("x")], {"tokens"}
    else:
        decode.fail["tokens"], prefill.hold = [RemoteError("x")], {"done"}
    scheduler = await make_scheduler(*pair, max_attempts=1)
    with pytest.raises(RequestFailed, match=f"{failing}: x"):
        await collect(scheduler.submit(ask()))
    await until(lambda: prefill.open == decode.open == 0)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        (("p0", "first"), "p0: ended the stream before the first token"),
        (("d0", "grant"), "d0: ended the stream before its grant"),
        (("d0", "tokens"), "d0: ended the stream after 1 tokens"),
        (("h0", "tokens"), "h0: ended the stream after 0 tokens"),
    ],
)
async def test_a_stream_that_just_ends_is_an_error_and_not_an_answer(
    make_scheduler, make_instance, pair, ask, collect, where, text
):
    # Known elsewhere: vllm-ascend #12166, #9046, #15108.
    hybrid = await make_instance("hybrid", "h0")
    used = [hybrid] if where[0] == "h0" else pair
    for instance in used:
        if instance.instance_id == where[0]:
            instance.silent = {where[1]}
    scheduler = await make_scheduler(*used, max_attempts=1)
    with pytest.raises(RequestFailed, match=text):
        await collect(scheduler.submit(ask()))


async def test_a_retry_comes_before_requests_that_wait(make_scheduler, pair, ask, collect, until):
    prefill, decode = pair
    prefill.hold, prefill.fail["done"], decode.hold = {"first"}, [RemoteError("once")], {"tokens"}
    scheduler = await make_scheduler(*pair, max_inflight_prefills=1)
    streams = [scheduler.submit(ask("r0", length=9))]
    await until(lambda: prefill.requests)
    streams += [scheduler.submit(ask(f"r{i}")) for i in range(1, 4)]
    prefill.release()
    await until(lambda: len(prefill.requests) > 1)
    decode.release()
    await asyncio.gather(*map(collect, streams))
    assert [len(each.prompt_token_ids) for each in prefill.requests] == [9, 9, 4, 4, 4]


# ---- instances that are not there --------------------------------------------------------------------------------


async def test_a_request_without_instances_ends_with_an_error_that_names_them(
    make_scheduler, pair, ask, collect, until
):
    scheduler = await make_scheduler(*pair, instance_wait_s=0.5)
    await pair[1].server.stop()
    await scheduler.instance_died("d0", "its process ended")
    with pytest.raises(Unavailable, match=r"no instances for 0\.5 s: d0 \(decode\) at 127\.0\.0\.1:\d+: "):
        await collect(scheduler.submit(ask()))


async def test_a_request_without_an_instance_of_a_role_says_which(make_scheduler, pair, ask, collect):
    scheduler = await make_scheduler(pair[0], instance_wait_s=0.5)
    with pytest.raises(Unavailable, match=r"no instances for 0\.5 s: there is no decode instance$"):
        await collect(scheduler.submit(ask()))


async def test_a_request_without_any_instance_says_that_none_has_been_added(make_scheduler, ask, collect):
    scheduler = await make_scheduler(instance_wait_s=0.5)
    with pytest.raises(Unavailable, match="no instance has been added"):
        await collect(scheduler.submit(ask()))
    assert not scheduler.info().ready


async def test_a_retry_that_finds_no_instance_tells_the_story(make_scheduler, pair, ask, collect, until):
    pair[0].hold = {"first"}
    scheduler = await make_scheduler(*pair, instance_wait_s=0.5)
    events = scheduler.submit(ask())
    await until(lambda: pair[0].requests)
    await pair[0].server.stop()
    await scheduler.instance_died("p0", "its process ended")
    with pytest.raises(Unavailable, match=r"attempt 1: p0: .*; no instances for 0\.5 s: p0 \(prefill\)"):
        await collect(events)


async def test_a_retry_waits_for_an_instance_that_loads_its_model_as_other_requests_do(
    make_scheduler, pair, ask, collect, until
):
    pair[1].hold = {"grant"}
    pair[1].silent = {"grant"}
    scheduler = await make_scheduler(*pair, instance_wait_s=0.2)
    answer = asyncio.create_task(collect(scheduler.submit(ask())))
    await until(lambda: pair[1].num_held)
    pair[1].status = "starting"
    await until(lambda: scheduler.fleet.handles["d0"].status == "starting")
    pair[1].release()
    await until(lambda: scheduler.retries.waiting)
    await asyncio.wait([answer], timeout=1)
    pair[1].status, pair[1].silent = "ready", set()
    tokens, end = await answer
    assert (tokens, end.num_attempts) == ([100, 101, 102, 103], 2)


async def test_a_retry_waits_for_instances_that_are_busy_as_other_requests_do(
    make_scheduler, pair, ask, collect, until, monkeypatch
):
    monkeypatch.setattr("hbserve_scheduler.instances.REFUSED_S", 3600.0)
    pair[0].fail["first"] = [Overloaded("it has enough")]
    scheduler = await make_scheduler(*pair, instance_wait_s=0.2)
    answer = asyncio.create_task(collect(scheduler.submit(ask())))
    await until(lambda: scheduler.fleet.handles["p0"].is_full and scheduler.retries.waiting)
    await asyncio.wait([answer], timeout=1)
    scheduler.fleet.handles["p0"]._may_be_asked()
    assert len((await answer)[0]) == 4


async def test_requests_wait_for_instances_that_come_later(make_scheduler, pair, ask, collect):
    scheduler = await make_scheduler(ready=False)
    events = scheduler.submit(ask())
    for instance in pair:
        await scheduler.add_instance(instance.instance_id, instance.role, instance.address)
    assert len((await collect(events))[0]) == 4


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_restarted_instance_is_used_again(make_scheduler, pair, ask, collect, until, role):
    instance = pair[0] if role == "prefill" else pair[1]
    scheduler = await make_scheduler(*pair)
    await collect(scheduler.submit(ask("before")))
    instance.hold = {"first", "grant"}
    events = scheduler.submit(ask("during"))
    await until(lambda: len(instance.requests) == 2)
    instance.hold = set()
    epoch = instance.server.epoch
    await instance.restart()
    tokens, end = await collect(events)
    assert (tokens, end.num_attempts) == ([100, 101, 102, 103], 2)
    await until(lambda: scheduler.stats().instances and scheduler.info().ready)
    assert {info.epoch for info in scheduler.info().instances}.isdisjoint({epoch})
    await collect(scheduler.submit(ask("after")))


async def test_wait_ready_raises_the_failed_instances_own_reason(make_scheduler, pair):
    pair[1].status, pair[1].error = "failed", "model.safetensors is truncated"
    scheduler = await make_scheduler(*pair, ready=False)
    with pytest.raises(InstanceFailed, match=r"d0 \(decode\) at .*: model\.safetensors is truncated"):
        await scheduler.wait_ready(30)


async def test_wait_ready_names_those_that_are_missing(make_scheduler, pair):
    pair[1].status = "starting"
    scheduler = await make_scheduler(*pair, ready=False)
    with pytest.raises(NotReady, match=r"not ready within 0\.5 s: d0 \(decode\) at .*: it is starting"):
        await scheduler.wait_ready(0.5)


@pytest.mark.parametrize(("configured", "role"), [("d1", "decode"), ("d0", "hybrid")])
async def test_an_instance_that_is_another_than_configured_is_not_used(make_scheduler, pair, configured, role):
    scheduler = await make_scheduler(pair[0], ready=False)
    await scheduler.add_instance(configured, role, pair[1].address)
    with pytest.raises(NotReady, match=f"is decode instance 'd0', not {role} instance '{configured}'"):
        await scheduler.wait_ready(0.5)


async def test_a_deployment_takes_what_the_smallest_of_its_instances_takes(make_scheduler, pair):
    pair[1].max_model_len = 64
    scheduler = await make_scheduler(*pair)
    assert scheduler.info().max_model_len == 64


@pytest.mark.parametrize(("status", "may_serve"), [("ready", True), ("starting", True), ("failed", False)])
async def test_requests_wait_for_an_instance_that_loads_its_model_and_not_for_one_that_failed(
    make_scheduler, pair, until, status, may_serve
):
    pair[1].status = status
    scheduler = await make_scheduler(*pair, ready=False)
    await until(lambda: [each.status for each in scheduler.stats().instances] == ["ready", status])
    assert scheduler.fleet.may_serve(soon=True) is may_serve


async def test_an_instance_cannot_be_added_twice(make_scheduler, pair):
    scheduler = await make_scheduler(*pair)
    with pytest.raises(ConfigError, match="instance_id='p0': is in use"):
        await scheduler.add_instance("p0", "prefill", pair[0].address)


async def test_an_instance_that_has_ended_is_not_used_although_no_heartbeat_is_due(
    make_scheduler, four, ask, collect, until
):
    scheduler = await make_scheduler(*four, heartbeat_interval_s=3600, heartbeat_timeout_s=3600)
    gone = next(each for each in four if each.instance_id == "d0")
    await gone.server.stop()
    await until(lambda: scheduler.fleet.handles["d0"].status == "lost")
    ends = [(await collect(scheduler.submit(ask(f"r{i}"))))[1] for i in range(3)]
    assert [(end.decode_instance, end.num_attempts) for end in ends] == [("d1", 1)] * 3


# ---- requests that end instances ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["its engine fails", "its process dies"])
async def test_a_request_that_was_on_two_instances_as_they_died_is_tried_on_no_other(
    make_scheduler, make_instance, ask, collect, how
):
    prefills = [await make_instance("prefill", f"p{i}") for i in range(4)]
    dying: list[asyncio.Task[None]] = []
    for instance in prefills:
        if how == "its engine fails":
            instance.fail["first"] = [EngineFailed(f"{instance.instance_id} failed: CUDA error")]
        else:
            phase = instance._phase

            async def kill(name, instance=instance, phase=phase):
                if name == "first":
                    dying.append(asyncio.create_task(instance.die()))
                    await asyncio.Event().wait()
                await phase(name)

            instance._phase = kill
    scheduler = await make_scheduler(*prefills, await make_instance("decode", "d0"), max_attempts=9)
    with pytest.raises(
        RequestFailed, match=r"it was on (p\d) and (p\d) as they died, and is tried on no other"
    ) as caught:
        await collect(scheduler.submit(ask()))
    assert sum(len(instance.requests) for instance in prefills) == 2
    assert "attempt 2: p" in str(caught.value)
    await asyncio.gather(*dying)


async def test_instances_that_end_in_order_tell_nothing_of_the_requests_that_were_there(
    make_scheduler, make_instance, ask, collect, until
):
    decodes = [await make_instance("decode", f"d{i}") for i in range(3)]
    for instance in decodes:
        instance.hold = {"tokens"}
    scheduler = await make_scheduler(await make_instance("prefill", "p0"), *decodes, max_attempts=9)
    answer = asyncio.create_task(collect(scheduler.submit(ask())))
    for _ in range(2):
        await until(lambda: any(each.open for each in decodes))
        here = next(each for each in decodes if each.open)
        await here.server.stop()
        decodes.remove(here)
    decodes[0].hold.clear()
    assert (await answer)[1].num_attempts == 3


async def test_few_of_those_that_were_on_a_dead_instance_are_tried_at_a_time(make_scheduler, pair, ask):
    fleet = (await make_scheduler(*pair, max_pending_reservations=99)).fleet
    retries, gone = Retries(fleet, lambda: None), fleet.handles["d0"]
    gone.note_death("an earlier life")
    suspects = [ScheduledRequest(ask(f"s{i}")) for i in range(MOST_SUSPECTS + 3)]
    for entry in suspects:
        entry.was_on = [(gone, "an earlier life")]
    others = [ScheduledRequest(ask(f"o{i}")) for i in range(3)]
    waiting = {
        entry.request.request_id: asyncio.create_task(retries.wait_for_place(entry)) for entry in [*suspects, *others]
    }
    await asyncio.sleep(0)

    async def placed() -> int:
        retries.place()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return sum(task.done() for task in waiting.values())

    assert await placed() == MOST_SUSPECTS + 3, "those that were elsewhere wait for nobody"
    assert await placed() == MOST_SUSPECTS + 3
    suspects[0].deliver(TokenEvent(0, [5]))
    suspects[1].fail(RequestFailed("it was aborted"))
    assert await placed() == MOST_SUSPECTS + 5
    for task in waiting.values():
        if task.done():
            task.result().end()
        task.cancel()
    await asyncio.gather(*waiting.values(), return_exceptions=True)


async def test_those_on_trial_that_have_to_be_placed_again_do_not_hold_themselves_back(make_scheduler, pair, ask):
    fleet = (await make_scheduler(*pair, max_pending_reservations=99)).fleet
    retries, gone = Retries(fleet, lambda: None), fleet.handles["d0"]
    gone.note_death("an earlier life")
    suspects = [ScheduledRequest(ask(f"s{i}")) for i in range(MOST_SUSPECTS)]
    for entry in suspects:
        entry.was_on = [(gone, "an earlier life")]
    for _ in range(2):
        waiting = [asyncio.create_task(retries.wait_for_place(entry)) for entry in suspects]
        await asyncio.sleep(0)
        retries.place()
        async with asyncio.timeout(20):
            for place in await asyncio.gather(*waiting):
                place.end()


IMPOSSIBLE = {
    "more than were asked for": TokenEvent(0, [5] * 5),
    "before the first": TokenEvent(-1, [5]),
    "later ones": TokenEvent(2, [5]),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
async def test_tokens_that_a_request_cannot_have_are_an_error_of_the_instance(ask, case):
    entry = ScheduledRequest(ask(max_tokens=4))
    with pytest.raises(RemoteError, match=r"cannot have|are missing"):
        entry.deliver(IMPOSSIBLE[case])
    assert entry.output == []
