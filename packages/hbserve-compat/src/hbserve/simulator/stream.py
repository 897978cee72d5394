"""The stream of what a modelled instance says in answer to one request, to the one who reads it."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from hbserve_rpc import PeerLost

T = TypeVar("T")


class Session(Protocol):
    """What an instance does for one stream."""

    def close(self) -> None:
        """Its reader has gone, before or after its end: it says nothing more, and leaves nothing behind."""


class Stream(Generic[T]):
    """An InstanceStream. Nothing runs for it but its reader, whom each `put` wakes once: an asynchronous generator in
    its place, with its own waits, was a third of a simulation."""

    def __init__(self, on_left: "Callable[[Stream[T]], object]") -> None:
        """on_left: called when its reader has gone."""
        self.session: Session | None = None
        self._on_left = on_left
        self._items: deque[T | None] = deque()
        """None for the end."""
        self._error: PeerLost | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: T, *, is_last: bool = False) -> None:
        self._items.append(item)
        if is_last:
            self._items.append(None)
        self._wake()

    def put_last(self, item: T) -> None:
        self.put(item, is_last=True)

    def fail(self, error: PeerLost) -> None:
        """What it has not been read of is lost."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        reader = self._reader
        if reader is not None and not reader.done():
            reader.set_result(None)

    def __aiter__(self) -> "Stream[T]":
        return self

    async def __anext__(self) -> T:
        while self._error is None:
            if not self._items:
                self._reader = asyncio.get_running_loop().create_future()
                await self._reader
                continue
            item = self._items[0]
            if item is None:
                raise StopAsyncIteration
            self._items.popleft()
            return item
        raise self._error

    async def __aenter__(self) -> "Stream[T]":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._on_left(self)
        if self.session is not None:
            self.session.close()
