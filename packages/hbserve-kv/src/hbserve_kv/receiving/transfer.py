"""One transfer at its receiver, and the links over which transfers arrive.

An IncomingTransfer owns its state, and each of its methods that changes the state publishes the change: it sets
`result` when it has ended, and `drained` when nothing can land any more. When it fails, its senders are told why.

Over a two-sided transport each link's parts are taken in the order in which they were announced. An announced part is
on its way, and if it were skipped, the next one would be taken in its place. So a part that is not taken ends its link,
because the two sides no longer agree on what goes over it. The sender learns why, then that the link has ended, and
ends the send that nobody takes.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from hbserve_kv.errors import TransferFailed
from hbserve_kv.memory.layout import HeadRange, Side
from hbserve_kv.memory.memory import Region
from hbserve_kv.protocol.messages import AnnouncedPart, Cancelled, Commit, Handshake, PartsAnnounced
from hbserve_kv.protocol.transfer_state import (
    Coverage,
    IncomingState,
    Outcome,
    Phase,
    TransferResult,
    joint_result,
)
from hbserve_kv.transports.base import Deadline, HeldRendezvous, Link, Part, Transport, disconnect
from hbserve_rpc import Peer
from hbserve_rpc.plain_values import one_line

logger = logging.getLogger(__name__)

_Taking = tuple["IncomingTransfer", AnnouncedPart]


@dataclass(eq=False)
class IncomingLink:
    """The receiving end of a link: one life of the connection to one sender."""

    hello: Handshake
    link: Link
    transport: Transport
    common_heads: HeadRange
    """Heads that both this sender and this rank hold."""
    peer: Peer
    """The other end of the RPC connection by which the link was made."""
    rendezvous: HeldRendezvous = field(default_factory=HeldRendezvous)
    notices: asyncio.Queue[Cancelled | None] = field(default_factory=asyncio.Queue)
    """Messages to be sent to the sender; None closes the link."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the sender has ended the link, or its heartbeats no longer arrive."""
    transfers: "set[IncomingTransfer]" = field(default_factory=set)
    """Transfers that the sender has begun, until they are drained."""
    announced: "deque[tuple[IncomingTransfer, AnnouncedPart]]" = field(default_factory=deque)
    """Parts that are under way, in the order in which they arrive. This field and those after it are for two-sided
    transports only."""
    has_announced: asyncio.Event = field(default_factory=asyncio.Event)
    connecting: asyncio.Task[None] | None = None
    taking: asyncio.Task[None] | None = None
    """The task that takes the announced parts."""
    broken: str = ""
    """Why nothing more is taken, even if the sender does not know yet; "" while parts are taken."""

    @property
    def is_connected(self) -> bool:
        return not self.ended.is_set()

    def connect(self, timeout_s: float) -> None:
        """Connect, from both ends at once, and take what is announced from now on. For two-sided transports only. A
        part may take `timeout_s`, counted from its turn."""
        self.connecting = asyncio.create_task(self.transport.connect(self.link))
        self.taking = asyncio.create_task(self._take_announced(timeout_s))

    def take(self, transfer: "IncomingTransfer | None", message: PartsAnnounced) -> bool:
        """Queue parts of `transfer`, which is None if it is not known, or no longer. Returns False if they are not
        taken."""
        if self.broken:
            return False
        late = f"a part of transfer {message.transfer_id} is late"
        error = late if transfer is None else transfer.start_parts(message.link, message.parts)
        if transfer is None or error:
            self.notices.put_nowait(Cancelled(message.transfer_id, error))
            self._break(error)
            return False
        self.announced.extend((transfer, part) for part in message.parts)
        self.has_announced.set()
        return True

    async def _take_announced(self, timeout_s: float) -> None:
        """Take parts one after another, in order, until the link ends."""
        error = "the link was lost"
        deadline: Deadline[_Taking] = Deadline(timeout_s, lambda late: self._late(timeout_s, *late))
        try:
            while self.is_connected and not self.broken:
                if not self.announced:
                    self.has_announced.clear()
                    await self.has_announced.wait()
                    continue
                await self._accept(*self.announced[0], deadline)
                self.announced.popleft()
        except Exception as failure:  # whatever a backend raised
            error = f"part {self.announced[0][1].index}: {type(failure).__name__}: {failure}"
        finally:
            # What was not taken counts as failed, and nothing of it can land any more.
            self._break(error)
            while self.announced:
                transfer, part = self.announced.popleft()
                transfer.end_part(self.link.key, part, error=self.broken)

    async def _accept(self, transfer: "IncomingTransfer", part: AnnouncedPart, deadline: "Deadline[_Taking]") -> None:
        """Take a part, or hand it to a device; in that case it lands later."""
        under_way = transfer, part
        deadline.begin(under_way)
        began_s, landing = time.monotonic(), None

        def landed(done: asyncio.Future[float]) -> None:
            deadline.end(under_way)
            if (failure := done.exception()) is not None:
                self._break(f"part {part.index}: {type(failure).__name__}: {failure}")
            # A device that was told to stop reports only that it has stopped, not why: `broken` has the reason.
            transfer.end_part(self.link.key, part, 0.0 if failure else done.result(), self.broken)

        try:
            assert self.connecting is not None
            await asyncio.shield(self.connecting)
            units, layers = transfer.units(self.link)[part.first : part.end], part.layers and range(*part.layers)
            what = Part(transfer.transfer_id, part.index, transfer.region, units, layers=layers)
            landing = await self.transport.accept(self.link, what)
        finally:
            if landing is None:
                deadline.end(under_way)
        if landing is None:
            transfer.end_part(self.link.key, part, time.monotonic() - began_s)
        else:
            landing.add_done_callback(landed)

    def _late(self, timeout_s: float, transfer: "IncomingTransfer", part: AnnouncedPart) -> None:
        self._break(f"part {part.index} of transfer {transfer.transfer_id} did not come within {timeout_s:.3g} s")

    def _break(self, why: str) -> None:
        """End the link from this side: its transfers fail, which tells the sender why, and then its stream ends."""
        if self.broken:
            return
        self.broken = why = one_line(why)
        if self.is_connected:
            logger.warning("the link from rank %d broke: %s", self.hello.rank, why)
        for transfer in list(self.transfers):
            transfer.fail(why)
        self.notices.put_nowait(None)

    def lose(self, why: str) -> asyncio.Task[None]:
        """Note that the link has ended, and that nothing arrives over it any more. Returns a task that ends when
        nothing is left of the link."""
        self.ended.set()
        self.rendezvous.end()
        for transfer in list(self.transfers):
            transfer.fail(why)
            if not self.transport.one_sided:
                transfer.sender_drained(self.link.key)
        for task in filter(None, (self.connecting, self.taking)):
            task.cancel()
        return asyncio.create_task(self._drop())

    async def _drop(self) -> None:
        if self.connecting is not None:
            await asyncio.gather(self.connecting, return_exceptions=True)
        await disconnect(self.transport, self.link)
        if self.taking is not None:
            await asyncio.gather(self.taking, return_exceptions=True)


class IncomingTransfer:
    """One transfer that is expected or under way, until nothing of it can land any more."""

    def __init__(
        self,
        transfer_id: str,
        region: Region,
        block_ids: list[int],
        heads: Iterable[int],
        on_failed: "Callable[[IncomingTransfer], None]",
        *,
        may_be_partial: bool = False,
        sender: str = "",
    ) -> None:
        """`heads` are those that must arrive. `on_failed` is called once, if the transfer fails while something may
        still land. `sender` is the name of the only instance that may send it; "" means any."""
        self.sender = sender
        self.transfer_id = transfer_id
        self.region: Region = region
        self.block_ids = block_ids
        self.links: dict[str, IncomingLink] = {}
        """Links of the senders that have begun, by key. They stay here after they are lost."""
        self.result: asyncio.Future[TransferResult] = asyncio.get_running_loop().create_future()
        self.drained = asyncio.Event()
        """Set when nothing can land any more, or when the receiver was closed before that, so that nobody will know."""
        self._state = IncomingState(frozenset(heads), len(block_ids), may_be_partial)
        self._on_failed = on_failed
        self._has_failed = False
        self._changed = asyncio.Event()
        self._announced: dict[str, Coverage] = {}
        """Units that are under way or have landed, by link; two-sided transports only."""
        self._taking_s: dict[str, float] = {}
        """Seconds during which parts were taken, by link; two-sided transports only."""
        self._committed: list[TransferResult] = []
        """One result for each sender that has committed."""

    @property
    def phase(self) -> Phase:
        return self._state.phase

    @property
    def cause(self) -> str:
        """Why the transfer has failed; "" if it has not."""
        return self._state.cause

    @property
    def missing_heads(self) -> frozenset[int]:
        """Heads that no sender has begun to bring yet; empty if the transfer has failed or ended."""
        return self._state.missing

    def awaits(self, link: IncomingLink) -> bool:
        """Whether the transfer was granted to the sender of this link by name, and that one has not begun it."""
        return self.sender == link.hello.name != "" and self.may_begin(link)

    def may_begin(self, link: IncomingLink) -> bool:
        """Whether the transfer still misses heads that can come over this link."""
        return not self.missing_heads.isdisjoint(link.common_heads.heads())

    @property
    def undrained(self) -> list[IncomingLink]:
        """Links over which something may still land."""
        return [self.links[key] for key in self._state.undrained]

    def units(self, link: Link) -> list[int]:
        """Return the granted blocks, in units of a link."""
        return self.block_ids if self.region == "arena" else link.mine.units(self.block_ids)

    def begin(self, link: IncomingLink) -> bool:
        """Note that a sender opens the transfer for its heads. Returns False if that does not fit; nothing has changed
        then."""
        heads, one_sided = link.common_heads.heads(), link.transport.one_sided
        if not link.is_connected or not self._state.begin(link.link.key, heads, one_sided=one_sided):
            return False
        self.links[link.link.key] = link
        link.transfers.add(self)
        return True

    def start_parts(self, key: str, parts: Sequence[AnnouncedPart]) -> str:
        """Parts are under way over a two-sided link. Returns why they do not fit, and then none of them counts; "" if
        they do. What was granted comes once, so that a sender can announce no more than that."""
        what, link = f"a part of transfer {self.transfer_id}", self.links.get(key)
        num_units = len(self.block_ids) * (link.link.mine.ratio if link else 1)
        num_layers = link.link.mine.layout.num_layers if link else 1
        for part in parts:
            first_layer, end_layer = part.layers or (0, num_layers)
            if not (0 <= part.first < part.end <= num_units and 0 <= first_layer < end_layer <= num_layers):
                return f"{what} is outside what was granted: {part}"
        announced, coming = self._announced.setdefault(key, Coverage(num_layers)), Coverage(num_layers)
        refused = f"{what} is late or was sent twice"
        for part in parts:
            if announced.has_any(*part.blocks) or coming.has_any(*part.blocks):
                return refused
            coming.add(*part.blocks)
        if not self._state.start_parts(key, *(part.index for part in parts)):
            return refused
        for part in parts:
            announced.add(*part.blocks)
        return ""

    def end_part(self, key: str, part: AnnouncedPart, took_s: float = 0.0, error: str = "") -> None:
        """Note that a part has landed or, with an `error`, has failed and nothing of it can land any more."""
        self._taking_s[key] = self._taking_s.get(key, 0.0) + took_s
        self._state.end_part(key, part.index, error)
        self._publish()

    async def until_taken(self, key: str) -> None:
        """Wait until the parts that were announced over a link have landed or failed."""
        while self._state.is_taking(key):
            await self._changed.wait()

    def commit(self, message: Commit, side: Side) -> bool:
        """Note that a sender has sent all its heads. Returns False if that does not fit, or if it has not sent all; in
        the latter case the transfer has failed.

        `side` is what arrives over its link. With a two-sided transport, only what has landed counts. What one-sided
        writes have brought is known only by the sender's word, and by checksums of the blocks. If this side's blocks
        are larger than the sender's, the last one need not be full.
        """
        key = message.link
        num_units = len(self._announced.get(key, ()))
        if key in self.links and self.links[key].transport.one_sided:
            num_units = message.num_bytes // side.unit_bytes
        num_blocks = -(-num_units // side.ratio)
        is_trusted = key in self.links and self.links[key].peer.is_trusted
        fits = self._state.commit(key, message.num_parts, num_blocks)
        if fits:
            self._committed.append(
                TransferResult(
                    Outcome.COMPLETED,
                    message.payload,
                    num_units * side.unit_bytes,
                    message.num_parts,
                    self._taking_s.get(key, message.time_s),
                    is_partial=num_blocks < len(self.block_ids),
                    is_trusted=is_trusted,
                )
            )
        self._publish()
        return fits

    def fail(self, reason: str) -> None:
        """Fail the transfer, unless it has ended. Its senders are told, and stop after the part that is under way."""
        self._state.fail(reason)
        self._publish()

    def sender_drained(self, key: str) -> None:
        """Note that nothing lands any more over this link."""
        self._state.sender_drained(key)
        self._publish()

    def give_up(self) -> None:
        """Note that the deadline for draining has passed: UNKNOWN, until it turns out to be drained after all."""
        self._state.give_up()
        self._publish()

    def close(self) -> None:
        """Wake whoever waits for the transfer to be drained: this receiver will not be there to see it."""
        self.give_up()
        self.drained.set()

    def _publish(self) -> None:
        """Let everyone who waits know the new state."""
        phase = self.phase
        if self._state.failed and not self._has_failed:
            self._has_failed = True
            for link in self.links.values():
                link.notices.put_nowait(Cancelled(self.transfer_id, self.cause))
            if phase is not Phase.FAILED_DRAINED:
                self._on_failed(self)
        if self._state.ended and not self.result.done():
            self.result.set_result(self._result())
        if phase >= Phase.FAILED_DRAINED:
            self.drained.set()
            for link in self.links.values():
                link.transfers.discard(self)
        self._changed.set()  # wakes only callers that wait now
        self._changed.clear()

    def _result(self) -> TransferResult:
        if self.phase is not Phase.COMPLETED:
            return TransferResult(self._state.outcome, error=self.cause)
        return joint_result(self._committed)


class PostedReceive:
    """A receive that waits for its sender, as its poster sees it: `KVTransferManager.post_receive`."""

    def __init__(self, transfer: IncomingTransfer, grant: bytes) -> None:
        self.grant = grant
        """Grant to be passed to the sender's `open_send`; opaque to whoever carries it."""
        self._transfer = transfer

    async def wait(self) -> TransferResult:
        """Wait for the end of the transfer. Unless the outcome is UNKNOWN, the blocks then belong to the caller
        again."""
        return await asyncio.shield(self._transfer.result)

    def fail(self, reason: str) -> None:
        """Give up the transfer. Returns at once. Does nothing if it has ended."""
        self._transfer.fail(reason)

    def when_ended(self, call: Callable[[TransferResult], None]) -> None:
        """Have the event loop call `call` with the result."""
        self._transfer.result.add_done_callback(lambda done: call(done.result()))

    async def cancel(self, reason: str) -> Outcome:
        """Give up the transfer. Returns once nothing can land any more, or with UNKNOWN at the deadline."""
        self.fail(reason)
        return (await self.wait()).outcome

    async def drained(self) -> None:
        """Wait, after UNKNOWN, until nothing can land any more. If the sender stays frozen, that never happens.

        Raises:
            TransferFailed: the manager was closed first, so nobody will know.
        """
        await self._transfer.drained.wait()
        if self._transfer.phase < Phase.FAILED_DRAINED:
            raise TransferFailed("the receiver was closed before its sender was known to have ended")
