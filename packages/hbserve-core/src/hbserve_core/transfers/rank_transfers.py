"""KV transfers of one rank: its manager and, if it is not rank 0, both ends of transfers/rank_protocol.py."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import msgspec

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.step import Runner
from hbserve_core.errors import RankFailed
from hbserve_core.model.shard import Shard
from hbserve_core.transfers import rank_protocol as protocol
from hbserve_core.transfers.launched_steps import LaunchedSteps
from hbserve_core.transfers.rank_protocol import Begun, Cancel, Commit, Ended, Endpoint, Figures, Push, Receive, Send
from hbserve_kv import (
    FingerprintMismatch,
    KVTransferManager,
    Outcome,
    PoolLayout,
    PostedReceive,
    SendTransfer,
    TransferFailed,
    TransferResult,
    TransferStats,
)
from hbserve_rpc import (
    HBServeRpcError,
    InvalidRequest,
    Keys,
    Method,
    PeerDied,
    RemoteError,
    RpcClient,
    RpcServer,
    RpcStream,
    StreamMethod,
)
from hbserve_rpc.messages import Empty

Q = TypeVar("Q", bound=msgspec.Struct)
R = TypeVar("R")

POOL_AXES = "blocks layers kv tokens heads dim"
"""Names of the dimensions of a runner's pool, as `LoadedModel.allocate_pool` makes it."""
RANK_STRIDE = 1 << 16
"""Distance between the numbers by which hbserve_kv knows the ranks of one instance: `kv_rank + rank * RANK_STRIDE`."""
SILENCE_S = 5.0
"""Longest silence after which a rank counts as lost. Its reports usually tell earlier: see ranks/worker_process.py."""
EXIT_STATUS_S = 1.0
"""Time given to rank 0 to learn of the end of a rank's process in another way, with its exit status. Of several reasons
for a failure, the first one is reported."""
TIMEOUT_S = 10.0
"""Deadline of calls that a rank answers at once."""
LINK_TIMEOUT_S = 300.0
"""Deadline of calls for which the rank has deadlines of its own. A rank that is lost is noticed earlier."""


def make_manager(config: InstanceConfig, runner: Runner, shard: Shard, epoch: str | None = None) -> KVTransferManager:
    """Make the manager of this process's rank, over its pool. Raises BackendUnavailable."""
    settings = msgspec.structs.replace(config.kv_transfer, keys=config.keys)
    if shard.rank:  # the next ports belong to other instances
        settings = msgspec.structs.replace(settings, port=0)
    return KVTransferManager(
        rank=config.kv_rank + shard.rank * RANK_STRIDE,
        pool=PoolLayout(runner.pool, POOL_AXES),
        fingerprint=runner.fingerprint,
        config=settings,
        epoch=epoch,
        heads=shard.kv_heads(runner.model_config.num_kv_heads),
        name=config.instance_id,
    )


class RankServer:
    """Server of the transfers of this process's rank, for rank 0. Belongs to the event loop that ran `start`."""

    def __init__(self, manager: KVTransferManager, steps: LaunchedSteps) -> None:
        self._manager = manager
        self._steps = steps
        self._server = RpcServer("127.0.0.1", 0, keys=manager.config.keys, allows=["instance"])
        self._transfers: dict[str, PostedReceive | SendTransfer] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._told: deque[Push | Commit] = deque()
        """Messages from rank 0 that wait, in order. The first is a push of a step that is not launched here yet."""

    async def start(self) -> str:
        """Start to serve, and return the address. Raises what `KVTransferManager.start` and `transfer_to_itself`
        raise."""
        server = self._server
        server.serve_stream(protocol.RECEIVE, lambda request: self._follow(request.transfer_id, self._post(request)))
        server.serve_stream(protocol.SEND, lambda request: self._follow(request.transfer_id, self._open(request)))
        server.serve_notification(protocol.PUSH, self._tell)
        server.serve_notification(protocol.COMMIT, self._tell)
        server.serve_notification(protocol.CANCEL, self._cancel)
        server.serve(protocol.ENDPOINT, self._endpoint)
        server.serve(protocol.OPEN_LINK, self._open_link)
        server.serve(protocol.STATS, self._stats)
        server.serve(protocol.CLOSE, self._close)
        await self._manager.start()
        await self._manager.transfer_to_itself()
        await server.start()
        return server.address

    async def _post(self, request: Receive) -> tuple[PostedReceive, Begun]:
        posted = self._manager.post_receive(
            request.transfer_id, request.block_ids, may_be_partial=True, sender=request.sender
        )
        return posted, Begun(grant=posted.grant)

    async def _open(self, request: Send) -> tuple[SendTransfer, Begun]:
        send = await self._manager.open_send(request.transfer_id, request.grant)
        return send, Begun(num_blocks=send.num_blocks)

    async def _follow(
        self, transfer_id: str, opening: Awaitable[tuple[PostedReceive | SendTransfer, Begun]]
    ) -> AsyncGenerator[Begun | Ended]:
        """Report one transfer from its beginning until it is drained, or until rank 0 no longer listens."""
        transfer = None
        try:
            transfer, begun = await opening
            self._transfers[transfer_id] = transfer
            yield begun
            yield Ended(await transfer.wait())
            await transfer.drained()
        except (TransferFailed, FingerprintMismatch, ValueError) as error:
            raise InvalidRequest(str(error)) from error
        finally:
            if transfer is not None:
                if self._transfers.get(transfer_id) is transfer:  # not a later one with this id
                    del self._transfers[transfer_id]
                # It is cancelled in a task of its own, because this one may be cancelled. If it has ended, nothing
                # happens.
                self._begin(transfer.cancel("rank 0 has given it up"))

    def _begin(self, job: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _tell(self, request: Push | Commit) -> None:
        self._told.append(request)
        if len(self._told) == 1:
            self._forward()

    def _forward(self) -> None:
        """Carry out the waiting messages up to the first one about a step that is not launched here yet. Rank 0 sends
        it when it has launched the step itself, which may be earlier."""
        loop = asyncio.get_running_loop()
        while self._told:
            request = self._told[0]
            step = request.step if isinstance(request, Push) else 0
            if not self._steps.has(step, lambda: loop.call_soon_threadsafe(self._forward)):
                return
            self._told.popleft()
            if not isinstance(send := self._transfers.get(request.transfer_id), SendTransfer):
                continue
            if isinstance(request, Push):
                send.push(request.block_ids, request.first, self._steps.event(step))
            else:
                self._begin(send.commit(request.payload))

    async def _cancel(self, request: Cancel) -> None:
        if transfer := self._transfers.get(request.transfer_id):
            await transfer.cancel(request.reason)

    async def _endpoint(self, _: Empty) -> Endpoint:
        return Endpoint(self._manager.endpoint)

    async def _open_link(self, request: Endpoint) -> Empty:
        try:
            await self._manager.open_link(request.endpoint)
        except (TransferFailed, FingerprintMismatch) as error:
            raise InvalidRequest(str(error)) from error
        return Empty()

    async def _stats(self, _: Empty) -> Figures:
        return Figures(self._manager.stats())

    async def _close(self, _: Empty) -> Empty:
        await self._manager.close()
        return Empty()


def serve_transfers(config: InstanceConfig, runner: Runner, shard: Shard, steps: LaunchedSteps) -> str:
    """Serve transfers in a thread of their own until the end of the process, and return the address.

    Raises:
        AddressInUse, BackendUnavailable.
    """
    address: Future[str] = Future()

    async def serve() -> None:
        try:
            address.set_result(await RankServer(make_manager(config, runner, shard), steps).start())
        except BaseException as error:  # belongs to the caller
            address.set_exception(error)
            return
        await asyncio.Event().wait()

    threading.Thread(target=lambda: asyncio.run(serve()), name="transfers", daemon=True).start()
    return address.result()


class RemoteRank:
    """Rank 0's access to the transfers of another rank, whose process serves them at `address`."""

    def __init__(self, rank: int, address: str, on_lost: Callable[[Exception], None], keys: Keys | None = None) -> None:
        """on_lost: called when the rank does not answer. The instance must end then."""
        self.name = f"rank {rank}"
        self.client = RpcClient(address, heartbeat_interval_s=1.0, heartbeat_timeout_s=SILENCE_S, keys=keys)
        self._on_lost = on_lost
        self._losing: asyncio.Task[None] | None = None
        self._stats = TransferStats()

    async def post_receive(self, transfer_id: str, block_ids: Sequence[int], sender: str = "") -> "RemoteTransfer":
        """Post a receive on the rank. Raises TransferFailed if the rank refuses or is lost."""
        return await self._begin(transfer_id, protocol.RECEIVE, Receive(transfer_id, list(block_ids), sender))

    async def open_send(self, transfer_id: str, grant: bytes) -> "RemoteTransfer":
        """Open a send on the rank. Raises TransferFailed if the rank cannot send or is lost."""
        return await self._begin(transfer_id, protocol.SEND, Send(transfer_id, grant))

    async def endpoint(self) -> bytes:
        """Return the endpoint at which the rank receives. Raises TransferFailed if it is lost."""
        return (await self._ask(protocol.ENDPOINT, Empty(), TIMEOUT_S)).endpoint

    async def open_link(self, endpoint: bytes) -> None:
        """Connect the rank to a receiver. Raises TransferFailed if the rank cannot connect or is lost."""
        await self._ask(protocol.OPEN_LINK, Endpoint(endpoint), LINK_TIMEOUT_S)

    async def _ask(self, method: Method[Q, R], request: Q, timeout_s: float) -> R:
        try:
            return await self.client.call(method, request, timeout_s=timeout_s)
        except (InvalidRequest, RemoteError) as error:
            raise TransferFailed(f"{self.name}: {error}") from error
        except HBServeRpcError as error:
            self.lost(error)
            raise TransferFailed(f"{self.name} is lost") from error

    async def _begin(self, name: str, method: StreamMethod[Any, Any], request: msgspec.Struct) -> "RemoteTransfer":
        stream = self.client.stream(method, request)
        try:
            return RemoteTransfer(self, name, stream, await anext(stream))
        except (InvalidRequest, RemoteError) as error:
            raise TransferFailed(f"{self.name}: {error}") from error
        except HBServeRpcError as error:
            self.lost(error)
            raise TransferFailed(f"transfer {name}: {self.name} is lost") from error
        except asyncio.CancelledError:
            await stream.aclose()
            raise

    def lost(self, error: Exception) -> None:
        """Report that the rank does not answer."""
        failed = RankFailed(f"{self.name} does not answer: {error}")
        if isinstance(error, PeerDied):  # whoever started its process also learns of its end, and how it ended
            asyncio.get_running_loop().call_later(EXIT_STATUS_S, self._on_lost, failed)
        else:
            self._on_lost(failed)

    async def stats(self) -> TransferStats:
        """Return the rank's figures or, if it is lost, the last ones received."""
        try:
            self._stats = (await self.client.call(protocol.STATS, Empty(), timeout_s=TIMEOUT_S)).stats
        except HBServeRpcError as error:
            self.lost(error)
        return self._stats

    def lose(self) -> None:
        """Give the rank up, because the instance has failed: calls that wait for it end, and later calls fail."""
        self._losing = asyncio.create_task(self.client.close("the instance has failed"))

    async def close(self) -> None:
        """End every transfer, and tell the peers."""
        if self._losing is not None:
            await self._losing
            return
        try:
            await self.client.call(protocol.CLOSE, Empty(), timeout_s=TIMEOUT_S)
        except HBServeRpcError as error:
            self.lost(error)
        await self.client.close()


class RemoteTransfer:
    """PostedReceive or SendTransfer of another rank.

    If the rank is lost, the transfer counts as failed and drained: the rank's process and the instance are ended before
    a block is used again.
    """

    def __init__(self, rank: RemoteRank, transfer_id: str, stream: RpcStream[Any], begun: Begun) -> None:
        self.grant, self.num_blocks = begun.grant, begun.num_blocks
        self._rank = rank
        self._transfer_id = transfer_id
        self._result: asyncio.Future[TransferResult] = asyncio.get_running_loop().create_future()
        self._draining = asyncio.create_task(self._follow(stream))

    async def _follow(self, stream: RpcStream[Any]) -> None:
        try:
            async for ended in stream:
                self._result.set_result(ended.result)
        except (InvalidRequest, RemoteError) as error:
            raise TransferFailed(f"{self._rank.name}: {error}") from error
        except HBServeRpcError as error:
            self._rank.lost(error)
        finally:
            if not self._result.done():
                self._result.set_result(TransferResult(Outcome.FAILED_DRAINED, error=f"{self._rank.name} is lost"))

    def _tell(self, method: Any, message: msgspec.Struct) -> None:
        with contextlib.suppress(HBServeRpcError):  # the client is closed, so the stream has ended too
            self._rank.client.notify(method, message)

    def push(self, block_ids: Sequence[int], first: int, step: int = 0) -> None:
        """Push blocks on the rank. step: see `Push.step`. Blocks that rank 0 has computed are also computed on that
        rank, because rank 0's step ends after the sums to which that rank contributed."""
        self._tell(protocol.PUSH, Push(self._transfer_id, list(block_ids), first, step))

    async def commit(self, payload: bytes = b"") -> TransferResult:
        self._tell(protocol.COMMIT, Commit(self._transfer_id, payload))
        return await self.wait()

    async def cancel(self, reason: str) -> Outcome:
        self._tell(protocol.CANCEL, Cancel(self._transfer_id, reason))
        return (await self.wait()).outcome

    async def wait(self) -> TransferResult:
        return await asyncio.shield(self._result)

    async def drained(self) -> None:
        await asyncio.shield(self._draining)
