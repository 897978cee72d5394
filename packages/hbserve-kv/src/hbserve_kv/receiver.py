"""The receiving half of a KVTransferManager: transfers that others send to this instance."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, NoReturn

from hbserve_kv import messages
from hbserve_kv.errors import FingerprintMismatch
from hbserve_kv.lookup_buffer import LookupBuffer
from hbserve_kv.memory import Region
from hbserve_kv.messages import Abandon, Accepted, Begin, Cancelled, Commit, Done, Handshake, HandshakeReply
from hbserve_kv.transfer_state import IncomingState, Outcome, State
from hbserve_kv.transport import Link, Part, Transport
from hbserve_rpc import InvalidRequest, RpcServer

logger = logging.getLogger(__name__)

GRACE_S = 1.0
"""After a sender's process is gone, what its kernel had sent already may still arrive for a moment."""


@dataclass(frozen=True)
class TransferResult:
    """How a transfer ended."""

    outcome: Outcome
    payload: bytes = b""
    """What the sender gave to `commit`."""
    num_bytes: int = 0
    num_parts: int = 0
    time_s: float = 0.0
    """Time during which a part of this transfer was moving, as the sender measured it."""
    error: str = ""
    """The first cause, unless the outcome is COMPLETED."""


@dataclass(eq=False)
class Incoming:
    """One transfer that is expected or under way."""

    transfer_id: str
    region: Region
    block_ids: list[int]
    state: IncomingState
    result: asyncio.Future[TransferResult] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    sender_address: str = ""

    async def wait_while(self, condition: Callable[[], bool]) -> None:
        while condition():
            self.changed.clear()
            await self.changed.wait()

    def settle(self, completed: TransferResult | None = None) -> None:
        """Publish what the state has become. To be called after every change of it."""
        self.changed.set()
        if self.state.ended and not self.result.done():
            self.result.set_result(completed or TransferResult(self.state.outcome, error=self.state.cause))
        if self.state.state >= State.FAILED_DRAINED:
            self.drained.set()


class Receiver:
    """Handlers of the control server, and the transfers they work on."""

    def __init__(
        self,
        *,
        rank: int,
        epoch: str,
        backend: str,
        fingerprint: dict[str, str | int],
        transport: Transport,
        buffer: LookupBuffer,
        timeout_s: float,
    ) -> None:
        self._rank = rank
        self._epoch = epoch
        self._backend = backend
        self._fingerprint = fingerprint
        self._transport = transport
        self._buffer = buffer
        self._timeout_s = timeout_s
        self.incoming: dict[str, Incoming] = {}
        self.quarantined: set[Incoming] = set()
        self.dropped_messages = 0
        self._links: dict[str, tuple[Handshake, Link, asyncio.Task[None]]] = {}
        self._background: set[asyncio.Task[None]] = set()

    def serve_on(self, server: RpcServer) -> None:
        server.serve(messages.HANDSHAKE, self._handshake)
        server.serve(messages.PART, self._part)
        server.serve(messages.COMMIT, self._commit)
        server.serve(messages.ABANDON, self._abandon)
        server.serve_stream(messages.TRANSFER, self._transfer)

    def expect(self, transfer_id: str, region: Region, block_ids: list[int]) -> Incoming:
        if transfer_id in self.incoming:
            raise ValueError(f"transfer_id={transfer_id!r} is in use")
        incoming = Incoming(transfer_id, region, block_ids, IncomingState(self._transport.one_sided))
        self.incoming[transfer_id] = incoming
        incoming.result.add_done_callback(lambda _: self.incoming.pop(transfer_id, None))
        return incoming

    async def cancel(self, incoming: Incoming, reason: str) -> Outcome:
        """Give a transfer up. Returns once nothing of it can land any more, or UNKNOWN at the deadline."""
        incoming.state.fail(reason)
        incoming.settle()
        if not incoming.result.done():
            self._watch(incoming)
        return (await asyncio.shield(incoming.result)).outcome

    async def close(self) -> None:
        for incoming in list(self.incoming.values()):
            incoming.state.fail("the receiver was closed")
            incoming.state.give_up()
            incoming.settle()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for _, link, connecting in list(self._links.values()):
            await self._drop(link, connecting)
        self._links.clear()

    # ---- handlers ------------------------------------------------------------------------------------------------

    async def _handshake(self, hello: Handshake) -> HandshakeReply:
        self._check(hello)
        for old_hello, old_link, connecting in list(self._links.values()):
            if old_hello.address == hello.address:
                del self._links[old_link.key]
                self._spawn(self._drop(old_link, connecting))
        link = Link(hello.link, is_sender=False, peer_rank=hello.rank, peer_description=hello.description)
        # Two-sided transports connect from both ends at once, so the answer must not wait for it.
        connect = self._nothing() if self._transport.one_sided else self._transport.connect(link)
        self._links[link.key] = (hello, link, asyncio.create_task(connect))
        return HandshakeReply(self._rank, self._epoch, self._transport.describe())

    def _check(self, hello: Handshake) -> None:
        mine = self._fingerprint | {"protocol": messages.PROTOCOL_VERSION, "kv_transfer.backend": self._backend}
        theirs = hello.fingerprint | {"protocol": hello.protocol_version, "kv_transfer.backend": hello.backend}
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise InvalidRequest(
                    f"{FingerprintMismatch.__name__}: {name} is {theirs.get(name)!r} on rank {hello.rank} "
                    f"and {mine.get(name)!r} on rank {self._rank}"
                )

    async def _nothing(self) -> None:
        return

    async def _transfer(self, begin: Begin) -> AsyncIterator[Accepted | Cancelled]:
        if begin.link not in self._links or begin.receiver_epoch != self._epoch:
            self._drop_message(f"transfer {begin.transfer_id} of an earlier life of this instance or of its link")
        incoming = await self._find(begin)
        if not incoming.state.begin(begin.sender_epoch):
            self._drop_message(f"transfer {begin.transfer_id} has begun or ended already")
        incoming.sender_address = self._links[begin.link][0].address
        try:
            yield Accepted(incoming.region, incoming.block_ids)
            await incoming.wait_while(lambda: incoming.state.state is State.RECEIVING)
            if incoming.state.state is not State.COMPLETED:
                yield Cancelled(incoming.state.cause)
            await incoming.wait_while(lambda: not incoming.state.ended)
        finally:
            if not incoming.state.ended:
                incoming.state.fail("the sender was lost")
                incoming.settle()
                self._watch(incoming)

    async def _find(self, begin: Begin) -> Incoming:
        if incoming := self.incoming.get(begin.transfer_id):
            return incoming
        if begin.num_bytes is None:
            self._drop_message(f"transfer {begin.transfer_id} is not expected: it was given up, or never granted")
        block_ids = await self._buffer.place(begin.transfer_id, begin.num_bytes or 0)
        incoming = self.expect(begin.transfer_id, "arena", block_ids)
        self._spawn(self._buffer.keep(begin.transfer_id, incoming))
        return incoming

    async def _part(self, message: messages.PartAnnounced) -> Done:
        incoming = self.incoming.get(message.transfer_id)
        if incoming is not None and not 0 <= message.first < message.end <= len(incoming.block_ids):
            self._drop_message(f"part {message.index} of transfer {message.transfer_id} is outside what was granted")
        if incoming is None or not incoming.state.start_part(message.sender_epoch, message.index):
            self._drop_message(f"part {message.index} of transfer {message.transfer_id} is late or was sent twice")
        # A task of our own: the bytes may land even if the sender, and so this call, is lost.
        await asyncio.shield(self._spawn(self._accept(incoming, message)))
        if message.index not in incoming.state.landed:
            raise InvalidRequest(incoming.state.cause)
        return Done()

    async def _accept(self, incoming: Incoming, message: messages.PartAnnounced) -> None:
        error = ""
        try:
            link, connecting = self._link_of(incoming)
            async with asyncio.timeout(self._timeout_s):
                await asyncio.shield(connecting)
            block_ids = incoming.block_ids[message.first : message.end]
            await self._transport.accept(link, Part(message.transfer_id, message.index, incoming.region, block_ids))
        except Exception as cause:  # whatever a backend raised has failed this part
            error = f"part {message.index}: {type(cause).__name__}: {cause}"
            logger.warning("transfer %s: %s", message.transfer_id, error)
        finally:
            incoming.state.end_part(message.index, error)
            incoming.settle()

    async def _commit(self, message: Commit) -> Done:
        incoming = self.incoming.get(message.transfer_id)
        if incoming is None or not incoming.state.commit(message.sender_epoch, message.num_parts):
            if incoming is not None:
                incoming.settle()
            self._drop_message(f"commit of transfer {message.transfer_id} is late, was sent twice, or lacks parts")
        incoming.settle(
            TransferResult(
                Outcome.COMPLETED, message.payload, message.num_bytes, message.num_parts, message.time_s
            )
        )  # fmt: skip
        return Done()

    async def _abandon(self, message: Abandon) -> Done:
        quarantined = (each for each in self.quarantined if each.transfer_id == message.transfer_id)
        incoming = self.incoming.get(message.transfer_id) or next(quarantined, None)
        if incoming is None or incoming.state.sender_epoch != message.sender_epoch:
            self._drop_message(f"abandon of transfer {message.transfer_id} is late")
        incoming.state.fail(message.reason)
        if message.drained:
            incoming.state.sender_drained(message.sender_epoch)
        incoming.settle()
        return Done()

    # ---- what goes on beside them --------------------------------------------------------------------------------

    def _watch(self, incoming: Incoming) -> None:
        if incoming not in self.quarantined:
            self.quarantined.add(incoming)
            self._spawn(self._wait_until_drained(incoming))

    async def _wait_until_drained(self, incoming: Incoming) -> None:
        """Settle a failed transfer as drained as soon as that is sure; as unknown at its deadline."""
        try:
            deadline_s = asyncio.get_running_loop().time() + self._timeout_s
            while not incoming.drained.is_set():
                if self._transport.one_sided and await self._is_gone(incoming.sender_address):
                    await asyncio.sleep(GRACE_S)
                    incoming.state.sender_drained(incoming.state.sender_epoch)
                elif asyncio.get_running_loop().time() > deadline_s:
                    incoming.state.give_up()
                incoming.settle()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await incoming.drained.wait()
        finally:
            self.quarantined.discard(incoming)

    async def _is_gone(self, address: str) -> bool:
        """Whether no process listens there any more. A frozen one still does."""
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(1.0):
                _, writer = await asyncio.open_connection(host, int(port))
        except ConnectionRefusedError:
            return True
        except (OSError, TimeoutError):
            return False
        writer.close()
        return False

    def _link_of(self, incoming: Incoming) -> tuple[Link, asyncio.Task[None]]:
        for hello, link, connecting in self._links.values():
            if hello.address == incoming.sender_address:
                return link, connecting
        raise ConnectionError(f"no link to {incoming.sender_address}")

    async def _drop(self, link: Link, connecting: asyncio.Task[None]) -> None:
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)
        await self._transport.disconnect(link)
        link.executor.shutdown(wait=False)

    def _spawn(self, job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(job)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def _drop_message(self, what: str) -> NoReturn:
        self.dropped_messages += 1
        raise InvalidRequest(what)
