"""The receiving ends of links: one handler of the control server for each sender, as long as that is connected."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping

from hbserve_kv.config import GOODBYE_TIMEOUT_S
from hbserve_kv.protocol.handshake import Identity, check, choose_transport
from hbserve_kv.protocol.messages import Cancelled, Handshake, LinkReply
from hbserve_kv.receiving.transfer import IncomingLink
from hbserve_kv.transports.base import Link, Transport

logger = logging.getLogger(__name__)


class IncomingLinks:
    """Links by key, while they are connected."""

    def __init__(
        self, me: Identity, transports: Mapping[str, Transport], on_lost: Callable[[IncomingLink, str], None]
    ) -> None:
        self._me = me
        self._transports = transports
        self._on_lost = on_lost
        self.connected: dict[str, IncomingLink] = {}
        self._dropping: set[asyncio.Task[None]] = set()

    async def serve(self, hello: Handshake) -> AsyncIterator[LinkReply | Cancelled]:
        """Handler of LINK."""
        common = check(hello, self._me)
        transport, passed_over = choose_transport(hello, self._transports, self._me.rank)
        self._lose_earlier_lives(hello)
        link = Link(
            hello.link, is_sender=False, peer_rank=hello.rank, peer_description=hello.offers[transport.name],
            heads=common.slice_in(self._me.heads), peer_heads=common.slice_in(hello.heads),
            peer_num_heads=hello.heads.count,
        )  # fmt: skip
        # Two-sided transports connect from both ends at once, so the answer must not wait for it.
        connect = asyncio.sleep(0) if transport.one_sided else transport.connect(link)
        made = IncomingLink(hello, link, transport, common, asyncio.create_task(connect))
        self.connected[link.key] = made
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

    def _lose_earlier_lives(self, hello: Handshake) -> None:
        for old in list(self.connected.values()):
            if old.hello.address == hello.address:
                self._lose(old, "the sender was restarted" if old.hello.epoch != hello.epoch else "the link broke")

    def _lose(self, lost: IncomingLink, why: str) -> None:
        if self.connected.pop(lost.link.key, None) is None:
            return
        lost.is_connected = False
        lost.ended.set()
        self._on_lost(lost, why)
        for task in lost.accepting:
            task.cancel()
        task = asyncio.create_task(self._drop(lost))
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)

    async def _drop(self, lost: IncomingLink) -> None:
        lost.connecting.cancel()
        await asyncio.gather(lost.connecting, return_exceptions=True)
        try:
            await lost.transport.disconnect(lost.link)
        except Exception:
            logger.exception("disconnecting a link of %s failed", lost.transport.name)
        lost.link.executor.shutdown(wait=False)

    async def say_goodbye(self) -> None:
        """End every link, and let the senders know. Before the server stops."""
        links = list(self.connected.values())
        for link in links:
            link.notices.put_nowait(None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_TIMEOUT_S):
                await asyncio.gather(*(link.ended.wait() for link in links))

    async def close(self) -> None:
        """After the server has stopped: wait until nothing is left of the links."""
        await asyncio.gather(*self._dropping, return_exceptions=True)
