"""A method of each kind, and servers and clients that must leave nothing behind."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from hbserve_rpc import Method, Notification, RpcClient, RpcServer, StreamMethod


class Ask(msgspec.Struct, frozen=True, tag=True):
    value: int = 0


@pytest.fixture
def rpc() -> SimpleNamespace:
    """The request and reply type, and a method of each kind."""
    return SimpleNamespace(
        Ask=Ask, CALL=Method("test.call", Ask, Ask), TELL=Notification("test.tell", Ask),
        STREAM=StreamMethod("test.stream", Ask, Ask),
    )  # fmt: skip


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Any]]:
    """Starts servers and clients; afterwards all are closed, and no task may be left."""
    before = asyncio.all_tasks()
    started: list[Any] = []

    async def start(thing: Any) -> Any:
        await thing.start()
        started.append(thing)
        return thing

    yield start
    for thing in reversed(started):
        await (thing.stop() if isinstance(thing, RpcServer) else thing.close())
    async with asyncio.timeout(10):
        while asyncio.all_tasks() - before - {asyncio.current_task()}:
            await asyncio.sleep(0.01)


@pytest.fixture
def connect(start: Callable[..., Any]) -> Callable[..., Any]:
    """A client of a server, with fast heartbeats."""

    async def connect(address: str, **settings: Any) -> RpcClient:
        defaults = {"heartbeat_interval_s": 0.1, "heartbeat_timeout_s": 1.0}
        return await start(RpcClient(address, **(defaults | settings)))

    return connect
