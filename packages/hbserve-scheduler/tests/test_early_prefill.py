"""A prompt may be computed before there is a grant for it: it begins sooner, and whatever fails, nothing is left."""

import asyncio
from typing import Any

import pytest

from hbserve_rpc import InvalidRequest, RemoteError
from hbserve_rpc.messages import InstanceInfo, InstanceStats, TokenEvent
from hbserve_scheduler import RequestFailed, SchedulerConfig
from hbserve_scheduler.instances import InstanceHandle

VERDICT_TIMEOUT_S = 5.0
ROOM = 500
"""Blocks that a decode instance reports as free: half of what it has."""


@pytest.fixture
async def roomy(make_instance) -> dict[str, Any]:
    """p0, p1, d0 and d1 by their names. The decode instances have room, and say so."""
    names = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
    made = {name: await make_instance(role, name) for name, role in names.items()}
    made["d0"].free_blocks = made["d1"].free_blocks = ROOM
    return made


@pytest.fixture
async def roomy_pair(roomy) -> tuple[Any, Any]:
    return roomy["p0"], roomy["d0"]


# ---- the flow ----------------------------------------------------------------------------------------------------


async def test_where_there_is_room_the_prompt_is_computed_while_the_decode_instance_still_grants(
    make_scheduler, roomy_pair, journal, ask, collect, until
):
    # Known elsewhere: SGLang #26780.
    prefill, decode = roomy_pair
    decode.hold = {"grant"}
    scheduler = await make_scheduler(*roomy_pair)
    events = scheduler.submit(ask())
    await until(lambda: ("p0", "first") in journal and ("d0", "grant") in journal)
    first = asyncio.ensure_future(anext(events))
    await asyncio.wait([first], timeout=0.1)
    assert not first.done(), "the wait is for the first token, not for the second"
    decode.release()
    assert await first == TokenEvent(0, [100])
    tokens, end = await collect(events)
    assert tokens == [101, 102, 103]
    assert (end.num_attempts, end.kv_bytes, end.num_cached_tokens) == (1, 1000, 1)
    (request,) = prefill.requests
    assert (request.grant, request.grant_follows) == (b"", True)
    assert request.transfer_id == decode.requests[0].transfer_id
    assert journal.count(("p0", "granted")) == 1


@pytest.mark.parametrize("num_to_grant", [0, 1, 3, 6])
async def test_what_is_saved_is_what_granting_takes_and_nothing_where_it_takes_nothing(
    make_scheduler, pair, journal, ask, until, num_to_grant
):
    """Counted in steps, of which a prompt takes four: where there is room the two are not added up."""
    prefill, decode = pair

    async def num_steps(is_early: bool) -> int:
        left = {"grant": num_to_grant, "first": 4} if num_to_grant else {"first": 4}
        prefill.hold, decode.hold = {"first"}, {"grant"} & left.keys()
        decode.free_blocks = ROOM if is_early else 0
        begin, steps = len(journal), 0
        scheduler = await make_scheduler(*pair)
        first = asyncio.ensure_future(anext(scheduler.submit(ask(max_tokens=2))))

        def under_way() -> set[str]:
            return {what for _, what in journal[begin:]} & (prefill.hold | decode.hold)

        while left:
            expected = left.keys() if is_early else {next(iter(left))}
            await until(lambda expected=expected: under_way() >= expected)
            steps += 1
            for what in under_way():
                left[what] -= 1
                if not left[what]:
                    del left[what]
                    (decode if what == "grant" else prefill).release()
        await first
        await until(lambda: not scheduler.running_requests)
        await scheduler.stop()
        return steps

    assert await num_steps(is_early=False) == num_to_grant + 4
    assert await num_steps(is_early=True) == max(num_to_grant, 4)


async def test_a_request_that_ends_with_its_first_token_waits_for_no_grant(
    make_scheduler, roomy_pair, ask, collect, until
):
    prefill, decode = roomy_pair
    prefill.stop_at, decode.hold = 0, {"grant"}
    scheduler = await make_scheduler(*roomy_pair)
    tokens, end = await collect(scheduler.submit(ask()))
    assert (tokens, end.finish_reason) == ([100], "stop")
    await until(lambda: prefill.open == decode.open == 0)


# ---- room --------------------------------------------------------------------------------------------------------


def handle_of(info: dict[str, Any], report: dict[str, Any]) -> InstanceHandle:
    handle = InstanceHandle("d0", "decode", "127.0.0.1:1", SchedulerConfig(), lambda _: None, lambda _: None)
    about = {"num_blocks": 100, "block_size": 16, "max_num_seqs": 8} | info
    handle.info = InstanceInfo("d0", "decode", "now", "ready", **about)
    handle.last_stats = InstanceStats(
        **({"instance_id": "d0", "role": "decode", "status": "ready", "epoch": "now"} | report)
    )
    return handle


@pytest.mark.parametrize(
    ("num_tokens", "info", "report", "has_room"),
    [
        (64, {}, {"free_blocks": 15}, True),
        (64, {}, {"free_blocks": 14}, False),  # a tenth stays free
        (65, {}, {"free_blocks": 15}, True),
        (80, {}, {"free_blocks": 15}, False),
        (64, {}, {"free_blocks": 90, "waiting_requests": 1}, False),
        (64, {}, {"free_blocks": 90, "active_requests": 7}, True),
        (64, {}, {"free_blocks": 90, "active_requests": 8}, False),
        (64, {}, {"free_blocks": 90, "epoch": "before"}, False),
        (64, {"max_num_seqs": 0}, {"free_blocks": 90}, False),
    ],
)
def test_there_is_room_if_the_last_report_of_this_life_says_so_with_some_to_spare(num_tokens, info, report, has_room):
    assert handle_of(info, report).reports_room(num_tokens) is has_room


@pytest.mark.parametrize(("num_choices", "free", "active", "has_room"), [
    (4, 18, 4, True), (4, 17, 0, False), (4, 90, 5, False),
])  # fmt: skip
def test_each_choice_takes_a_block_and_a_place_and_all_share_their_prompt(num_choices, free, active, has_room):
    report = {"free_blocks": free, "active_requests": active}
    assert handle_of({}, report).reports_room(64, num_choices) is has_room


def test_there_is_no_room_without_a_report():
    handle = handle_of({}, {"free_blocks": 90})
    handle.last_stats = None
    assert not handle.reports_room(1)
    handle = handle_of({}, {"free_blocks": 90})
    handle.info = None
    assert not handle.reports_room(1)


async def test_what_was_given_to_an_instance_since_its_report_is_taken_from_its_room(
    make_scheduler, roomy_pair, ask, collect, until
):
    """Reports come once a second, requests a hundred times."""
    prefill, decode = roomy_pair
    decode.free_blocks = 100 + 10  # of 1000, a tenth of which stays free: room for two requests of 4 blocks
    prefill.hold = {"first"}
    scheduler = await make_scheduler(*roomy_pair, heartbeat_interval_s=60.0, heartbeat_timeout_s=600.0)
    streams = [scheduler.submit(ask(f"r{i}", length=64)) for i in range(3)]
    await until(lambda: len(prefill.requests) == 3)
    assert [request.grant_follows for request in prefill.requests] == [True, True, False]
    prefill.release()
    await asyncio.gather(*map(collect, streams))
    await scheduler.refresh()
    await collect(scheduler.submit(ask("after-a-report", length=64)))
    assert prefill.requests[-1].grant_follows


async def test_no_more_prompts_are_computed_ahead_than_reservations_may_wait(
    make_scheduler, roomy_pair, ask, collect, until
):
    prefill, decode = roomy_pair
    decode.hold = {"grant"}
    scheduler = await make_scheduler(*roomy_pair, max_pending_reservations=2)
    streams = [scheduler.submit(ask(f"r{i}")) for i in range(5)]
    await until(lambda: len(decode.requests) == 2 and len(prefill.requests) == 2)
    assert scheduler.stats().waiting_requests == 3
    decode.release()
    await asyncio.gather(*map(collect, streams))


# ---- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["while it computes", "when it has computed"])
async def test_after_a_refused_reservation_the_next_attempt_is_where_the_prompt_was_computed(
    make_scheduler, roomy, ask, collect, until, when
):
    """So that at most its last block is computed again; the client has the first token meanwhile."""
    prefills, decodes = [roomy["p0"], roomy["p1"]], [roomy["d0"], roomy["d1"]]
    for instance in decodes:
        instance.hold, instance.fail["grant"] = {"grant"}, []
    for instance in prefills:
        instance.hold = {"first"} if when == "while it computes" else set()
    scheduler = await make_scheduler(*roomy.values())
    events = scheduler.submit(ask())
    await until(lambda: any(each.granted for each in prefills) and any(each.open for each in decodes))
    (used,) = [each for each in prefills if each.requests]
    (refusing,) = [each for each in decodes if each.requests]
    (other,) = [each for each in decodes if not each.requests]
    other.hold = set()
    refusing.fail["tokens"] = []
    await refusing.server.stop()
    await scheduler.instance_died(refusing.instance_id, "its process ended")
    if when == "while it computes":
        await asyncio.sleep(0.05)
        assert used.open, "it goes on"
        used.release()
    tokens, end = await collect(events)
    assert tokens == [100, 101, 102, 103]
    assert (end.num_attempts, end.prefill_instance, end.decode_instance) == (2, used.instance_id, other.instance_id)
    assert [request.output_token_ids for request in used.requests] == [[], [100]]
    assert sum(len(each.requests) for each in prefills) == 2


async def test_a_request_that_the_decode_instance_calls_invalid_is_not_computed_to_its_end(
    make_scheduler, roomy_pair, ask, collect, until, monkeypatch
):
    prefill, decode = roomy_pair
    monkeypatch.setattr("hbserve_scheduler.attempt.VERDICT_TIMEOUT_S", VERDICT_TIMEOUT_S)
    prefill.hold, decode.fail["grant"] = {"first"}, [InvalidRequest("that cannot be")]
    scheduler = await make_scheduler(*roomy_pair)
    begin_s = asyncio.get_running_loop().time()
    with pytest.raises(InvalidRequest, match="d0: that cannot be"):
        await collect(scheduler.submit(ask()))
    assert asyncio.get_running_loop().time() - begin_s < VERDICT_TIMEOUT_S, "the other side knows no better"
    await until(lambda: prefill.open == 0)


@pytest.mark.parametrize("how", ["fails", "dies", "just ends"])
async def test_a_prefill_that_ends_while_the_grant_is_waited_for_gives_the_reservation_up(
    make_scheduler, roomy, ask, collect, until, how
):
    decodes = [roomy["d0"], roomy["d1"]]
    for instance in decodes:
        instance.hold = {"grant"}
    dying, other = roomy["p0"], roomy["p1"]
    other.fail["connect d0"] = other.fail["connect d1"] = [RemoteError("later")] * 99  # so that p0 is chosen
    scheduler = await make_scheduler(*roomy.values())
    if how == "fails":
        dying.fail["first"] = [RemoteError("out of luck")]
    elif how == "just ends":
        dying.silent = {"first"}
    events = scheduler.submit(ask())
    if how == "dies":
        await until(lambda: dying.granted and any(each.open for each in decodes))
        await dying.server.stop()
        await scheduler.instance_died("p0", "its process ended")
    await until(lambda: len(other.requests) == 1)
    await until(lambda: sum(each.open for each in decodes) == 1)
    for instance in decodes:
        instance.release()
    tokens, end = await collect(events)
    assert tokens == [100, 101, 102, 103]
    assert (end.num_attempts, end.prefill_instance) == (2, "p1")


async def test_both_sides_may_fail_before_the_grant(make_scheduler, roomy_pair, ask, collect):
    prefill, decode = roomy_pair
    prefill.fail["first"], decode.fail["grant"] = [RemoteError("P")], [RemoteError("D")]
    scheduler = await make_scheduler(*roomy_pair, max_attempts=1)
    with pytest.raises(RequestFailed, match="p0: P"):
        await collect(scheduler.submit(ask()))


@pytest.mark.parametrize("held", [{"grant"}, {"first", "tokens"}, {"grant", "first"}, {"done", "tokens"}])
@pytest.mark.parametrize("how", ["abort", "aclose", "stop"])
async def test_an_abort_before_or_after_the_grant_closes_both_streams(
    make_scheduler, roomy_pair, journal, ask, collect, until, held, how
):
    prefill, decode = roomy_pair
    prefill.hold, decode.hold = held & {"first", "done"}, held & {"grant", "tokens"}
    scheduler = await make_scheduler(*roomy_pair)
    events = scheduler.submit(ask())
    await until(lambda: held <= {what for _, what in journal} and prefill.open and decode.open)
    if how == "aclose":
        await events.aclose()
    elif how == "stop":
        await scheduler.stop()
    else:
        assert await scheduler.abort("r")
        assert (await collect(events))[1].finish_reason == "abort"
    await until(lambda: prefill.open == decode.open == 0)
    assert not prefill.granted
