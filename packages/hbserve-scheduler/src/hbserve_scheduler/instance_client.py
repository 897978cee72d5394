"""A connection to one instance as the scheduler needs it: RpcClient is one, and a simulator has another."""

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
    """As RpcStream: to leave it before its end is to abort."""

    def __aiter__(self) -> AsyncIterator[Item]:
        return self

    async def __anext__(self) -> Item: ...

    async def each(self, take: Callable[[Item], object]) -> bool:
        """As RpcStream's, which wakes nobody for an item: here for those in whose place a test has few."""
        async for item in self:
            if take(item):
                return True
        return False

    async def __aenter__(self) -> "InstanceStream[Item]": ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class InstanceClient(Protocol):
    """As RpcClient, whose contracts these are."""

    on_lost: Callable[[PeerLost], None]
    on_doubt: Callable[[str], None]
    problem: str

    async def start(self) -> None: ...

    async def close(self, why: str = ..., *, error: type[PeerLost] = ...) -> None: ...

    async def call(self, method: Method[Q, R], request: Q, *, timeout_s: float) -> R: ...

    def notify(self, method: Notification[Q], request: Q) -> None: ...

    def stream(self, method: StreamMethod[Q, R], request: Q) -> InstanceStream[R]: ...


ClientFactory = Callable[..., InstanceClient]
"""Called as RpcClient is: with an address, `heartbeat_interval_s` and `heartbeat_timeout_s`."""
