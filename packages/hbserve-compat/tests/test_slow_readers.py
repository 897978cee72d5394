"""Clients of the OpenAI server that do not read their answers, or do not end their requests, cost a bounded amount."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hbserve_fake_scheduler import FakeServer

from hbserve.server.http import http_server
from hbserve.server.http.http_server import HttpServer
from hbserve.text.tokenizer import load_tokenizer
from hbserve_scheduler.config import ServerSection
from hbserve_testing.narrowing import present
from hbserve_testing.waits import until

STEP, NUM_STEPS = "x" * 100, 4000


class Asking:
    """A server, and a streamed request to it whose answer is not read."""

    def __init__(self, server: FakeServer, http: HttpServer, client: socket.socket) -> None:
        self.server = server
        self.http = http
        self.client = client


@pytest.fixture
def asking(small_model: Callable[[str], Path]) -> Callable[[], Any]:
    tokenizer = load_tokenizer(small_model("qwen3"))

    @asynccontextmanager
    async def asking(n: int = 1) -> AsyncIterator[Asking]:
        server = FakeServer(tokenizer, port=0)
        server.answers(*[STEP] * NUM_STEPS)
        http = HttpServer(server.service.settings, server.app)
        present(http._socket).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # those of its connections too
        await http.start()
        body = json.dumps({"prompt": "a", "max_tokens": len(STEP) * NUM_STEPS, "stream": True, "n": n}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(present(http._socket).getsockname())
            client.sendall(head.encode() + body)
            client.setblocking(False)
            yield Asking(server, http, client)
        await http.stop()
        assert not server.scheduler.running

    return asking


@pytest.mark.parametrize("n", [1, 2])
async def test_an_answer_that_nobody_reads_waits_where_it_is_bounded_and_loses_nothing_when_it_is_read(asking, n):
    async with asking(n) as found:
        scheduler, loop = found.server.scheduler, asyncio.get_running_loop()
        await until(lambda: any(each.flow.write_paused for each in found.http._server.server_state.connections))
        num_given = scheduler.num_given
        for _ in range(NUM_STEPS):  # it could go on now, if nothing held it
            await asyncio.sleep(0)
        assert scheduler.num_given <= num_given + 2 * n * len(STEP), "what was taken, and waits to be sent"
        content = b""
        while part := await loop.sock_recv(found.client, 1 << 20):
            content += part
        assert content.count(STEP.encode()) == NUM_STEPS * n
        await until(lambda: not found.http.num_answering)
        (figures,) = found.server.service.http.counts.values()
        body = content.partition(b"\r\n\r\n")[2]
        assert 0.9 * len(body) < figures.response_bytes < len(body), "all of it, but what chunks are framed by"
        assert b"data: [DONE]" in content


async def test_a_client_that_reads_nothing_for_long_loses_its_connection_and_its_answer_ends(asking, monkeypatch):
    monkeypatch.setattr(http_server, "STALL_TIMEOUT_S", 0.2)
    async with asking() as found:
        await until(lambda: bool(found.server.scheduler.running))
        await until(lambda: not found.server.scheduler.running)
        assert found.server.scheduler.num_abandoned == 1
        assert found.server.scheduler.num_given < NUM_STEPS * len(STEP)
        await until(lambda: not found.http._server.server_state.connections)


HEADS = {
    "one header without an end": b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-A: ",
    "a path without an end": b"GET /",
    "trailers without an end": b"POST /ping HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-A: ",
}


@pytest.mark.parametrize("case", HEADS)
async def test_a_request_that_does_not_end_is_cut_off(asking, case):
    async with asking() as found:
        reader, writer = await asyncio.open_connection(*present(found.http._socket).getsockname())
        writer.write(HEADS[case])
        num_sent = 0
        with contextlib.suppress(ConnectionError):
            while num_sent < 64 << 20 and not reader.at_eof():
                writer.write(b"x" * (64 << 10))
                num_sent += 64 << 10
                await writer.drain()
                await asyncio.sleep(0)
        assert num_sent < 32 << 20, "the buffers of the connection hold some more than the bound"
        writer.close()


HALVES = {
    "nothing": b"",
    "half a head": b"POST /v1/completions HTTP/1.1\r\nHos",
    "half a body": b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{",
    "half of a second request": b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /health HTTP/1.1\r\nHos",
}


@pytest.mark.parametrize("case", HALVES)
async def test_a_client_that_does_not_go_on_with_its_request_loses_its_connection(asking, monkeypatch, case):
    monkeypatch.setattr(http_server, "KEEP_ALIVE_S", 0.5)
    monkeypatch.setattr(http_server, "STALL_TIMEOUT_S", 0.2)
    async with asking() as found:
        reader, writer = await asyncio.open_connection(*present(found.http._socket).getsockname())
        writer.write(HALVES[case])
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(30):
                await reader.read()
        writer.close()


async def test_a_client_that_waits_long_for_the_answer_to_a_whole_request_keeps_its_connection(monkeypatch):
    monkeypatch.setattr(http_server, "KEEP_ALIVE_S", 0.5)
    monkeypatch.setattr(http_server, "STALL_TIMEOUT_S", 0.2)
    goes_on = asyncio.Event()

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await goes_on.wait()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    http = HttpServer(ServerSection(port=0), answer)
    await http.start()
    reader, writer = await asyncio.open_connection(*http.bound_socket.getsockname())
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    silent, other = await asyncio.open_connection(*http.bound_socket.getsockname())
    async with asyncio.timeout(60):
        with contextlib.suppress(ConnectionError):
            await silent.read()  # it came later, and has lost its own
        goes_on.set()
        assert (await reader.readline()).startswith(b"HTTP/1.1 204")
    writer.close()
    other.close()
    await http.stop()
