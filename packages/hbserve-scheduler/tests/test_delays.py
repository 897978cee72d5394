"""Requests that are slow on purpose: what held each up is in its record, in its line of the log, and in a figure."""

import asyncio
import logging
import re
import time

import pytest

from hbserve_rpc import records
from hbserve_rpc.messages import ClientEvent
from hbserve_rpc.records import AttemptRecord, RequestRecord
from hbserve_testing.waits import until

HELD_S = 0.3


@pytest.fixture
def lines(caplog, monkeypatch):
    """What the log says of a request's delay. However loaded the machine is, the longest one is named."""
    caplog.set_level(logging.INFO, "hbserve_scheduler.figures")
    monkeypatch.setattr(records, "MUCH", 0.0)

    def last() -> str:
        (line,) = [each.getMessage() for each in caplog.records if "request slow: 4 + 4" in each.getMessage()]
        return re.sub(r"[0-9.]+ ms", "N ms", line.rpartition("; ")[2])

    return last


async def slow(scheduler, instances, ask, release, *, num_held=1, num_told=0):
    """A request that instances hold, so many of them, until `release`, which is told for how long; its record.

    However long it took to be there, with so many events told to its client, it is held for longer: that is what has
    delayed it most.
    """
    told: list[ClientEvent] = []
    began_s = time.monotonic()
    reading = asyncio.create_task(scheduler.submit(ask("slow")).each(told.append))
    await until(lambda: sum(each.num_held for each in instances) == num_held and len(told) == num_told)
    held_s = max(HELD_S, 2 * (time.monotonic() - began_s))
    await asyncio.sleep(held_s)
    release(held_s)
    await reading
    (record,) = [each for each in scheduler.figures.records if each.request_id == "slow"]
    assert record.delays[record.main_delay] >= 0.9 * held_s
    stats = scheduler.stats()
    assert stats.delayed_requests[record.main_delay] == 1
    assert stats.delay_s[record.main_delay] >= record.delays[record.main_delay]
    return record


def release_all(instances):
    def release(_: float) -> None:
        for each in instances:
            each.release()

    return release


async def test_one_that_waits_in_the_queue(make_scheduler, pair, ask, collect, lines):
    pair[0].hold = {"first"}
    scheduler = await make_scheduler(*pair, max_inflight_prefills=1)
    before = asyncio.create_task(collect(scheduler.submit(ask("before"))))
    record = await slow(scheduler, pair, ask, release_all(pair))
    await before
    assert (record.main_delay, lines()) == ("queue", "waited N ms in the queue")


async def test_one_whose_decode_instance_has_no_room_for_long(make_scheduler, pair, ask, lines):
    pair[1].hold = {"grant"}

    def release(held_s: float) -> None:
        """Its prompt was computed before it waited, however late its prefill instance is heard."""
        pair[0].transfer_age_s = 2 * held_s
        pair[1].release()

    record = await slow(await make_scheduler(*pair), pair, ask, release)
    assert (record.main_delay, lines()) == ("reservation", "waited N ms for room on d0")


async def test_one_whose_kv_moves_over_a_slow_link(make_scheduler, pair, ask, lines):
    pair[0].hold = pair[1].hold = {"done", "tokens"}

    def release(held_s: float) -> None:
        pair[0].transfer_age_s = held_s
        for each in pair:
            each.release()

    record = await slow(await make_scheduler(*pair), pair, ask, release, num_held=2, num_told=1)
    assert (record.main_delay, lines()) == ("transfer", "waited N ms for its KV from p0 to d0")


async def test_one_that_was_preempted(make_scheduler, pair, ask, lines):
    pair[1].hold, pair[1].num_preemptions = {"tokens"}, 2
    pair[0].transfer_age_s = 0.0
    record = await slow(await make_scheduler(*pair), pair, ask, release_all(pair), num_told=1)
    assert (record.main_delay, lines()) == ("preemption", "preempted 2 times, and paused for N ms")


async def test_one_that_was_tried_again(make_scheduler, pair, make_instance, ask, lines):
    prefills = [pair[0], await make_instance("prefill", "p1")]
    for each in prefills:
        each.hold, each.silent, each.transfer_age_s = {"first"}, {"first"}, 0.0
    scheduler = await make_scheduler(*prefills, pair[1])

    def release(_: float) -> None:
        """Let the first attempt fail, and the other one not."""
        (other,) = [each for each in prefills if not each.requests]
        other.silent = set()
        for each in prefills:
            each.release()

    record = await slow(scheduler, prefills, ask, release)
    assert (record.main_delay, lines()) == ("retry", "lost N ms to failed attempts")


def test_a_wait_beside_which_the_prompt_is_computed_is_none():
    early = AttemptRecord(0.0, "p", "d", granted_s=2.0, computed=[(1.0, 8), (1.5, 16), (2.5, 24)], kv_moved_s=3.0)
    assert early.waits(9.0) == {"reservation": 0.5, "transfer": 0.5}
    late = AttemptRecord(1.0, "p", "d", granted_s=2.0, computed=[(3.0, 8)], kv_moved_s=2.5)
    assert late.waits(9.0) == {"reservation": 1.0, "transfer": 0.0}
    told_late = AttemptRecord(0.0, "p", "d", granted_s=0.0, computed=[(1.0, 8)], kv_moved_s=3.0, decoding_s=1.25)
    assert told_late.waits(9.0)["transfer"] == 0.25, "it was decoded already"
    never = AttemptRecord(1.0, "p", "d")
    assert never.waits(9.0) == {"reservation": 8.0}


def test_only_what_takes_much_of_a_requests_time_is_named():
    attempt = AttemptRecord(0.2, "p", "d", granted_s=0.3, first_token_s=0.5, kv_moved_s=0.5)
    record = RequestRecord("r", 0, 4, 3, 0, 0, 0, [attempt], 1.0, "length", 0.5, 0.6)
    assert record.main_delay is None
    assert record.describe().endswith(": length")
    never_placed = RequestRecord("r", 0, 4, 0, 0, 0, 0, [], 1.0, None, error="no room")
    assert never_placed.main_delay == "queue"
