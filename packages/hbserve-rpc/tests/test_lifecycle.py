"""Servers that die, freeze and come back, as real processes."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from hbserve_rpc import PeerLost, RpcServer

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
    yield ask
    await asyncio.sleep(600)
    yield ask
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
        process.wait(timeout=30)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_killed_or_frozen_server_loses_what_waits_for_it(rpc, serve, connect, number):
    process, port = serve()
    client = await connect(f"127.0.0.1:{port}")
    stream = client.stream(rpc.STREAM, rpc.Ask(1))
    await anext(stream)
    os.kill(process.pid, number)
    async with asyncio.timeout(30):
        with pytest.raises(PeerLost, match=f"127.0.0.1:{port}"):
            await anext(stream)


async def test_a_restarted_server_fails_what_waited_and_serves_what_comes(rpc, serve, connect):
    process, port = serve()
    client = await connect(f"127.0.0.1:{port}", heartbeat_timeout_s=30.0)
    stream = client.stream(rpc.STREAM, rpc.Ask(1))
    await anext(stream)
    process.kill()
    process.wait(timeout=30)
    second, _ = serve(port)
    async with asyncio.timeout(30):
        with pytest.raises(PeerLost, match="restarted"):
            await anext(stream)
    assert (await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)).value == second.pid


async def test_a_silent_client_ends_its_work_on_the_server(rpc, start, connect):
    closed = asyncio.Event()

    async def forever(ask):
        try:
            yield ask
            await asyncio.sleep(600)
        finally:
            closed.set()

    server = RpcServer(heartbeat_timeout_s=1.0)
    server.serve_stream(rpc.STREAM, forever)
    await start(server)
    client = await connect(server.address)
    await anext(client.stream(rpc.STREAM, rpc.Ask()))
    client._tasks[1].cancel()  # its heartbeat, as if the process were frozen
    async with asyncio.timeout(30):
        await closed.wait()


async def test_stopping_a_server_ends_its_generators(rpc, connect):
    closed = asyncio.Event()

    async def forever(ask):
        try:
            yield ask
            await asyncio.sleep(600)
        finally:
            closed.set()

    server = RpcServer()
    server.serve_stream(rpc.STREAM, forever)
    await server.start()
    client = await connect(server.address)
    await anext(client.stream(rpc.STREAM, rpc.Ask()))
    async with asyncio.timeout(10):
        await server.stop()
        await server.stop()
    assert closed.is_set()
