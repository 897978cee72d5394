"""One transfer on the side that sends it."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import torch

from hbserve_kv.errors import FingerprintMismatch, TransferFailed
from hbserve_kv.memory.memory import Memory, Region
from hbserve_kv.protocol.messages import AnnouncedPart, Begin
from hbserve_kv.protocol.transfer_state import Outcome, Phase, SendState, TransferResult
from hbserve_kv.sending.connection import Leg
from hbserve_kv.sending.peers import Peers
from hbserve_kv.transports.base import Part

logger = logging.getLogger(__name__)


class SendTransfer:
    """One transfer to a receiver that has accepted it. Made by `KVTransferManager.open_send`.

    Under tensor parallelism the receiver is several ranks, each of which gets the heads that it has in common with this
    one: the transfer has a leg to each of them, and is what the legs are together.

    Source blocks belong to the transfer from `push` until `commit` or `abort` has returned COMPLETED or FAILED_DRAINED,
    or until `drained` has returned.
    """

    def __init__(self, begin: Begin, memory: Memory, peers: Peers, receivers: Sequence[tuple[str, str]]) -> None:
        """receivers: address and epoch of each rank."""
        self._begin = begin
        self._memory = memory
        self._region: Region = "pool" if begin.num_bytes is None else "arena"
        self._peers = peers
        self._legs: dict[int, Leg] = {}
        """Those that are connected."""
        self._places: set[int] = set()
        """Of the granted blocks, those that were pushed."""
        self._opened = asyncio.Event()
        self._drained = asyncio.Event()
        self.state = SendState(len(receivers), self._publish)
        self.result: asyncio.Future[TransferResult] = asyncio.get_running_loop().create_future()
        self.tasks = [asyncio.create_task(self._run_leg(i, *receiver)) for i, receiver in enumerate(receivers)]
        """One for each leg; they end when the receiver knows the end too."""

    async def _run_leg(self, number: int, address: str, epoch: str) -> None:
        for _ in range(2):  # with a connection that the receiver has ended already, once more over a new one
            try:
                connection = await self._peers.connection(address, epoch)
            except Exception as error:
                self.state.fail(str(error), number, error)
                return
            self._legs[number] = Leg(connection, number, self.state, self._begin, self._memory)
            if await self._legs[number].run():
                return
        self.state.fail(f"{address} has ended the connection, and a new one too", number)

    def _publish(self) -> None:
        """Called by the state after each change."""
        state = self.state
        if state.phase is not Phase.OPENING:
            self._opened.set()
        if state.ended and not self.result.done():
            self.result.set_result(self._make_result())
        if state.phase >= Phase.FAILED_DRAINED:
            self._drained.set()
        for leg in self._legs.values():
            leg.wake()

    def _make_result(self) -> TransferResult:
        if self.state.failed:
            logger.debug("transfer %s failed: %s", self._begin.transfer_id, self.state.cause)
        legs = self._legs.values()
        return TransferResult(
            self.state.outcome,
            num_bytes=sum(leg.num_blocks_moved * leg.block_bytes for leg in legs),
            num_parts=sum(leg.num_moved for leg in self.state.legs),
            time_s=max((leg.time_s for leg in legs), default=0.0),
            error=self.state.cause,
        )

    async def open(self) -> None:
        """Wait until all receivers have accepted.

        Raises:
            FingerprintMismatch: one's KV means something else.
            TransferFailed: one is not there, or refuses. Those that have accepted are told.
        """
        try:
            await self._opened.wait()
        except asyncio.CancelledError:
            self.state.fail("the sender was cancelled")
            raise
        if not self.state.failed and len({len(leg.target.block_ids) for leg in self._legs.values()}) > 1:
            self.state.fail("the ranks of the receiver want different numbers of blocks")
        if self.state.failed:
            error = self.state.error
            if isinstance(error, FingerprintMismatch):
                raise error
            raise TransferFailed(f"transfer {self._begin.transfer_id}: {self.state.cause}") from error

    @property
    def num_blocks(self) -> int:
        """How many blocks the receiver wants."""
        return len(self._legs[0].target.block_ids)

    def push(self, block_ids: Sequence[int], first: int, ready: Any = None) -> None:
        """Queue blocks: `block_ids[i]` goes to block `first + i` of those granted. Returns at once.

        On CUDA the blocks are read after the event `ready`, or without one after the work that is now queued on the
        caller's current stream; other transfers do not wait for it. Nothing, if the transfer has failed.

        Raises:
            ValueError: more blocks than were granted, or one that this side does not have; or the transfer is
                committed.
        """
        if first < 0 or first + len(block_ids) > self.num_blocks:
            raise ValueError(f"blocks [{first}, {first + len(block_ids)}) of {self.num_blocks} granted ones")
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self._memory.rows(self._region).shape[0]:
            raise ValueError(f"block_ids={list(block_ids)}: outside the pool")
        if self.state.phase in (Phase.COMMITTING, Phase.COMPLETED):
            raise ValueError(f"blocks [{first}, {first + len(block_ids)}) after the commit")
        if ready is None and self._memory.device.type == "cuda":
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(self._memory.device))
        self._places.update(range(first, first + len(block_ids)))
        for number, leg in self._legs.items():
            is_waiting = bool(leg.parts)
            step = max(1, leg.connection.transport.max_part_bytes // self._memory.block_bytes)
            for start in range(0, len(block_ids), step):
                ids = list(block_ids[start : start + step])
                index, offset = self.state.legs[number].num_pushed, first + start
                if not self.state.push(number):
                    return
                target = leg.target.block_ids[offset : offset + len(ids)]
                part = Part(self._begin.transfer_id, index, self._region, ids, leg.target.region, target, ready)
                leg.parts.append((part, AnnouncedPart(index, offset, len(ids))))
            leg.num_blocks_pushed = len(self._places)
            if leg.parts and not is_waiting:
                leg.connection.queue(leg)

    async def commit(self, payload: bytes = b"") -> TransferResult:
        """Wait for all parts, then hand the transfer over with `payload`. COMPLETED: the receiver has acknowledged,
        which it does for all blocks that it has granted, and for fewer only if it was posted so. The payload may have
        1 MiB."""
        self.state.commit(payload)
        return await self.wait()

    async def abort(self, reason: str) -> Outcome:
        """Send no more. Returns once no block is read any more, or UNKNOWN. Nothing, if the transfer has ended."""
        self.state.fail(reason)
        return (await self.wait()).outcome

    cancel = abort
    """Its name at a PostedReceive, for who has both."""

    async def wait(self) -> TransferResult:
        """How it ended: after a commit, an abort or a failure."""
        return await asyncio.shield(self.result)

    async def drained(self) -> None:
        """After UNKNOWN: wait until no block is read any more."""
        await self._drained.wait()


OutgoingTransfer = SendTransfer
"""Its earlier name."""
