"""The receiving half of a KVTransferManager: the handlers of its control server, and the links and transfers they act
on."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import NoReturn

from hbserve_kv.config import GOODBYE_TIMEOUT_S, KVTransferConfig
from hbserve_kv.errors import BufferTooSmall, TransferTimeout
from hbserve_kv.memory.layout import sides
from hbserve_kv.memory.memory import Memory, Region
from hbserve_kv.protocol import messages
from hbserve_kv.protocol.checksum import link_checksums
from hbserve_kv.protocol.handshake import Identity, choose_transport, common_heads
from hbserve_kv.protocol.messages import (
    Abandon,
    Accepted,
    Asked,
    Begin,
    Cancelled,
    Commit,
    Handshake,
    LinkReply,
    Nothing,
    PartsAnnounced,
    Told,
    UnknownLink,
)
from hbserve_kv.protocol.transfer_state import Phase
from hbserve_kv.receiving.lookup_buffer import LookupBuffer
from hbserve_kv.receiving.quarantine import CHECK_INTERVAL_S, Quarantine, ask_sender, has_ended
from hbserve_kv.receiving.transfer import IncomingLink, IncomingTransfer
from hbserve_kv.transports.base import HeldRendezvous, Link, Transport
from hbserve_rpc import InvalidRequest, Peer, RpcServer, calling_peer


class Receiver:
    """The handlers of the control server, with the links while they are connected, and the transfers."""

    def __init__(
        self,
        me: Identity,
        memory: Memory,
        transports: Mapping[str, Transport],
        buffer: LookupBuffer,
        config: KVTransferConfig,
    ) -> None:
        self._me = me
        self._transports = transports
        self._memory = memory
        self._buffer = buffer
        self._config = config
        self.transfers: dict[str, IncomingTransfer] = {}
        """Transfers by id, until they have a result. A failed one that is not drained yet is in the quarantine too."""
        self.dropped_messages = 0
        self.links: dict[str, IncomingLink] = {}
        self.quarantine = Quarantine(longest_s=config.expiry_s, on_revoked=self.end_links, keys=config.keys)
        self._asking: dict[str, asyncio.Task[None]] = {}
        """Tasks that ask whether the sender of an old link is still there, by link."""
        self._losing: set[asyncio.Task[None]] = set()
        """Tasks of links that were lost, until nothing of them is left."""

    def serve_on(self, server: RpcServer) -> None:
        server.serve_stream(messages.LINK, self.serve_link)
        server.serve(messages.TELL, self._tell)
        server.serve(messages.ASK, self._ask)
        server.serve(messages.BEGIN, self._begin)
        server.serve_notification(messages.PARTS, self._parts)
        server.serve(messages.COMMIT, self._commit)
        server.serve(messages.ABANDON, self._abandon)

    def expect(
        self,
        transfer_id: str,
        region: Region,
        block_ids: list[int],
        *,
        may_be_partial: bool = False,
        sender: str = "",
    ) -> IncomingTransfer:
        """Expect a transfer from now on. Raises ValueError if the id is in use."""
        if transfer_id in self.transfers:
            raise ValueError(f"transfer_id={transfer_id!r} is in use")
        heads, watch = self._me.heads.heads(), self.quarantine.watch
        transfer = IncomingTransfer(
            transfer_id, region, block_ids, heads, watch, may_be_partial=may_be_partial, sender=sender
        )
        self.transfers[transfer_id] = transfer
        expiry = asyncio.get_running_loop().call_later(self._config.expiry_s, self._expire, transfer)
        transfer.result.add_done_callback(lambda _: expiry.cancel())
        transfer.result.add_done_callback(lambda _: self.transfers.pop(transfer_id))
        return transfer

    def _expire(self, transfer: IncomingTransfer) -> None:
        if missing := transfer.missing_heads:
            of_heads = f" of heads {sorted(missing)}" if transfer.phase is Phase.MOVING else ""
            transfer.fail(f"no sender{of_heads} began within {self._config.expiry_s} s")

    async def say_goodbye(self) -> None:
        """End every transfer and every link, and tell the senders, which may say that they write no more. Call this
        before the server stops."""
        self._fail_all()
        await self.quarantine.until_empty(GOODBYE_TIMEOUT_S)
        links = list(self.links.values())
        for link in links:
            link.notices.put_nowait(None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_TIMEOUT_S):
                await asyncio.gather(*(link.ended.wait() for link in links))

    async def close(self) -> None:
        """End what is left, so that nothing stays behind. Call this after the server has stopped."""
        self._fail_all()  # a message may have begun to arrive meanwhile
        await self.quarantine.close()
        await self._buffer.close()
        await asyncio.gather(*self._asking.values(), *self._losing, return_exceptions=True)

    def _fail_all(self) -> None:
        for transfer in list(self.transfers.values()):
            transfer.fail("the receiver was closed")

    # ---- links ---------------------------------------------------------------------------------------------------

    async def serve_link(self, hello: Handshake) -> AsyncIterator[LinkReply | Cancelled]:
        """Handle LINK: run for each sender as long as it is connected."""
        me, common, peer = self._me, common_heads(hello, self._me), calling_peer()
        transport, passed_over = choose_transport(hello, self._transports, me.rank)
        if hello.link in self.links:
            raise InvalidRequest("there is a link of this name already")
        self._replace(hello, peer)
        if any(link.peer.connection == peer.connection for link in self.links.values()):
            raise InvalidRequest("there is a link of this connection already")  # each may hold a thread, and sockets
        rendezvous, (mine, theirs) = HeldRendezvous(), sides(me.layout, me.heads, hello.layout, hello.heads)
        link = Link(
            hello.link,
            is_sender=False,
            peer_rank=hello.rank,
            peer_description=hello.offers[transport.name],
            mine=mine,
            peer=theirs,
            rendezvous=rendezvous,
        )
        made = self.links[link.key] = IncomingLink(hello, link, transport, common, peer, rendezvous)
        if not transport.one_sided:
            made.connect(self._config.timeout_s)  # both ends connect at once, so the reply must not wait for this
        try:
            description = await transport.admit(link)
            yield LinkReply(me.rank, me.epoch, me.heads, me.layout, transport.name, description, passed_over)
            while (notice := await made.notices.get()) is not None:
                yield notice
        finally:
            self._lose(made, "the sender was lost")

    def end_links(self, keys: set[str], why: str) -> None:
        """End links over which nothing arrives any more. Senders that are still there are told, and make new ones."""
        for key in keys & self.links.keys():
            link = self.links[key]
            self._lose(link, why)
            link.notices.put_nowait(None)

    def _replace(self, hello: Handshake, peer: Peer) -> None:
        """End older links of the sender that shakes hands. A sender has one link, so its old one has ended if the rank,
        epoch and host are the same. Whoever claims to be another life at the same address may be anybody, so that
        address itself is asked."""
        for old in [each for each in self.links.values() if each.hello.address == hello.address]:
            key = old.link.key
            is_its_host = old.peer.address == peer.address
            if is_its_host and (old.hello.rank, old.hello.epoch) == (hello.rank, hello.epoch):
                self.end_links({key}, "the link broke")
            elif key not in self._asking:
                self._asking[key] = asyncio.create_task(self._end_if_over(old))
                self._asking[key].add_done_callback(lambda _, key=key: self._asking.pop(key))  # type: ignore[misc]

    async def _end_if_over(self, old: IncomingLink) -> None:
        if await has_ended(old, self._config.keys):
            self.end_links({old.link.key}, "the sender was restarted")

    def _lose(self, lost: IncomingLink, why: str) -> None:
        if self.links.pop(lost.link.key, None) is None:
            return
        losing = [lost.lose(why)]
        awaited = [transfer for transfer in self.transfers.values() if transfer.awaits(lost)]
        if awaited and lost.peer.is_trusted:  # a stranger may claim any name
            losing.append(asyncio.create_task(self._fail_if_gone(lost, awaited)))
        for task in losing:
            self._losing.add(task)
            task.add_done_callback(self._losing.discard)

    async def _fail_if_gone(self, lost: IncomingLink, awaited: Sequence[IncomingTransfer]) -> None:
        """Fail transfers that were granted to the sender of a lost link and that it has not begun, once it does not
        answer any more. It does not know their blocks, so its silence is enough, whereas a quarantine needs proof.

        While the sender answers, it may connect again, or be about to end. If it has a new link, or another life of it
        has one, nothing fails: the transfers may be granted to that life.
        """
        hello = lost.hello
        while any(transfer.awaits(lost) for transfer in awaited):
            answer = await ask_sender(lost, self._config.keys)
            if any((each.hello.name, each.hello.rank) == (hello.name, hello.rank) for each in self.links.values()):
                return
            if answer is None or answer.epoch != hello.epoch:
                for transfer in awaited:
                    if transfer.awaits(lost):
                        transfer.fail(f"its sender {hello.name!r} was lost before it began")
                return
            await asyncio.sleep(CHECK_INTERVAL_S)

    # ---- handlers ------------------------------------------------------------------------------------------------

    async def _tell(self, told: Told) -> Nothing:
        what = f"{told.name} of a rendezvous"
        link = self._link_of(told.link, what)
        try:
            await link.rendezvous.set(told.name, told.value)
        except (ConnectionError, ValueError) as error:
            self._drop_message(f"{what}: {error}")
        return Nothing()

    async def _ask(self, asked: Asked) -> Told:
        what = f"{asked.name} of a rendezvous"
        link = self._link_of(asked.link, what)
        try:
            return Told(asked.link, asked.name, await link.rendezvous.get(asked.name))
        except (
            ConnectionError,
            ValueError,
        ) as error:  # the link has ended, because it could not be opened here
            self._drop_message(f"{what}: {error}")

    async def _begin(self, begin: Begin) -> Accepted | UnknownLink:
        link = self._find_link(begin.link)
        if link is None:
            self.dropped_messages += 1
            return UnknownLink()
        transfer = await self._granted_or_buffered(begin, link)
        self._require_sender(transfer, link)
        if not transfer.begin(link):
            if begin.num_bytes is not None and transfer.phase is Phase.OPENING:
                transfer.fail("the sender was lost")  # its room in the buffer was made for this sender
            self._drop_message(f"transfer {begin.transfer_id} has begun or ended already")
        return Accepted(transfer.region, transfer.block_ids, self._config.checksum)

    async def _granted_or_buffered(self, begin: Begin, link: IncomingLink) -> IncomingTransfer:
        """Return the transfer that was granted, or a new one in the lookup buffer."""
        if transfer := self.transfers.get(begin.transfer_id):
            if begin.num_bytes is not None and transfer.region == "pool":
                self._drop_message(f"transfer {begin.transfer_id} was granted blocks of the pool, and is no tensor")
            return transfer
        if begin.num_bytes is None:
            self._drop_message(f"transfer {begin.transfer_id} is not expected: it was given up, or never granted")
        if not link.link.mine.is_whole or not link.link.peer.is_whole:
            raise InvalidRequest("whole tensors need blocks of the same size and heads on both sides")
        try:
            block_ids = await self._buffer.place(begin.transfer_id, begin.num_bytes)
        except (BufferTooSmall, TransferTimeout) as error:
            raise InvalidRequest(str(error)) from error
        if begin.transfer_id in self.transfers or begin.transfer_id in self._buffer:
            await self._buffer.free(block_ids)
            self._drop_message(f"transfer {begin.transfer_id} has begun already, or waits to be received")
        transfer = self.expect(begin.transfer_id, "arena", block_ids)
        self._buffer.keep(transfer)
        return transfer

    def _parts(self, message: PartsAnnounced) -> None:
        """Handle PARTS. This is not a coroutine, which could be suspended: what the sender sends next must find these
        parts begun."""
        link = self._find_link(message.link)
        if link is None or not link.take(self.transfers.get(message.transfer_id), message):
            self.dropped_messages += 1

    async def _commit(self, message: Commit) -> Nothing:
        what = f"commit of transfer {message.transfer_id}"
        link, transfer = self._link_of(message.link, what), self.transfers.get(message.transfer_id)
        if transfer is None or message.link not in transfer.links:
            self._drop_message(f"{what} is late, was sent twice, or has not begun by this link")
        await transfer.until_taken(message.link)
        if transfer.cause:
            await asyncio.sleep(0)  # lets the link's stream report the cause before this answer does
        if message.checksums and (error := await self._corruption(transfer, link, message)):
            transfer.fail(error)
        if not transfer.commit(message, link.link.mine):
            self._drop_message(f"{what} is late, was sent twice, or lacks parts: {transfer.cause}")
        return Nothing()

    async def _corruption(self, transfer: IncomingTransfer, link: IncomingLink, message: Commit) -> str:
        units = transfer.units(link.link)
        places = sorted(place for place in message.checksums if 0 <= place < len(units))
        wanted = [units[place] for place in places]
        found = await link.link.run(link_checksums, self._memory, link.link, transfer.region, wanted)
        wrong = [place for place, number in zip(places, found, strict=True) if number != message.checksums[place]]
        return f"checksum: granted blocks {wrong} differ from what was sent" if wrong else ""

    async def _abandon(self, message: Abandon) -> Nothing:
        expected, link = self.transfers.get(message.transfer_id), self._find_link(message.link)
        begun = expected is not None and message.link in expected.links
        transfer = expected if begun else self.quarantine.find(message.transfer_id, message.link)
        if transfer is None and expected is not None and link is not None and expected.may_begin(link):
            self._require_sender(expected, link)
            expected.fail(message.reason)  # this sender could not even begin, because another receiver had refused
            return Nothing()
        if transfer is None or not _is_callers(transfer.links[message.link]):
            self._drop_message(f"abandon of transfer {message.transfer_id} is late, or not of its sender")
        transfer.fail(message.reason)
        if message.drained and message.may_be_buffered:
            self.quarantine.drain_later(transfer, transfer.links[message.link])
        elif message.drained:
            transfer.sender_drained(message.link)
        return Nothing()

    # ---- helpers -------------------------------------------------------------------------------------------------

    def _find_link(self, key: str) -> IncomingLink | None:
        """Return the link with this key; None if there is none, or none any more, or if it is not the caller's."""
        link = self.links.get(key)
        return link if link is not None and _is_callers(link) else None

    def _link_of(self, key: str, what: str) -> IncomingLink:
        link = self._find_link(key)
        if link is None:
            self._drop_message(f"{what} is of an earlier life of this instance or of its sender, or not of its sender")
        return link

    def _require_sender(self, transfer: IncomingTransfer, link: IncomingLink) -> None:
        if transfer.sender not in ("", link.hello.name):
            self._drop_message(
                f"transfer {transfer.transfer_id} was granted to {transfer.sender!r}, and not to {link.hello.name!r}"
            )

    def _drop_message(self, what: str) -> NoReturn:
        self.dropped_messages += 1
        raise InvalidRequest(what)


def _is_callers(link: IncomingLink) -> bool:
    """Whether the message being handled came over the connection by which the link was made."""
    return link.peer.connection == calling_peer().connection
