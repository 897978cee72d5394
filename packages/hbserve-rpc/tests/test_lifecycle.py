"""Servers that die, freeze and come back, as real processes."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from hbserve_rpc import PeerLost, RpcClient, RpcServer, wire
from hbserve_testing.processes import freeze, strike


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_killed_or_frozen_server_loses_what_waits_for_it(rpc, serve, connect, number):
    process, port = serve()
    client = await connect(f"127.0.0.1:{port}")
    stream = client.stream(rpc.STREAM, rpc.Ask(1))
    await anext(stream)
    strike(process.pid, number)
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


async def test_a_silent_client_ends_its_work_on_the_server_which_says_whose(rpc, start, connect, caplog):
    caplog.set_level("INFO")
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
    client._heart.cancel()  # as if the process were frozen
    async with asyncio.timeout(30):
        await closed.wait()
    assert re.search(r"a client at 127\.0\.0\.1 was silent for \d+\.\d s; its work ends", caplog.text)


async def test_a_client_that_left_in_order_is_forgotten_and_not_reported_as_silent(rpc, start, connect, caplog):
    async def answer(ask):
        return ask

    server = RpcServer(heartbeat_timeout_s=0.4)
    server.serve(rpc.CALL, answer)
    await start(server)
    client = await connect(server.address, heartbeat_timeout_s=0.4)
    with caplog.at_level("INFO"):
        await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)
        await client.close()
        async with asyncio.timeout(30):
            while server._clients:
                await asyncio.sleep(0.02)
    assert "silent" not in caplog.text


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


async def test_a_server_that_thaws_ends_what_its_client_has_given_up(rpc, serve, connect):
    process, port = serve()
    client = await connect(f"127.0.0.1:{port}", heartbeat_timeout_s=2.0)
    stream = client.stream(rpc.STREAM, rpc.Ask(1))
    await anext(stream)
    freeze(process.pid)
    async with asyncio.timeout(30):
        with pytest.raises(PeerLost, match="silent"):
            await anext(stream)
    os.kill(process.pid, signal.SIGCONT)
    async with asyncio.timeout(30):
        assert (await asyncio.to_thread(process.stdout.readline)).strip() == "closed"
    assert (await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)).value == process.pid


def test_a_process_that_is_a_little_late_has_not_stood_still():
    assert [wire.own_pause(10.0, now_s, 1.0) for now_s in (10.9, 11.0, 11.9, 13.5)] == [0.0, 0.0, 0.0, 2.5]


async def test_a_process_that_stood_still_itself_gives_up_nobody(rpc, start, connect):
    async def wait(ask):
        await asyncio.sleep(0.5)
        return ask

    server = RpcServer(heartbeat_timeout_s=1.0)
    server.serve(rpc.CALL, wait)
    await start(server)
    client = await connect(server.address)
    call = asyncio.create_task(client.call(rpc.CALL, rpc.Ask(3), timeout_s=30))
    await asyncio.sleep(0.1)
    time.sleep(2.5)  # noqa: ASYNC251  as a handler does that computes in the event loop
    assert (await call).value == 3


async def test_a_call_made_after_a_restart_is_not_lost_to_answers_to_messages_before_it(rpc, start, connect):
    async def echo(ask):
        return ask

    server = RpcServer()
    server.serve(rpc.CALL, echo)
    await start(server)
    client = await connect(server.address)
    before = asyncio.create_task(client.call(rpc.CALL, rpc.Ask(1), timeout_s=20))
    await asyncio.sleep(0)
    (last_lost,) = client._waiting
    after = asyncio.create_task(client.call(rpc.CALL, rpc.Ask(2), timeout_s=20))
    await asyncio.sleep(0)
    client._handle(wire.UnknownClient(server.epoch, last_lost), b"")
    with pytest.raises(PeerLost):
        await before
    assert (await after).value == 2


async def test_frames_of_an_earlier_life_are_dropped(rpc, start, connect):
    # Known elsewhere: vLLM #58063, #49238, SGLang #28596, #27039.
    async def echo(ask):
        return ask

    server = RpcServer()
    server.serve(rpc.CALL, echo)
    await start(server)
    client = await connect(server.address)
    await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)
    pending = asyncio.create_task(client.call(rpc.CALL, rpc.Ask(2), timeout_s=20))
    await asyncio.sleep(0)
    (id_,) = client._waiting
    client._handle(wire.Reply("an earlier epoch", id_), wire.encode(rpc.Ask(666)))
    assert (await pending).value == 2
    assert client.dropped_frames == 1


async def test_each_life_on_the_same_port_has_its_own_epoch(start):
    first = RpcServer()
    await first.start()
    await first.stop()
    second = await start(RpcServer(port=first.port))
    assert second.address == first.address
    assert second.epoch != first.epoch


async def test_a_stopped_server_leaves_no_task_and_its_port_is_free_at_once(rpc, start, connect):
    entered = asyncio.Event()

    async def stuck(ask):
        entered.set()
        await asyncio.sleep(600)

    before = asyncio.all_tasks()
    server = RpcServer()
    server.serve(rpc.CALL, stuck)
    await server.start()
    client = RpcClient(server.address, heartbeat_interval_s=0.1, heartbeat_timeout_s=1.0)
    await client.start()
    call = asyncio.create_task(client.call(rpc.CALL, rpc.Ask(), timeout_s=60))
    async with asyncio.timeout(30):
        await entered.wait()
        await server.stop()
        with pytest.raises(PeerLost):
            await call
        await client.close()
    assert asyncio.all_tasks() == before
    await start(RpcServer(port=server.port))


async def test_closing_a_client_fails_what_waits_and_what_comes(rpc, serve):
    _, port = serve()
    before = asyncio.all_tasks()
    client = RpcClient(f"127.0.0.1:{port}")
    await client.close()
    await client.start()
    stream = client.stream(rpc.STREAM, rpc.Ask())
    await anext(stream)
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    await client.close()
    await client.close()
    with pytest.raises(PeerLost, match="closed"):
        await waiting
    with pytest.raises(PeerLost, match="not started"):
        await client.call(rpc.CALL, rpc.Ask(), timeout_s=1)
    assert asyncio.all_tasks() == before


async def test_closing_that_is_cancelled_still_leaves_no_socket():
    """A context that is collected with an open socket would wait for ever."""
    server = RpcServer()
    await server.start()
    client = RpcClient(f"127.0.0.1:{server.port}")
    await client.start()
    for thing, end in ((client, client.close), (server, server.stop)):
        socket = thing._socket._socket
        closing = asyncio.create_task(end())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert socket.closed
        await end()


NEVER_CLOSED = """
import asyncio, gc
from hbserve_rpc import RpcClient, RpcServer
async def main():
    await RpcClient("127.0.0.1:9").start()
    await RpcServer().start()
asyncio.run(main())
gc.collect()
print("ended")
"""


def test_a_client_and_a_server_that_were_never_closed_are_collected_without_waiting_for_ever():
    done = subprocess.run([sys.executable, "-c", NEVER_CLOSED], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr


async def test_where_something_else_listens_the_error_says_that_there_is_no_connection(rpc, connect):
    with socket.create_server(("127.0.0.1", 0)) as other:  # which says nothing, as a web server that waits to be asked
        client = await connect(f"127.0.0.1:{other.getsockname()[1]}", heartbeat_timeout_s=0.3)
        with pytest.raises(PeerLost, match=r"was silent for .* during .*; there is no connection: nothing that speaks"):
            await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)
