"""The sending end of a link: one life of the connection to one peer."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hbserve_kv.errors import FingerprintMismatch, TransferFailed
from hbserve_kv.protocol import messages
from hbserve_kv.protocol.handshake import Identity
from hbserve_kv.protocol.messages import Abandon, AnnouncedPart, Cancelled, Handshake, LinkReply, PartsAnnounced
from hbserve_kv.transports.base import DrainUnknown, Link, Part, Transport
from hbserve_rpc import HBServeRpcError, InvalidAddress, RpcClient, RpcStream

logger = logging.getLogger(__name__)


class Connection:
    """Made by `connect`, lost once and never used again. The parts of all transfers to the peer go over it in order."""

    def __init__(
        self, client: RpcClient, stream: RpcStream[Any], reply: LinkReply, link: Link, transport: Transport,
        timeout_s: float,
    ) -> None:  # fmt: skip
        self.client = client
        self.link = link
        self.transport = transport
        self.timeout_s = timeout_s
        self.epoch = reply.epoch
        self.lost = ""
        """Why it is of no use any more; "" while it is."""
        self.is_lost = asyncio.Event()
        self.quiet = asyncio.Event()
        """Set some time after it was lost: this side reads and writes nothing of it any more."""
        self.transfers: dict[str, Callable[[str], None]] = {}
        """Called with the reason when the receiver gives a transfer up, or the connection is lost."""
        self.on_lost: Callable[[], None] = lambda: None
        self._stream = stream
        self._in_order = asyncio.Lock()
        self._idle = asyncio.Event()
        self._listening = asyncio.create_task(self._listen())
        self._closing: asyncio.Task[None] | None = None
        self._peer_knows = False
        """The receiver ended the link, so there is nothing to tell it."""

    async def _listen(self) -> None:
        try:
            async for item in self._stream:
                if isinstance(item, Cancelled) and item.transfer_id in self.transfers:
                    self.transfers[item.transfer_id](f"cancelled by the receiver: {item.reason}")
            self._peer_knows = True
            self.lose(f"{self.client.address} closed the link")
        except HBServeRpcError as error:
            self.lose(str(error))

    async def move(
        self, transfer_id: str, parts: Sequence[Part], announced: Sequence[AnnouncedPart], on_begin: Callable[[], None]
    ) -> float:
        """Move parts, after those before them; returns the seconds that it took, without waiting for those. Over a
        two-sided transport they may land a little later: see COMMIT. `on_begin` is called when it is their turn, and
        they are announced.

        Raises:
            Exception: what `Transport.push` raised, or why the connection was lost. It is lost by a part that may still
                move, and if the two sides may disagree on what was sent.
        """
        async with self._in_order:
            if self.lost:
                raise TransferFailed(self.lost)
            began_s = time.monotonic()
            push = self.transport.push if self.transport.one_sided else self._push_to_taker
            try:
                if not self.transport.one_sided:
                    message = PartsAnnounced(transfer_id, self.link.key, list(announced))
                    self.client.notify(messages.PARTS, message)
                on_begin()
                for part in parts:
                    await push(self.link, part)
            except BaseException as error:
                if not self.transport.one_sided or isinstance(error, DrainUnknown):
                    self.lose(f"the link broke: {error or type(error).__name__}")
                raise
            return time.monotonic() - began_s

    async def _push_to_taker(self, link: Link, part: Part) -> None:
        """Push, until the connection is lost: then nobody takes it any more."""
        pushing = asyncio.ensure_future(self.transport.push(link, part))
        losing = asyncio.ensure_future(self.is_lost.wait())
        timeout_s = 2 * self.timeout_s  # the receiver gives a part half of it, and then says so
        try:
            await asyncio.wait([pushing, losing], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not pushing.done():
                self.lose(f"part {part.index} was not taken within {timeout_s:.3g} s")
                raise TransferFailed(self.lost)
            await pushing
        finally:
            losing.cancel()
            pushing.cancel()
            await asyncio.wait([pushing])

    async def abandon(self, transfer_id: str, reason: str, *, drained: bool, in_kernel: bool = False) -> None:
        """Tell the receiver that a transfer has failed. If it does not answer it will find out by itself."""
        if self._peer_knows:
            return
        message = Abandon(transfer_id, self.link.key, reason, drained, in_kernel)
        try:
            await self.client.call(messages.ABANDON, message, timeout_s=self.timeout_s)
        except HBServeRpcError as error:
            logger.debug("transfer %s: the receiver was not told of its end: %s", transfer_id, error)

    def forget(self, transfer_id: str) -> None:
        """The transfer has ended, and the receiver knows."""
        self.transfers.pop(transfer_id, None)
        if self.lost and not self.transfers:
            self._idle.set()

    def lose(self, why: str) -> None:
        """Of no use any more. What goes over it fails, and then it is closed in the background."""
        if self.lost:
            return
        self.lost = why
        self.is_lost.set()
        self._closing = asyncio.create_task(self._close())
        self.on_lost()
        for cancel in list(self.transfers.values()):
            cancel(why)
        if not self.transfers:
            self._idle.set()

    async def _close(self) -> None:
        await disconnect(self.transport, self.link)
        self.quiet.set()
        # The receiver hears how each transfer ended before it hears that the link has.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * self.timeout_s):
                await self._idle.wait()
        if self._listening is not asyncio.current_task():
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        await self.hang_up()

    async def close(self, why: str) -> None:
        """Lose it and return when nothing is left."""
        self.lose(why)
        assert self._closing is not None
        await asyncio.shield(self._closing)

    async def hang_up(self) -> None:
        """Wait for no answer of the peer any more. What was said to it may still arrive."""
        await self._stream.aclose()
        await self.client.close()


async def connect(
    address: str, me: Identity, my_address: str, transports: Mapping[str, Transport], timeout_s: float
) -> Connection:
    """Connect by the best transport of both sides. If that fails when it is tried, the next best is.

    Raises:
        FingerprintMismatch: the peer's KV means something else.
        TransferFailed: the peer does not answer, or no transport reaches it.
    """
    offers = dict(transports)
    while True:
        client = _client(address, timeout_s)
        await client.start()
        try:
            stream, reply, link = await _shake_hands(client, me, my_address, offers, timeout_s)
            transport = offers.pop(reply.transport)
            error = await _try_transport(transport, link, timeout_s)
        except BaseException:
            await client.close()
            raise
        if error is None:
            passed_over = "".join(f"; not {name}: {reason}" for name, reason in reply.passed_over.items())
            logger.info("link to %s: %s%s%s", address, transport.name, link.detail and f", {link.detail}", passed_over)
            return Connection(client, stream, reply, link, transport, timeout_s)
        await stream.aclose()
        await client.close()
        if not offers:
            raise TransferFailed(f"no connection to {address} by {transport.name}: {error}") from error
        logger.warning("no connection to %s by %s, next is %s: %s", address, transport.name, next(iter(offers)), error)


def _client(address: str, timeout_s: float) -> RpcClient:
    try:
        return RpcClient(address, heartbeat_interval_s=min(2.0, timeout_s / 4), heartbeat_timeout_s=timeout_s)
    except InvalidAddress as error:  # it came in a grant
        raise TransferFailed(f"no connection to {error}") from error


async def _try_transport(transport: Transport, link: Link, timeout_s: float) -> Exception | None:
    try:
        async with asyncio.timeout(timeout_s):
            await transport.connect(link)
    except TimeoutError as error:
        await disconnect(transport, link)
        return TransferFailed(str(error) or f"it does not answer within {timeout_s:.3g} s")
    except BaseException as error:
        await disconnect(transport, link)
        if isinstance(error, Exception):  # whatever a backend raised
            return error
        raise
    return None


async def disconnect(transport: Transport, link: Link) -> None:
    """`Transport.disconnect`, and the link's thread. What goes wrong is logged: there is nobody to tell."""
    try:
        await transport.disconnect(link)
    except Exception:
        logger.exception("disconnecting a link of %s failed", transport.name)
    link.executor.shutdown(wait=False)


async def _shake_hands(
    client: RpcClient, me: Identity, my_address: str, offers: Mapping[str, Transport], timeout_s: float
) -> tuple[RpcStream[Any], LinkReply, Link]:
    hello = Handshake(
        messages.PROTOCOL_VERSION, me.rank, me.epoch, my_address, me.fingerprint, me.heads,
        {name: transport.describe() for name, transport in offers.items()}, uuid.uuid4().hex,
    )  # fmt: skip
    stream = client.stream(messages.LINK, hello)
    try:
        async with asyncio.timeout(timeout_s):
            reply: LinkReply = await anext(stream)
    except TimeoutError:
        raise TransferFailed(f"no connection to {client.address}: no answer within {timeout_s} s") from None
    except (HBServeRpcError, StopAsyncIteration) as error:
        if FingerprintMismatch.__name__ in str(error):
            raise FingerprintMismatch(f"{client.address} refuses: {error}") from error
        raise TransferFailed(f"no connection to {client.address}: {error or 'the link was closed'}") from error
    common = me.heads.common(reply.heads)
    assert common is not None, "the receiver has checked it"
    link = Link(
        hello.link, is_sender=True, peer_rank=reply.rank, peer_description=reply.description,
        heads=common.slice_in(me.heads), peer_heads=common.slice_in(reply.heads),
        peer_num_heads=reply.heads.count,
    )  # fmt: skip
    return stream, reply, link
