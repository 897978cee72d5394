"""Peers that one does not know: who has no key gets nowhere, and who has one changes nothing but what is its own."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from hbserve_kv_layouts import layout_of

from hbserve_kv import Outcome, TransferFailed
from hbserve_kv.protocol import messages
from hbserve_kv.protocol.messages import Abandon, Asked, Begin, Commit, Handshake, PartsAnnounced, Told, UnknownLink
from hbserve_rpc import InvalidRequest, Method, NotAllowed, RpcClient, connected_client, make_keys

KEYS = make_keys()
BACKENDS = ["ipc", "nccl"]
"""A one-sided one and a two-sided one."""


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture
async def pair(managers, backend):
    """A sender and a receiver with keys, and a transfer that has begun and not moved."""
    sender = await managers(0, backend, keys=KEYS["instance"], name="prefill-0")
    receiver = await managers(1, backend, keys=KEYS["instance"])
    posted = receiver.post_receive("t", [1, 2], sender="prefill-0")
    transfer = await sender.open_send("t", posted.grant)
    return sender, receiver, posted, transfer


async def finish(posted, transfer) -> None:
    """As if nothing had happened."""
    async with asyncio.timeout(30):
        transfer.push([1, 2], 0)
        assert (await transfer.commit(b"done")).outcome is Outcome.COMPLETED
        received = await posted.wait()
    assert (received.outcome, received.payload, received.is_trusted) == (Outcome.COMPLETED, b"done", True)


@contextlib.asynccontextmanager
async def connected(receiver, party) -> AsyncIterator[RpcClient]:
    async with RpcClient(receiver.address, keys=KEYS[party], heartbeat_timeout_s=60) as client, asyncio.timeout(30):
        yield client


@pytest.mark.parametrize("party", ["client", "scheduler"])
async def test_only_instances_reach_a_control_server_with_keys(pair, party):
    _, receiver, *rest = pair
    async with connected(receiver, party) as client:
        with pytest.raises(NotAllowed):
            await client.call(messages.ALIVE, messages.Nothing(), timeout_s=30)
    await finish(*rest)


async def test_an_instance_without_keys_cannot_send_to_one_that_has_some(managers, pair):
    _, _, *rest = pair
    stranger = await managers(2, "ipc", name="prefill-0")
    with pytest.raises(TransferFailed, match="does not let this side in"):
        await stranger.open_send("t", rest[0].grant)
    await finish(*rest)


async def test_what_is_said_of_a_link_by_another_connection_changes_nothing(pair):
    """By one that knows everything: an instance with the right key, and all names."""
    _, receiver, posted, transfer = pair
    (link,) = receiver._receiver.links
    async with connected(receiver, "instance") as client:
        assert await client.call(messages.BEGIN, Begin("t", link), timeout_s=30) == UnknownLink()
        client.notify(messages.PARTS, PartsAnnounced("t", link, [messages.AnnouncedPart(0, 0, 1)]))
        forged: list[tuple[Method[Any, Any], Any]] = [
            (messages.COMMIT, Commit("t", link, 0, 2 * 1536, 0.0, b"forged")),
            (messages.ABANDON, Abandon("t", link, "forged", drained=True)),
            (messages.TELL, Told(link, "name", b"forged")),
            (messages.ASK, Asked(link, "name")),
        ]
        for method, message in forged:
            with pytest.raises(InvalidRequest, match=r"late|not of its sender"):
                await client.call(method, message, timeout_s=30)
        hello = receiver._receiver.links[link].hello
        with pytest.raises(InvalidRequest, match="there is a link of this name already"):
            await anext(client.stream(messages.LINK, hello))
    assert set(receiver._receiver.links) == {link}
    await finish(posted, transfer)


async def test_a_connection_has_one_link_whatever_names_and_addresses_it_gives(pair):
    _, receiver, *rest = pair
    (link,) = receiver._receiver.links
    hello = receiver._receiver.links[link].hello
    first, second = (msgspec.structs.replace(hello, link=f"of-{port}", address=f"127.0.0.1:{port}") for port in (1, 2))
    async with connected(receiver, "instance") as client:
        await anext(stream := client.stream(messages.LINK, first))
        with pytest.raises(InvalidRequest, match="there is a link of this connection already"):
            await anext(client.stream(messages.LINK, second))
        assert set(receiver._receiver.links) == {link, "of-1"}
        await stream.aclose()
    await finish(*rest)


@pytest.mark.parametrize("what", ["begin", "abandon"])
async def test_a_grant_for_one_instance_is_of_no_use_to_another(managers, backend, what):
    receiver = await managers(0, backend, keys=KEYS["instance"])
    granted = await managers(1, backend, keys=KEYS["instance"], name="prefill-0")
    other = await managers(2, backend, keys=KEYS["instance"], name="prefill-1")
    posted = receiver.post_receive("t", [1, 2], sender="prefill-0")
    if what == "begin":
        with pytest.raises(TransferFailed, match="was granted to 'prefill-0', and not to 'prefill-1'"):
            await other.open_send("t", posted.grant)
    else:
        await other.open_link(receiver.endpoint)
        (connection,) = other._peers.links.values()
        abandon = Abandon("t", connection.link.key, "forged", drained=True)
        with pytest.raises(InvalidRequest, match="was granted to 'prefill-0', and not to 'prefill-1'"):
            await connection.client.call(messages.ABANDON, abandon, timeout_s=30)
    await finish(posted, await granted.open_send("t", posted.grant))


async def test_whoever_asks_for_what_a_link_that_has_ended_had_hears_that_and_the_log_has_no_traceback(
    managers, caplog
):
    sender, receiver = [await managers(rank, "ipc") for rank in range(2)]
    await sender.open_link(receiver.endpoint)
    (connection,) = sender._peers.links.values()
    (link,) = receiver._receiver.links.values()
    link.rendezvous.end()
    key = connection.link.key
    forged: list[tuple[Method[Any, Any], Any]] = [
        (messages.TELL, Told(key, "name", b"x")),
        (messages.ASK, Asked(key, "name")),
    ]
    for method, message in forged:
        with pytest.raises(InvalidRequest, match="name of a rendezvous: the link has ended"):
            await connection.client.call(method, message, timeout_s=30)
    assert "Traceback" not in caplog.text


async def test_a_link_from_another_host_replaces_none_of_this_one(pair):
    """Whoever names the address and the epoch of a sender: that address is asked before anything ends."""
    _, receiver, posted, transfer = pair
    (link,) = receiver._receiver.links
    old = receiver._receiver.links[link]
    forged = msgspec.structs.replace(old.hello, link="forged")
    elsewhere = connected_client.Peer(b"other", "instance", "192.0.2.1")
    connected_client._calling.set(elsewhere)
    serving = receiver._receiver.serve_link(forged)
    await anext(serving)
    async with asyncio.timeout(30):
        while receiver._receiver._asking:
            await asyncio.sleep(0.005)
    assert link in receiver._receiver.links
    await serving.aclose()
    await finish(posted, transfer)


def come_from(address, receiver, monkeypatch):
    """As the receiver sees its callers."""
    known = receiver._server._socket.said_by_connection
    monkeypatch.setattr(
        receiver._server._socket,
        "said_by_connection",
        lambda what: address if what == "Peer-Address" else known(what),
    )


async def test_a_stranger_that_comes_and_goes_under_the_name_of_a_sender_ends_nothing(managers, backend, monkeypatch):
    receiver, stranger = await managers(1, backend), await managers(0, backend, name="prefill-0")
    posted = receiver.post_receive("t", [1, 2], sender="prefill-0")
    with monkeypatch.context() as patched:
        come_from("192.0.2.1", receiver, patched)
        await stranger.open_link(receiver.endpoint)
        await stranger.close()
        async with asyncio.timeout(20):
            while receiver._receiver.links or receiver._receiver._losing:
                await asyncio.sleep(0.005)
    sender = await managers(0, backend, name="prefill-0")
    await finish(posted, await sender.open_send("t", posted.grant))


@pytest.mark.parametrize(
    ("keys", "address", "is_trusted"),
    [(None, "127.0.0.1", True), (None, "192.0.2.1", False), (None, "", False), (KEYS["instance"], "192.0.2.1", True)],
    ids=["local", "another host", "unknown", "another host with a key"],
)
async def test_what_comes_is_trusted_if_its_sender_has_a_key_or_is_of_this_host(
    managers, backend, monkeypatch, keys, address, is_trusted
):
    sender, receiver = [await managers(rank, backend, keys=keys) for rank in range(2)]
    come_from(address, receiver, monkeypatch)
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([1], 0)
    await transfer.commit()
    assert (await posted.wait()).is_trusted == is_trusted


def test_a_handshake_of_a_sender_that_has_no_name_is_read():
    """Of an older version."""
    hello = Handshake(9, 0, "e", "127.0.0.1:1", {}, messages.HeadRange(), layout_of(), {}, "l")
    plain = msgspec.to_builtins(hello)
    del plain["name"]
    assert msgspec.convert(plain, Handshake) == hello
