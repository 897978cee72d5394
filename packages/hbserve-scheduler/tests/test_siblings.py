"""Several schedulers of the same instances: one of them has the figures of all, and aborts whatever any of them has."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import astuple

from hbserve_rpc.messages import LatencySummary, SchedulerStats
from hbserve_scheduler import CpuScheduler, RemoteScheduler, SchedulerConfig, SchedulerServer, siblings
from hbserve_scheduler.siblings import total


@pytest.fixture
async def serve(until: Any, assert_empty: Any) -> AsyncIterator[Any]:
    """Makes SchedulerServers of the same instances."""
    made: list[SchedulerServer] = []

    async def make(*instances: Any) -> SchedulerServer:
        config = SchedulerConfig(port=0, heartbeat_interval_s=0.1, heartbeat_timeout_s=20.0)
        server = SchedulerServer(CpuScheduler(config))
        for instance in instances:
            await server.scheduler.add_instance(instance.instance_id, instance.role, instance.address)
        await server.start()
        made.append(server)
        await server.scheduler.wait_ready(30)
        return server

    yield make
    for server in made:
        await assert_empty(server.scheduler)
        await server.stop()


@pytest.fixture
async def family(serve: Any, pair: Any) -> AsyncIterator[tuple[SchedulerServer, SchedulerServer, RemoteScheduler]]:
    """A server, a sibling of it, and a client of the first one."""
    parent, child = await serve(*pair), await serve(*pair)
    await parent.siblings.add("child", child.address)
    remote = RemoteScheduler(parent.address)
    await remote.start()
    yield parent, child, remote
    await remote.stop()


async def test_figures_are_those_of_all_and_instances_are_counted_once(family, ask, collect):
    parent, child, remote = family
    for server, count in ((parent, 1), (child, 2)):
        for _ in range(count):
            await collect(server.scheduler.submit(ask()))
    stats = await remote.fetch_stats()
    assert (stats.total_requests, stats.completed_requests, stats.success_rate) == (3, 3, 1.0)
    assert stats.handoff.count == 3
    assert (stats.output_tokens, stats.ended_requests) == (12, {"length": 3})
    assert {sum(each.counts) for name, each in stats.histograms.items() if name == "time_to_first_token_seconds"} == {3}
    assert [each.instance_id for each in stats.instances] == ["p0", "d0"]
    (link,) = stats.links.values()
    assert (link.outcomes, link.num_bytes, link.active) == ({"completed": 3}, 3000, 0)
    assert stats.delay_s.keys() == {"queue", "reservation", "transfer", "preemption", "retry"}


async def test_requests_of_all_are_remembered_in_the_order_in_which_they_ended(family, ask, collect):
    parent, child, remote = family
    for server, name in ((child, "a"), (parent, "b"), (child, "c")):
        await collect(server.scheduler.submit(ask(name)))
    found = await remote.fetch_records(60)
    assert [each.request_id for each in found] == ["a", "b", "c"]
    assert [each.request_id for each in await remote.fetch_records(60, "c")] == ["c"]
    assert await remote.fetch_records(0) == []


async def test_an_abort_reaches_whichever_has_the_request(family, pair, ask, collect):
    _, child, remote = family
    pair[1].hold = {"tokens"}
    events = child.scheduler.submit(ask("of the child"))
    await anext(events)
    assert not await remote.abort("of nobody")
    assert await remote.abort("of the child")
    assert (await collect(events))[1].finish_reason == "abort"


async def test_the_death_of_an_instance_reaches_all_at_once(family, pair, until, monkeypatch):
    parent, child, _ = family
    handles = [each.scheduler.fleet.handles["d0"] for each in (parent, child)]
    heard = []
    for handle in handles:  # what else they hear of the end of the instance may come before or after
        drop = handle.drop

        def noting(why, drop=drop):
            heard.append(why)
            return drop(why)

        monkeypatch.setattr(handle, "drop", noting)
    await pair[1].server.stop()
    await parent.instance_died("d0", "its process ended")
    await parent.instance_died("of nobody", "it never was")
    await until(lambda: heard == ["its process ended"] * 2)
    await until(lambda: [each.status for each in handles] == ["lost"] * 2)  # long before 20 s of silence


async def test_what_one_has_counted_stays_counted_when_it_has_ended_and_comes_again(family, serve, pair, ask, collect):
    parent, child, remote = family
    await collect(child.scheduler.submit(ask()))
    assert (await remote.fetch_stats()).completed_requests == 1
    await child.stop()
    await parent.siblings.remove("child")
    await parent.siblings.remove("child")
    assert (await remote.fetch_stats()).completed_requests == 1
    again = await serve(*pair)
    await parent.siblings.add("child", again.address)
    await collect(again.scheduler.submit(ask()))
    assert (await remote.fetch_stats()).completed_requests == 2


async def test_links_of_one_that_has_ended_are_shown_until_an_instance_of_them_has_left(family, ask, collect):
    parent, child, remote = family
    await collect(child.scheduler.submit(ask()))
    await remote.fetch_stats()
    await child.stop()
    await parent.siblings.remove("child")
    (link,) = (await remote.fetch_stats()).links.values()
    assert link.outcomes == {"completed": 1}
    await parent.members.remove("d0")
    stats = await remote.fetch_stats()
    assert (stats.links, stats.completed_requests) == ({}, 1)


async def test_one_that_does_not_answer_has_the_figures_of_before_and_holds_nobody_up(
    family, ask, collect, monkeypatch
):
    parent, child, remote = family
    await collect(child.scheduler.submit(ask()))
    assert (await remote.fetch_stats()).completed_requests == 1
    monkeypatch.setattr(siblings, "PATIENCE_S", 0.2)
    await child._server.stop()
    async with asyncio.timeout(30):
        assert (await remote.fetch_stats()).completed_requests == 1
    assert not await parent.siblings.abort("of nobody", "abort")


def test_summaries_of_latencies_are_joined_by_their_counts():
    several = [SchedulerStats(handoff=LatencySummary(*each)) for each in ((1, 0.1, 0.1), (0, 0.0, 0.0), (3, 0.3, 0.9))]
    joined = astuple(total(several).handoff)
    assert joined == pytest.approx(astuple(LatencySummary(4, 0.25, 0.9)))


def test_bounds_are_shared_out_and_none_becomes_nothing():
    shared = SchedulerConfig(max_queue_size=10, max_inflight_prefills=1).shared_among(4)
    assert (shared.max_queue_size, shared.max_inflight_prefills, shared.max_pending_reservations) == (3, 1, 2)
    assert shared.max_inflight_requests == 128
    assert shared.max_attempts == SchedulerConfig().max_attempts
