"""The stream of what a modelled instance says in answer to one request, to the one who reads it."""

import asyncio
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


class Session(Protocol):
    """What an instance does for one stream."""

    def close(self) -> None:
        """Its reader has gone, before or after its end: it says nothing more, and leaves nothing behind."""


class Stream(Generic[T]):
    """An InstanceStream. Nothing runs for it but its reader, whom each `put` wakes once: an asynchronous generator in
    its place, with its own waits, was a third of a simulation."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_left: "Callable[[Stream[T]], object]") -> None:
        """on_left: called when its reader has gone."""
        self._loop = loop
        self.session: Session | None = None
        self._on_left = on_left
        self._items: list[T | None] = []
        """Few; None for the end."""
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._take: Callable[[T], object] | None = None
        """Of `each`, while that waits for more."""

    def put(self, item: T, *, is_last: bool = False) -> None:
        if self._take is None:
            self._items.append(item)
            self._wake()
        else:
            self._hand_over(item, self._take)
        if is_last:
            self._items.append(None)
            self._wake()

    def _hand_over(self, item: T, take: Callable[[T], object]) -> None:
        try:
            has_enough = take(item)
        except Exception as error:  # of whoever waits in `each`
            self._take = None
            self.fail(error)
            return
        if has_enough:
            self._take = None
            self._wake()

    def put_last(self, item: T) -> None:
        self.put(item, is_last=True)

    def fail(self, error: Exception) -> None:
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
                self._reader = self._loop.create_future()
                await self._reader
                continue
            item = self._items[0]
            if item is None:
                raise StopAsyncIteration
            del self._items[0]
            return item
        raise self._error

    async def each(self, take: Callable[[T], object]) -> bool:
        """As RpcStream's: nobody is woken for an item."""
        items = self._items
        while self._error is None and items:
            item = items[0]
            if item is None:
                return False
            del items[0]
            if take(item):
                return True
        if self._error is None:
            self._take, self._reader = take, self._loop.create_future()
            try:
                await self._reader
            finally:
                self._take = None
        if self._error is not None:
            raise self._error
        return not items or items[0] is not None

    async def __aenter__(self) -> "Stream[T]":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._on_left(self)
        if self.session is not None:
            self.session.close()
            self.session = None  # which knows this stream: both are freed at once, without the garbage collector
