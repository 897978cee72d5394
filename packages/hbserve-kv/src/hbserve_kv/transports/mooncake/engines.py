"""The Mooncake engines of one instance: a few with which it writes, and a few through which others write to it. Each is
shared by a group of links.

An engine registers the whole memory, and on RDMA opens every network card, so 64 peers must not need 64 engines. But a
problem with one peer affects its engine, so the other links of the group have to move away:

- While an engine meets a peer for the first time, it holds a mutex that every write needs, for a minute if that peer
has just frozen. Meanwhile writes wait here, where they can switch to another engine.
- A write that failed may go on until its engine ends.
- What a sender's system has taken of a write lands whenever its network lets it, unless the engine ends through which
it would land. The other links of that engine lose it too.

In all cases the engine is retired: nothing new is begun with it, its links move to another one with their next write,
and it ends after its last call. An engine remembers what it learnt of a peer, and has no call to forget it, so it is
not used again for a session that has failed.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from hbserve_kv.transports.base import Link
from hbserve_kv.transports.own_sockets import look_every
from hbserve_rpc import format_address

logger = logging.getLogger(__name__)

MOST_ENGINES = 4
MOST_RECEIVING_ON_TCP = 64
"""Limit of receiving engines on TCP, where an engine is cheap, so that each sender may have its own."""
MOST_LEFT = 16
"""Number of links after whose departure an engine that writes is retired. An engine keeps some connections to each peer
that has gone, because it has no call to close them."""
LONGEST_FIRST_CONTACT_S = 2.0
LOOK_INTERVAL_S, LAST_LOOK_INTERVAL_S = 0.05, 0.005


@dataclass(eq=False)
class Engine:
    """One engine and what is known of its use. Belongs to the event loop."""

    native: Any
    """Mooncake's TransferEngine. Deleting this attribute ends it."""
    scratch: memoryview
    """Registered memory of its own, into which it reads to test whether it reaches a peer."""
    scratch_address: int
    loopback: str = "127.0.0.1"
    failed: set[str] = field(default_factory=set)
    """Sessions in which something has failed."""
    retired: str = ""
    """Why nothing new is begun with it; "" if it is in use."""
    num_left: int = 0
    """Number of links that have used it and do not any more."""
    num_calls: int = 0
    """Number of calls under way, until the last of which it does not end."""
    is_open: asyncio.Event = field(default_factory=asyncio.Event)
    """Set unless it is meeting a peer for the first time; also set when it is retired."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it neither reads nor writes any more."""

    def __post_init__(self) -> None:
        self.is_open.set()
        look_often(self.native, LOOK_INTERVAL_S)
        # Its listening thread is already in a wait of a second, which a probe from the engine to itself ends.
        self.native.send_probe(format_address(self.loopback, self.native.get_rpc_port()))


class MooncakeEngines:
    """A set of engines, and which link uses which of them."""

    def __init__(self, make: Callable[[], Engine], *, most_left: int | None = None) -> None:
        """`make` may take long, and is called in a link's thread. `most_left` is how many links may leave an engine
        before it is retired; None: any number."""
        self._make = make
        self._most_left = most_left
        self.most = MOST_ENGINES
        self.keeps_unused = True
        """Whether engines without links are kept for the next links. One engine always is."""
        self._engines: list[Engine] = []
        self._of: dict[str, Engine] = {}
        """The engine that each link uses, by the key of the link."""
        self._choosing = asyncio.Lock()
        self._ending: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._engines)

    def of(self, link: Link) -> Engine | None:
        return self._of.get(link.key)

    async def join(self, link: Link, session: str) -> Engine:
        """Give the link an engine that is not meeting a peer right now."""
        while True:
            async with self._choosing:
                self._of[link.key] = engine = await self._choose(link, session)
            await engine.is_open.wait()
            if not engine.retired:
                return engine

    async def _choose(self, link: Link, session: str) -> Engine:
        """Choose the engine with the fewest links; make a new one if all are in use and there may be more."""
        self._of.pop(link.key, None)  # not by `leave`, because the link may get the same engine again
        fit = [engine for engine in self._engines if session not in engine.failed]
        best = min(fit, key=self._num_links, default=None)
        if best is not None and (not self._num_links(best) or len(self._engines) >= self.most):
            return best
        if len(self._engines) >= self.most:
            self.retire(min(self._engines, key=self._num_links), f"every engine has failed with {session}")
        made = await link.run(self._make)
        self._engines.append(made)
        return made

    def prepare(self) -> None:
        """Make the first engine now, so that a problem with it is reported now."""
        self._engines.append(self._make())

    def links_of(self, engine: Engine) -> set[str]:
        """Return the keys of the links that use an engine."""
        return {key for key, each in self._of.items() if each is engine}

    def leave(self, link: Link) -> None:
        left = self._of.pop(link.key, None)
        if left is None:
            return
        left.num_left += 1
        if self._most_left is not None and left.num_left >= self._most_left:
            self.retire(left, "many peers have left it")
        if left in self._engines and len(self._engines) > 1 and not (self.keeps_unused or self.links_of(left)):
            self.retire(left, "nobody uses it")

    def _num_links(self, engine: Engine) -> int:
        return len(self.links_of(engine))

    @asynccontextmanager
    async def call(self, engine: Engine) -> AsyncIterator[None]:
        """Keep the engine from ending during the block."""
        engine.num_calls += 1
        try:
            yield
        finally:
            engine.num_calls -= 1
            self._end_if_idle(engine)

    @asynccontextmanager
    async def first_contact(self, engine: Engine) -> AsyncIterator[None]:
        """Let an open engine meet a peer. Other links wait meanwhile, and move to another engine if it takes too
        long."""
        assert engine.is_open.is_set()
        engine.is_open.clear()
        loop = asyncio.get_running_loop()
        watch = loop.call_later(LONGEST_FIRST_CONTACT_S, self.retire, engine, "a peer does not answer it")
        try:
            async with self.call(engine):
                yield
        finally:
            watch.cancel()
            engine.is_open.set()

    def retire(self, engine: Engine, why: str) -> None:
        """Begin nothing new with an engine, and end it when its calls have returned."""
        if engine.retired:
            return
        logger.debug("a Mooncake engine of %s links ends: %s", self._num_links(engine), why)
        engine.retired = why
        self._engines.remove(engine)
        engine.is_open.set()
        self._end_if_idle(engine)

    def _end_if_idle(self, engine: Engine) -> None:
        if engine.retired and not engine.num_calls and not engine.ended.is_set():
            task = asyncio.create_task(end(engine))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        for engine in list(self._engines):
            self.retire(engine, "closed")
        await asyncio.gather(*self._ending)


async def end(engine: Engine) -> None:
    """End an engine, and return when it has ended, which stops its writes. No call of it may be under way."""
    look_often(engine.native, LAST_LOOK_INTERVAL_S)
    await asyncio.sleep(LOOK_INTERVAL_S)
    await asyncio.to_thread(delattr, engine, "native")
    engine.ended.set()


def look_often(native: Any, interval_s: float) -> None:
    """Set how often the engine's listening thread checks whether the engine ends.

    Ending an engine waits for that thread while holding the GIL. The thread checks whenever accept() returns, which
    Mooncake lets wait for a second. Mooncake has no setting for this wait, but it is an option of the socket.
    """
    look_every(native.get_rpc_port(), interval_s)
