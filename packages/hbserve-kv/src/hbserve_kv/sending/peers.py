"""The peers to which one instance sends. They come, go, restart and freeze, each without affecting the others."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hbserve_kv.config import GOODBYE_TIMEOUT_S
from hbserve_kv.errors import FingerprintMismatch, TransferFailed
from hbserve_kv.memory.layout import sides
from hbserve_kv.protocol import messages
from hbserve_kv.protocol.handshake import Identity, check_reply
from hbserve_kv.protocol.messages import Handshake, LinkReply
from hbserve_kv.sending.link import OutgoingLink
from hbserve_kv.transports.base import Link, Transport, disconnect
from hbserve_rpc import HBServeRpcError, InvalidAddress, Keys, RpcClient, RpcStream
from hbserve_rpc.own_process import with_file_limit
from hbserve_rpc.plain_values import one_line

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 10.0


@dataclass
class Breaker:
    """Circuit breaker: backoff before a peer that could not be reached is tried again. The caller supplies the time.

    After a failure nothing is tried for a pause, which doubles up to a limit. Then one attempt decides (half-open). A
    peer is never given up for good.
    """

    num_failures: int = 0
    retry_at_s: float = 0.0
    last_error: str = ""

    def refusal(self, now_s: float) -> str:
        """Return why no attempt should be made now; "" if one should."""
        if now_s >= self.retry_at_s:
            return ""
        pause_s = self.retry_at_s - now_s
        return f"failed {self.num_failures} times, last: {self.last_error}; tried again in {pause_s:.1f} s"

    def failed(self, error: str, now_s: float) -> None:
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self.num_failures, 16))
        self.num_failures += 1
        self.retry_at_s, self.last_error = now_s + pause_s, error

    def is_stale(self, now_s: float) -> bool:
        """Whether the last failure is so long ago that it means nothing any more."""
        return now_s > self.retry_at_s + LONGEST_PAUSE_S


class Peers:
    """Links to peers: one to each peer that is there. For a peer that is gone, this only knows when to try it again."""

    def __init__(
        self,
        me: Identity,
        my_address: Callable[[], str],
        transports: Mapping[str, Transport],
        timeout_s: float,
        keys: Keys | None = None,
    ) -> None:
        self._me = me
        self._keys = keys
        self._my_address = my_address
        self._transports = transports
        self._timeout_s = timeout_s
        self.links: dict[str, OutgoingLink] = {}
        self._connecting: dict[str, asyncio.Task[OutgoingLink]] = {}
        self._breakers: dict[tuple[str, str], Breaker] = {}
        self._closing: dict[asyncio.Task[None], OutgoingLink] = {}
        self._not_quiet: set[OutgoingLink] = set()
        self._closed = False

    async def link_to(self, address: str, epoch: str) -> OutgoingLink:
        """Return the link to the peer at `address` in its life `epoch`, or in any life if that is "".

        Raises:
            FingerprintMismatch: the peer's KV means something else.
            TransferFailed: the peer is not there, was not there a moment ago, or is another life.
        """
        while (found := self.links.get(address)) is not None:
            if epoch in ("", found.epoch):
                return found
            if await self._is_old(found, epoch):
                break
            found.lose(f"{address} was restarted")
        found = found or await self._shared_attempt(address, epoch)
        if epoch not in ("", found.epoch):
            raise TransferFailed(f"{address} was restarted since it granted this")
        return found

    async def _is_old(self, found: OutgoingLink, epoch: str) -> bool:
        """Whether `epoch` is an earlier life than that of `found`. A healthy link must survive an old grant."""
        try:
            alive = await found.client.call(messages.ALIVE, messages.Nothing(), timeout_s=self._timeout_s)
        except HBServeRpcError:
            return False
        return alive.epoch == found.epoch

    async def _shared_attempt(self, address: str, epoch: str) -> OutgoingLink:
        if self._closed:
            raise TransferFailed("the sender was closed")
        if address not in self._connecting:
            breaker = self._breakers.get((address, epoch))
            if breaker is not None and (refusal := breaker.refusal(time.monotonic())):
                raise TransferFailed(f"no connection to {address}: it {refusal}")
            task = asyncio.create_task(self._attempt(address, epoch))
            self._connecting[address] = task
            task.add_done_callback(lambda done: self._attempted(address, done))
        attempt, me = self._connecting[address], asyncio.current_task()
        try:
            return await asyncio.shield(attempt)
        except asyncio.CancelledError:
            if attempt.cancelled() and me is not None and not me.cancelling():
                raise TransferFailed("the sender was closed") from None
            raise

    def _attempted(self, address: str, done: asyncio.Task[OutgoingLink]) -> None:
        del self._connecting[address]
        if not done.cancelled():
            done.exception()  # whoever waited has the error; if nobody does any more, the breaker has it

    async def _attempt(self, address: str, epoch: str) -> OutgoingLink:
        try:
            made = await self._connect(address)
        except FingerprintMismatch:
            raise  # the peer answers, so no backoff is needed
        except TransferFailed as error:
            self._failed((address, epoch), str(error))
            raise
        self._breakers.pop((address, epoch), None)
        self.links[address] = made
        self._not_quiet.add(made)
        made.on_lost = lambda closing: self._lost(address, made, closing)
        return made

    def _failed(self, key: tuple[str, str], error: str) -> None:
        now_s = time.monotonic()
        self._breakers = {each: breaker for each, breaker in self._breakers.items() if not breaker.is_stale(now_s)}
        self._breakers.setdefault(key, Breaker()).failed(error, now_s)

    def _lost(self, address: str, lost: OutgoingLink, closing: asyncio.Task[None]) -> None:
        del self.links[address]
        self.writing()  # forgets links that are quiet by now
        self._closing[closing] = lost
        closing.add_done_callback(self._closing.pop)

    def writing(self) -> list[str]:
        """Return the keys of the links over which this side may still write, including lost ones."""
        self._not_quiet = {each for each in self._not_quiet if not each.quiet.is_set()}
        return [each.link.key for each in self._not_quiet]

    async def close(self) -> None:
        """Lose every link, and return when nothing is left of them.

        This does not wait for a peer that is dead or frozen and does not answer: such a peer finds out by itself.
        """
        self._closed = True
        for attempt in list(self._connecting.values()):
            attempt.cancel()
        await asyncio.gather(*self._connecting.values(), return_exceptions=True)
        for link in list(self.links.values()):
            link.lose("the sender was closed")
        closing = dict(self._closing)
        if closing:
            await asyncio.wait(closing, timeout=GOODBYE_TIMEOUT_S)
            await asyncio.gather(*(link.hang_up() for task, link in closing.items() if not task.done()))
        await asyncio.gather(*closing, return_exceptions=True)

    # ---- connecting ----------------------------------------------------------------------------------------------

    async def _connect(self, address: str) -> OutgoingLink:
        """Connect by the best transport that both sides have. If that fails, try the next best.

        Raises:
            FingerprintMismatch: the peer's KV means something else.
            TransferFailed: the peer does not answer, or no transport reaches it.
        """
        offers, timeout_s = dict(self._transports), self._timeout_s
        while True:
            client = self._client(address)
            await client.start()
            try:
                stream, reply, link = await self._shake_hands(client, offers)
                transport = offers.pop(reply.transport)
                error = await _try_transport(transport, link, timeout_s)
            except BaseException:
                await client.close()
                raise
            if error is None:
                passed_over = one_line("".join(f"; not {name}: {why}" for name, why in reply.passed_over.items()))
                whom = "itself" if address == self._my_address() else address
                logger.info(
                    "link to %s: %s%s%s", whom, transport.name, link.summary and f", {link.summary}", passed_over
                )
                return OutgoingLink(client, stream, reply, link, transport, timeout_s)
            await stream.aclose()
            await client.close()
            problem = one_line(with_file_limit(str(error)))  # Gloo says what failed, and not at which limit
            if not offers:
                raise TransferFailed(f"no connection to {address} by {transport.name}: {problem}") from error
            logger.warning(
                "no connection to %s by %s, next is %s: %s", address, transport.name, next(iter(offers)), problem
            )

    def _client(self, address: str) -> RpcClient:
        timeout_s = self._timeout_s
        try:
            return RpcClient(
                address, heartbeat_interval_s=min(2.0, timeout_s / 4), heartbeat_timeout_s=timeout_s, keys=self._keys
            )
        except InvalidAddress as error:  # it came in a grant
            raise TransferFailed(f"no connection to {error}") from error

    async def _shake_hands(
        self, client: RpcClient, offers: Mapping[str, Transport]
    ) -> tuple[RpcStream[Any], LinkReply, Link]:
        me, timeout_s = self._me, self._timeout_s
        hello = Handshake(
            messages.PROTOCOL_VERSION,
            me.rank,
            me.epoch,
            self._my_address(),
            me.fingerprint,
            me.heads,
            me.layout,
            {name: transport.describe() for name, transport in offers.items()},
            uuid.uuid4().hex,
            me.name,
        )
        stream = client.stream(messages.LINK, hello)
        try:
            async with asyncio.timeout(timeout_s):
                reply: LinkReply = await anext(stream)
            check_reply(reply, me, offers)
        except TimeoutError:
            raise TransferFailed(f"no connection to {client.address}: no answer within {timeout_s} s") from None
        except (HBServeRpcError, StopAsyncIteration) as error:
            if FingerprintMismatch.__name__ in str(error):
                raise FingerprintMismatch(f"{client.address} refuses: {error}") from error
            raise TransferFailed(f"no connection to {client.address}: {error or 'the link was closed'}") from error
        mine, peer = sides(me.layout, me.heads, reply.layout, reply.heads)
        link = Link(
            hello.link,
            is_sender=True,
            peer_rank=reply.rank,
            peer_description=reply.description,
            mine=mine,
            peer=peer,
            rendezvous=_RemoteRendezvous(client, hello.link, timeout_s),
        )
        return stream, reply, link


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


class _RemoteRendezvous:
    """The sender's end of a Rendezvous, which asks the receiver."""

    def __init__(self, client: RpcClient, link: str, timeout_s: float) -> None:
        self._client = client
        self._link = link
        self._timeout_s = timeout_s

    async def set(self, name: str, value: bytes) -> None:
        await self._client.call(messages.TELL, messages.Told(self._link, name, value), timeout_s=self._timeout_s)

    async def get(self, name: str) -> bytes:
        asked = messages.Asked(self._link, name)
        return (await self._client.call(messages.ASK, asked, timeout_s=self._timeout_s)).value
