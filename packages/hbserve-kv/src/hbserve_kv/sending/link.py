"""The sending end of a link, and the legs of transfers that go over it. The receiving end: receiving/transfer.py."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from hbserve_kv.errors import TransferFailed
from hbserve_kv.memory.memory import Memory
from hbserve_kv.protocol import messages
from hbserve_kv.protocol.checksum import link_checksums
from hbserve_kv.protocol.messages import (
    Abandon,
    Accepted,
    AnnouncedPart,
    Begin,
    Cancelled,
    Commit,
    LinkReply,
    PartsAnnounced,
    UnknownLink,
)
from hbserve_kv.protocol.transfer_state import Coverage, Phase, SendState
from hbserve_kv.transports.base import Deadline, DrainUnknown, Link, Part, Transport, disconnect
from hbserve_rpc import HBServeRpcError, InvalidRequest, RpcClient, RpcStream

logger = logging.getLogger(__name__)

MAX_ANNOUNCED_PARTS = 16
DRAIN_PATIENCE_S = 2.0
"""How long a part may keep moving after its link was lost before its transfer is UNKNOWN. A part of Mooncake may keep
moving for a minute."""
CAUSE_PATIENCE_S = 0.2
"""How long a failed push waits for a better explanation, which comes over the RPC connection."""


class LinkUnknown(ConnectionError):
    """Raised when the receiver has already ended a link that this side still has."""


class Leg:
    """What one transfer sends over one link: leg `number` of `state`. Its life is one task, `run`."""

    def __init__(self, outgoing: "OutgoingLink", number: int, state: SendState, begin: Begin, memory: Memory) -> None:
        self.outgoing = outgoing
        self.number = number
        self.state = state
        self.begin = msgspec.structs.replace(begin, link=outgoing.link.key)
        self.target: Accepted  # set when the receiver accepts
        self.parts: deque[tuple[Part, AnnouncedPart]] = deque()
        """Parts that were pushed and have not begun yet."""
        self.side = outgoing.link.mine
        self.target_units: list[int] = []
        """What the receiver has granted, in the link's units."""
        self.pushed = Coverage(self.side.layout.num_layers)
        """Which of `target_units` have been pushed."""
        self.num_bytes_moved = 0
        self.time_s = 0.0
        """Seconds during which parts were moving."""
        self.memory = memory
        self._checksums: dict[int, int] = {}
        self._begun = Coverage(self.side.layout.num_layers)
        self._has_changed = asyncio.Event()
        self._handing_over: asyncio.Timeout | None = None

    def wake(self) -> None:
        """Have `run` look again: what it waits for may have come true."""
        self._has_changed.set()
        if self.state.failed and self._handing_over is not None:
            self._handing_over.reschedule(0)
            self._handing_over = None

    async def _until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self._has_changed.clear()
            await self._has_changed.wait()

    async def run(self) -> bool:
        """Run the leg from BEGIN to the last message to the receiver. Returns False if the receiver had ended the link
        before this side heard of it, and nothing has been sent."""
        legs, name = self.outgoing.legs, self.begin.transfer_id
        if name in legs:
            self.state.fail(f"one to {self.outgoing.client.address} is under way already")
            return True
        legs[name] = self
        try:
            # If the transfer has failed while connecting, the receiver is told so at once, without a BEGIN.
            if self.state.failed or await self._hand_over():
                await self._drain()
        except LinkUnknown as error:
            self.outgoing.forget(name)
            self.outgoing.lose(str(error))
            return False
        self.outgoing.forget(name)
        return True

    async def _hand_over(self) -> bool:
        """Send BEGIN and, once all parts are on their way, COMMIT. Ends early when the transfer fails. Returns whether
        the receiver may have begun it."""
        state = self.state
        try:
            async with asyncio.timeout(None) as self._handing_over:
                try:
                    await self._begin()
                    await self._until(lambda: state.may_commit(self.number))
                    await self._commit()
                finally:
                    self._handing_over = None
        except LinkUnknown:
            raise
        except Exception as error:
            is_refused = state.phase is Phase.OPENING and isinstance(error, InvalidRequest)
            what = "commit: " if state.phase is Phase.COMMITTING else ""
            state.fail(f"{what}{error}", self.number, error)
            return not is_refused
        return True

    async def _begin(self) -> None:
        outgoing = self.outgoing
        # The receiver waits for room in its lookup buffer no longer than its own deadline.
        timeout_s = 2 * outgoing.timeout_s
        target = await outgoing.client.call(messages.BEGIN, self.begin, timeout_s=timeout_s)
        if isinstance(target, UnknownLink):
            raise LinkUnknown(f"{outgoing.client.address} does not know the link any more")
        if problem := messages.misfit(target, self.begin, self.side, outgoing.link.peer):
            raise TransferFailed(f"{outgoing.client.address} accepts it into blocks it cannot have granted: {problem}")
        self.target = target
        self.target_units = outgoing.link.peer.units(target.block_ids) if target.region == "pool" else target.block_ids
        self.state.accept(self.number, one_sided=outgoing.transport.one_sided)

    async def _commit(self) -> None:
        num_parts, num_bytes = self.state.legs[self.number].num_pushed, len(self.pushed) * self.side.unit_bytes
        message = Commit(
            self.begin.transfer_id,
            self.begin.link,
            num_parts,
            num_bytes,
            self.time_s,
            self.state.payload,
            self._checksums,
        )
        # The receiver answers when all parts have landed, and each of them has a deadline of its own.
        timeout_s = self.outgoing.timeout_s * (2 + num_parts)
        await self.outgoing.client.call(messages.COMMIT, message, timeout_s=timeout_s)
        self.state.acknowledge(self.number)

    async def _drain(self) -> None:
        """Wait until nothing is read for this leg any more. If the transfer has failed, tell the receiver so; if the
        wait takes long, tell it first that the leg is not drained yet."""
        outgoing, mine, name = self.outgoing, self.state.legs[self.number], self.begin.transfer_id

        def is_over() -> bool:
            return mine.is_quiet or outgoing.quiet.is_set()

        if not mine.acknowledged:
            await self._until(lambda: mine.is_quiet or outgoing.lost)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_PATIENCE_S):
                    await self._until(is_over)
            if not is_over():
                self.state.give_up()
                await outgoing.abandon(name, self.state.cause, drained=False)
        await self._until(is_over)
        may_be_buffered = not mine.is_quiet
        self.state.close(self.number)
        if not mine.acknowledged:
            await outgoing.abandon(name, self.state.cause, drained=True, may_be_buffered=may_be_buffered)

    async def note_checksums(self, parts: Sequence[tuple[Part, AnnouncedPart]]) -> None:
        """Compute checksums for the commit, if the receiver wants them."""
        if not self.target.checksum:
            return
        link = self.outgoing.link
        try:
            for part, what in parts:
                units = dict(zip(range(what.first, what.end), part.block_ids, strict=True))
                if part.layers is not None:  # checksums are of whole blocks only
                    self._begun.add(range(what.first, what.end), part.layers)
                    units = {place: units[place] for place in self._begun.by_layers & units.keys()}
                numbers = await link.run(link_checksums, self.memory, link, part.region, [*units.values()], part.ready)
                self._checksums.update(zip(units, numbers, strict=True))
        except Exception as error:  # for example one of the device
            self.state.fail(f"checksum: {type(error).__name__}: {error}", self.number, error)


class OutgoingLink:
    """The sending end of a link. Once it is lost, it is never used again.

    The parts of all transfers to the peer are pushed over it one after the other, in the order in which they become
    ready. Parts of one transfer keep the order of its pushes.
    """

    def __init__(
        self,
        client: RpcClient,
        stream: RpcStream[Any],
        reply: LinkReply,
        link: Link,
        transport: Transport,
        timeout_s: float,
    ) -> None:
        self.client = client
        self.link = link
        self.transport = transport
        self.timeout_s = timeout_s
        self.epoch = reply.epoch
        self.lost = ""
        """Why the link cannot be used any more; "" while it can."""
        self.quiet = asyncio.Event()
        """Set some time after the loss, when this side does not read or write anything for the link any more."""
        self.legs: dict[str, Leg] = {}
        """Legs by transfer id, until the receiver knows how they ended."""
        self.turns: asyncio.Queue[Leg | None] = asyncio.Queue()
        """Queue with each leg that has a part ready to begin, once; None after the loss."""
        self.on_lost: Callable[[asyncio.Task[None]], None] = lambda closing: None
        """Callback for the loss of the link. It gets the task that then closes the link."""
        self._stream = stream
        self._under_way: Deadline[Part] = Deadline(2 * timeout_s, self._late)
        self._has_moved = asyncio.Event()
        self._idle = asyncio.Event()
        self._listening = asyncio.create_task(self._listen())
        self._moving = asyncio.create_task(self._move_parts())
        self._closing: asyncio.Task[None] | None = None
        self._peer_knows = False
        """Whether the receiver has ended the link, and so need not be told anything."""

    async def _listen(self) -> None:
        try:
            async for item in self._stream:
                if isinstance(item, Cancelled) and (leg := self.legs.get(item.transfer_id)):
                    leg.state.fail(f"cancelled by the receiver: {item.reason}", leg.number)
            self._peer_knows = True
            self.lose(f"{self.client.address} closed the link")
        except HBServeRpcError as error:
            self.lose(str(error))

    def queue(self, leg: Leg) -> None:
        """Give a leg that has parts a turn as soon as its first part may begin. Parts of other legs do not wait for
        that."""
        part, _ = leg.parts[0]
        if self._may_begin(leg, part):
            self.turns.put_nowait(leg)
        else:
            leg.memory.events.until(part.ready).add_done_callback(lambda happened: self._ready(leg, happened))

    def _ready(self, leg: Leg, happened: asyncio.Future[float]) -> None:
        if (error := happened.exception()) is not None:
            leg.state.fail(f"its blocks were not computed: {type(error).__name__}: {error}", leg.number)
        self.turns.put_nowait(leg)

    def _may_begin(self, leg: Leg, part: Part) -> bool:
        """Whether the part is ready, or need not be: the device waits for that, and no checksum is wanted, for which
        the link's thread would wait. Otherwise a part that is not ready is not announced, because the receiver would
        wait for it and for nothing else."""
        return (
            part.ready is None
            or (self.transport.waits_on_device and not leg.target.checksum)
            or leg.memory.events.has_happened(part.ready)
        )

    def _next_parts(self, leg: Leg) -> list[tuple[Part, AnnouncedPart]]:
        """Take the parts of a leg that may begin together in its turn. The leg gets another turn for the rest."""
        parts, most = [leg.parts.popleft()], 1 if self.transport.one_sided else MAX_ANNOUNCED_PARTS
        while leg.parts and len(parts) < most and self._may_begin(leg, leg.parts[0][0]):
            parts.append(leg.parts.popleft())
        if leg.parts:
            self.queue(leg)
        return parts

    async def _move_parts(self) -> None:
        """Push the legs' parts, turn by turn. Parts of each leg go in the order in which they were pushed.

        Over a two-sided transport they are announced first, several in one message, and may land a little later than
        this counts them: see COMMIT. The link is lost if a failed part may still be moving, and after any failure that
        may leave the two sides with different ideas of what was sent.
        """
        is_announced = not self.transport.one_sided
        while not self.lost and (leg := await self.turns.get()) is not None:
            parts = self._next_parts(leg)
            await leg.note_checksums(parts)
            while is_announced and len(self._under_way) >= MAX_ANNOUNCED_PARTS:
                self._has_moved.clear()
                await self._has_moved.wait()
            if not leg.state.begin_parts(leg.number, len(parts)):
                continue
            num_left = len(parts)
            try:
                if is_announced:
                    what = PartsAnnounced(leg.begin.transfer_id, self.link.key, [what for _, what in parts])
                    self.client.notify(messages.PARTS, what)
                for part, _ in parts:
                    await self._push(leg, part)
                    num_left -= 1
            except (Exception, asyncio.CancelledError) as error:  # whatever a backend raises; `lose` cancels
                if is_announced and not self.lost and isinstance(error, (OSError, RuntimeError)):
                    # Perhaps the receiver has ended what the part went over, and is about to say why.
                    await asyncio.wait([self._listening], timeout=CAUSE_PATIENCE_S)
                self._fail(leg, parts[-num_left][0], num_left, error)

    async def _push(self, leg: Leg, part: Part) -> None:
        """Move a part, or hand it to a device; in that case it ends later."""
        self._under_way.begin(part)
        began_s, moving = time.monotonic(), None
        try:
            moving = await self.transport.push(self.link, part)
            if moving is None and self.lost and not self.transport.one_sided:
                raise ConnectionError(self.lost)  # the backend has ignored that it was cancelled
        finally:
            if moving is None:
                self._under_way.end(part)
        if moving is not None:
            moving.add_done_callback(lambda moved: self._end(leg, part, moved))
        else:
            self._count(leg, part, time.monotonic() - began_s)

    def _end(self, leg: Leg, part: Part, moved: asyncio.Future[float]) -> None:
        self._under_way.end(part)
        self._has_moved.set()
        if (error := moved.exception()) is not None:
            self._fail(leg, part, 1, error)
        else:
            self._count(leg, part, moved.result())

    @staticmethod
    def _count(leg: Leg, part: Part, time_s: float) -> None:
        leg.time_s += time_s
        leg.num_bytes_moved += len(part.block_ids) * leg.side.of_layers(part.layers).unit_bytes
        leg.state.end_parts(leg.number, 1)

    def _fail(self, leg: Leg, part: Part, num_parts: int, error: BaseException) -> None:
        """Note that a part has failed. `num_parts` counts it, and those behind it that were announced with it."""
        may_go_on = isinstance(error, DrainUnknown)
        if may_go_on or not self.transport.one_sided:
            self.lose(f"the link broke: {str(error) or type(error).__name__}")
        cause = f"part {part.index}: {type(error).__name__}: {error}"
        leg.state.end_parts(leg.number, num_parts, cause, may_go_on=may_go_on)

    def _late(self, part: Part) -> None:
        """Lose the link because of a part that takes too long. The receiver gives a part half of this time, and then
        says so; one-sided parts end by themselves."""
        if not self.transport.one_sided:
            self.lose(f"part {part.index} was not taken within {2 * self.timeout_s:.3g} s")

    async def abandon(self, transfer_id: str, reason: str, *, drained: bool, may_be_buffered: bool = False) -> None:
        """Tell the receiver that a transfer has failed. A receiver that does not answer will find out by itself."""
        if self._peer_knows:
            return
        message = Abandon(transfer_id, self.link.key, reason, drained, may_be_buffered)
        try:
            await self.client.call(messages.ABANDON, message, timeout_s=self.timeout_s)
        except HBServeRpcError as error:
            logger.debug("transfer %s: the receiver was not told of its end: %s", transfer_id, error)

    def forget(self, transfer_id: str) -> None:
        """Drop a transfer that has ended, once its receiver knows."""
        del self.legs[transfer_id]
        if self.lost and not self.legs:
            self._idle.set()

    def lose(self, why: str) -> None:
        """Stop using the link for good. What goes over it fails, and then it is closed in the background."""
        if self.lost:
            return
        self.lost = why
        self._closing = asyncio.create_task(self._close())
        self.on_lost(self._closing)
        if self.transport.one_sided:
            self.turns.put_nowait(None)
        else:
            self._moving.cancel()  # nobody takes what it pushes
        for leg in list(self.legs.values()):
            leg.state.fail(why, leg.number)
            leg.wake()
        if not self.legs:
            self._idle.set()

    async def _close(self) -> None:
        await disconnect(self.transport, self.link)
        self.quiet.set()
        for leg in self.legs.values():
            leg.wake()
        # The receiver is told how each transfer ended before it learns that the link has ended.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * self.timeout_s):
                await self._idle.wait()
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)
        await self.hang_up()

    async def hang_up(self) -> None:
        """End the connection without waiting for more answers of the peer. What was sent may still arrive."""
        await self._stream.aclose()
        await self.client.close()
