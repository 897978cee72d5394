"""Other schedulers over the same instances, each in a process of its own: their figures are added, news reach all."""

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
"""How long a sibling may take to answer. One that does not counts with the figures that it gave last."""
NO_SUMS = {"success_rate", "handoff", "instances"}
"""Fields of SchedulerStats that are not added up."""


class Siblings:
    """The other schedulers, which come and go. What one has counted stays counted, so that sums never fall; but as in
    each of them, links of instances that have left are forgotten."""

    def __init__(self, members: Callable[[], list[Member]], keys: Keys | None = None) -> None:
        """members: the instances that all are to use."""
        self._members = members
        self._keys = keys
        self._remotes: dict[str, RemoteScheduler] = {}
        """Their clients, by name."""
        self._last: dict[str, SchedulerStats] = {}
        """The last figures of each, by name."""
        self._gone = SchedulerStats()
        """Figures of those that have ended, together."""

    async def add(self, name: str, address: str) -> None:
        """Count a SchedulerServer at `host:port` in. One that has this name already is an earlier life of it, and has
        ended."""
        await self.remove(name)
        remote = RemoteScheduler(address, keys=self._keys)
        await remote.start()
        self._remotes[name] = remote
        remote.tell_members(self._members())

    async def remove(self, name: str) -> None:
        """Note that it has ended. One that is not there is passed over."""
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
        """Figures of all schedulers, `own` included. All have the same instances: those of `own` are the latest."""
        await asyncio.gather(*(self._ask(name, remote) for name, remote in self._remotes.items()))
        there = {each.instance_id for each in self._members()}
        links = {key: each for key, each in self._gone.links.items() if each.is_between(there)}
        self._gone = msgspec.structs.replace(self._gone, links=links)
        return total([own, self._gone, *self._last.values()])

    async def _ask(self, name: str, remote: RemoteScheduler) -> None:
        found = await _in_time(remote.fetch_stats())
        if found is not None and self._remotes.get(name) is remote:  # else it was removed meanwhile
            self._last[name] = found

    async def records(self, last_s: float, request_id: str) -> list[list[RequestRecord]]:
        """As `CpuScheduler.records`, of each sibling that answers."""
        asking = [_in_time(remote.fetch_records(last_s, request_id)) for remote in self._remotes.values()]
        return [found or [] for found in await asyncio.gather(*asking)]

    def tell_members(self) -> None:
        for remote in self._remotes.values():
            remote.tell_members(self._members())

    def instance_died(self, instance_id: str, why: str) -> None:
        for remote in self._remotes.values():
            remote.instance_died(instance_id, why)

    async def abort(self, request_id: str, reason: FinishReason, choice: int | None = None) -> bool:
        """End a request of one of them. Returns whether one of them had it."""
        asking = [_in_time(remote.abort(request_id, reason, choice)) for remote in self._remotes.values()]
        return any(await asyncio.gather(*asking))


async def _in_time(asking: Coroutine[Any, Any, T]) -> T | None:
    """What is answered; None: there was no answer."""
    with contextlib.suppress(HBServeRpcError, TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            return await asking
    return None


def total(several: Sequence[SchedulerStats]) -> SchedulerStats:
    """Sums, with the instances of the first."""
    names = [name for name in SchedulerStats.__struct_fields__ if name not in NO_SUMS]
    sums = {name: reduce(_added, (getattr(each, name) for each in several)) for name in names}
    ended = sums["completed_requests"] + sums["failed_requests"]
    rate = sums["completed_requests"] / ended if ended else 1.0
    handoff = _joint([each.handoff for each in several if each.handoff.count])
    return SchedulerStats(**sums, success_rate=rate, handoff=handoff, instances=several[0].instances)


def _added(one: Any, other: Any) -> Any:
    """The sum of numbers, of histograms, or of dicts of them key by key."""
    if not isinstance(one, dict):
        return one + other
    return one | {key: one[key] + value if key in one else value for key, value in other.items()}


def _joint(latencies: list[LatencySummary]) -> LatencySummary:
    """One summary for all, as far as summaries say it: the mean of medians, and the worst 99th percentile."""
    count = sum(each.count for each in latencies)
    if not count:
        return LatencySummary()
    p50_s = sum(each.count * each.p50_s for each in latencies) / count
    return LatencySummary(count, p50_s, max(each.p99_s for each in latencies))
