"""A method of each kind, and servers and clients that must leave nothing behind."""

import asyncio
import subprocess
import sys
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


SERVER = """
import asyncio, sys
from hbserve_rpc import Method, RpcServer, StreamMethod
import msgspec
class Ask(msgspec.Struct, frozen=True, tag=True):
    value: int = 0
async def pid(ask):
    import os
    return Ask(os.getpid())
async def forever(ask):
    try:
        yield ask
        await asyncio.sleep(600)
    finally:
        print("closed", flush=True)
async def main():
    server = RpcServer(port=int(sys.argv[1]))
    server.serve(Method("test.call", Ask, Ask), pid)
    server.serve_stream(StreamMethod("test.stream", Ask, Ask), forever)
    await server.start()
    print(server.port, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.fixture
def serve():
    """Starts a server process on a port; returns it and the port."""
    processes = []

    def serve(port: int = 0) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-c", SERVER, str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    yield serve
    for process in processes:
        process.kill()
        process.communicate(timeout=30)  # closes its pipe too
