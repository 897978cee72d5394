"""Whatever is sent to the OpenAI server, it is answered or refused, never with a 500, and leaves nothing behind."""

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hbserve_fake_scheduler import FakeServer
from hbserve_random_requests import BODY, HEADER, LINE, PATHS, PAYLOAD
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbserve.server.http.http_server import HttpServer
from hbserve.text.tokenizer import load_tokenizer

many = settings(
    derandomize=True, max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


def new_server(small_model: Callable[[str], Path], **changes: Any) -> FakeServer:
    server = FakeServer(load_tokenizer(small_model("qwen3")), **changes)
    server.answers("He", "llo")
    return server


async def until_empty(server: FakeServer, tasks: set[Any]) -> None:
    async with asyncio.timeout(20):
        while server.scheduler.running or asyncio.all_tasks() - tasks:
            await asyncio.sleep(0.001)


def test_whatever_body_is_sent_is_answered_or_refused_by_name(small_model):
    statuses: Counter[int] = Counter()
    server = new_server(small_model)

    async def post(path: str, body: bytes, tasks: set[Any]) -> None:
        response = await server.client.post(path, content=body)
        statuses[response.status_code] += 1
        if response.status_code != 200:
            assert response.status_code in (400, 404, 405, 413), response.text
            more = set() if path.startswith("/v1/messages") else {"param", "code"}
            assert set(response.json()["error"]) == {"message", "type"} | more
            assert len(response.content) < 3000
        await until_empty(server, tasks)

    with asyncio.Runner() as runner:

        @many
        @given(PATHS, BODY)
        def send(path: str, body: bytes) -> None:
            async def run() -> None:
                await post(path, body, asyncio.all_tasks())

            runner.run(run())

        send()
    assert min(statuses[200], statuses[400]) > 2, statuses


def test_whatever_is_written_to_its_socket_and_whenever_it_is_closed_nothing_stays(small_model):
    server = new_server(small_model, port=0)

    async def speak(port: int, head: str, payload: bytes, num_read: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode("latin-1") + payload)
        found = b""
        try:
            async with asyncio.timeout(0.02):
                found = await reader.readexactly(num_read)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()
        return found

    with asyncio.Runner() as runner:
        http = HttpServer(server.service.settings, server.app)
        runner.run(http.start())
        port = int(http.url.rpartition(":")[2])

        @settings(many, max_examples=200)
        @given(LINE, st.lists(HEADER, max_size=3), PAYLOAD, st.sampled_from([0, 1, 200]))
        def send(line: str, headers: list[str], payload: bytes, num_read: int) -> None:
            async def run() -> None:
                found = await speak(port, "\r\n".join([line, *headers, "", ""]), payload, num_read)
                assert b" 500 " not in found.split(b"\r\n")[0]

            runner.run(run())

        send()

        async def ends() -> None:
            async with asyncio.timeout(20):
                while server.scheduler.running or http.num_answering:
                    await asyncio.sleep(0.01)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
            writer.close()
            await http.stop()
            assert asyncio.all_tasks() == {asyncio.current_task()}

        runner.run(ends())
