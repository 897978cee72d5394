"""`hbserve chat` with servers that break off or are something else, and with what people type or paste."""

import asyncio
import contextlib
import io
import os
import pty
import socket
import sys
import termios
from collections.abc import AsyncIterator

import pytest

from hbserve.client.chat_client import ChatClient
from hbserve.client.http_stream import why_not_connected
from hbserve.commands.chat import MOST_OF_LINE, Conversation
from hbserve.commands.command import shown_at_terminal
from hbserve_rpc import InvalidRequest, PeerLost, RemoteError
from hbserve_testing.waits import until

OK = b"HTTP/1.1 200 OK\r\n"
EVENT = b'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
END = b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\n'
DONE = b"data: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def of_length(data: bytes, more: int = 0) -> bytes:
    return b"Content-Length: %d\r\n\r\n%b" % (len(data) + more, data)


async def asked(answer: bytes, *, stays_open: bool = False) -> list[tuple[str, str | None]]:
    """Return what a client gets of these bytes, after which the server ends or keeps the connection."""
    is_read = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        if stays_open:
            await is_read.wait()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server, asyncio.timeout(30):
        client = ChatClient("{}:{}".format(*server.sockets[0].getsockname()), None)
        try:
            return [piece async for piece in client.answer([])]
        finally:
            is_read.set()


@pytest.mark.parametrize(
    "body",
    [
        b"\r\n" + EVENT,
        b"Transfer-Encoding: chunked\r\n\r\n" + chunk(EVENT),
        b"Transfer-Encoding: chunked\r\n\r\n" + chunk(EVENT) + b"40\r\ndata",
        of_length(EVENT),
        of_length(EVENT, more=9),
    ],
)
async def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one(body):
    with pytest.raises(PeerLost, match="has ended its answer too early"):
        await asked(OK + body)


@pytest.mark.parametrize("content", [b"<html>Welcome", b'{"choices": [{"message": {"content": "a"}}]}', b""])
async def test_what_is_no_stream_of_events_is_not_an_empty_answer(content):
    with pytest.raises(RemoteError, match="answers without server-sent events: its answer begins with"):
        await asked(OK + of_length(content))


@pytest.mark.parametrize(
    ("answer", "pieces"),
    [
        (OK + of_length(EVENT + END + DONE), [("half", None), ("", "length")]),
        (OK + of_length(EVENT + DONE), [("half", None)]),
        (
            OK + b"transfer-encoding:Chunked\r\n\r\n" + chunk(EVENT + END) + b"0\r\n\r\n",
            [("half", None), ("", "length")],
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + of_length(EVENT + DONE), [("half", None)]),
    ],
)
async def test_an_answer_ends_by_its_own_rules_though_the_connection_stays(answer, pieces):
    assert await asked(answer, stays_open=True) == pieces


async def test_an_answer_without_a_length_ends_with_its_connection():
    assert await asked(OK + b"\r\n" + EVENT + END) == [("half", None), ("", "length")]
    with pytest.raises(RemoteError, match=r"answered 500: 'boom'$"):
        await asked(b"HTTP/1.0 500 X\r\n\r\nboom")


async def test_a_host_that_takes_no_connections_is_no_server_that_is_slow_to_answer(monkeypatch):
    monkeypatch.setattr("hbserve.client.http_stream.CONNECT_TIMEOUT_S", 0.1)
    monkeypatch.setattr("hbserve.client.chat_client.ANSWER_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as held:
        for _ in range(4):  # more than its queue has room for
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        with pytest.raises(PeerLost, match=r"--url: no server at 127\.0\.0\.1:\d+: no answer$"):
            await ChatClient(f"127.0.0.1:{full.getsockname()[1]}", None).require_server()


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 404 X\r\n" + of_length(b'{"error": "no such model"}'), "^no such model$"),
        (b"HTTP/1.1 500 X\r\n" + of_length(b"boom"), "answered 500: 'boom'$"),
        (
            b"HTTP/1.1 401 X\r\n" + of_length(b"<html>"),
            "answered 401: '<html>'; --api-key or HBSERVE_API_KEY sends one",
        ),
        (b"HTTP/1.1 301 X\r\nLocation: https://a/v1\r\n" + of_length(b""), "it points to 'https://a/v1'"),
        (OK + of_length(EVENT + b'data: {"error": "overloaded"}\n\n'), "^overloaded$"),
    ],
)
async def test_the_words_of_other_servers_are_told_too(answer, problem):
    with pytest.raises(RemoteError, match=problem):
        await asked(answer, stays_open=True)


async def test_https_to_a_server_without_tls_is_told_as_that():
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        with pytest.raises(PeerLost, match=r"does not speak TLS .*; is its URL http://\?"):
            await ChatClient(f"https://{host}:{port}", None).require_server()
    assert why_not_connected("a:1", OSError("refused")) == "no server at a:1: refused"


class Terminal:
    """A conversation at a pseudo terminal. A question that begins with `fail` is answered with an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.end, its_end = pty.openpty()
        settings = termios.tcgetattr(its_end)
        settings[3] &= ~termios.ECHO
        termios.tcsetattr(its_end, termios.TCSANOW, settings)
        monkeypatch.setattr(sys, "stdin", os.fdopen(its_end))
        self.asked: list[list[str]] = []
        self.talking = asyncio.create_task(Conversation(self._answer).run())

    async def _answer(self, messages: list[dict[str, str]]) -> AsyncIterator[tuple[str, str | None]]:
        self.asked.append([each["content"] for each in messages])
        yield "an", None
        if messages[-1]["content"].startswith("fail"):
            raise RemoteError("d0 was lost")
        if sum(len(each["content"]) for each in messages) > 20:
            raise InvalidRequest("prompt: 9 tokens; the instances take at most 8")
        yield "swer", "length" if messages[-1]["content"] == "long" else "stop"

    async def type(self, text: bytes) -> None:
        os.write(self.end, text)

    async def leave(self) -> None:
        os.write(self.end, b"\x04")
        async with asyncio.timeout(30):
            await self.talking
        sys.stdin.close()
        os.close(self.end)


async def test_at_a_terminal_a_question_that_fails_is_forgotten_and_the_talk_goes_on(monkeypatch, capsys):
    terminal = Terminal(monkeypatch)
    for number, line in enumerate((b"one\n", b"fail\n", b"long\n"), 1):
        await terminal.type(line)
        await until(lambda number=number: len(terminal.asked) == number)
    await terminal.leave()
    assert terminal.asked == [["one"], ["one", "answer", "fail"], ["one", "answer", "long"]]
    printed = capsys.readouterr()
    assert printed.out == "> answer\n> an\n> answer\n> \n"
    failed, cut = printed.err.splitlines()
    assert failed == "error: d0 was lost"
    assert cut.startswith("hbserve: the answer is cut here: --max-tokens")


async def test_a_conversation_that_has_become_too_long_is_told_with_its_cure_and_can_begin_anew(monkeypatch, capsys):
    terminal = Terminal(monkeypatch)
    for number, line in enumerate((b"x" * 21 + b"\n", b"one\n", b"the second is long\n", b"/clear\nagain\n"), 1):
        await terminal.type(line)
        await until(lambda number=number: len(terminal.asked) == number)
    await terminal.leave()
    assert terminal.asked[-2:] == [["one", "answer", "the second is long"], ["again"]]
    refused = "error: prompt: 9 tokens; the instances take at most 8"
    assert capsys.readouterr().err.splitlines() == [
        refused,
        f"{refused}; /clear forgets what was said, and leaves more room",
    ]


async def test_lines_between_triple_quotes_are_one_question(monkeypatch):
    terminal = Terminal(monkeypatch)
    await terminal.type(b'"""Mend this:\ndef f(x):\n\n    return\n"""\n"""one"""\n  """two\n"""\nthree\n')
    await until(lambda: len(terminal.asked) == 4)
    await terminal.leave()
    assert [each[-1] for each in terminal.asked] == ["Mend this:\ndef f(x):\n\n    return", "one", "two", "three"]


async def test_a_line_that_the_terminal_has_cut_is_not_asked(monkeypatch, capsys):
    terminal = Terminal(monkeypatch)
    for _ in range(10):
        await terminal.type(b"x" * 1000)
    await terminal.type(b"\n")
    await until(lambda: f"exceeds {MOST_OF_LINE} bytes" in capsys.readouterr().err)
    await terminal.type(b"one\n")
    await until(lambda: terminal.asked == [["one"]])
    await terminal.leave()


async def test_a_terminal_does_not_obey_what_an_answer_has_and_a_file_has_it_as_it_is(monkeypatch):
    said = "\x1b]0;title\x07a\x9b2J é\u200d\t\r"

    async def answer(messages: list[dict[str, str]]) -> AsyncIterator[tuple[str, str | None]]:
        yield said, "stop"

    end, its_end = pty.openpty()
    with os.fdopen(its_end, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stdin", _piped(b"hi\n"))
        patched.setattr(sys, "stdout", terminal)
        await Conversation(answer).run()
        sys.stdin.close()
    found = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(end, 1000):
            found += part
    os.close(end)
    assert found.decode() == "\\x1b]0;title\\x07a\\x9b2J é\u200d\t\r\r\n\r\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert shown_at_terminal(said) == said


async def test_what_stdin_cannot_repeat_ends_with_the_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", _piped(b"fail\ntwo\n"))
    asked: list[str] = []

    async def answer(messages: list[dict[str, str]]) -> AsyncIterator[tuple[str, str | None]]:
        asked.append(messages[-1]["content"])
        yield "an", None
        raise RemoteError("d0 was lost")

    with pytest.raises(RemoteError, match="d0 was lost"):
        await Conversation(answer).run()
    assert (asked, capsys.readouterr().out) == (["fail"], "an\n")
    sys.stdin.close()


def _piped(text: bytes) -> io.TextIOWrapper:
    reading, writing = os.pipe()
    os.write(writing, text)
    os.close(writing)
    return os.fdopen(reading)
