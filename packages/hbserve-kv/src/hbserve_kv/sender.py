"""The sending half of a KVTransferManager: peers that it sends to, and transfers under way to them."""

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hbserve_kv import messages
from hbserve_kv.errors import FingerprintMismatch, TransferFailed
from hbserve_kv.memory import Memory, Region
from hbserve_kv.messages import Abandon, Accepted, Begin, Cancelled, Commit, Handshake, PartAnnounced
from hbserve_kv.receiver import TransferResult
from hbserve_kv.transfer_state import Outcome
from hbserve_kv.transport import DrainUnknown, Link, Part, Transport
from hbserve_rpc import HBServeRpcError, RpcClient, RpcStream

if TYPE_CHECKING:
    from hbserve_kv.manager import KVTransferManager

logger = logging.getLogger(__name__)

MAX_PART_BYTES = 64 << 20
"""A larger push is cut: this bounds the staging memory of two-sided transports."""


class Peer:
    """A process that this one sends to. One control connection, one link; both are made again after a failure."""

    def __init__(self, address: str, manager: "KVTransferManager", transport: Transport, timeout_s: float) -> None:
        self.address = address
        self.epoch = ""
        self.rank = -1
        self._manager = manager
        self._transport = transport
        self._timeout_s = timeout_s
        self._client: RpcClient | None = None
        self._link: Link | None = None
        self._connecting = asyncio.Lock()
        self._in_order = asyncio.Lock()

    async def connect(self, epoch: str = "") -> tuple[RpcClient, Link]:
        """The connection; made or renewed if there is none, or none to that `epoch` of the peer."""
        async with self._connecting:
            if self._link is not None and self._client is not None and epoch in ("", self.epoch):
                return self._client, self._link
            await self.disconnect()
            interval_s = min(2.0, self._timeout_s / 4)
            client = RpcClient(self.address, heartbeat_interval_s=interval_s, heartbeat_timeout_s=self._timeout_s)
            await client.start()
            self._client = client
            try:
                self._link = await self._shake_hands(client)
                async with asyncio.timeout(self._timeout_s):
                    await self._transport.connect(self._link)
            except BaseException:
                await self.disconnect()
                raise
            return client, self._link

    async def _shake_hands(self, client: RpcClient) -> Link:
        me, key = self._manager, uuid.uuid4().hex
        hello = Handshake(
            messages.PROTOCOL_VERSION, me.rank, me.epoch, me.address, self._transport.name,
            dict(me.fingerprint), self._transport.describe(), key,
        )  # fmt: skip
        try:
            reply = await client.call(messages.HANDSHAKE, hello, timeout_s=self._timeout_s)
        except HBServeRpcError as error:
            if FingerprintMismatch.__name__ in str(error):
                raise FingerprintMismatch(f"{self.address} refuses: {error}") from error
            raise TransferFailed(f"no handshake with {self.address}: {error}") from error
        self.epoch, self.rank = reply.epoch, reply.rank
        return Link(key, is_sender=True, peer_rank=reply.rank, peer_description=reply.description)

    async def disconnect(self) -> None:
        link, client = self._link, self._client
        self._link = self._client = None
        if link is not None:
            await self._transport.disconnect(link)
            link.executor.shutdown(wait=False)
        if client is not None:
            await client.close()

    async def move(self, client: RpcClient, link: Link, part: Part, announced: PartAnnounced) -> None:
        """Move one part, after those before it.

        Raises:
            Exception: it failed; the link is gone, since the two sides may disagree on what was sent over it.
        """
        async with self._in_order:
            if self._link is not link:
                raise TransferFailed(f"the link to {self.address} broke")
            work: list[Any] = [asyncio.ensure_future(self._transport.push(link, part))]
            if not self._transport.one_sided:
                work.append(asyncio.ensure_future(
                    client.call(messages.PART, announced, timeout_s=2 * self._timeout_s)
                ))  # fmt: skip
            try:
                await asyncio.gather(*work)
            except BaseException:
                await self._transport.disconnect(link)
                for job in work:
                    job.cancel()
                await asyncio.gather(*work, return_exceptions=True)
                if self._link is link:
                    await self.disconnect()
                raise


class OutgoingTransfer:
    """One transfer to a peer that has accepted it. Made by `KVTransferManager.open_send`.

    Source blocks belong to the transfer from `push` until `commit` or `abort` has returned COMPLETED or FAILED_DRAINED.
    """

    def __init__(
        self,
        manager: "KVTransferManager",
        peer: Peer,
        begin: Begin,
        connection: tuple[RpcClient, Link],
        memory: Memory,
        region: Region = "pool",
    ) -> None:
        self._begin = begin
        self._manager = manager
        self._peer = peer
        self._client, self._link = connection
        self._memory = memory
        self._region: Region = region
        self._target: Accepted | None = None
        self._stream: RpcStream[Any] = self._client.stream(messages.TRANSFER, begin)
        self._parts: asyncio.Queue[Part | None] = asyncio.Queue()
        self._indices = itertools.count()
        self._first_of: dict[int, int] = {}
        self._error = ""
        self._drained = True
        self._num_parts = 0
        self._num_bytes = 0
        self._time_s = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Raises TransferFailed if the receiver refuses."""
        try:
            first = await anext(self._stream)
        except (HBServeRpcError, StopAsyncIteration) as error:
            await self._stream.aclose()
            raise TransferFailed(f"transfer {self._begin.transfer_id}: {error or 'ended by the receiver'}") from error
        if isinstance(first, Cancelled):
            await self._stream.aclose()
            raise TransferFailed(f"transfer {self._begin.transfer_id}: cancelled by the receiver: {first.reason}")
        self._target = first
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._listen())]

    @property
    def num_blocks(self) -> int:
        """How many blocks the receiver wants."""
        assert self._target is not None
        return len(self._target.block_ids)

    def push(self, block_ids: Sequence[int], first: int, ready: Any = None) -> None:
        """Queue blocks: `block_ids[i]` goes to block `first + i` of those granted. Returns at once.

        On CUDA the blocks are read after the event `ready`, or without one after the work that is now queued on the
        caller's current stream.

        Raises:
            ValueError: more blocks than were granted.
        """
        assert self._target is not None
        if first < 0 or first + len(block_ids) > self.num_blocks:
            raise ValueError(f"blocks [{first}, {first + len(block_ids)}) of {self.num_blocks} granted ones")
        if ready is None and self._memory.device.type == "cuda":
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(self._memory.device))
        step = max(1, MAX_PART_BYTES // self._memory.block_bytes)
        for start in range(0, len(block_ids), step):
            ids = list(block_ids[start : start + step])
            index, offset = next(self._indices), first + start
            target = self._target.block_ids[offset : offset + len(ids)]
            self._first_of[index] = offset
            part = Part(self._begin.transfer_id, index, self._region, ids, self._target.region, target, ready)
            self._parts.put_nowait(part)

    async def commit(self, payload: bytes = b"") -> TransferResult:
        """Wait for all parts, then hand the transfer over with `payload`. COMPLETED: the receiver has acknowledged."""
        self._parts.put_nowait(None)
        await self._tasks[0]
        if not self._error:
            message = Commit(
                self._begin.transfer_id,
                self._begin.sender_epoch,
                self._num_parts,
                self._num_bytes,
                self._time_s,
                payload,
            )
            try:
                await self._client.call(messages.COMMIT, message, timeout_s=self._manager.config.timeout_s)
            except HBServeRpcError as error:
                # If the receiver gave up, its reason is on its way, and says more than the refusal.
                await asyncio.wait([self._tasks[1]], timeout=1.0)
                self._fail(f"commit: {error}")
        if self._error:
            await self._tell()
        return await self._end(Outcome.COMPLETED if not self._error else self._failed_outcome())

    async def abort(self, reason: str) -> Outcome:
        """Send no more. Returns once no block is read any more."""
        self._fail(reason)
        self._parts.put_nowait(None)
        await self._tasks[0]
        await self._tell()
        return (await self._end(self._failed_outcome())).outcome

    def _failed_outcome(self) -> Outcome:
        return Outcome.FAILED_DRAINED if self._drained else Outcome.UNKNOWN

    async def _end(self, outcome: Outcome) -> TransferResult:
        self._tasks[1].cancel()
        await asyncio.gather(self._tasks[1], return_exceptions=True)
        await self._stream.aclose()
        result = TransferResult(outcome, b"", self._num_bytes, self._num_parts, self._time_s, self._error)
        self._manager.ended(self, result)
        return result

    async def _work(self) -> None:
        while (part := await self._parts.get()) is not None:
            if self._error:
                continue
            announced = PartAnnounced(
                part.transfer_id, self._begin.sender_epoch, part.index, self._first_of[part.index], len(part.block_ids)
            )
            began_s = time.monotonic()
            try:
                await self._peer.move(self._client, self._link, part, announced)
            except (Exception, DrainUnknown) as error:  # whatever a backend raised has failed this transfer
                self._drained = self._drained and not isinstance(error, DrainUnknown)
                self._fail(f"part {part.index}: {type(error).__name__}: {error}")
                continue
            self._time_s += time.monotonic() - began_s
            self._num_parts += 1
            self._num_bytes += len(part.block_ids) * self._memory.block_bytes

    async def _listen(self) -> None:
        try:
            async for item in self._stream:
                if isinstance(item, Cancelled):
                    self._fail(f"cancelled by the receiver: {item.reason}")
                    self._parts.put_nowait(None)
                    await self._tasks[0]
                    await self._tell()
        except HBServeRpcError as error:
            self._fail(str(error))

    async def _tell(self) -> None:
        """Tell the receiver that this transfer has failed, and whether anything may still land."""
        message = Abandon(self._begin.transfer_id, self._begin.sender_epoch, self._error, self._drained)
        try:
            await self._client.call(messages.ABANDON, message, timeout_s=self._manager.config.timeout_s)
        except HBServeRpcError as error:
            logger.info("transfer %s: the receiver was not told of its end: %s", self._begin.transfer_id, error)

    def _fail(self, cause: str) -> None:
        if not self._error:
            logger.debug("transfer %s failed: %s", self._begin.transfer_id, cause)
            self._error = cause
