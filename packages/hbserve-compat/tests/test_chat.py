"""`hbserve chat`: a conversation with the server at a URL, and one with instances of its own."""

import asyncio
import json
import os
import pty
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import zmq.asyncio
from hbserve_fake_scheduler import FakeServer
from hbserve_served import served

from hbserve.client.chat_client import ChatClient
from hbserve.client.http_stream import why_not_connected
from hbserve.commands.chat import Conversation
from hbserve.server.http.http_server import HttpServer
from hbserve.text.tokenizer import load_tokenizer
from hbserve_rpc import InvalidAddress, InvalidRequest, PeerLost, RemoteError
from hbserve_rpc.own_process import Signalled, until_signalled
from hbserve_testing.waits import until

COMMAND = [sys.executable, "-m", "hbserve", "chat"]


@pytest.fixture
async def server(small_model: Callable[[str], Path]) -> AsyncIterator[FakeServer]:
    server = FakeServer(load_tokenizer(small_model("qwen3")), port=0, api_key="k")
    server.answers("He", "llo")
    http = HttpServer(server.service.settings, server.app)
    await http.start()
    server.url = http.url
    yield server
    await http.stop()


async def texts(client: ChatClient) -> list[str]:
    return [text async for text, _ in client.answer([{"role": "user", "content": "hi"}]) if text]


async def test_an_answer_comes_in_pieces_from_a_url_with_or_without_v1(server):
    for url in (server.url, f"{server.url}/v1", f"{server.url}/v1/", server.url.removeprefix("http://")):
        assert "".join(await texts(ChatClient(url, "k", max_tokens=9))) == "Hello"
    ((prompt, params), *_) = server.scheduler.asked
    assert (server.tokenizer.decode(prompt), params.max_tokens) == ("<user>hi", 9)


async def test_what_a_server_refuses_and_what_is_no_server_is_told_in_its_words(server):
    with pytest.raises(RemoteError, match=r"no API key: .*; --api-key or HBSERVE_API_KEY sends one"):
        await texts(ChatClient(server.url, None))
    with pytest.raises(RemoteError, match="wrong API key"):
        await texts(ChatClient(server.url, "other"))
    with pytest.raises(InvalidRequest, match="max_tokens=-1"):
        await texts(ChatClient(server.url, "k", max_tokens=-1))
    server.scheduler.steps.append(RemoteError("d0 was lost"))
    with pytest.raises(RemoteError, match="d0 was lost"):
        await texts(ChatClient(server.url, "k"))
    with socket.create_server(("127.0.0.1", 0)) as held:
        address = f"http://127.0.0.1:{held.getsockname()[1]}"
    with pytest.raises(PeerLost, match=r"no server at 127\.0\.0\.1:\d+: Connection refused$"):
        await texts(ChatClient(address, None))
    both = OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 1), [Errno 111] Connect call failed")
    assert why_not_connected("a:1", both) == "no server at a:1: Connection refused"
    refused = ssl.SSLCertVerificationError()
    refused.verify_message = "self-signed certificate"
    assert why_not_connected("a:1", refused).startswith(
        "the certificate of a:1 is not trusted: self-signed certificate;"
    )
    with pytest.raises(InvalidAddress, match=r"--url='ftp://a'"):
        ChatClient("ftp://a", None)


async def test_a_wrong_address_or_key_is_told_before_the_first_question(server, monkeypatch):
    await ChatClient(server.url, "k").require_server()
    with pytest.raises(RemoteError, match="wrong API key"):
        await ChatClient(server.url, "other").require_server()
    context = zmq.asyncio.Context()
    rpc = context.socket(zmq.ROUTER)  # what `hbserve serve` prints as its RPC address
    port = rpc.bind_to_random_port("tcp://127.0.0.1")
    try:
        async with asyncio.timeout(30):
            with pytest.raises(RemoteError, match="does not speak HTTP"):
                await ChatClient(f"127.0.0.1:{port}", None).require_server()
    finally:
        context.destroy(linger=0)
    monkeypatch.setattr("hbserve.client.chat_client.ANSWER_TIMEOUT_S", 0.1)
    silent = pytest.raises(PeerLost, match=r"accepts connections, but did not answer within 0\.1 s")
    with socket.create_server(("127.0.0.1", 0)) as mute, silent:
        await ChatClient(f"127.0.0.1:{mute.getsockname()[1]}", None).require_server()


def test_the_command_asks_its_server_before_it_invites_a_question():
    with socket.create_server(("127.0.0.1", 0)) as held:
        address = f"http://127.0.0.1:{held.getsockname()[1]}"
    done = subprocess.run([*COMMAND, "--url", address], input="", capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --url: no server at")


async def test_characters_that_stdout_cannot_show_are_shown_as_their_numbers(server):
    server.answers("é")
    command = [*COMMAND, "--url", server.url, "--api-key", "k"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = await asyncio.to_thread(subprocess.run, command, input=b"hi\n", capture_output=True, env=env, timeout=90)
    assert (done.returncode, done.stdout) == (0, b"\\xe9\n\n"), done.stderr


async def test_a_conversation_goes_with_each_question_and_ends_with_its_input(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.write(writing, "one\n\nzwö".encode())
    os.close(writing)
    monkeypatch.setattr(sys, "stdin", os.fdopen(reading))
    asked = []

    async def answer(messages: list[dict[str, str]]) -> AsyncIterator[tuple[str, str | None]]:
        asked.append([each["content"] for each in messages])
        yield "an", None
        yield "swer", "stop"

    await Conversation(answer).run()
    assert asked == [["one"], ["one", "answer", "zwö"]]
    assert capsys.readouterr().out == "answer\nanswer\n\n"
    sys.stdin.close()


@pytest.mark.parametrize("said", [b"", b"one\ntwo\n"], ids=["a question is waited for", "an answer comes"])
async def test_sigterm_ends_the_conversation_and_not_only_an_answer(monkeypatch, said):
    reading, writing = os.pipe()
    os.write(writing, said)
    monkeypatch.setattr(sys, "stdin", os.fdopen(reading))
    asked = []

    async def answer(messages: list[dict[str, str]]) -> AsyncIterator[tuple[str, str | None]]:
        asked.append(messages[-1]["content"])
        yield "an", None
        await asyncio.Event().wait()

    talking = asyncio.create_task(until_signalled(Conversation(answer).run()))
    await until(lambda: signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL and len(asked) == bool(said))
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(30):
        with pytest.raises(Signalled, match="SIGTERM"):
            await talking
    assert len(asked) == bool(said)
    os.close(writing)
    sys.stdin.close()


@pytest.mark.warm
def test_without_a_url_it_starts_a_pair_and_talks_to_it(tmp_path, small_model):
    model = shutil.copytree(small_model("qwen3"), tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    command = [*COMMAND, "--model", str(model), "--max-tokens", "3"]
    done = subprocess.run(command, input="one\ntwo\n", capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
    command = [*COMMAND, "--url", "http://127.0.0.1:1", "--model", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stderr) == (2, f"error: --model={model}: not with --url, whose server sets it\n")


@pytest.mark.warm
def test_ctrl_c_stops_an_answer_and_not_the_program_and_the_conversation_goes_on(tmp_path, small_model):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    # One that never ends an answer by itself, and not soon by its length: the signal comes before.
    folder = shutil.copytree(small_model("qwen3"), tmp_path / "endless")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None, "max_position_embeddings": 4096}))
    with served(tmp_path, f"--chat-template={template}", model={"path": str(folder)}) as server:
        terminal, its_end = pty.openpty()
        command = [*COMMAND, "--url", server.url, "--max-tokens", "3000"]
        process = subprocess.Popen(command, stdin=its_end, stdout=its_end, stderr=its_end, start_new_session=True)
        os.close(its_end)
        read_until(terminal, b"> ")
        os.write(terminal, b"one\n")
        read_until(terminal, b"one\r\n", more=1)
        process.send_signal(signal.SIGINT)
        read_until(terminal, b"> ")
        server.until_empty()
        os.write(terminal, b"two\n")
        read_until(terminal, b"two\r\n", more=1)
        process.send_signal(signal.SIGINT)
        read_until(terminal, b"> ")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        os.close(terminal)
        server.until_empty()
        assert server.metrics()["hbserve:requests_total"] == 2


def read_until(terminal: int, end: bytes, *, more: int = 0) -> bytes:
    """Read from a terminal up to these bytes, and `more` bytes after them."""
    found = b""
    while end not in found or len(found) < found.index(end) + len(end) + more:
        found += os.read(terminal, 1 << 16)
    return found
