"""The receiving ends of links: one handler of the control server for each sender, as long as that is connected.

Over a two-sided transport each link's parts are taken in the order in which they were announced. What was announced is
on its way, and the next part would be taken in its place. So a part that is not taken ends its link: the two sides no
longer agree on what goes over it. The sender hears why, then that the link has ended, and ends the send that nobody
takes.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping

from hbserve_kv.config import GOODBYE_TIMEOUT_S
from hbserve_kv.protocol.handshake import Identity, check, choose_transport
from hbserve_kv.protocol.messages import AnnouncedPart, Cancelled, Handshake, LinkReply, PartsAnnounced
from hbserve_kv.receiving.quarantine import has_ended
from hbserve_kv.receiving.transfer import IncomingLink, IncomingTransfer
from hbserve_kv.transports.base import Deadline, Link, Part, Transport, disconnect
from hbserve_kv.transports.rendezvous import HeldRendezvous

logger = logging.getLogger(__name__)

_Taking = tuple[IncomingTransfer, AnnouncedPart]


class IncomingLinks:
    """Links by key, while they are connected."""

    def __init__(self, me: Identity, transports: Mapping[str, Transport], timeout_s: float) -> None:
        """A part may take `timeout_s` from its turn on."""
        self._me = me
        self._transports = transports
        self._timeout_s = timeout_s
        self.connected: dict[str, IncomingLink] = {}
        self._dropping: set[asyncio.Task[None]] = set()
        self._asking: dict[str, asyncio.Task[None]] = {}
        """Whether a sender is still there, by link."""

    async def serve(self, hello: Handshake) -> AsyncIterator[LinkReply | Cancelled]:
        """Handler of LINK."""
        common = check(hello, self._me)
        transport, passed_over = choose_transport(hello, self._transports, self._me.rank)
        self._replace(hello)
        rendezvous = HeldRendezvous()
        link = Link(
            hello.link,
            is_sender=False,
            peer_rank=hello.rank,
            peer_description=hello.offers[transport.name],
            heads=common.slice_in(self._me.heads),
            peer_heads=common.slice_in(hello.heads),
            peer_num_heads=hello.heads.count,
            rendezvous=rendezvous,
        )
        made = IncomingLink(hello, link, transport, common, rendezvous)
        self.connected[link.key] = made
        if not transport.one_sided:
            # It connects from both ends at once, so the answer must not wait for it.
            made.connecting = asyncio.create_task(transport.connect(link))
            made.taking = asyncio.create_task(self._take_announced(made))
        try:
            me, description = self._me, await transport.admit(link)
            yield LinkReply(me.rank, me.epoch, me.heads, transport.name, description, passed_over)
            while (notice := await made.notices.get()) is not None:
                yield notice
        finally:
            self._lose(made, "the sender was lost")

    def end(self, keys: set[str], why: str) -> None:
        """Nothing comes over these links any more: the senders that are still there hear it, and make new ones."""
        for key in keys & self.connected.keys():
            link = self.connected[key]
            self._lose(link, why)
            link.notices.put_nowait(None)

    def _replace(self, hello: Handshake) -> None:
        """A sender has one link. So what it had is over if this is the same life of it; who says to be another life, at
        the same address, may be anybody: that address itself is asked."""
        for old in [each for each in self.connected.values() if each.hello.address == hello.address]:
            key = old.link.key
            if (old.hello.rank, old.hello.epoch) == (hello.rank, hello.epoch):
                self.end({key}, "the link broke")
            elif key not in self._asking:
                self._asking[key] = asyncio.create_task(self._end_if_over(old))
                self._asking[key].add_done_callback(lambda _, key=key: self._asking.pop(key))  # type: ignore[misc]

    async def _end_if_over(self, old: IncomingLink) -> None:
        if await has_ended(old):
            self.end({old.link.key}, "the sender was restarted")

    def _lose(self, lost: IncomingLink, why: str) -> None:
        if self.connected.pop(lost.link.key, None) is None:
            return
        lost.is_connected = False
        lost.ended.set()
        lost.rendezvous.end()
        for transfer in list(lost.transfers):
            transfer.fail(why)
            if not lost.transport.one_sided:
                transfer.sender_drained(lost.link.key)
        for task in filter(None, (lost.connecting, lost.taking)):
            task.cancel()
        dropping = asyncio.create_task(self._drop(lost))
        self._dropping.add(dropping)
        dropping.add_done_callback(self._dropping.discard)

    async def _drop(self, lost: IncomingLink) -> None:
        if lost.connecting is not None:
            await asyncio.gather(lost.connecting, return_exceptions=True)
        await disconnect(lost.transport, lost.link)
        if lost.taking is not None:
            await asyncio.gather(lost.taking, return_exceptions=True)

    async def say_goodbye(self) -> None:
        """End every link, and let the senders know. Before the server stops."""
        links = list(self.connected.values())
        for link in links:
            link.notices.put_nowait(None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_TIMEOUT_S):
                await asyncio.gather(*(link.ended.wait() for link in links))

    async def close(self) -> None:
        """After the server has stopped: wait until nothing is left of the links, and nothing is taken any more."""
        await asyncio.gather(*self._asking.values(), *self._dropping, return_exceptions=True)

    # ---- announced parts -----------------------------------------------------------------------------------------

    def take(self, link: IncomingLink, transfer: IncomingTransfer | None, message: PartsAnnounced) -> bool:
        """Queue parts of `transfer`, None if there is no such one (any more). False: they are not taken."""
        if link.broken:
            return False
        late = f"a part of transfer {message.transfer_id} is late"
        error = late if transfer is None else transfer.start_parts(message.link, message.parts)
        if transfer is None or error:
            link.notices.put_nowait(Cancelled(message.transfer_id, error))
            self._break(link, error)
            return False
        link.announced.extend((transfer, part) for part in message.parts)
        link.has_announced.set()
        return True

    async def _take_announced(self, link: IncomingLink) -> None:
        """One task for each link, so that its parts are taken in order. Ends with the link."""
        error = "the link was lost"
        deadline: Deadline[_Taking] = Deadline(self._timeout_s, lambda late: self._late(link, *late))
        try:
            while link.is_connected and not link.broken:
                if not link.announced:
                    link.has_announced.clear()
                    await link.has_announced.wait()
                    continue
                transfer, part = link.announced[0]
                await self._accept(link, transfer, part, deadline)
                link.announced.popleft()
        except Exception as failure:  # whatever a backend raised
            error = f"part {link.announced[0][1].index}: {type(failure).__name__}: {failure}"
        finally:
            # Nothing of the parts that were not taken can land any more: they have failed.
            self._break(link, error)
            while link.announced:
                transfer, part = link.announced.popleft()
                transfer.end_part(link.link.key, part, error=link.broken)

    async def _accept(
        self, link: IncomingLink, transfer: IncomingTransfer, part: AnnouncedPart, deadline: Deadline[_Taking]
    ) -> None:
        """Take a part, or leave it to a device: then it lands later."""
        under_way = transfer, part
        deadline.begin(under_way)
        began_s, landing = time.monotonic(), None

        def landed(done: asyncio.Future[float]) -> None:
            deadline.end(under_way)
            if (failure := done.exception()) is not None:
                self._break(link, f"part {part.index}: {type(failure).__name__}: {failure}")
            # A device that was told to stop says no more than that it has.
            transfer.end_part(link.link.key, part, 0.0 if failure else done.result(), link.broken)

        try:
            assert link.connecting is not None
            await asyncio.shield(link.connecting)
            block_ids = transfer.block_ids[part.first : part.end]
            landing = await link.transport.accept(
                link.link, Part(transfer.transfer_id, part.index, transfer.region, block_ids)
            )
        finally:
            if landing is None:
                deadline.end(under_way)
        if landing is None:
            transfer.end_part(link.link.key, part, time.monotonic() - began_s)
        else:
            landing.add_done_callback(landed)

    def _late(self, link: IncomingLink, transfer: IncomingTransfer, part: AnnouncedPart) -> None:
        what = f"part {part.index} of transfer {transfer.transfer_id}"
        self._break(link, f"{what} did not come within {self._timeout_s:.3g} s")

    def _break(self, link: IncomingLink, why: str) -> None:
        """End a link: its transfers fail, which tells the sender why, and then its stream ends."""
        if link.broken:
            return
        link.broken = why
        if link.is_connected:
            logger.warning("the link from rank %d broke: %s", link.hello.rank, why)
        for transfer in list(link.transfers):
            transfer.fail(why)
        link.notices.put_nowait(None)
