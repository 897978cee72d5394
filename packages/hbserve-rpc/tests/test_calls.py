"""Calls: one request, one reply or one error."""

import asyncio
import logging

import pytest
import zmq
import zmq.asyncio

from hbserve_rpc import (
    AddressInUse,
    EngineFailed,
    InvalidRequest,
    KVTransferFailed,
    LogitsNotFinite,
    Overloaded,
    ProtocolMismatch,
    RemoteError,
    RequestTimeout,
    RpcServer,
    RpcTimeout,
    SamplingParams,
    Unavailable,
    wire,
)
from hbserve_rpc.messages import GENERATE, GenerateRequest


async def test_many_calls_at_once_get_their_own_replies(rpc, start, connect):
    async def double(ask):
        await asyncio.sleep(0.001 * (ask.value % 5))
        return rpc.Ask(2 * ask.value)

    server = RpcServer()
    server.serve(rpc.CALL, double)
    await start(server)
    client = await connect(server.address)
    replies = await asyncio.gather(*(client.call(rpc.CALL, rpc.Ask(i), timeout_s=20) for i in range(200)))
    assert [reply.value for reply in replies] == [2 * i for i in range(200)]


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("x=3: expected 4"), LogitsNotFinite("token 3"), Overloaded("full", 2.5), RequestTimeout("late"),
        Unavailable("nobody"), EngineFailed("CUDA error"), KVTransferFailed("d0 is lost"),
    ],
    ids=lambda e: e.code,
)  # fmt: skip
async def test_what_says_whether_to_try_again_or_what_to_blame_crosses_as_itself(rpc, start, connect, error):
    async def refuse(ask):
        raise error

    server = RpcServer()
    server.serve(rpc.CALL, refuse)
    await start(server)
    with pytest.raises(type(error), match=str(error)) as caught:
        await (await connect(server.address)).call(rpc.CALL, rpc.Ask(), timeout_s=20)
    assert vars(caught.value) == vars(error)


@pytest.mark.parametrize(("said_s", "kept_s"), [(-1, 0), (float("nan"), 0), (float("inf"), 3600), (1e300, 3600)])
def test_a_time_to_come_back_that_cannot_be_is_bounded(said_s, kept_s):
    error = wire.revive_error(wire.Failed("epoch", 1, Overloaded.code, "full", said_s))
    assert isinstance(error, Overloaded)
    assert error.retry_after_s == kept_s


async def test_any_other_error_crosses_as_a_remote_error_with_its_message(rpc, start, connect):
    async def fail(ask):
        raise KeyError("missing")

    server = RpcServer()
    server.serve(rpc.CALL, fail)
    await start(server)
    with pytest.raises(RemoteError, match="KeyError: 'missing'"):
        await (await connect(server.address)).call(rpc.CALL, rpc.Ask(), timeout_s=20)


async def test_an_error_whose_text_has_no_utf8_still_crosses(rpc, start, connect, caplog):
    # The server logs it, and what is captured of that could not cross to pytest-xdist.
    caplog.set_level(logging.CRITICAL, "hbserve_rpc")

    async def fail(ask):
        raise FileNotFoundError("model-\udcff")

    server = RpcServer()
    server.serve(rpc.CALL, fail)
    await start(server)
    with pytest.raises(RemoteError, match=r"FileNotFoundError: model-\\udcff"):
        await (await connect(server.address)).call(rpc.CALL, rpc.Ask(), timeout_s=20)


async def test_a_handler_whose_own_work_was_cancelled_fails_its_call(rpc, start, connect):
    async def wait_for_what_is_cancelled(ask):
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    server = RpcServer()
    server.serve(rpc.CALL, wait_for_what_is_cancelled)
    await start(server)
    with pytest.raises(RemoteError, match="CancelledError"):
        await (await connect(server.address)).call(rpc.CALL, rpc.Ask(), timeout_s=20)


async def test_any_number_of_calls_to_a_server_that_is_not_there_keep_their_deadline(rpc, start, connect):
    absent = RpcServer()
    await absent.start()
    await absent.stop()
    client = await connect(absent.address, heartbeat_timeout_s=60)
    calls = [client.call(rpc.CALL, rpc.Ask(), timeout_s=1) for _ in range(2000)]
    async with asyncio.timeout(40):
        assert {type(each) for each in await asyncio.gather(*calls, return_exceptions=True)} == {RpcTimeout}


async def test_a_request_that_cannot_be_sent_leaves_nothing_waiting(rpc, start, connect):
    client = await connect((await start(RpcServer())).address)
    with pytest.raises(OverflowError):
        await client.call(rpc.CALL, rpc.Ask(2**70), timeout_s=20)
    assert not client._waiting


async def test_a_late_answer_is_a_timeout_and_the_handler_is_stopped(rpc, start, connect):
    stopped = asyncio.Event()

    async def sleep(ask):
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    server = RpcServer()
    server.serve(rpc.CALL, sleep)
    await start(server)
    with pytest.raises(RpcTimeout, match=r"test\.call within 0\.2 s"):
        await (await connect(server.address)).call(rpc.CALL, rpc.Ask(), timeout_s=0.2)
    async with asyncio.timeout(20):
        await stopped.wait()


async def test_an_unknown_method_is_refused_with_those_that_there_are(rpc, start, connect):
    server = await start(RpcServer())
    with pytest.raises(InvalidRequest, match=r"does not serve 'test\.call'"):
        await (await connect(server.address)).call(rpc.CALL, rpc.Ask(), timeout_s=20)


async def test_an_address_that_this_host_does_not_have_is_named():
    with pytest.raises(OSError, match=r"cannot serve on 192\.0\.2\.1:0"):
        await RpcServer("192.0.2.1").start()


async def test_a_port_in_use_is_named(start):
    server = await start(RpcServer())
    with pytest.raises(AddressInUse, match=server.address):
        await RpcServer(port=server.port).start()


async def test_a_client_may_be_there_before_its_server(rpc, start, connect):
    async def echo(ask):
        return ask

    probe = RpcServer()
    await probe.start()
    await probe.stop()
    client = await connect(probe.address)
    with pytest.raises(RpcTimeout):
        await client.call(rpc.CALL, rpc.Ask(), timeout_s=0.2)
    server = RpcServer(port=probe.port)
    server.serve(rpc.CALL, echo)
    await start(server)
    assert (await client.call(rpc.CALL, rpc.Ask(5), timeout_s=20)).value == 5


async def test_frames_that_are_not_of_this_protocol_are_counted_and_change_nothing(rpc, start, connect):
    async def echo(ask):
        return ask

    server = RpcServer()
    server.serve(rpc.CALL, echo)
    await start(server)
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(f"tcp://{server.address}")
        await socket.send_multipart([b"\xff\xff", b""])
        await socket.send_multipart([b"one frame too many", b"", b""])
        await socket.send_multipart([wire.encode(wire.Ping()), b""])
        async with asyncio.timeout(20):
            _head, _body = await socket.recv_multipart()
    assert server.dropped_frames == 3
    assert (await (await connect(server.address)).call(rpc.CALL, rpc.Ask(1), timeout_s=20)).value == 1


async def test_a_client_counts_frames_that_are_not_of_this_protocol(rpc, connect):
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        client = await connect(f"127.0.0.1:{port}", heartbeat_timeout_s=20)
        async with asyncio.timeout(20):
            identity, *_ = await socket.recv_multipart()
        await socket.send_multipart([identity, b"\xff", b""])
        await socket.send_multipart([identity, b"one frame only"])
        await socket.send_multipart([identity, wire.encode(wire.Reply("epoch", 77)), b""])
        async with asyncio.timeout(20):
            while client.dropped_frames < 3:
                await asyncio.sleep(0.01)
        pending = asyncio.create_task(client.call(rpc.CALL, rpc.Ask(), timeout_s=20))
        await socket.send_multipart([identity, wire.encode(wire.Refused(99, "epoch")), b""])
        with pytest.raises(ProtocolMismatch, match="version 99"):
            await pending


NOW, OLDEST = wire.PROTOCOL_VERSION, wire.OLDEST_VERSION


@pytest.mark.parametrize(("version", "older"), [(NOW + 1, "this side"), (OLDEST - 1, "the other side")])
async def test_another_protocol_version_is_named_with_both_and_with_the_side_to_upgrade(
    rpc, start, connect, version, older, caplog
):
    server = await start(RpcServer())
    client = await connect(server.address)
    pending = asyncio.create_task(client.call(rpc.CALL, rpc.Ask(), timeout_s=20))
    await asyncio.sleep(0)
    client._handle(wire.Refused(version, "epoch"), b"")
    here = f"{OLDEST} to {NOW}" if OLDEST < NOW else f"{NOW}"
    told = f"speaks version {version} of the protocol, this side {here}: {older} is older, upgrade hbserve there"
    with pytest.raises(ProtocolMismatch, match=f"^{client.address} {told}$"):
        await pending
    server._greet(b"another", wire.Hello(version, 10.0, version))  # whose operator may see this side's log alone
    assert f"refused a client: it {told}" in caplog.text


@pytest.mark.parametrize(
    ("version", "oldest", "is_welcome"),
    [
        (NOW, OLDEST, True),
        (NOW + 1, NOW, True),
        (NOW + 1, NOW + 1, False),
        (99, 0, False),
        (OLDEST - 1, OLDEST - 1, False),
        (OLDEST - 1, 0, False),
    ],
)
async def test_a_client_is_welcome_if_both_sides_have_a_version_in_common(start, version, oldest, is_welcome):
    server = await start(RpcServer())
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(f"tcp://{server.address}")
        await socket.send_multipart([wire.encode(wire.Hello(version, 10.0, oldest)), b""])
        async with asyncio.timeout(20):
            head, _ = await socket.recv_multipart()
    answer = wire.Welcome if is_welcome else wire.Refused
    assert wire.decode_from_server(head) == answer(wire.PROTOCOL_VERSION, server.epoch)


def test_what_a_newer_peer_says_beyond_what_is_known_here_is_passed_over():
    newer = {"type": "Welcome", "version": NOW + 1, "epoch": "e", "new": [1]}
    assert wire.decode_from_server(wire.encode(newer)) == wire.Welcome(NOW + 1, "e")


async def test_bad_sampling_parameters_on_the_wire_come_back_as_an_invalid_request(start, connect):
    async def nothing(request):
        return
        yield

    server = RpcServer()
    server.serve_stream(GENERATE, nothing)
    await start(server)
    params = SamplingParams()
    params.top_p = 7
    with pytest.raises(InvalidRequest, match=r"top_p=7(\.0)?: expected a number in \(0, 1\]"):
        await anext((await connect(server.address)).stream(GENERATE, GenerateRequest("r", (1,), params)))
