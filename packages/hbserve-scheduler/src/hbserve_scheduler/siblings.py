"""Other schedulers over the same instances, each in its own process. Their figures are added up, and news reach all."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from functools import reduce
from typing import Any, TypeVar

import msgspec

from hbserve_rpc import HBServeRpcError, Keys
from hbserve_rpc.members import Member
from hbserve_rpc.messages import FinishReason, LatencySummary, SchedulerStats
from hbserve_rpc.records import RequestRecord
from hbserve_scheduler.remote import RemoteScheduler

T = TypeVar("T")

PATIENCE_S = 2.0
"""Longest time that a sibling may take to answer. One that takes longer counts with its last figures."""
NO_SUMS = {"success_rate", "handoff", "instances"}
"""Fields of SchedulerStats that are not added up."""


class Siblings:
    """The other schedulers, which come and go. What one has counted stays counted, so that sums never fall. But links
    of instances that have left are forgotten, as in each scheduler."""

    def __init__(self, members: Callable[[], list[Member]], keys: Keys | None = None) -> None:
        """Begin without siblings. members: returns the instances that all schedulers should use."""
        self._members = members
        self._keys = keys
        self._remotes: dict[str, RemoteScheduler] = {}
        """Clients of the siblings, by name."""
        self._last: dict[str, SchedulerStats] = {}
        """Last figures of each sibling, by name."""
        self._gone = SchedulerStats()
        """Sum of the figures of siblings that have ended."""

    async def add(self, name: str, address: str) -> None:
        """Add a SchedulerServer at `host:port` as a sibling. A sibling with this name is an earlier life of it, which
        has ended."""
        await self.remove(name)
        remote = RemoteScheduler(address, keys=self._keys)
        await remote.start()
        self._remotes[name] = remote
        remote.tell_members(self._members())

    async def remove(self, name: str) -> None:
        """Note that a sibling has ended. An unknown one is ignored."""
        remote, last = self._remotes.pop(name, None), self._last.pop(name, None)
        if last is not None:
            links = {key: msgspec.structs.replace(each, active=0) for key, each in last.links.items()}
            ended = msgspec.structs.replace(last, waiting_requests=0, running_requests=0, links=links)
            self._gone = total([self._gone, ended])
        if remote is not None:
            await remote.stop()

    async def close(self) -> None:
        for name in list(self._remotes):
            await self.remove(name)

    async def total(self, own: SchedulerStats) -> SchedulerStats:
        """Return the sum of the figures of all schedulers, `own` included. All schedulers have the same instances, of
        which those in `own` are the latest."""
        await asyncio.gather(*(self._ask(name, remote) for name, remote in self._remotes.items()))
        there = {each.instance_id for each in self._members()}
        links = {key: each for key, each in self._gone.links.items() if each.is_between(there)}
        self._gone = msgspec.structs.replace(self._gone, links=links)
        return total([own, self._gone, *self._last.values()])

    async def _ask(self, name: str, remote: RemoteScheduler) -> None:
        found = await _in_time(remote.fetch_stats())
        if found is not None and self._remotes.get(name) is remote:  # otherwise it was removed meanwhile
            self._last[name] = found

    async def records(self, last_s: float, request_id: str) -> list[list[RequestRecord]]:
        """Return `CpuScheduler.records` of each sibling; an empty list for one that does not answer."""
        asking = [_in_time(remote.fetch_records(last_s, request_id)) for remote in self._remotes.values()]
        return [found or [] for found in await asyncio.gather(*asking)]

    def tell_members(self) -> None:
        for remote in self._remotes.values():
            remote.tell_members(self._members())

    def instance_died(self, instance_id: str, why: str) -> None:
        for remote in self._remotes.values():
            remote.instance_died(instance_id, why)

    async def abort(self, request_id: str, reason: FinishReason, choice: int | None = None) -> bool:
        """End a request, whichever sibling has it, and return whether one had it."""
        asking = [_in_time(remote.abort(request_id, reason, choice)) for remote in self._remotes.values()]
        return any(await asyncio.gather(*asking))


async def _in_time(asking: Coroutine[Any, Any, T]) -> T | None:
    """Return the answer, or None if there was none in time."""
    with contextlib.suppress(HBServeRpcError, TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            return await asking
    return None


def total(several: Sequence[SchedulerStats]) -> SchedulerStats:
    """Add figures up. The instances are those of the first."""
    names = [name for name in SchedulerStats.__struct_fields__ if name not in NO_SUMS]
    sums = {name: reduce(_added, (getattr(each, name) for each in several)) for name in names}
    ended = sums["completed_requests"] + sums["failed_requests"]
    rate = sums["completed_requests"] / ended if ended else 1.0
    handoff = _joint([each.handoff for each in several if each.handoff.count])
    return SchedulerStats(**sums, success_rate=rate, handoff=handoff, instances=several[0].instances)


def _added(one: Any, other: Any) -> Any:
    """Return the sum of two numbers or histograms, or of dicts of them key by key."""
    if not isinstance(one, dict):
        return one + other
    return one | {key: one[key] + value if key in one else value for key, value in other.items()}


def _joint(latencies: list[LatencySummary]) -> LatencySummary:
    """Summarise all, as far as summaries allow it: by the mean of the medians, and the worst 99th percentile."""
    count = sum(each.count for each in latencies)
    if not count:
        return LatencySummary()
    p50_s = sum(each.count * each.p50_s for each in latencies) / count
    return LatencySummary(count, p50_s, max(each.p99_s for each in latencies))
