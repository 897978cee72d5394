"""What anybody can send has bounds: numbers, frames, lists, clients, and the lines that it makes in a log."""

import asyncio
import logging
import struct
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from hbserve_rpc import (
    HBServeRpcError,
    InvalidRequest,
    Overloaded,
    ProtocolMismatch,
    RpcServer,
    message_socket,
    wire,
)
from hbserve_rpc import server as server_module
from hbserve_rpc.counts import RpcFaults
from hbserve_rpc.members import Member
from hbserve_rpc.message_socket import Complaints
from hbserve_rpc.messages import GENERATE, AbortRequest, GenerateRequest
from hbserve_rpc.plain_values import one_line, plain_id
from hbserve_rpc.sampling_params import SamplingParams
from hbserve_testing.waits import until


@pytest.fixture
async def serving(rpc, start) -> RpcServer:
    """A server that answers what it is asked."""

    async def answer(ask):
        return ask

    server = RpcServer()
    server.serve(rpc.CALL, answer)
    return await start(server)


@pytest.fixture
def stranger(serving) -> Iterator[zmq.Socket[bytes]]:
    """A connection that says what it likes."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"tcp://{serving.address}")
        yield socket


HELLO = wire.encode(wire.Hello(wire.PROTOCOL_VERSION, 1.0))


@pytest.mark.parametrize("silence_s", [float("nan"), float("inf"), 1e9, 0.0, -1.0])
async def test_a_client_cannot_have_its_requests_kept_for_ever(serving, stranger, silence_s):
    stranger.send_multipart([wire.encode(wire.Hello(wire.PROTOCOL_VERSION, silence_s)), b""])
    await until(lambda: serving.dropped_frames == 1)
    assert not serving._clients


async def test_a_client_whose_own_setting_is_longer_asks_for_the_longest_that_it_may(rpc, serving, connect):
    client = await connect(serving.address, heartbeat_timeout_s=1e9)
    assert (await client.call(rpc.CALL, rpc.Ask(3), timeout_s=20)).value == 3


async def test_a_frame_that_is_too_long_is_not_read_and_others_go_on(rpc, start, connect, monkeypatch):
    monkeypatch.setattr(wire, "MOST_FRAME_BYTES", 1 << 20)
    asked = []

    async def answer(ask):
        asked.append(ask)
        return ask

    server = RpcServer()
    server.serve(rpc.CALL, answer)
    await start(server)
    client = await connect(server.address)
    assert (await client.call(rpc.CALL, rpc.Ask(3), timeout_s=20)).value == 3
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"tcp://{server.address}")
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.send_multipart([HELLO, b""])
        await until(lambda: len(server._clients) == 2)
        socket.send_multipart([wire.encode(wire.Call(1, rpc.CALL.name)), bytes((1 << 20) + 1)])
        await until(lambda: monitor.poll(0))
        monitor.close()
    assert (await client.call(rpc.CALL, rpc.Ask(7), timeout_s=20)).value == 7
    assert len(asked) == 2
    assert server.dropped_frames == 0


async def test_what_is_too_long_to_be_sent_is_refused_where_it_begins(start, connect, monkeypatch):
    params = SamplingParams(0, 4)

    async def answer(request):
        yield GenerateRequest("r", (300,) * 1000, params)

    server = RpcServer()
    server.serve_stream(GENERATE, answer)
    await start(server)
    client = await connect(server.address)
    monkeypatch.setattr(wire, "MOST_FRAME_BYTES", 1000)
    with pytest.raises(InvalidRequest, match=r"^instance.generate: 3\d\d\d bytes; at most 1000 can be sent"):
        await anext(client.stream(GENERATE, GenerateRequest("r", (300,) * 1000, params)))
    with pytest.raises(InvalidRequest, match=r"an item of instance.generate: 3\d\d\d bytes; at most 1000"):
        await anext(client.stream(GENERATE, GenerateRequest("r", (300,), params)))


async def test_a_prompt_of_millions_of_tokens_is_refused_before_it_is_decoded(start, stranger_to):
    server = RpcServer()
    server.serve_stream(GENERATE, lambda request: pytest.fail("it was decoded"))
    await start(server)
    body = wire.encode(GenerateRequest("r", (1,), SamplingParams(0, 4)))
    (found,) = [place for place in range(len(body)) if body[place : place + 2] == b"\x91\x01"]
    body = body[:found] + b"\xdd" + struct.pack(">I", 60_000_000) + b"\x01" * 1000
    error = await stranger_to(server, wire.Open(1, GENERATE.name), body)
    assert error.code == "invalid_request"
    assert "length <= 4194304" in error.message


@pytest.fixture
def stranger_to():
    """Says one thing to a server; returns what it answers."""

    async def ask(server: RpcServer, envelope: wire.FromClient, body: bytes) -> wire.FromServer:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(f"tcp://{server.address}")
            socket.send_multipart([HELLO, b""])
            socket.send_multipart([wire.encode(envelope), body])
            for _ in range(2):
                await until(lambda: socket.poll(0))
                head, _ = socket.recv_multipart()
            return wire.decode_from_server(head)

    return ask


async def test_messages_that_are_none_make_few_lines_and_all_are_counted(serving, stranger, caplog):
    caplog.set_level(logging.WARNING)
    for _ in range(500):
        stranger.send_multipart([b"\xc1", b""])
    await until(lambda: serving.dropped_frames == 500)
    assert [record.getMessage() for record in caplog.records] == [
        "dropped a message of 3 frames that is not of this protocol"
    ]


DEEP = b"\x91" * 100_000 + b"\x00"
"""A list of a list of a list …, which no stack holds."""
UNREADABLE = {
    "no UTF-8": b"\x81" + wire.encode("type") + b"\xa3\xff\xfe\xfd",
    "deep, in a field that nobody reads": b"\x82" + wire.encode("x") + DEEP + wire.encode("type") + wire.encode("Ask"),
}
unreadable = pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE)


@unreadable
async def test_what_cannot_be_read_is_refused_in_a_line_wherever_it_stands(
    rpc, serving, stranger, stranger_to, body, caplog
):
    async def stream(ask):
        yield ask

    serving.serve_stream(rpc.STREAM, stream)
    serving.serve_notification(rpc.TELL, lambda told: None)
    for envelope in (wire.Call(1, rpc.CALL.name), wire.Open(1, rpc.STREAM.name)):
        answer = await stranger_to(serving, envelope, body)
        assert (answer.code, answer.message.partition(":")[0]) == (InvalidRequest.code, envelope.method)
    stranger.send_multipart([HELLO, b""])
    stranger.send_multipart([body, b""])
    stranger.send_multipart([wire.encode(wire.Notify(1, rpc.TELL.name)), body])
    await until(lambda: serving.faults == RpcFaults(dropped_frames=1, failed_notifications=1))
    assert "Traceback" not in caplog.text


@unreadable
async def test_an_answer_that_cannot_be_read_ends_its_own_call_with_an_error(rpc, serving, connect, body):
    answered = asyncio.Event()

    async def wait(ask):
        await answered.wait()
        return ask

    serving.serve(rpc.CALL, wait)
    client = await connect(serving.address)
    call = asyncio.create_task(client.call(rpc.CALL, rpc.Ask(3), timeout_s=20))
    await until(lambda: client._epoch is not None and client._waiting)
    (id_,) = client._waiting
    client._receive([body, b""])
    assert client.dropped_frames == 1
    client._receive([wire.encode(wire.Reply(serving.epoch, id_)), body])
    with pytest.raises(ProtocolMismatch, match=r"answered test.call with"):
        await call
    answered.set()
    assert (await client.call(rpc.CALL, rpc.Ask(4), timeout_s=20)).value == 4


async def test_an_id_that_is_used_twice_leaves_the_first_one_under_way_and_known(rpc, serving, stranger):
    ended = asyncio.Event()

    async def forever(ask):
        try:
            yield ask
            await asyncio.Event().wait()
        finally:
            ended.set()

    serving.serve_stream(rpc.STREAM, forever)
    stranger.send_multipart([HELLO, b""])
    for envelope in (wire.Open(1, rpc.STREAM.name), wire.Call(1, rpc.CALL.name), wire.Open(1, rpc.STREAM.name)):
        stranger.send_multipart([wire.encode(envelope), wire.encode(rpc.Ask(1))])
    await until(lambda: serving.dropped_frames == 2)
    stranger.send_multipart([wire.encode(wire.Goodbye(id=2)), b""])
    async with asyncio.timeout(20):
        await ended.wait()


def test_a_line_that_comes_after_others_that_were_not_written_has_their_number(monkeypatch, caplog):
    now_s = 100.0
    monkeypatch.setattr(message_socket.time, "monotonic", lambda: now_s)
    complaints = Complaints(logging.getLogger("hbserve_rpc.test"))
    for _ in range(5):
        complaints.add("dropped %d", 1)
    now_s += message_socket.COMPLAINT_PAUSE_S
    complaints.add("dropped %d", 2)
    now_s += message_socket.COMPLAINT_PAUSE_S
    complaints.add("dropped %d", 3)
    assert [record.getMessage() for record in caplog.records] == [
        "dropped 1", "dropped 2 (4 more such lines since the last one)", "dropped 3"
    ]  # fmt: skip


async def test_no_more_clients_are_known_than_may_be(rpc, serving, stranger, connect, monkeypatch):
    client = await connect(serving.address)
    await client.call(rpc.CALL, rpc.Ask(1), timeout_s=20)
    monkeypatch.setattr(server_module, "MOST_CLIENTS", 1)
    stranger.send_multipart([HELLO, b""])
    await until(lambda: serving.dropped_frames == 1)
    assert len(serving._clients) == 1
    assert (await client.call(rpc.CALL, rpc.Ask(2), timeout_s=20)).value == 2


# ---- texts of peers, in logs -------------------------------------------------------------------------------------

SAID = "first\n\x1b[31msecond " + "x" * 100_000
"""Two lines, in red, and more than fits a log."""


@pytest.mark.parametrize("error", [InvalidRequest, Overloaded, RuntimeError])
async def test_whatever_a_peer_says_of_an_error_is_one_line(rpc, serving, connect, error):
    async def fails(ask):
        raise error(SAID)

    serving.serve(rpc.CALL, fails)
    client = await connect(serving.address)
    with pytest.raises(HBServeRpcError) as raised:
        await client.call(rpc.CALL, rpc.Ask(3), timeout_s=20)
    said = str(raised.value)
    assert said.isprintable()
    assert said.removeprefix("RuntimeError: ").startswith("first \\x1b[31msecond xxx")
    assert said.endswith("xxx")
    assert 3900 < len(said) < 4100


async def test_a_method_that_a_stranger_makes_up_is_one_line_of_the_log(serving, stranger, caplog):
    stranger.send_multipart([HELLO, b""])
    stranger.send_multipart([wire.encode(wire.Notify(1, SAID)), b""])
    await until(lambda: serving.failed_notifications)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.isprintable()
    assert said.startswith("notification first \\x1b[31msecond")
    assert len(said) < 4100


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "\x85", "a\u2029", "x" * 257])
def test_an_id_of_several_lines_or_without_an_end_is_refused_by_whoever_reads_it(name):
    with pytest.raises(InvalidRequest, match=r"^request_id='.*: expected "):
        plain_id("request_id", name)
    for message in (AbortRequest(name), Member(name, "hybrid", "127.0.0.1:1")):
        with pytest.raises(msgspec.ValidationError, match=r"Expected `str` .* at `\$\.(request|instance)_id`"):
            msgspec.msgpack.decode(wire.encode(message), type=type(message))


def test_what_is_one_line_already_stays_as_it_is():
    for text in ("", "a  b", "ü 漢 \\x1b"):
        assert one_line(text) == text
    assert one_line(" a \r\n\t b\x00\xa0c\ud800 ") == "a b\\x00 c\\ud800"
    assert one_line("0123456789 abc", 6) == "012 … abc"
