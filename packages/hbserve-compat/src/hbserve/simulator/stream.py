"""The stream in which a modelled instance answers one request."""

import asyncio
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


class Session(Protocol):
    """The work of an instance for one stream."""

    def close(self) -> None:
        """End the session, whose reader has left, before or after its end. It sends nothing more, and leaves nothing
        behind."""


class Stream(Generic[T]):
    """An InstanceStream without a task: `put` wakes the reader, once for each item. With an asynchronous generator and
    its own waits, streams took a third of a simulation's time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_left: "Callable[[Stream[T]], object]") -> None:
        """`on_left` is called when the reader has left."""
        self._loop = loop
        self.session: Session | None = None
        self._on_left = on_left
        self._items: list[T | None] = []
        """Items that were not read yet; there are few. None marks the end."""
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._take: Callable[[T], object] | None = None
        """The argument of `each`, while that waits for more items."""

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
        except Exception as error:  # is raised to the caller that waits in `each`
            self._take = None
            self.fail(error)
            return
        if has_enough:
            self._take = None
            self._wake()

    def put_last(self, item: T) -> None:
        self.put(item, is_last=True)

    def fail(self, error: Exception) -> None:
        """End the stream with an error. Items that were not read yet are lost."""
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
        """Pass items to `take` until it returns True, without waking a task for each; see RpcStream's `each`."""
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
            self.session = None  # breaks a cycle of references, so that both are freed without the garbage collector
