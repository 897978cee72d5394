"""The rendezvous of a link: values by name that its ends tell each other while they connect, kept by the receiver.

The sender reaches them over the RPC connection that carries the link already. So a process group needs no store with a
port of its own. Torch's TCPStore binds every interface, and whenever it is connected to it looks up the peer's name: a
name server that drops a question costs five seconds then.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

MAX_VALUES, MAX_BYTES = 64, 1 << 20
"""Of one link; a group of two ranks needs two values of some hundred bytes."""


class Rendezvous(Protocol):
    """As either end sees it. Belongs to the manager's event loop."""

    async def set(self, name: str, value: bytes) -> None: ...

    async def get(self, name: str) -> bytes:
        """Wait until either end has set it. Raises ConnectionError, or what the connection to the receiver does."""
        ...


class HeldRendezvous:
    """The receiver's."""

    def __init__(self) -> None:
        self._values: dict[str, asyncio.Future[bytes]] = {}
        self._ended = False

    async def set(self, name: str, value: bytes) -> None:
        """Raises ValueError: it is set already, or too long."""
        if len(value) > MAX_BYTES or self._value(name).done():
            raise ValueError(f"{name}: {len(value)} bytes, of at most {MAX_BYTES} that may be set once")
        self._value(name).set_result(value)

    async def get(self, name: str) -> bytes:
        return await asyncio.shield(self._value(name))

    def _value(self, name: str) -> asyncio.Future[bytes]:
        if self._ended:
            raise ConnectionError("the link has ended")
        if name not in self._values:
            if len(self._values) == MAX_VALUES:
                raise ValueError(f"{name}: there are {MAX_VALUES} values already")
            self._values[name] = asyncio.get_running_loop().create_future()
        return self._values[name]

    def end(self) -> None:
        """Whoever waits hears that nothing comes."""
        self._ended = True
        for value in self._values.values():
            if not value.done():
                value.set_exception(ConnectionError("the link has ended"))
                value.exception()  # or asyncio complains where nobody waits
        self._values.clear()


class LinkStore(Store):
    """A link's rendezvous as the store of a process group, for the thread that makes the group.

    Made in the event loop, and held by whoever uses the group: torch itself holds only the half of it that is C++.
    """

    def __init__(self, rendezvous: Rendezvous, timeout_s: float) -> None:
        super().__init__()
        self._rendezvous = rendezvous
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self.published: list[bytes] = []
        """What this side has set."""

    def set(self, name: str, value: bytes) -> None:  # type: ignore[override]  # the stubs say str, torch gives bytes
        self.published.append(bytes(value))
        self._run(self._rendezvous.set(name, bytes(value)), self._timeout_s)

    def get(self, name: str) -> bytes:
        return self._run(self._rendezvous.get(name), self._timeout_s)

    def wait(self, names: Sequence[str], timeout: timedelta | None = None) -> None:
        for name in names:
            self._run(self._rendezvous.get(name), timeout.total_seconds() if timeout else self._timeout_s)

    def check(self, names: Sequence[str]) -> bool:
        """Asked by NCCL's watchdog each second, for a sign that some rank wants a dump: there is none."""
        return False

    def _run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        if self._loop.is_closed():
            work.close()
            raise ConnectionError("the event loop of this link has ended")
        return asyncio.run_coroutine_threadsafe(_bounded(work, timeout_s), self._loop).result()


async def _bounded(work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    async with asyncio.timeout(timeout_s):
        return await work
