"""Clients that do not read: what is kept for them is bounded, whatever they say, and others are served."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import zmq

from hbserve_rpc import Method, Overloaded, RpcServer, StreamMethod, connected_client, server, wire


class Blob(msgspec.Struct, frozen=True, tag=True):
    number: int = 0
    content: bytes = b""


BLOB_BYTES, NUM_BLOBS = 32 << 10, 600
BLOBS: StreamMethod[Blob, Blob] = StreamMethod("test.blobs", Blob, Blob)
BLOB: Method[Blob, Blob] = Method("test.blob", Blob, Blob)
MOST_BYTES = 16 << 20
"""ZeroMQ's queue is 4 MiB; the system's buffers of a connection are some more."""


class Deaf:
    """A client of the bare protocol that reads when it is told to, with small buffers until then."""

    def __init__(self, context: "zmq.Context[Any]", address: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        for option, value in ((zmq.LINGER, 0), (zmq.RCVHWM, 1), (zmq.RCVBUF, 4096), (zmq.IDENTITY, b"deaf")):
            self.socket.setsockopt(option, value)
        self.socket.connect(f"tcp://{address}")
        self.say(wire.Hello(wire.PROTOCOL_VERSION, 60.0))

    def say(self, envelope: wire.FromClient, request: msgspec.Struct | None = None) -> None:
        self.socket.send_multipart([wire.encode(envelope), b"" if request is None else wire.encode(request)])

    async def read(self) -> tuple[Any, bytes]:
        async with asyncio.timeout(20):
            while not self.socket.poll(0):
                await asyncio.sleep(0.001)
        head, body = self.socket.recv_multipart()
        return wire.decode_from_server(head), body


@pytest.fixture
async def serving(start: Any) -> tuple[RpcServer, dict[str, int]]:
    """A server of blobs, and how many it has made."""
    made = {"blobs": 0}

    async def one(request: Blob) -> Blob:
        made["blobs"] += 1
        return Blob(request.number, bytes(BLOB_BYTES))

    async def several(request: Blob) -> Any:
        for number in range(NUM_BLOBS):
            yield await one(Blob(number))

    serving = RpcServer()
    serving.serve(BLOB, one)
    serving.serve_stream(BLOBS, several)
    return await start(serving), made


@pytest.fixture
async def deaf(serving: Any) -> AsyncIterator[Deaf]:
    with zmq.Context() as context:
        deaf = Deaf(context, serving[0].address)
        with deaf.socket:
            yield deaf


async def until_it_stands(made: dict[str, int]) -> None:
    async with asyncio.timeout(20):
        before = -1
        while made["blobs"] == 0 or made["blobs"] != before:
            before = made["blobs"]
            await asyncio.sleep(0.1)


async def test_a_client_that_gives_credit_and_reads_nothing_stops_its_streams_at_a_bound_and_loses_nothing(
    serving, deaf, connect
):
    rpc_server, made = serving
    for id_ in (1, 2):
        deaf.say(wire.Open(id_, BLOBS.name), Blob())
        deaf.say(wire.Credits(10 + id_, [(id_, wire.CREDIT)] * NUM_BLOBS))
    await until_it_stands(made)
    assert made["blobs"] * BLOB_BYTES < MOST_BYTES
    other = await connect(rpc_server.address)
    assert (await other.call(BLOB, Blob(5), timeout_s=20)).number == 5
    numbers: dict[int, list[int]] = {1: [], 2: []}
    ends: list[Any] = []
    while len(ends) < 2:
        envelope, _ = await deaf.read()
        if isinstance(envelope, wire.Items):
            assert len(envelope.items) <= 2 + connected_client.MESSAGE_BYTES / BLOB_BYTES
            for id_, number, _ in envelope.items:
                numbers[id_].append(number)
        elif isinstance(envelope, wire.End):
            ends.append(envelope.id)
    assert numbers == {1: list(range(NUM_BLOBS)), 2: list(range(NUM_BLOBS))}


async def test_a_client_that_asks_on_and_reads_nothing_is_given_up(serving, deaf, monkeypatch):
    monkeypatch.setattr(server, "MOST_WAITING_BYTES", 1 << 20)
    rpc_server, made = serving
    for id_ in range(1, NUM_BLOBS):
        deaf.say(wire.Call(id_, BLOB.name), Blob())
    await until_it_stands(made)
    async with asyncio.timeout(20):
        while rpc_server._clients:
            await asyncio.sleep(0.01)
    assert made["blobs"] * BLOB_BYTES < MOST_BYTES
    envelope = None
    while not isinstance(envelope, wire.UnknownClient):  # said again and again: it finds no room before others are read
        deaf.say(wire.Ping(NUM_BLOBS))
        envelope, _ = await deaf.read()
        assert isinstance(envelope, wire.Welcome | wire.Reply | wire.UnknownClient)


async def test_more_work_of_one_client_than_may_be_under_way_is_refused(start, connect, monkeypatch):
    monkeypatch.setattr(server, "MOST_WORK", 3)
    go_on = asyncio.Event()

    async def wait(request: Blob) -> Blob:
        await go_on.wait()
        return request

    rpc_server = RpcServer()
    rpc_server.serve(BLOB, wait)
    await start(rpc_server)
    client, other = await connect(rpc_server.address), await connect(rpc_server.address)
    calls = [asyncio.create_task(client.call(BLOB, Blob(i), timeout_s=20)) for i in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="3 calls and streams of one client"):
        await client.call(BLOB, Blob(), timeout_s=20)
    last = asyncio.create_task(other.call(BLOB, Blob(7), timeout_s=20))
    go_on.set()
    assert [reply.number for reply in await asyncio.gather(*calls, last)] == [0, 1, 2, 7]


async def test_a_client_whose_connection_is_closed_ends_its_work_long_before_it_would_be_silent(start, connect):
    ended = []

    async def wait(request: Blob) -> Any:
        try:
            yield request
            await asyncio.Event().wait()
        finally:
            ended.append(request.number)

    rpc_server = RpcServer(drops_closed=True)
    rpc_server.serve_stream(BLOBS, wait)
    await start(rpc_server)
    other = (await connect(rpc_server.address)).stream(BLOBS, Blob(2))
    await anext(other)
    with zmq.Context() as context, Deaf(context, rpc_server.address).socket as socket:  # silent after a minute
        socket.send_multipart([wire.encode(wire.Open(1, BLOBS.name)), wire.encode(Blob(1))])
        async with asyncio.timeout(20):
            while len(rpc_server._clients) < 2 or not all(each.work for each in rpc_server._clients.values()):
                await asyncio.sleep(0.01)
        socket.close()
        async with asyncio.timeout(20):
            while not ended:
                await asyncio.sleep(0.01)
    assert ended == [1]
    await other.aclose()
