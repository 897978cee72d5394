"""The RPC server of a CpuScheduler, for clients in other processes."""

import asyncio
import contextlib
import heapq
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping

import msgspec

from hbserve_rpc import AddressInUse, InvalidRequest, Keys, RpcServer, calling_peer
from hbserve_rpc.health_port import HealthPort
from hbserve_rpc.members import (
    SCHEDULER_DRAIN,
    SCHEDULER_FLIP,
    SCHEDULER_JOIN,
    SCHEDULER_MEMBERS,
    SCHEDULER_RELOAD,
    SCHEDULER_SCALE,
    DrainRequest,
    FlipRequest,
    JoinRequest,
    Members,
    Reloaded,
    ScaleNews,
    ScaleRequest,
)
from hbserve_rpc.messages import (
    SCHEDULER_ABORT,
    SCHEDULER_GENERATE,
    SCHEDULER_INFO,
    SCHEDULER_INSTANCE_DIED,
    SCHEDULER_STATS,
    Aborted,
    AbortRequest,
    ClientEvent,
    Empty,
    GenerateRequest,
    InstanceDied,
    InstanceInfo,
    Role,
    SchedulerStats,
    ServiceInfo,
)
from hbserve_rpc.metrics_text import Family
from hbserve_rpc.records import SCHEDULER_RECORDS, Records, RecordsRequest, RequestRecord
from hbserve_scheduler.cpu_scheduler import CpuScheduler
from hbserve_scheduler.declared import DeclaredInstances
from hbserve_scheduler.membership import Membership
from hbserve_scheduler.metrics import deployment_metrics
from hbserve_scheduler.siblings import Siblings

logger = logging.getLogger(__name__)


class SchedulerServer:
    """Server of a scheduler, with which it starts and stops. The requests of a client that goes away are aborted.

    Its figures are those of its scheduler and of `siblings` together. To abort a request, a client need not know which
    of these has it.
    """

    def __init__(self, scheduler: CpuScheduler, *, keys: Keys | None = None) -> None:
        """Make a server that does not serve yet. keys: those of a scheduler; with them only holders of keys are served,
        and siblings must have keys."""
        self.scheduler = scheduler
        self.keys = keys
        self.members = Membership(scheduler.fleet)
        self.declared: DeclaredInstances | None = None
        """Instances from the deployment's file, if there is one. To be set before `start`."""
        self.scale: Callable[[Mapping[Role, int]], AsyncGenerator[str, None]] | None = None
        """Function that scales each role to a number of instances, and yields lines about what is done. It is set by
        whoever starts instances."""
        self.siblings = Siblings(self.members.members, keys)
        scheduler.fleet.on_members = self.siblings.tell_members
        self._server = RpcServer(scheduler.config.host, scheduler.config.port, drops_closed=True, keys=keys)
        self._server.serve(SCHEDULER_INFO, self._info)
        self._server.serve(SCHEDULER_STATS, self._stats)
        self._server.serve(SCHEDULER_RECORDS, self._records)
        self._server.serve(SCHEDULER_ABORT, self._abort)
        self._server.serve(SCHEDULER_JOIN, self._join)
        self._server.serve(SCHEDULER_DRAIN, self._drain)
        self._server.serve(SCHEDULER_RELOAD, self._reload)
        self._server.serve_notification(SCHEDULER_MEMBERS, self._members)
        self._server.serve_notification(SCHEDULER_INSTANCE_DIED, self._instance_died)
        self._server.serve_stream(SCHEDULER_GENERATE, self._generate)
        self._server.serve_stream(SCHEDULER_FLIP, self._flip)
        self._server.serve_stream(SCHEDULER_SCALE, self._scale)
        self.health: HealthPort | None = None
        if scheduler.config.health_port is not None:
            self.health = HealthPort(
                scheduler.config.host,
                scheduler.config.health_port,
                why_dead=lambda: "",
                why_not_ready=self._why_not_ready,
                metrics=self._metrics,
            )

    @property
    def address(self) -> str:
        return self._server.address

    async def start(self) -> None:
        """Start the server and its scheduler. Raises AddressInUse."""
        try:
            await self._server.start()
        except AddressInUse:
            problem = f"{self.address} is in use: give another scheduler.port, or 0 to let the system choose"
            raise AddressInUse(problem) from None
        if self.health is not None:
            await self.health.start()
        await self.scheduler.start()
        if self.declared is not None:
            await self.declared.start()

    async def stop(self) -> None:
        await self._server.stop()
        if self.declared is not None:
            await self.declared.close()
        await self.members.close()
        if self.health is not None:
            await self.health.stop()
        await self.siblings.close()
        await self.scheduler.stop()

    async def serve_until(self, stop: asyncio.Event) -> None:
        """Serve until the event is set. Raises AddressInUse."""
        await self.start()
        logger.info("scheduling %d instances on %s", len(self.scheduler.fleet.handles), self.address)
        try:
            await stop.wait()
        finally:
            await self.stop()

    async def _info(self, _: Empty) -> ServiceInfo:
        return self.scheduler.info()

    async def fetch_stats(self) -> SchedulerStats:
        """Return the figures of the scheduler and its siblings, by the instances' last reports."""
        own = msgspec.structs.replace(self.scheduler.stats(), rpc=self._server.faults)
        return await self.siblings.total(own)

    def _why_not_ready(self) -> str:
        fleet = self.scheduler.fleet
        return "" if fleet.may_serve() else "; ".join(fleet.problems())

    async def _metrics(self) -> Iterable[Family]:
        return deployment_metrics(await self.fetch_stats())

    async def _stats(self, _: Empty) -> SchedulerStats:
        await self.scheduler.refresh()
        return await self.fetch_stats()

    async def _records(self, request: RecordsRequest) -> Records:
        return Records(await self.fetch_records(request.last_s, request.request_id))

    async def fetch_records(self, last_s: float, request_id: str = "") -> list[RequestRecord]:
        """Return `CpuScheduler.records` of the scheduler and its siblings, in the order in which requests ended."""
        own, others = self.scheduler.records(last_s, request_id), await self.siblings.records(last_s, request_id)
        # Each scheduler's records keep their order: the time of day may be set back, so sorting could reverse them.
        return list(heapq.merge(own, *others, key=lambda each: each.submitted_at + each.e2e_s))

    async def _abort(self, request: AbortRequest) -> Aborted:
        asked = request.request_id, request.reason, request.choice
        return Aborted(await self.scheduler.abort(*asked) or await self.siblings.abort(*asked))

    async def instance_died(self, instance_id: str, why: str) -> None:
        """See `CpuScheduler.instance_died`; the siblings are told too. An unknown instance is ignored."""
        self.siblings.instance_died(instance_id, why)
        if instance_id in self.scheduler.fleet.handles:
            await self.scheduler.instance_died(instance_id, why)

    async def _join(self, request: JoinRequest) -> InstanceInfo:
        return await self.members.join(request.address, request.role, again=request.again)

    async def _drain(self, request: DrainRequest) -> Empty:
        if request.leaves:
            self.members.leave(request.instance_id, request.within_s)
        else:
            self.members.drain(request.instance_id)
        return Empty()

    async def _flip(self, request: FlipRequest) -> AsyncIterator[ScaleNews]:
        async with contextlib.aclosing(self.members.flip(request)) as lines:
            async for text in lines:
                yield ScaleNews(text)

    async def _scale(self, request: ScaleRequest) -> AsyncIterator[ScaleNews]:
        if self.scale is None:
            raise InvalidRequest(
                "this scheduler starts no instances, or is still starting: `hbserve instance --register` adds one, "
                "`hbserve drain --leave` removes one"
            )
        async with contextlib.aclosing(self.scale(request.wanted)) as lines:
            async for text in lines:
                yield ScaleNews(text)

    async def _reload(self, _: Empty) -> Reloaded:
        if self.declared is None:
            raise InvalidRequest("this scheduler has no file: whoever started it named its instances")
        return await self.declared.reload()

    async def _members(self, news: Members) -> None:
        if calling_peer().party not in (None, "scheduler"):
            raise InvalidRequest("only another scheduler may say which instances there are")
        await self.members.set_members(news.members)

    async def _instance_died(self, news: InstanceDied) -> None:
        if calling_peer().party == "client":
            raise InvalidRequest("a client cannot report the end of an instance")
        await self.instance_died(news.instance_id, news.why)

    async def _generate(self, request: GenerateRequest) -> AsyncIterator[ClientEvent]:
        events = self.scheduler.submit(request)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()
