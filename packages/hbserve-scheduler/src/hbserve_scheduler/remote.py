"""A scheduler in another process, used as if it were in this one."""

import asyncio
from collections.abc import Mapping
from typing import Literal

from hbserve_rpc import HBServeRpcError, Keys, NotAllowed, ProtocolMismatch, RpcClient, RpcStream
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
    Member,
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
    AbortRequest,
    ClientEvent,
    Empty,
    FinishReason,
    GenerateRequest,
    InstanceDied,
    InstanceInfo,
    Role,
    SchedulerStats,
    ServiceInfo,
)
from hbserve_rpc.plain_values import plain_id
from hbserve_rpc.records import SCHEDULER_RECORDS, RecordsRequest, RequestRecord
from hbserve_scheduler.admission import admitted
from hbserve_scheduler.errors import NotReady

CALL_TIMEOUT_S = 10.0
RETRY_S = 0.1


class RemoteScheduler:
    """Client of a SchedulerServer at `host:port`."""

    def __init__(self, address: str, *, heartbeat_timeout_s: float = 10.0, keys: Keys | None = None) -> None:
        """Make a client that is not connected yet.

        heartbeat_timeout_s: time of silence after which each side takes the other for lost, and ends its requests.
        keys: those of a client or of a scheduler, if the server has keys.
        """
        self.address = address
        self._infos: list[InstanceInfo] = []
        self.digest_block_size = 0
        """See `CpuScheduler.digest_block_size`; the value that `find` received last."""
        self._client = RpcClient(
            address,
            heartbeat_interval_s=heartbeat_timeout_s / 5,
            heartbeat_timeout_s=heartbeat_timeout_s,
            keys=keys,
            server="scheduler",
        )

    async def start(self) -> None:
        await self._client.start()

    async def stop(self) -> None:
        await self._client.close()

    async def find(self, timeout_s: float) -> ServiceInfo:
        """Wait until the scheduler answers. Requests wait there for instances that are not ready yet.

        Raises:
            NotReady: it did not answer in time. Raised at once if the scheduler does not let this side in, or speaks
                another protocol version.
        """
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        problem = f"{self.address}: no answer"
        while (left_s := deadline_s - asyncio.get_running_loop().time()) > 0:
            try:
                info = await self._client.call(SCHEDULER_INFO, Empty(), timeout_s=min(left_s, CALL_TIMEOUT_S))
                self._infos = [each for each in info.instances if each.status == "ready"]
                self.digest_block_size = info.digest_block_size
                return info
            except (NotAllowed, ProtocolMismatch) as error:
                raise NotReady(str(error)) from error
            except HBServeRpcError as error:
                problem = str(error)
                await asyncio.sleep(min(RETRY_S, max(0.0, deadline_s - asyncio.get_running_loop().time())))
        raise NotReady(f"no scheduler within {timeout_s:g} s: {problem}")

    def submit(self, request: GenerateRequest) -> RpcStream[ClientEvent]:
        """Return a stream of TokenEvents, then a RequestFinished for each choice. Its first item raises what
        `CpuScheduler.submit` raises."""
        return self._client.stream(SCHEDULER_GENERATE, self.check(request))

    def check(self, request: GenerateRequest) -> GenerateRequest:
        """See `CpuScheduler.check`. This checks against the instances that `find` received last."""
        return admitted(request, self._infos, self.digest_block_size)

    async def wait_for_room(self, priority: int = 0) -> None:
        """Return at once: the queue is in the other process, which answers Overloaded itself."""

    async def abort(self, request_id: str, reason: FinishReason = "abort", choice: int | None = None) -> bool:
        """See `CpuScheduler.abort`."""
        request_id = plain_id("request_id", request_id)
        request = AbortRequest(request_id, reason, choice)
        reply = await self._client.call(SCHEDULER_ABORT, request, timeout_s=CALL_TIMEOUT_S)
        return reply.found

    def instance_died(self, instance_id: str, why: str) -> None:
        """See `CpuScheduler.instance_died`. Nothing tells when the scheduler has heard of it."""
        self._client.notify(SCHEDULER_INSTANCE_DIED, InstanceDied(instance_id, why))

    async def join(self, address: str, role: Role | None = None, *, again: bool = True) -> InstanceInfo:
        """Have the scheduler use the instance at `host:port`: see `Membership.join`."""
        return await self._client.call(SCHEDULER_JOIN, JoinRequest(address, role, again), timeout_s=CALL_TIMEOUT_S)

    async def drain(self, instance_id: str, *, leaves: bool = False, within_s: float | None = None) -> None:
        """Have an instance get no new requests, and with `leaves`, leave when it has none left: see `Membership`."""
        request = DrainRequest(instance_id, leaves, within_s)
        await self._client.call(SCHEDULER_DRAIN, request, timeout_s=CALL_TIMEOUT_S)

    def flip(self, instance_id: str, role: Literal["prefill", "decode"]) -> RpcStream[ScaleNews]:
        """Have an instance serve in the other role: see `Membership.flip`. The stream ends when it does.

        Raises, while iterating:
            InvalidRequest: the role cannot be changed; says why.
        """
        return self._client.stream(SCHEDULER_FLIP, FlipRequest(instance_id, role))

    def scale(self, wanted: Mapping[Role, int]) -> RpcStream[ScaleNews]:
        """Have `wanted[role]` instances of each role, of those that the deployment has started. The stream ends when
        that is done.

        Raises, while iterating:
            InvalidRequest: there cannot be so many, or this scheduler starts none; says why.
            RemoteError: an instance did not start; has its reason.
        """
        return self._client.stream(SCHEDULER_SCALE, ScaleRequest(dict(wanted)))

    async def reload(self) -> Reloaded:
        """Have the deployment's file read again."""
        return await self._client.call(SCHEDULER_RELOAD, Empty(), timeout_s=CALL_TIMEOUT_S)

    def tell_members(self, members: list[Member]) -> None:
        """Have a sibling use exactly these instances. Nothing tells when it has heard of it."""
        self._client.notify(SCHEDULER_MEMBERS, Members(members))

    async def fetch_stats(self) -> SchedulerStats:
        return await self._client.call(SCHEDULER_STATS, Empty(), timeout_s=CALL_TIMEOUT_S)

    async def fetch_records(self, last_s: float, request_id: str = "") -> list[RequestRecord]:
        """See `CpuScheduler.records`."""
        request = RecordsRequest(last_s, request_id)
        return (await self._client.call(SCHEDULER_RECORDS, request, timeout_s=CALL_TIMEOUT_S)).requests
