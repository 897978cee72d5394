"""Keys: who has one gets in, everybody else learns that keys are needed, and all are changed without a stop."""

import asyncio
import contextlib
import functools
import itertools
import json
import socket
import threading
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
import zmq

from hbserve_rpc import KeysError, NotAllowed, RpcServer, calling_peer, load_keys, make_keys, wire
from hbserve_rpc.keys import PARTIES, add_keys, drop_keys, save_keys, switch_keys
from hbserve_rpc.message_socket import MessageSocket, SharedContext

KEYS = make_keys()
NULL_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
"""What ZeroMQ says first of a socket without keys."""


@pytest.fixture
def serve_keyed(rpc, start):
    """Starts a server that answers with who asks; what it was asked is in `asked`."""
    asked: list[object] = []

    async def serve(keys=KEYS, party="instance", **settings) -> SimpleNamespace:
        async def answer(ask):
            asked.append(calling_peer())
            return ask

        server = RpcServer(keys=keys and keys[party], **settings)
        server.serve(rpc.CALL, answer)
        return SimpleNamespace(server=await start(server), address=server.address, asked=asked)

    return serve


@pytest.fixture
def dial(connect):
    """A client with patience: how fast it hears of a refusal is not for its heartbeats to say."""
    return functools.partial(connect, heartbeat_timeout_s=60)


async def test_a_handler_knows_the_party_and_the_connection_of_who_calls(rpc, serve_keyed, dial):
    served = await serve_keyed()
    one, other = [await dial(served.address, keys=KEYS[party]) for party in ("scheduler", "instance")]
    for client in (one, other, one):
        await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)
    first, second, third = served.asked
    assert [each.party for each in served.asked] == ["scheduler", "instance", "scheduler"]
    assert first == third
    assert first.connection != second.connection
    assert first.is_trusted


async def test_without_keys_nobody_has_a_party_and_this_host_is_trusted(rpc, serve_keyed, dial):
    served = await serve_keyed(None)
    await (await dial(served.address)).call(rpc.CALL, rpc.Ask(), timeout_s=20)
    (peer,) = served.asked
    assert (peer.party, peer.address, peer.is_trusted) == (None, "127.0.0.1", True)
    assert not replace(peer, address="192.0.2.1").is_trusted


@pytest.mark.parametrize(
    ("whose", "party", "allows"),
    [(None, "", PARTIES), ("ours", "client", ("scheduler", "instance")), ("half", "client", PARTIES)],
    ids=["no keys", "a party that may not come", "an unknown key"],
)
async def test_who_is_not_let_in_hears_so_at_once_and_is_asked_nothing(
    rpc, serve_keyed, dial, caplog, whose, party, allows
):
    served = await serve_keyed(allows=allows)
    others = make_keys()
    half = msgspec.structs.replace(
        others["client"], public_keys=others["client"].public_keys | {"instance": [KEYS["instance"].public_key]}
    )
    keys = {None: None, "ours": KEYS["client"], "half": half}[whose]
    client = await dial(served.address, keys=keys)
    for _ in range(3):
        with pytest.raises(NotAllowed, match=r"in: (it accepts connections by keys|it ends each handshake)"):
            await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)
        await asyncio.sleep(0.15)  # once it is refused already, and once it tries again
    assert not served.asked
    assert not served.server._clients
    assert ("refused a connection from 127.0.0.1" in caplog.text) == (keys is not None)


async def test_a_side_with_keys_talks_to_no_server_without_them_and_to_none_with_others(rpc, serve_keyed, dial):
    plain, strange = await serve_keyed(None), await serve_keyed(make_keys())
    client = await dial(plain.address, keys=KEYS["client"])
    with pytest.raises(NotAllowed, match=r"it has no keys, as this side has|it ends each handshake"):
        await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)
    client = await dial(strange.address, keys=KEYS["client"])
    with pytest.raises(NotAllowed, match="it ends each handshake, as one does that has another key"):
        await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)
    assert not plain.asked + strange.asked


async def test_a_server_that_is_restarted_with_keys_lets_in_who_was_refused(rpc, serve_keyed, dial):
    served = await serve_keyed(None)
    client = await dial(served.address, keys=KEYS["client"])
    with pytest.raises(NotAllowed):
        await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)
    await served.server.stop()
    await serve_keyed(port=served.server.port)
    async with asyncio.timeout(20):
        while True:
            try:
                assert await client.call(rpc.CALL, rpc.Ask(7), timeout_s=20) == rpc.Ask(7)
                break
            except NotAllowed:
                await asyncio.sleep(0.02)


async def test_a_refusal_is_heard_also_if_it_comes_before_connecting_has_returned(rpc, dial, monkeypatch):
    """ZeroMQ's thread connects while this one may be without a core, and is told once that no key is wanted."""
    connect, has_given_up = zmq.Socket.connect, threading.Event()

    def connect_and_lose_the_core(self, address):
        connect(self, address)
        assert not address.startswith("tcp:") or has_given_up.wait(20)

    def answer_without_keys(listener):
        asks, _ = listener.accept()
        with asks:
            asks.settimeout(30)
            asks.sendall(NULL_GREETING)
            while _read(asks):
                pass
        has_given_up.set()

    monkeypatch.setattr(zmq.Socket, "connect", connect_and_lose_the_core)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        answering = asyncio.create_task(asyncio.to_thread(answer_without_keys, listener))
        await asyncio.sleep(0)
        client = await dial(f"127.0.0.1:{listener.getsockname()[1]}", keys=KEYS["client"])
        with pytest.raises(NotAllowed, match="it has no keys"):
            await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)
        await answering


async def test_a_connection_that_was_given_up_and_is_let_in_late_does_not_silence_the_one_after_it(
    rpc, serve_keyed, dial
):
    """A server takes who has the identity of another for that one come again, and reads the other no more."""
    served = await serve_keyed()
    client = await dial(served.address, keys=KEYS["client"])
    await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)
    identity = client._socket._socket.getsockopt(zmq.IDENTITY)
    client._connection._refused("as in a handshake that was broken off")
    async with asyncio.timeout(20):
        while client._connection.refusal:  # it is tried again
            await asyncio.sleep(0.01)
    await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)
    heard: list[list[bytes]] = []
    late = MessageSocket(zmq.DEALER, {zmq.IDENTITY: identity}, heard.append, SharedContext())
    options = KEYS["client"].client_options(KEYS["instance"].public_key)
    try:
        late.open(lambda socket: socket.connect(f"tcp://{served.address}"), options)
        late.send([wire.encode(wire.Hello(wire.PROTOCOL_VERSION, 60.0)), b""])
        async with asyncio.timeout(20):
            while not heard:
                await asyncio.sleep(0.01)
        assert await client.call(rpc.CALL, rpc.Ask(7), timeout_s=20) == rpc.Ask(7)
    finally:
        late.close()


STEPS = [KEYS]
for step in (add_keys, switch_keys, drop_keys):
    STEPS.append(step(STEPS[-1]))


@pytest.mark.parametrize("pair", list(itertools.pairwise(STEPS)), ids=["add", "switch", "drop"])
@pytest.mark.parametrize("server_is_first", [True, False])
async def test_at_each_step_to_other_keys_old_and_new_processes_talk(rpc, serve_keyed, dial, pair, server_is_first):
    of_client, of_server = pair[::-1] if server_is_first else pair
    served = await serve_keyed(of_server, "scheduler")
    client = await dial(served.address, keys=of_client["client"], server="scheduler")
    assert await client.call(rpc.CALL, rpc.Ask(3), timeout_s=20) == rpc.Ask(3)


async def test_a_running_client_follows_a_server_to_its_next_key_and_nothing_asked_meanwhile_is_lost(
    rpc, serve_keyed, dial
):
    before, after = STEPS[1], STEPS[2]
    served = await serve_keyed(before)
    client = await dial(served.address, keys=before["client"])
    await client.call(rpc.CALL, rpc.Ask(), timeout_s=20)
    await served.server.stop()
    async with asyncio.timeout(20):
        while client._epoch is not None:  # it knows that nobody listens there; who asks later waits for the next life
            await asyncio.sleep(0.01)
    asking = [asyncio.create_task(client.call(rpc.CALL, rpc.Ask(value), timeout_s=20)) for value in range(5)]
    await asyncio.sleep(0)
    await serve_keyed(after, port=served.server.port)
    assert [each.value for each in await asyncio.gather(*asking)] == list(range(5))


def test_two_keys_are_the_most_and_the_old_ones_are_gone_in_the_end():
    with pytest.raises(KeysError, match="there are two keys of each party already"):
        add_keys(STEPS[1])
    with pytest.raises(KeysError, match="there are no new keys"):
        switch_keys(KEYS)
    assert drop_keys(STEPS[1]) == KEYS  # one may think better of it
    for party in PARTIES:
        assert STEPS[3][party].public_keys.keys() == KEYS[party].public_keys.keys()
        assert not set(STEPS[3][party].public_keys[party]) & set(KEYS[party].public_keys[party])


def test_keys_are_in_files_for_nobody_else_and_their_text_has_no_secret(tmp_path, caplog):
    folder = tmp_path / "new" / "keys"
    paths = save_keys(KEYS, folder)
    assert [path.name for path in paths] == ["client.key", "scheduler.key", "instance.key"]
    for path, party in zip(paths, PARTIES, strict=True):
        assert path.stat().st_mode & 0o777 == 0o600
        assert load_keys(folder, party) == KEYS[party]
        others = {KEYS[each].secret_key for each in PARTIES} - {KEYS[party].secret_key}
        assert not any(secret in path.read_text() for secret in others)
        assert KEYS[party].secret_key not in repr(KEYS[party])
    assert not caplog.text
    save_keys(STEPS[1], folder)
    paths[0].chmod(0o644)
    assert load_keys(folder, "client") == STEPS[1]["client"]
    assert "other users of this host may read it" in caplog.text
    assert sorted(folder.iterdir()) == sorted(paths)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda file: file.unlink(), "there is no such file; `hbserve keys .*` makes it"),
        (lambda file: file.write_text("{"), "client.key: Input data was truncated"),
        (lambda file: file.write_bytes(b"\xff"), "client.key: "),
        (lambda file: rewrite(file, party="instance"), "not one of public_keys.instance"),
        (lambda file: rewrite(file, secret_key="short"), "it is not a key: expected 40 characters"),
        (lambda file: rewrite(file, secret_key="%" * 40), "it is not a key: expected 40 characters"),
        (lambda file: rewrite(file, public_keys={"client": [KEYS["client"].public_key]}), "scheduler, instance are"),
        (lambda file: rewrite(file, public_keys=KEYS["client"].public_keys | {"instance": []}), "length >= 1"),
        (lambda file: rewrite(file, more=1), "unknown field `more`"),
        (lambda file: file.write_bytes(file.with_name("instance.key").read_bytes()), "expected those of 'client'"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_refused_with_its_path_and_without_its_secret(tmp_path, change, problem):
    save_keys(KEYS, tmp_path)
    change(tmp_path / "client.key")
    with pytest.raises(KeysError, match=problem) as refused:
        load_keys(tmp_path, "client")
    assert str(tmp_path / "client.key") in str(refused.value)
    assert KEYS["client"].secret_key not in str(refused.value)


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_without_libsodium_the_error_says_what_to_install(tmp_path, monkeypatch):
    save_keys(KEYS, tmp_path)
    monkeypatch.setattr(zmq, "has", lambda what: False)
    for use in (make_keys, lambda: load_keys(tmp_path, "client")):
        with pytest.raises(KeysError, match=r"pip install .* pyzmq"):
            use()


async def test_a_stranger_without_keys_reads_nothing_and_submits_nothing(serve_keyed, monkeypatch):
    """Whatever it speaks: no byte of it is handed to the server, and what it reads is what ZeroMQ says of itself."""
    served = await serve_keyed()
    heard: list[bytes] = []
    monkeypatch.setattr(served.server._socket, "_on_message", heard.append)
    hello = [wire.encode(wire.Hello(wire.PROTOCOL_VERSION, 1.0)), b""]
    stranger = make_keys()["client"]
    right_server = stranger.client_options(KEYS["instance"].public_key)
    wrong_server = stranger.client_options(stranger.public_keys["instance"][0])
    context, sockets = zmq.Context(), []
    try:
        for kind, options in itertools.product((zmq.DEALER, zmq.SUB, zmq.REQ), ({}, right_server, wrong_server)):
            each = context.socket(kind)
            sockets.append(each)
            for option, value in (options | {zmq.LINGER: 0, zmq.IMMEDIATE: 0}).items():
                each.setsockopt(option, value)
            if kind == zmq.SUB:
                each.setsockopt(zmq.SUBSCRIBE, b"")
            each.connect(f"tcp://{served.address}")
            if kind != zmq.SUB:
                each.send_multipart(hello)
        read = await asyncio.to_thread(by_hand, served.server.port)
        await asyncio.sleep(0.3)
        assert not any(each.poll(0) for each in sockets)
    finally:
        context.destroy(linger=0)
    assert not heard
    assert not served.server._clients
    assert all(len(each) <= 64 and each[12:32].rstrip(b"\0") in (b"CURVE", b"") for each in read)


def by_hand(port: int) -> list[bytes]:
    """What a server answers to who speaks ZeroMQ's protocol by hand, with the mechanism NULL, or another protocol."""
    ready = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    read = []
    for said in (NULL_GREETING + ready + b"\x01\x00\x00\x05hello", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" * 50):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as stranger:
            stranger.sendall(said)
            with contextlib.suppress(OSError):  # it has hung up already
                stranger.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := _read(stranger):
                answer += piece
        read.append(answer)
    return read


def _read(stranger: socket.socket) -> bytes:
    try:
        return stranger.recv(4096)
    except ConnectionResetError:
        return b""
