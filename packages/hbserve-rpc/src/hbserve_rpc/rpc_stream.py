"""The client's side of a stream, which waits for its items. A call is a stream of one item."""

import asyncio
import functools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from hbserve_rpc import wire
from hbserve_rpc.errors import PeerLost, ProtocolMismatch, RpcTimeout

R = TypeVar("R")


class Client(Protocol):
    """The part of an RpcClient that streams need."""

    address: str

    @property
    def why_silent(self) -> str: ...

    def begin(self, pending: "RpcStream[Any]", envelope: wire.Call | wire.Open, request: msgspec.Struct) -> None: ...

    def send(self, envelope: wire.FromClient) -> None: ...

    def give_credit(self, id_: int, count: int) -> None: ...

    def forget(self, id_: int) -> bool: ...


@functools.cache
def _decoder(item: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(item)


async def whenever_told(give: Callable[[], bool], listen: Callable[[Callable[[], None] | None], None]) -> None:
    """Call `give` now, and in each turn of the event loop in which it has something to give, until it returns True. No
    task is woken for these calls. What `give` raises is raised here, and not where it was called.

    listen: gets the function to call when there is something, and None at the end.
    """
    left, mishap = asyncio.get_running_loop().create_future(), None

    def tell() -> None:
        nonlocal mishap
        if left.done():
            return
        try:
            is_over = give()
        except Exception as error:
            mishap, is_over = error, True
        if is_over and not left.done():  # `give` may have cancelled the task that waits here
            left.set_result(None)

    listen(tell)
    try:
        tell()
        await left
    finally:
        listen(None)
    if mishap is not None:
        raise mishap


class RpcStream(AsyncIterator[R], Generic[R]):
    """Iterator over the items of one stream, in order. It is made by `RpcClient.stream`."""

    def __init__(self, client: Client, id_: int, method: str, item: Any, timeout_s: float | None) -> None:
        self.id = id_
        self.method = method
        self.since_s = time.monotonic()
        self.opening: tuple[wire.Open, msgspec.Struct] | None = None
        self._client = client
        self._decode = _decoder(item).decode
        self._timeout_s = timeout_s
        self._items: deque[R] = deque()
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        """Future of whoever waits for an item or the end. An Event would take twice as long for each token."""
        self._tell: Callable[[], None] | None = None
        """Function to call for an item or the end, while `each` waits."""
        self._num_received = 0
        self._num_taken = 0

    def receive_item(self, number: int, item: bytes | msgspec.Raw) -> bool:
        """Take an item that arrived. Return False if it ended the stream here, while the server goes on and must be
        told."""
        if number != self._num_received:
            self.fail(PeerLost(f"{self._client.address} lost item {self._num_received} of {self.method}"))
            return False
        try:
            decoded = self._decode(item)
        except wire.UNREADABLE as error:
            self.fail(ProtocolMismatch(f"{self._client.address} answered {self.method} with {error}"))
            return False
        self._num_received += 1
        self._items.append(decoded)
        self._wake()
        return True

    def end(self, envelope: wire.Reply | wire.End | wire.Failed, body: bytes) -> None:
        if isinstance(envelope, wire.Reply):
            self.receive_item(0, body)
        elif isinstance(envelope, wire.End) and envelope.count not in (None, self._num_received):
            what = f"{self._num_received} items of {self.method}, which has {envelope.count}"
            self.fail(PeerLost(f"{self._client.address} has sent {what}: the others are lost"))
        self.fail(wire.revive_error(envelope) if isinstance(envelope, wire.Failed) else StopAsyncIteration())

    def fail(self, error: Exception) -> None:
        """End the stream after the items that have already arrived. The first cause is kept."""
        self._client.forget(self.id)
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._tell is not None:
            self._tell()
        elif self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def each(self, take: Callable[[R], object]) -> bool:
        """Pass every item to `take` as soon as it arrives, until `take` returns True or the stream ends. Return whether
        there may be more items.

        No task is woken for an item: `take` is called in the turn of the event loop in which it arrived. Meanwhile the
        stream has no timeout.

        Raises what iterating raises, and what `take` raises.
        """

        def give() -> bool:
            while self._items:
                if take(self._next_item()):
                    return True
            return self._error is not None

        self._open()
        await whenever_told(give, self._listen)
        if self._items or self._error is None:
            return True
        if not isinstance(self._error, StopAsyncIteration):
            raise self._error
        return False

    def _listen(self, tell: Callable[[], None] | None) -> None:
        self._tell = tell

    def _open(self) -> None:
        if self.opening is not None:
            envelope, request = self.opening
            self.opening, self.since_s = None, time.monotonic()
            self._client.begin(self, envelope, request)

    async def __anext__(self) -> R:
        self._open()
        while not self._items:
            if self._error is not None:
                raise self._error
            self._reader = asyncio.get_running_loop().create_future()
            if self._timeout_s is None:  # the path of each token, so not even an idle timer is made
                await self._reader
            else:
                await self._wait(self._reader, self._timeout_s)
        return self._next_item()

    def _next_item(self) -> R:
        self._num_taken += 1
        if self._num_taken % (wire.CREDIT // 2) == 0 and self._error is None:
            self._client.give_credit(self.id, wire.CREDIT // 2)
        return self._items.popleft()

    async def _wait(self, reader: "asyncio.Future[None]", timeout_s: float) -> None:
        late = asyncio.get_running_loop().call_later(timeout_s, self._is_late)
        try:
            await reader
        finally:
            late.cancel()

    def _is_late(self) -> None:
        if self._items or self._error is not None:  # it arrived in the same turn of the loop
            return
        silent = f"no answer to {self.method} within {self._timeout_s:.3g} s{self._client.why_silent}"
        self._close(RpcTimeout(f"{self._client.address}: {silent}"))
        self._wake()

    async def aclose(self) -> None:
        """Close the stream, so that the server stops. May be called twice, and after the end."""
        self._close(StopAsyncIteration())

    def _close(self, why: Exception) -> None:
        self.opening = None
        self._error = self._error or why
        self._items.clear()
        if self._client.forget(self.id):
            self._client.send(wire.Close(self.id))

    async def __aenter__(self) -> "RpcStream[R]":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
