"""One transfer on the side that sends it."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hbserve_kv.errors import TransferFailed
from hbserve_kv.memory.memory import Memory, Region
from hbserve_kv.protocol import messages
from hbserve_kv.protocol.checksum import link_checksums
from hbserve_kv.protocol.messages import Accepted, AnnouncedPart, Begin, Commit
from hbserve_kv.protocol.transfer_state import Outcome, TransferResult
from hbserve_kv.sending.connection import Connection
from hbserve_kv.transports.base import DrainUnknown, Part
from hbserve_rpc import HBServeRpcError, InvalidRequest

logger = logging.getLogger(__name__)

MAX_ANNOUNCED_PARTS = 16
DRAIN_PATIENCE_S = 1.0
"""How long the end of a transfer waits for a link to become quiet, before it is UNKNOWN."""


class OutgoingTransfer:
    """One transfer to a peer that has accepted it. Made by `KVTransferManager.open_send`.

    Source blocks belong to the transfer from `push` until `commit` or `abort` has returned COMPLETED or FAILED_DRAINED,
    or until `drained` has returned.
    """

    def __init__(
        self,
        connection: Connection,
        begin: Begin,
        memory: Memory,
        region: Region,
        on_end: Callable[["OutgoingTransfer", TransferResult], None],
    ) -> None:
        self._connection = connection
        self._begin = begin
        self._memory = memory
        self._region: Region = region
        self._on_end = on_end
        self._target: Accepted | None = None
        self._parts: asyncio.Queue[tuple[Part, AnnouncedPart] | None] = asyncio.Queue()
        self._num_pushed = self._num_pushed_bytes = 0
        self._checksums: dict[int, int] = {}
        self._error = ""
        self._is_unknown = False
        self._is_committed = False
        """The receiver has it, whatever happens to the connection now."""
        self._num_begun = self._num_parts = self._num_bytes = 0
        self._may_commit = asyncio.Event()
        self._time_s = 0.0
        self._worker: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[TransferResult] | None = None
        self._told: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Raises TransferFailed if the receiver refuses."""
        name, connection = self._begin.transfer_id, self._connection
        if name in connection.transfers:
            raise TransferFailed(f"transfer {name} to {connection.client.address} is under way already")
        connection.transfers[name] = self._cancel
        try:
            # The receiver waits for room in its lookup buffer for no longer than its own deadline.
            self._target = await connection.client.call(messages.BEGIN, self._begin, timeout_s=2 * connection.timeout_s)
        except InvalidRequest as error:
            connection.forget(name)
            raise TransferFailed(f"transfer {name}: {error}") from error
        except BaseException as error:
            # The receiver may have accepted it, and must not wait for us.
            self._error = self._error or str(error) or "the sender was cancelled"
            self._told = asyncio.create_task(self._tell())
            if isinstance(error, HBServeRpcError):
                raise TransferFailed(f"transfer {name}: {error}") from error
            raise
        if self._error:  # while the answer was on its way
            self._told = asyncio.create_task(self._tell())
            raise TransferFailed(f"transfer {name}: {self._error}")
        self._worker = asyncio.create_task(self._work())

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
            ValueError: more blocks than were granted, or one that this side does not have.
        """
        assert self._target is not None
        if first < 0 or first + len(block_ids) > self.num_blocks:
            raise ValueError(f"blocks [{first}, {first + len(block_ids)}) of {self.num_blocks} granted ones")
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self._memory.rows(self._region).shape[0]:
            raise ValueError(f"block_ids={list(block_ids)}: outside the pool")
        if ready is None and self._memory.device.type == "cuda":
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(self._memory.device))
        step = max(1, self._connection.transport.max_part_bytes // self._memory.block_bytes)
        for start in range(0, len(block_ids), step):
            ids = list(block_ids[start : start + step])
            index, offset = self._num_pushed, first + start
            target = self._target.block_ids[offset : offset + len(ids)]
            part = Part(self._begin.transfer_id, index, self._region, ids, self._target.region, target, ready)
            self._num_pushed += 1
            self._num_pushed_bytes += self._bytes_of(part)
            self._parts.put_nowait((part, AnnouncedPart(index, offset, len(ids))))

    async def commit(self, payload: bytes = b"") -> TransferResult:
        """Wait for all parts, then hand the transfer over with `payload`. COMPLETED: the receiver has acknowledged."""
        return await self._end(payload)

    async def abort(self, reason: str) -> Outcome:
        """Send no more. Returns once no block is read any more, or UNKNOWN. Nothing, if the transfer has ended."""
        self._cancel(reason)
        return (await self._end(None)).outcome

    async def drained(self) -> None:
        """After UNKNOWN: wait until no block is read any more."""
        if self._is_unknown:
            await self._connection.quiet.wait()

    async def closed(self) -> None:
        """After the end: wait until the receiver was told, too."""
        if self._told is not None:
            await asyncio.wait([self._told])

    async def _end(self, payload: bytes | None) -> TransferResult:
        # A task of its own: whoever waits may be cancelled, and the transfer must still end.
        return await asyncio.shield(self._start_end(payload))

    def _start_end(self, payload: bytes | None) -> "asyncio.Task[TransferResult]":
        if self._ending is None:
            self._parts.put_nowait(None)
            self._ending = asyncio.create_task(self._finish(payload))
            self._check_complete()
        return self._ending

    async def _finish(self, payload: bytes | None) -> TransferResult:
        committing = asyncio.create_task(self._commit(payload)) if payload is not None else None
        await self._wait_for_worker()
        if committing is not None:
            if self._error:
                committing.cancel()
            await asyncio.wait([committing])
            if not committing.cancelled():
                committing.result()
        outcome = Outcome.COMPLETED
        if self._error:
            outcome = Outcome.FAILED_DRAINED
            self._told = asyncio.create_task(self._tell())
            if self._is_unknown:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(DRAIN_PATIENCE_S):
                        await self._connection.quiet.wait()
                outcome = Outcome.FAILED_DRAINED if self._connection.quiet.is_set() else Outcome.UNKNOWN
        else:
            self._connection.forget(self._begin.transfer_id)
        result = TransferResult(outcome, b"", self._num_bytes, self._num_parts, self._time_s, self._error)
        self._on_end(self, result)
        return result

    async def _wait_for_worker(self) -> None:
        """A part that does not end though its peer was lost, as Mooncake's may for a minute, is not waited for."""
        assert self._worker is not None
        losing = asyncio.create_task(self._connection.is_lost.wait())
        await asyncio.wait([self._worker, losing], return_when=asyncio.FIRST_COMPLETED)
        losing.cancel()
        await asyncio.wait([self._worker], timeout=DRAIN_PATIENCE_S)
        if not self._worker.done():
            self._is_unknown = True
            self._cancel(self._connection.lost)

    def _check_complete(self) -> None:
        """The receiver of a two-sided transport knows when the parts have landed that were announced to it."""
        done = self._num_parts if self._connection.transport.one_sided else self._num_begun
        if self._ending is not None and done == self._num_pushed:
            self._may_commit.set()

    def _begun(self, num_parts: int) -> None:
        self._num_begun += num_parts
        self._check_complete()

    async def _commit(self, payload: bytes) -> None:
        await self._may_commit.wait()
        message = Commit(
            self._begin.transfer_id, self._begin.link, self._num_pushed, self._num_pushed_bytes, self._time_s, payload,
            self._checksums,
        )  # fmt: skip
        # The receiver answers when all parts have landed, and gives each its own deadline.
        timeout_s = self._connection.timeout_s * (2 + self._num_pushed)
        try:
            await self._connection.client.call(messages.COMMIT, message, timeout_s=timeout_s)
            self._is_committed = True
        except HBServeRpcError as error:
            self._cancel(f"commit: {error}")

    async def _tell(self) -> None:
        """Tell the receiver that this has failed, whether anything may still land, and when it cannot any more."""
        connection, name = self._connection, self._begin.transfer_id
        if self._is_unknown and not connection.quiet.is_set():
            await connection.abandon(name, self._error, drained=False)
            await connection.quiet.wait()
        await connection.abandon(name, self._error, drained=True, in_kernel=self._is_unknown)
        connection.forget(name)

    async def _work(self) -> None:
        while (item := await self._parts.get()) is not None:
            batch = [item]
            is_last = False
            while len(batch) < MAX_ANNOUNCED_PARTS and not self._parts.empty() and not is_last:
                following = self._parts.get_nowait()
                is_last = following is None
                batch += [following] if following is not None else []
            if not self._error:
                await self._move([part for part, _ in batch], [announced for _, announced in batch])
            if is_last:
                return

    async def _move(self, parts: Sequence[Part], announced: Sequence[AnnouncedPart]) -> None:
        try:
            await self._note_checksums(parts, announced)
            self._time_s += await self._connection.move(
                self._begin.transfer_id, parts, announced, lambda: self._begun(len(parts))
            )
        except Exception as error:  # whatever a backend raised has failed this transfer
            self._is_unknown = self._is_unknown or isinstance(error, DrainUnknown)
            self._cancel(f"part {announced[0].index}: {type(error).__name__}: {error}")
            return
        self._num_parts += len(parts)
        self._num_bytes += sum(self._bytes_of(part) for part in parts)
        self._check_complete()

    def _bytes_of(self, part: Part) -> int:
        heads = self._connection.link.heads
        share = 1.0 if heads is None else heads.count / self._memory.num_heads
        return int(len(part.block_ids) * self._memory.block_bytes * share)

    async def _note_checksums(self, parts: Sequence[Part], announced: Sequence[AnnouncedPart]) -> None:
        assert self._target is not None
        if self._target.checksum:
            link = self._connection.link
            for part, what in zip(parts, announced, strict=True):
                numbers = await link.run(link_checksums, self._memory, link, part.region, part.block_ids, part.ready)
                self._checksums.update(zip(range(what.first, what.end), numbers, strict=True))

    def _cancel(self, cause: str) -> None:
        """Stop after the part that is under way, and end: the receiver waits to hear it. The first cause is kept."""
        if self._error or self._is_committed:
            return
        logger.debug("transfer %s failed: %s", self._begin.transfer_id, cause)
        self._error = cause
        if self._worker is not None:
            self._start_end(None)
