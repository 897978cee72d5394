"""The interface of a connection to one instance. RpcClient is one implementation, and a simulator has another."""

from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Protocol, TypeVar

import msgspec

from hbserve_rpc import PeerLost
from hbserve_rpc.methods import Method, Notification, StreamMethod

Q = TypeVar("Q", bound=msgspec.Struct)
R = TypeVar("R")
Item = TypeVar("Item", covariant=True)


class InstanceStream(Protocol[Item]):
    """Interface of a stream like RpcStream. Leaving it before its end aborts it."""

    def __aiter__(self) -> AsyncIterator[Item]:
        return self

    async def __anext__(self) -> Item: ...

    async def each(self, take: Callable[[Item], object]) -> bool:
        """See `RpcStream.each`, which wakes no task for an item. This simple version is for streams with few items, as
        in tests."""
        async for item in self:
            if take(item):
                return True
        return False

    async def __aenter__(self) -> "InstanceStream[Item]": ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class InstanceClient(Protocol):
    """Interface of a client of an instance. The contracts are those of RpcClient."""

    on_lost: Callable[[PeerLost], None]
    on_doubt: Callable[[str], None]
    problem: str

    async def start(self) -> None: ...

    async def close(self, why: str = ..., *, error: type[PeerLost] = ...) -> None: ...

    async def call(self, method: Method[Q, R], request: Q, *, timeout_s: float) -> R: ...

    def notify(self, method: Notification[Q], request: Q) -> None: ...

    def stream(self, method: StreamMethod[Q, R], request: Q) -> InstanceStream[R]: ...


ClientFactory = Callable[..., InstanceClient]
"""Maker of clients, which is called as RpcClient is: with an address, `heartbeat_interval_s`, `heartbeat_timeout_s`."""
