"""The receiving half of a KVTransferManager: the handlers of its control server, and the transfers they work on."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NoReturn

from hbserve_kv.memory.memory import Memory, Region
from hbserve_kv.protocol import messages
from hbserve_kv.protocol.checksum import link_checksums
from hbserve_kv.protocol.handshake import Identity
from hbserve_kv.protocol.messages import (
    Abandon,
    Accepted,
    Alive,
    Begin,
    Cancelled,
    Commit,
    Nothing,
    PartsAnnounced,
)
from hbserve_kv.protocol.transfer_state import IncomingState, Outcome, State, TransferResult
from hbserve_kv.receiving.links import IncomingLinks
from hbserve_kv.receiving.lookup_buffer import LookupBuffer
from hbserve_kv.receiving.parts import PartTaker
from hbserve_kv.receiving.quarantine import GRACE_S, Quarantine
from hbserve_kv.receiving.transfer import Incoming, IncomingLink
from hbserve_kv.transports.base import Transport
from hbserve_rpc import InvalidRequest, RpcServer


class Receiver:
    """Handlers of the control server, and the transfers they work on."""

    def __init__(
        self,
        *,
        me: Identity,
        memory: Memory,
        transports: Mapping[str, Transport],
        buffer: LookupBuffer,
        timeout_s: float,
        expiry_s: float,
        checksum: bool,
        writing: Callable[[], list[str]],
    ) -> None:
        self._me = me
        self._memory = memory
        self._transports = transports
        self._buffer = buffer
        self._timeout_s = timeout_s
        self._expiry_s = expiry_s
        self._checksum = checksum
        self._writing = writing
        self.incoming: dict[str, Incoming] = {}
        self.dropped_messages = 0
        self._links = IncomingLinks(me, transports, self._lost)
        self.quarantine = Quarantine(longest_s=expiry_s, on_revoked=self._links.end)
        self._taker = PartTaker(timeout_s, self._fail)
        self._waiting: set[asyncio.Task[None]] = set()
        """Wait for time to pass; `close` ends them."""

    def serve_on(self, server: RpcServer) -> None:
        server.serve_stream(messages.LINK, self._links.serve)
        server.serve(messages.BEGIN, self._begin)
        server.serve_notification(messages.PARTS, self._parts)
        server.serve(messages.COMMIT, self._commit)
        server.serve(messages.ABANDON, self._abandon)
        server.serve(messages.ALIVE, self._alive)

    def expect(self, transfer_id: str, region: Region, block_ids: list[int]) -> Incoming:
        if transfer_id in self.incoming:
            raise ValueError(f"transfer_id={transfer_id!r} is in use")
        incoming = Incoming(transfer_id, region, block_ids, IncomingState(frozenset(self._me.heads.heads())))
        self.incoming[transfer_id] = incoming
        expiry = asyncio.get_running_loop().call_later(self._expiry_s, self._expire, incoming)
        incoming.result.add_done_callback(lambda _: self._forget(incoming, expiry))
        return incoming

    def _expire(self, incoming: Incoming) -> None:
        if incoming.state.state is State.POSTED:
            self._fail(incoming, f"no sender began within {self._expiry_s} s")

    def _forget(self, incoming: Incoming, expiry: asyncio.TimerHandle) -> None:
        expiry.cancel()
        self.incoming.pop(incoming.transfer_id, None)
        for link in incoming.links.values():
            link.transfers.discard(incoming)

    @property
    def links(self) -> dict[str, IncomingLink]:
        """Of the senders that are connected, by key."""
        return self._links.connected

    async def cancel(self, incoming: Incoming, reason: str) -> Outcome:
        """Give a transfer up. Returns once nothing of it can land any more, or UNKNOWN at the deadline."""
        self._fail(incoming, reason)
        return (await asyncio.shield(incoming.result)).outcome

    def _lost(self, lost: IncomingLink, why: str) -> None:
        """For IncomingLinks: nothing more comes over this link."""
        for incoming in list(lost.transfers):
            self._fail(incoming, why)
        if not lost.transport.one_sided:
            for incoming in self.quarantine.of_link(lost.link.key):
                incoming.state.sender_drained(lost.link.key)
                incoming.settle()

    def _fail(self, incoming: Incoming, reason: str) -> None:
        """End a transfer that has not ended: its senders are told, and end after the part that is under way."""
        if incoming.state.state <= State.RECEIVING:
            incoming.state.fail(reason)
            for link in incoming.links.values():
                link.notices.put_nowait(Cancelled(incoming.transfer_id, incoming.state.cause))
        incoming.settle()
        self.quarantine.watch(incoming)

    async def say_goodbye(self) -> None:
        """End every transfer and every link, and let the senders know. Before the server stops."""
        for incoming in list(self.incoming.values()):
            self._fail(incoming, "the receiver was closed")
        await self._links.say_goodbye()

    async def close(self) -> None:
        """Leave nothing behind. After the server has stopped."""
        for incoming in list(self.incoming.values()):
            incoming.state.give_up()
            incoming.settle()
        await self.quarantine.close()
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)
        await self._taker.close()
        await self._links.close()

    # ---- handlers ------------------------------------------------------------------------------------------------

    async def _alive(self, _: Nothing) -> Alive:
        return Alive(self._me.epoch, self._writing())

    async def _begin(self, begin: Begin) -> Accepted:
        link = self._link_of(begin.link, f"transfer {begin.transfer_id}")
        incoming = await self._find(begin, link)
        began = link.is_connected and incoming.state.begin(
            begin.link, link.common_heads.heads(), one_sided=link.transport.one_sided
        )
        if not began:
            if begin.num_bytes is not None and incoming.state.state is State.POSTED:
                self._fail(incoming, "the sender was lost")  # its room in the buffer was made for this sender
            self._drop_message(f"transfer {begin.transfer_id} has begun or ended already")
        incoming.links[begin.link] = link
        link.transfers.add(incoming)
        return Accepted(incoming.region, incoming.block_ids, self._checksum)

    async def _find(self, begin: Begin, link: IncomingLink) -> Incoming:
        if incoming := self.incoming.get(begin.transfer_id):
            return incoming
        if begin.num_bytes is None:
            self._drop_message(f"transfer {begin.transfer_id} is not expected: it was given up, or never granted")
        if link.link.heads or link.link.peer_heads:
            raise InvalidRequest("whole tensors need blocks of the same size on both sides; these hold different heads")
        block_ids = await self._buffer.place(begin.transfer_id, begin.num_bytes)
        try:
            incoming = self.expect(begin.transfer_id, "arena", block_ids)
        except ValueError:
            await self._buffer.free(block_ids)
            self._drop_message(f"transfer {begin.transfer_id} has begun already")
        _keep(self._waiting, self._buffer.keep(begin.transfer_id, incoming))
        return incoming

    async def _parts(self, message: PartsAnnounced) -> None:
        """There is no pause in here: what the sender asks later finds these parts begun."""
        link, incoming = self.links.get(message.link), self.incoming.get(message.transfer_id)
        if link is None or not self._taker.take(link, incoming, message):
            self.dropped_messages += 1

    async def _commit(self, message: Commit) -> Nothing:
        what = f"commit of transfer {message.transfer_id}"
        link, incoming = self._link_of(message.link, what), self.incoming.get(message.transfer_id)
        if incoming is None:
            self._drop_message(f"{what} is late or was sent twice")
        await self._taker.until_taken(link, incoming)
        if message.checksums and (error := await self._corruption(incoming, link, message)):
            self._fail(incoming, error)
        if not incoming.state.commit(message.link, message.num_parts):
            incoming.settle()
            if incoming.state.state is not State.RECEIVING:
                self.quarantine.watch(incoming)
            self._drop_message(f"{what} is late, was sent twice, or lacks parts: {incoming.state.cause}")
        time_s = incoming.taking_s.get(message.link, message.time_s)
        incoming.committed.append(
            TransferResult(Outcome.COMPLETED, message.payload, message.num_bytes, message.num_parts, time_s)
        )
        incoming.settle()
        return Nothing()

    async def _corruption(self, incoming: Incoming, link: IncomingLink, message: Commit) -> str:
        places = sorted(place for place in message.checksums if 0 <= place < len(incoming.block_ids))
        block_ids = [incoming.block_ids[place] for place in places]
        found = await link.link.run(link_checksums, self._memory, link.link, incoming.region, block_ids)
        wrong = [place for place, number in zip(places, found, strict=True) if number != message.checksums[place]]
        return f"checksum: blocks {wrong} of those granted are not as they were sent" if wrong else ""

    async def _abandon(self, message: Abandon) -> Nothing:
        incoming = self.incoming.get(message.transfer_id)
        if incoming is None or message.link not in incoming.links:
            incoming = self.quarantine.find(message.transfer_id, message.link)
        if incoming is None:
            self._drop_message(f"abandon of transfer {message.transfer_id} is late")
        self._fail(incoming, message.reason)
        if message.drained and message.in_kernel:
            _keep(self._waiting, self._drain_later(incoming, incoming.links[message.link]))
        elif message.drained:
            incoming.state.sender_drained(message.link)
        incoming.settle()
        return Nothing()

    async def _drain_later(self, incoming: Incoming, link: IncomingLink) -> None:
        if not await self.quarantine.revoke(link):
            await asyncio.sleep(GRACE_S)
        incoming.state.sender_drained(link.link.key)
        incoming.settle()

    # ---- what goes on beside them --------------------------------------------------------------------------------

    def _link_of(self, key: str, what: str) -> IncomingLink:
        if key not in self.links:
            self._drop_message(f"{what} is of an earlier life of this instance or of its sender")
        return self.links[key]

    def _drop_message(self, what: str) -> NoReturn:
        self.dropped_messages += 1
        raise InvalidRequest(what)


def _keep(tasks: set[asyncio.Task[None]], job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.create_task(job)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
