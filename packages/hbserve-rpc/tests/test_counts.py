"""Figures that grow, and how late an event loop is."""

import asyncio
import time

import msgspec

from hbserve_rpc.counts import Histogram, HttpCounts, LinkCounts
from hbserve_rpc.loop_lag import PAUSE_S, LoopLag


def test_transfers_of_two_schedulers_over_one_link_are_added_and_it_is_up_as_the_first_has_it():
    one, other = LinkCounts("p", "d", True, active=2), LinkCounts("p", "d", False, active=1)
    one.end("completed")
    one.num_bytes, one.time_s, other.num_bytes, other.time_s = 100, 0.5, 23, 0.25
    before = other.copy()
    other.end("failed")
    both = one + other
    assert both == LinkCounts("p", "d", True, 1, {"completed": 1, "failed": 1}, 123, 0.75)
    assert (before.outcomes, before.active) == ({}, 1), "a copy does not grow"
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(both), type=LinkCounts) == both


def test_http_requests_of_two_front_ends_are_added():
    one, other = (HttpCounts("GET", "/x", "2xx", Histogram.over([1.0]), size, 2 * size) for size in (3, 4))
    one.seconds.observe(0.5)
    other.seconds.observe(2.0)
    both = one + other
    assert both == HttpCounts("GET", "/x", "2xx", Histogram([1.0], [1, 1], 2.5), 7, 14)
    before = one.copy()
    one.seconds.observe(0.25)
    assert before.seconds.counts == [1, 0]


async def test_an_event_loop_that_is_kept_busy_is_late_by_as_long():
    lag = LoopLag()
    lag.start()
    try:
        async with asyncio.timeout(30):
            while not sum(lag.histogram.counts):
                time.sleep(PAUSE_S + 0.1)  # noqa: ASYNC251  the fault that is looked for
                await asyncio.sleep(0)
    finally:
        lag.stop()
    assert lag.histogram.total > 0.09
    LoopLag().stop()
