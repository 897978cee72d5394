"""`SendTransfer`, which is one transfer at its sender, from `open_send` to `commit`. Its legs are in link.py."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from hbserve_kv.errors import FingerprintMismatch, TransferFailed
from hbserve_kv.memory.layout import checked_blocks, checked_layers
from hbserve_kv.memory.memory import Memory, Region
from hbserve_kv.protocol.messages import AnnouncedPart, Begin, checked_payload
from hbserve_kv.protocol.transfer_state import Outcome, Phase, SendState, TransferResult
from hbserve_kv.sending.link import Leg
from hbserve_kv.sending.peers import Peers
from hbserve_kv.transports.base import Part

logger = logging.getLogger(__name__)


def require_loop(loop: asyncio.AbstractEventLoop | None) -> None:
    """Raise RuntimeError if this is another event loop or thread than that of `loop`, which would not notice the call.
    `loop` may be None, which is not checked."""
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if loop is not None and running is not loop:
        raise RuntimeError(
            "transfers belong to the event loop that started their manager: call it there "
            "(asyncio.run_coroutine_threadsafe, loop.call_soon_threadsafe)"
        )


class SendTransfer:
    """One transfer to a receiver that has accepted it. Made by `KVTransferManager.open_send`.

    Under tensor parallelism the receiver is several ranks, each of which gets the heads that it has in common with this
    one. The transfer has a leg to each of them, and consists of these legs.

    Source blocks belong to the transfer from `push` until `commit` or `abort` has returned COMPLETED or FAILED_DRAINED,
    or until `drained` has returned.
    """

    def __init__(self, begin: Begin, memory: Memory, peers: Peers, receivers: Sequence[tuple[str, str]]) -> None:
        """`receivers` are the address and the epoch of each rank."""
        self._begin = begin
        self._memory = memory
        self._region: Region = "pool" if begin.num_bytes is None else "arena"
        self._peers = peers
        self._legs: dict[int, Leg] = {}
        """Legs whose link has been made, by number."""
        self._opened = asyncio.Event()
        self._drained = asyncio.Event()
        self.state = SendState(len(receivers), self._publish)
        self.result: asyncio.Future[TransferResult] = asyncio.get_running_loop().create_future()
        self.tasks = [asyncio.create_task(self._run_leg(i, *receiver)) for i, receiver in enumerate(receivers)]
        """One task for each leg. It ends when the receiver knows how the transfer ended."""

    async def _run_leg(self, number: int, address: str, epoch: str) -> None:
        for _ in range(2):  # if the receiver has ended the link already, try once more over a new one
            try:
                outgoing = await self._peers.link_to(address, epoch)
            except Exception as error:
                self.state.fail(str(error), number, error)
                return
            self._legs[number] = Leg(outgoing, number, self.state, self._begin, self._memory)
            if await self._legs[number].run():
                return
        self.state.fail(f"{address} has ended the connection, and a new one too", number)

    def _publish(self) -> None:
        """Let everyone who waits know the new state. The state calls this after each change."""
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
            num_bytes=sum(leg.num_bytes_moved for leg in legs),
            num_parts=sum(leg.num_moved for leg in self.state.legs),
            time_s=max((leg.time_s for leg in legs), default=0.0),
            error=self.state.cause,
        )

    async def open(self) -> None:
        """Wait until all receivers have accepted.

        Raises:
            FingerprintMismatch: the KV of a receiver means something else.
            TransferFailed: a receiver is not there, or refuses. Those that have accepted are told.
        """
        try:
            await self._opened.wait()
        except asyncio.CancelledError:
            self.state.fail("the sender was cancelled")
            raise
        if not self.state.failed and len({len(leg.target_units) for leg in self._legs.values()}) > 1:
            self.state.fail("the ranks of the receiver want different numbers of blocks")
        if self.state.failed:
            error = self.state.error
            if isinstance(error, FingerprintMismatch):
                raise error
            raise TransferFailed(f"transfer {self._begin.transfer_id}: {self.state.cause}") from error

    @property
    def num_blocks(self) -> int:
        """Number of blocks, of `block_size` tokens each, that the receiver wants."""
        return len(self._legs[0].target_units)

    @property
    def block_size(self) -> int:
        """Tokens per block in this transfer's count of blocks: the smaller of the two sides' block sizes."""
        return self._legs[0].side.unit_tokens

    @property
    def has_equal_blocks(self) -> bool:
        """Whether the blocks of all receivers have as many tokens as this side's."""
        return all(
            leg.side.ratio == 1 and len(leg.target_units) == len(leg.target.block_ids) for leg in self._legs.values()
        )

    def push(self, block_ids: Sequence[int], first: int, ready: Any = None, *, layers: range | None = None) -> None:
        """Queue blocks: `block_ids[i]` goes to block `first + i` of those granted. Returns at once.

        If the two sides' blocks differ in size, `first` counts the smaller ones, of `block_size` tokens. If this side's
        are r times larger, `block_ids[i]` goes to [first + r * i, first + r * (i + 1)). What falls outside the granted
        blocks is not sent, so `first` may be anything above -r. `layers` are the only layers to push now, because only
        they are computed; push the others later.

        On CUDA the blocks are read after the event `ready` or, without one, after the work that is now queued on the
        caller's current stream. Other transfers do not wait for it. Does nothing if the transfer has failed.

        Raises:
            ValueError: more blocks than were granted, some that were pushed already, or one that this side does not
                have; or no such layers; or the transfer has been committed.
        """
        require_loop(self.result.get_loop())
        block_ids = checked_blocks(block_ids, self._memory.num_blocks(self._region))
        checked_layers(layers, self._memory.layout.num_layers)
        if self.state.phase in (Phase.COMMITTING, Phase.COMPLETED):
            raise ValueError(f"blocks [{first}, {first + len(block_ids)}) after the commit")
        if ready is None and self._memory.is_on_gpu:
            import torch

            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(self._memory.device))
        # Positions are found for all legs, which raises if something does not fit, before anything is pushed to one.
        for leg, (units, start) in [(leg, self._units(leg, block_ids, first, layers)) for leg in self._legs.values()]:
            if units and not self._push(leg, units, start, ready, layers):
                return

    def _units(self, leg: Leg, block_ids: Sequence[int], first: int, layers: range | None) -> tuple[list[int], int]:
        """Units as the leg counts them, and the position of the first one among those granted."""
        ratio = leg.side.ratio if self._region == "pool" else 1
        end, num_granted = first + ratio * len(block_ids), len(leg.target_units)
        if not (-ratio < first and end < num_granted + ratio):
            raise ValueError(f"blocks [{first}, {end}) of {num_granted} granted ones")
        units = leg.side.units(block_ids) if ratio > 1 else list(block_ids)
        before, start = max(0, -first), max(0, first)
        places = range(start, max(start, min(end, num_granted)))
        if leg.pushed.has_any(places, layers):
            raise ValueError(f"blocks [{first}, {end}): some were pushed already")
        return units[before : before + len(places)], start

    def _push(self, leg: Leg, units: list[int], first: int, ready: Any, layers: range | None) -> bool:
        """Queue parts of a leg. Returns False if the transfer has failed."""
        is_waiting = bool(leg.parts)
        step = max(1, leg.outgoing.transport.max_part_bytes // leg.side.of_layers(layers).unit_bytes)
        span = None if layers is None else (layers.start, layers.stop)
        for start in range(0, len(units), step):
            ids = units[start : start + step]
            index, place = self.state.legs[leg.number].num_pushed, first + start
            if not self.state.push(leg.number):
                return False
            target = leg.target_units[place : place + len(ids)]
            part = Part(self._begin.transfer_id, index, self._region, ids, leg.target.region, target, ready, layers)
            leg.parts.append((part, AnnouncedPart(index, place, len(ids), span)))
            leg.pushed.add(range(place, place + len(ids)), layers)
        if leg.parts and not is_waiting:
            leg.outgoing.queue(leg)
        return True

    async def commit(self, payload: bytes = b"") -> TransferResult:
        """Wait for all parts, then hand the transfer over with `payload`, of at most 1 MiB. COMPLETED means that the
        receiver has acknowledged. It does so only if all granted blocks have arrived, or if it accepts fewer."""
        self.state.commit(checked_payload(payload))
        return await self.wait()

    async def commit_and_drain(self, payload: bytes = b"") -> TransferResult:
        """Commit, and return the result once no block is read any more, so that the caller may give the blocks back
        whatever happens. If it is cancelled, the transfer fails: its receiver must not take what is put there next."""
        try:
            return await self.commit(payload)
        finally:
            self.state.fail("the sender was cancelled")  # does nothing if it has ended
            await self._drained.wait()

    async def abort(self, reason: str) -> Outcome:
        """Stop sending. Returns once no block is read any more, or with UNKNOWN. Does nothing if the transfer has
        ended."""
        self.state.fail(reason)
        return (await self.wait()).outcome

    cancel = abort
    """Alias of `abort`, by the name that it has on a PostedReceive, for callers that have both."""

    async def wait(self) -> TransferResult:
        """Wait for the end of the transfer, after a commit, an abort or a failure."""
        return await asyncio.shield(self.result)

    async def drained(self) -> None:
        """Wait, after UNKNOWN, until no block is read any more."""
        await self._drained.wait()


OutgoingTransfer = SendTransfer
"""Earlier name of `SendTransfer`."""
