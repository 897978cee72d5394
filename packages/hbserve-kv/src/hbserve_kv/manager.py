"""KVTransferManager: everything that one instance sends and receives."""

import asyncio
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from hbserve_kv.backends import make_transport
from hbserve_kv.base import KVTransferBase
from hbserve_kv.config import KVTransferConfig
from hbserve_kv.errors import TransferFailed
from hbserve_kv.lookup_buffer import LookupBuffer
from hbserve_kv.memory import Memory, Region, gather
from hbserve_kv.messages import Begin, Grant
from hbserve_kv.receiver import Incoming, Receiver, TransferResult
from hbserve_kv.sender import OutgoingTransfer, Peer
from hbserve_kv.transfer_state import Outcome
from hbserve_kv.transport import Transport
from hbserve_rpc import RpcServer


@dataclass(frozen=True)
class TransferStats:
    """Gauges are of now, counters from the start."""

    active_transfers: int
    buffered_bytes: int
    num_quarantined: int
    """Failed transfers that are not drained yet."""
    num_failed: int
    bytes_sent: int
    bytes_received: int
    busy_time_s: float
    """Time during which parts were moving to or from this instance, added up over transfers."""
    dropped_messages: int


class _Shape(msgspec.Struct, frozen=True):
    """What a tensor was, beside its bytes."""

    dtype: str
    shape: list[int]


class PostedReceive:
    """A receive that waits for its sender. Made by `KVTransferManager.post_receive`."""

    def __init__(self, receiver: Receiver, incoming: Incoming, grant: bytes) -> None:
        self.grant = grant
        """What the sender gives to `open_send`; opaque to whoever carries it."""
        self._receiver = receiver
        self._incoming = incoming

    async def wait(self) -> TransferResult:
        """How it ended. Unless the outcome is UNKNOWN, the blocks are the caller's again."""
        return await asyncio.shield(self._incoming.result)

    async def cancel(self, reason: str) -> Outcome:
        """Want it no more. Returns once nothing can land any more, or UNKNOWN at the deadline."""
        return await self._receiver.cancel(self._incoming, reason)

    async def drained(self) -> None:
        """After UNKNOWN: wait until nothing can land any more. That is never, for a sender that stays frozen."""
        await self._incoming.drained.wait()


class KVTransferManager(KVTransferBase):
    """One per instance. Lives in the event loop that ran `start`; every method belongs there.

    Engines move blocks of their pool: the receiver calls `post_receive` and passes the grant on, the sender calls
    `open_send` with it, `push`es as blocks fill, and `commit`s. Whoever has whole tensors to move uses `send_kv_cache`
    and `receive_kv_cache` instead, in any order; these go through the lookup buffer.
    """

    def __init__(
        self,
        *,
        rank: int,
        pool: torch.Tensor,
        fingerprint: Mapping[str, str | int],
        config: KVTransferConfig,
        epoch: str | None = None,
    ) -> None:
        """`pool`: (num_blocks, …), contiguous, on the CPU or a CUDA device; one block is `pool[i]`.

        `fingerprint` says what the bytes mean; both sides must have the same.

        Raises:
            BackendUnavailable: the configured backend, or a library of it, is missing.
        """
        super().__init__(rank, config.options)
        self.config = config
        self.epoch = epoch or uuid.uuid4().hex
        self._memory = Memory(pool, config.buffer_size)
        self.fingerprint = {"block_bytes": self._memory.block_bytes, **fingerprint}
        self._transport: Transport = make_transport(config, rank)
        self._server = RpcServer(config.host, config.port, epoch=self.epoch, heartbeat_timeout_s=config.timeout_s)
        self._buffer = LookupBuffer(self._memory, timeout_s=config.timeout_s, expiry_s=config.expiry_s)
        self._receiver = Receiver(
            rank=rank, epoch=self.epoch, backend=self._transport.name, fingerprint=self.fingerprint,
            transport=self._transport, buffer=self._buffer, timeout_s=config.timeout_s,
        )  # fmt: skip
        self._receiver.serve_on(self._server)
        self._peers: dict[str, Peer] = {}
        self._addresses: dict[int, str] = {}
        self._outgoing: set[OutgoingTransfer] = set()
        self._sent = self._received = self._failed = 0
        self._busy_time_s = 0.0
        self._closed = False

    async def start(self) -> None:
        """Bind the control server and make the memory ready.

        Raises:
            AddressInUse, BackendUnavailable.
        """
        await self._transport.start(self._memory)
        try:
            await self._server.start()
        except OSError:
            await self._transport.close()
            raise

    async def close(self) -> None:
        """End every transfer and leave no thread, socket or task behind. May be called twice."""
        if self._closed:
            return
        self._closed = True
        await asyncio.gather(*(transfer.abort("the sender was closed") for transfer in list(self._outgoing)))
        for peer in self._peers.values():
            await peer.disconnect()
        await self._server.stop()
        await self._receiver.close()
        await self._transport.close()

    @property
    def address(self) -> str:
        """`host:port` of the control server, as peers reach it."""
        return self._server.address

    # ---- blocks of the pool --------------------------------------------------------------------------------------

    def post_receive(self, transfer_id: str, block_ids: Sequence[int]) -> PostedReceive:
        """Expect one transfer into these blocks of the pool; no blocks: only its commit.

        Raises:
            ValueError: the id is in use, or a block is outside the pool or there twice.
        """
        num_blocks = self._memory.pool.shape[0]
        if len(set(block_ids)) != len(block_ids) or not all(0 <= block_id < num_blocks for block_id in block_ids):
            raise ValueError(f"block_ids={list(block_ids)}: expected different ones from 0 to {num_blocks - 1}")
        incoming = self._receiver.expect(transfer_id, "pool", list(block_ids))
        incoming.result.add_done_callback(lambda done: self._count_received(done.result()))
        grant = Grant(transfer_id, self.address, self.epoch, list(block_ids))
        return PostedReceive(self._receiver, incoming, msgspec.msgpack.encode(grant))

    async def open_send(self, transfer_id: str, grant: bytes) -> OutgoingTransfer:
        """Begin the transfer that `grant` allows; connects to its receiver if need be.

        Raises:
            FingerprintMismatch: the receiver's KV means something else.
            TransferFailed: the receiver is not there, was restarted, or has given the transfer up.
        """
        wanted = msgspec.msgpack.decode(grant, type=Grant)
        return await self._open(wanted.address, wanted.epoch, transfer_id, None)

    async def _open(self, address: str, epoch: str, transfer_id: str, num_bytes: int | None) -> OutgoingTransfer:
        if address not in self._peers:
            self._peers[address] = Peer(address, self, self._transport, self.config.timeout_s)
        peer = self._peers[address]
        try:
            connection = await peer.connect(epoch)
        except (OSError, RuntimeError) as error:
            raise TransferFailed(f"no connection to {address}: {error}") from error
        if epoch not in ("", peer.epoch):
            raise TransferFailed(f"transfer {transfer_id}: {address} was restarted since it granted it")
        begin = Begin(transfer_id, connection[1].key, self.epoch, peer.epoch, num_bytes)
        region: Region = "pool" if num_bytes is None else "arena"
        transfer = OutgoingTransfer(self, peer, begin, connection, self._memory, region)
        await transfer.start()
        self._outgoing.add(transfer)
        return transfer

    def ended(self, transfer: OutgoingTransfer, result: TransferResult) -> None:
        """For OutgoingTransfer: it has ended."""
        self._outgoing.discard(transfer)
        self._sent += result.num_bytes
        self._busy_time_s += result.time_s
        self._failed += result.outcome is not Outcome.COMPLETED

    # ---- whole tensors -------------------------------------------------------------------------------------------

    def add_peer(self, rank: int, address: str) -> None:
        """Say where a rank's manager is: needed to send to it by rank."""
        self._addresses[rank] = address

    async def send_kv_cache(self, request_id: str, kv_buffer: torch.Tensor, target_rank: int) -> None:
        """Send a tensor of any shape to the lookup buffer of `target_rank`; waits for room there.

        Raises:
            TransferFailed: the peer is unknown, lost, or has no room in time.
            BufferTooSmall: the tensor is larger than this side's lookup buffer.
        """
        if target_rank not in self._addresses:
            raise TransferFailed(f"rank {target_rank} is unknown; add_peer({target_rank}, address) first")
        flat = kv_buffer.contiguous().view(-1).view(torch.uint8)
        block_ids = await self._buffer.place(request_id, flat.numel())
        try:
            for i, block_id in enumerate(block_ids):
                piece = flat[i * self._memory.block_bytes : (i + 1) * self._memory.block_bytes]
                self._memory.arena[block_id, : piece.numel()].copy_(piece)
            transfer = await self._open(self._addresses[target_rank], "", request_id, flat.numel())
            transfer.push(block_ids, 0)
            shape = _Shape(str(kv_buffer.dtype).removeprefix("torch."), list(kv_buffer.shape))
            result = await transfer.commit(msgspec.msgpack.encode(shape))
        finally:
            await self._buffer.free(block_ids)
        if result.outcome is not Outcome.COMPLETED:
            raise TransferFailed(f"{request_id}: {result.error}")

    async def receive_kv_cache(self, request_id: str, source_rank: int) -> torch.Tensor:
        """The tensor that was sent under this id: from the lookup buffer if it is there, else when it comes.

        Raises:
            TransferTimeout: nothing came before the deadline.
            TransferFailed: its sender failed.
        """
        block_ids, result = await self._buffer.take(request_id)
        try:
            what = msgspec.msgpack.decode(result.payload, type=_Shape)
            dtype: Any = getattr(torch, what.dtype)
            num_bytes = math.prod(what.shape) * dtype.itemsize
            flat = gather(self._memory.arena, block_ids).reshape(-1)[:num_bytes].clone() if block_ids else None
        finally:
            await self._buffer.free(block_ids)
        if flat is None:
            return torch.empty(what.shape, dtype=dtype, device=self._memory.device)
        return flat.view(dtype).view(what.shape)

    # ---- figures -------------------------------------------------------------------------------------------------

    def _count_received(self, result: TransferResult) -> None:
        self._received += result.num_bytes
        self._busy_time_s += result.time_s
        self._failed += result.outcome is not Outcome.COMPLETED

    def stats(self) -> TransferStats:
        return TransferStats(
            active_transfers=len(self._receiver.incoming) + len(self._outgoing),
            buffered_bytes=self._memory.buffered_bytes,
            num_quarantined=len(self._receiver.quarantined),
            num_failed=self._failed,
            bytes_sent=self._sent,
            bytes_received=self._received,
            busy_time_s=self._busy_time_s,
            dropped_messages=self._receiver.dropped_messages,
        )
