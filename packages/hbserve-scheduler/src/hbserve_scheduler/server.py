"""A CpuScheduler behind RPC, for clients in other processes."""

import asyncio
import logging
from collections.abc import AsyncIterator

from hbserve_rpc import RpcServer
from hbserve_rpc.messages import (
    SCHEDULER_ABORT,
    SCHEDULER_GENERATE,
    SCHEDULER_INFO,
    SCHEDULER_STATS,
    Aborted,
    AbortRequest,
    ClientEvent,
    Empty,
    GenerateRequest,
    SchedulerStats,
    ServiceInfo,
)
from hbserve_rpc.records import SCHEDULER_RECORDS, Records, RecordsRequest
from hbserve_scheduler.cpu_scheduler import CpuScheduler

logger = logging.getLogger(__name__)


class SchedulerServer:
    """Starts and stops with its scheduler. A client that goes away aborts its requests."""

    def __init__(self, scheduler: CpuScheduler) -> None:
        self.scheduler = scheduler
        self._server = RpcServer(scheduler.config.host, scheduler.config.port, drops_closed=True)
        self._server.serve(SCHEDULER_INFO, self._info)
        self._server.serve(SCHEDULER_STATS, self._stats)
        self._server.serve(SCHEDULER_RECORDS, self._records)
        self._server.serve(SCHEDULER_ABORT, self._abort)
        self._server.serve_stream(SCHEDULER_GENERATE, self._generate)

    @property
    def address(self) -> str:
        return self._server.address

    async def start(self) -> None:
        """Raises AddressInUse."""
        await self._server.start()
        await self.scheduler.start()

    async def stop(self) -> None:
        await self._server.stop()
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

    async def _stats(self, _: Empty) -> SchedulerStats:
        await self.scheduler.refresh()
        return self.scheduler.stats()

    async def _records(self, request: RecordsRequest) -> Records:
        return Records(self.scheduler.records(request.last_s, request.request_id))

    async def _abort(self, request: AbortRequest) -> Aborted:
        return Aborted(await self.scheduler.abort(request.request_id, request.reason))

    async def _generate(self, request: GenerateRequest) -> AsyncIterator[ClientEvent]:
        events = self.scheduler.submit(request)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()
