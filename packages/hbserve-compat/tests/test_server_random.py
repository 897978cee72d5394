"""Whatever is sent to the OpenAI server: it is answered or refused, never with a 500, and nothing of it stays."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hbserve_fake_scheduler import FakeServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbserve.server.anthropic_fields import MessagesBody
from hbserve.server.http_server import HttpServer
from hbserve.server.request_fields import ChatBody, CompletionBody
from hbserve.server.responses_fields import ResponsesBody
from hbserve.tokenizer import load_tokenizer

LEAF = (
    st.none() | st.booleans() | st.integers() | st.integers(-2, 5) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5) | st.sampled_from(["auto", "\x00", "x" * 600, 2**70, -(2**70), 1e308, "text", "user"])
)  # fmt: skip
VALUE = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
CONTENT = st.text(max_size=4) | VALUE | st.lists(st.deferred(lambda: PART), max_size=3)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "boss"]), "content": CONTENT},
    optional={"tool_calls": VALUE, "reasoning": LEAF, "name": LEAF},
)
PART = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            ["text", "input_text", "thinking", "tool_use", "tool_result", "function_call", "reasoning"]
        )
    },
    optional={"text": LEAF, "content": VALUE, "input": VALUE, "name": LEAF, "arguments": LEAF, "role": st.just("user")},
)
KINDS = (ChatBody, CompletionBody, ResponsesBody, MessagesBody)
CHANGES = st.dictionaries(
    st.sampled_from([*(name for kind in KINDS for name in kind.__struct_fields__), "user", "a\r\nb"]),
    VALUE,
    max_size=2,
)
GOOD = st.fixed_dictionaries(
    {"prompt": st.just("hi") | st.just([5, 6]), "stream": st.booleans(), "n": st.integers(1, 3)}
)
CHAT = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, min_size=1, max_size=2), "stream": st.booleans(), "max_tokens": st.just(9)}
)
RESPONSE = st.fixed_dictionaries(
    {"input": st.text(max_size=4) | st.lists(MESSAGE | PART, max_size=3), "stream": st.booleans()}
)
BODY = (
    st.binary(max_size=30)
    | st.tuples(GOOD | CHAT | RESPONSE | VALUE.filter(lambda value: isinstance(value, dict)), CHANGES).map(
        lambda both: json.dumps({**both[0], **both[1]}).encode()
    )
)  # fmt: skip
GENERATING = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"]
PATHS = st.sampled_from([*GENERATING, "/tokenize", "/detokenize", "/v1/models/%00"])
many = settings(derandomize=True, max_examples=300, deadline=None, database=None, suppress_health_check=HealthCheck)


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
    assert min(statuses[200], statuses[400]) >= 10, statuses


LINE = st.sampled_from(
    [
        "POST /v1/completions HTTP/1.1",
        "GET /health HTTP/1.1",
        "GET / HTTP/1.0",
        "\x00",
        "POST * HTTP/9.9",
        "GET /%ff%0a",
    ]
)
HEADER = st.sampled_from(
    [
        "Content-Length: 20",
        "Content-Length: -1",
        "Content-Length: 9999999999",
        "Transfer-Encoding: chunked",
        "X-Request-Id: a",
        "Expect: 100-continue",
        "Connection: close",
        ": empty",
        "A: " + "b" * 9000,
        "Host: a",
    ]
)
STREAMED = b'{"prompt": "hi", "stream": true}'
PAYLOAD = st.binary(max_size=20) | st.sampled_from([STREAMED, b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\n"])


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
