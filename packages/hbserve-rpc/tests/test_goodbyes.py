"""How each side hears that the other has ended, or only their connection, long before heartbeats would say so."""

import asyncio
import os
import signal
from typing import Any

import pytest

from hbserve_rpc import PeerLost, RpcServer, wire

NEVER_S = 3600.0
"""Heartbeats say nothing in these tests."""


class Serving:
    """A server whose calls wait for the test."""

    def __init__(self, rpc: Any, port: int = 0) -> None:
        self.asked = asyncio.Event()
        self.go_on = asyncio.Event()
        self.ended = asyncio.Event()
        self.server = RpcServer(port=port, heartbeat_timeout_s=NEVER_S)
        self.server.serve(rpc.CALL, self._answer)

    @staticmethod
    async def answer_at_once(ask: Any) -> Any:
        return ask

    async def _answer(self, ask: Any) -> Any:
        self.asked.set()
        try:
            await self.go_on.wait()
        finally:
            self.ended.set()
        return ask


@pytest.fixture
def patient(connect):
    """A client with what it has heard of its server's ends."""

    async def start(address: str) -> tuple[Any, list[str]]:
        client = await connect(address, heartbeat_interval_s=NEVER_S, heartbeat_timeout_s=NEVER_S)
        losses: list[str] = []
        client.on_lost = lambda lost: losses.append(f"{type(lost).__name__}: {lost}")
        return client, losses

    return start


async def asking(rpc, client, serving) -> asyncio.Task[Any]:
    call = asyncio.create_task(client.call(rpc.CALL, rpc.Ask(7), timeout_s=60))
    async with asyncio.timeout(30):
        await serving.asked.wait()
        while client._epoch is None:
            await asyncio.sleep(0.001)
    return call


async def replaced(rpc, start, serving, monkeypatch) -> Serving:
    """Another life in its place: it ends without a word."""
    monkeypatch.setattr(serving.server._socket, "say_last", lambda frames: None)
    await serving.server.stop()
    again = Serving(rpc, serving.server.port)
    await start(again.server)
    return again


async def test_a_server_that_ends_in_order_says_so_and_who_asks_later_waits_for_the_next_life(rpc, start, patient):
    serving = Serving(rpc)
    await serving.server.start()
    client, losses = await patient(serving.server.address)
    call = await asking(rpc, client, serving)
    await serving.server.stop()
    async with asyncio.timeout(30):
        with pytest.raises(PeerLost, match="has ended in order"):
            await call
        while len(losses) < 2:
            await asyncio.sleep(0.005)
        assert losses[0] == f"PeerLost: {serving.server.address} has ended in order, or is being restarted"
        assert "nobody listens there" in losses[1]
        later = asyncio.create_task(client.call(rpc.CALL, rpc.Ask(8), timeout_s=60))
        again = Serving(rpc, serving.server.port)
        again.go_on.set()
        await start(again.server)
        assert (await later).value == 8


async def test_a_client_that_ends_in_order_ends_its_work_at_once_and_that_is_no_news(rpc, start, patient, caplog):
    caplog.set_level("INFO")
    serving = Serving(rpc)
    await start(serving.server)
    client, _ = await patient(serving.server.address)
    call = await asking(rpc, client, serving)
    await client.close()
    async with asyncio.timeout(30):
        await serving.ended.wait()
    assert not serving.server._clients
    with pytest.raises(PeerLost, match="this client was closed"):
        await call
    assert "its work ends" not in caplog.text


async def test_a_server_that_was_killed_is_lost_although_nobody_says_so_and_nothing_waits_for_it(rpc, serve, patient):
    process, port = serve()
    client, losses = await patient(f"127.0.0.1:{port}")
    await client.call(rpc.CALL, rpc.Ask(), timeout_s=60)
    os.kill(process.pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        while not losses:
            await asyncio.sleep(0.005)
    assert losses == [f"PeerDied: 127.0.0.1:{port} has ended or is being restarted: nobody listens there"]


class Cable:
    """Between a client and a server, until it is cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: list[asyncio.StreamWriter] = []
        self.num_made = 0

    async def __aenter__(self) -> "Cable":
        self._listening = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._listening.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        self._listening.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except ConnectionRefusedError:
            writer.close()
            return
        self._writers += [writer, there_writer]
        self.num_made += 1
        await asyncio.gather(self._pass(reader, there_writer), self._pass(there_reader, writer))

    @staticmethod
    async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
        except ConnectionError:
            pass
        writer.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()


async def test_a_short_break_of_the_connection_to_the_same_life_loses_nothing(rpc, start, patient):
    serving = Serving(rpc)
    await start(serving.server)
    async with Cable(serving.server.port) as cable, asyncio.timeout(30):
        client, losses = await patient(cable.address)
        call = await asking(rpc, client, serving)
        cable.cut()
        while not serving.server._clients or cable.num_made < 2 or not client._connection.is_there:
            await asyncio.sleep(0.005)
        serving.server.serve(rpc.CALL, serving.answer_at_once)
        await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)  # the server knows of the new connection
        serving.go_on.set()
        assert (await call).value == 7
        assert losses == []
        await client.close()


async def test_another_life_behind_the_same_address_is_noticed_when_it_is_reached(rpc, start, patient, monkeypatch):
    """Also where the address always answers, as that of a proxy does."""
    serving = Serving(rpc)
    await serving.server.start()
    async with Cable(serving.server.port) as cable, asyncio.timeout(30):
        client, losses = await patient(cable.address)
        call = await asking(rpc, client, serving)
        await replaced(rpc, start, serving, monkeypatch)
        cable.cut()
        with pytest.raises(PeerLost, match="was restarted"):
            await call
        assert losses == [f"PeerDied: {cable.address} was restarted"]
        await client.close()


async def test_what_a_life_has_heard_that_never_said_who_it_was_is_lost_with_its_connection(
    rpc, start, patient, monkeypatch
):
    serving, send = Serving(rpc), RpcServer._send
    monkeypatch.setattr(
        serving.server,
        "_send",
        lambda to, envelope, *body: None if isinstance(envelope, wire.Welcome) else send(serving.server, to, envelope),
    )
    await serving.server.start()
    async with Cable(serving.server.port) as cable, asyncio.timeout(30):
        client, _ = await patient(cable.address)
        call = asyncio.create_task(client.call(rpc.CALL, rpc.Ask(7), timeout_s=60))
        await serving.asked.wait()
        again = await replaced(rpc, start, serving, monkeypatch)
        cable.cut()
        with pytest.raises(PeerLost, match="not connected for long enough to say who it is"):
            await call
        again.go_on.set()
        assert (await client.call(rpc.CALL, rpc.Ask(8), timeout_s=20)).value == 8
        await client.close()


async def test_a_silent_server_is_in_doubt_until_it_is_heard_again(rpc, start, connect, monkeypatch):
    server = await start(RpcServer(heartbeat_timeout_s=NEVER_S))
    doubts: asyncio.Queue[str] = asyncio.Queue()
    client = await connect(server.address, heartbeat_interval_s=0.02, heartbeat_timeout_s=NEVER_S)
    client._doubt_s = 0.1
    client.on_doubt = doubts.put_nowait
    handle = server._handle
    async with asyncio.timeout(30):
        while client._epoch is None:
            await asyncio.sleep(0.001)
        monkeypatch.setattr(server, "_handle", lambda *_: None)
        assert (await doubts.get()).startswith("it was silent for")
        monkeypatch.setattr(server, "_handle", handle)
        assert await doubts.get() == ""


async def test_a_server_whose_connection_has_ended_is_in_doubt_until_the_same_life_is_connected_again(
    rpc, start, patient
):
    serving = Serving(rpc)
    await start(serving.server)
    async with Cable(serving.server.port) as cable:
        client, losses = await patient(cable.address)
        doubts: asyncio.Queue[str] = asyncio.Queue()
        client.on_doubt = doubts.put_nowait
        call = await asking(rpc, client, serving)
        async with asyncio.timeout(30):
            cable.cut()
            assert await doubts.get() == "its connection has ended"
            assert await doubts.get() == ""
            serving.go_on.set()
            await call
    assert losses == []
