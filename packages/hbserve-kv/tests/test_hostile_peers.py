"""Peers that say what cannot be, found by a fuzzer: they are refused in a line that names it, and hit nobody else."""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from hbserve_kv_layouts import layout_of, whole_blocks

from hbserve_kv import FingerprintMismatch, HeadRange, Outcome, TransferFailed
from hbserve_kv.protocol import messages
from hbserve_kv.protocol.messages import (
    MOST_RANKS,
    MOST_UNITS,
    Abandon,
    Accepted,
    Asked,
    Begin,
    Cancelled,
    Commit,
    Grant,
    Handshake,
    LinkReply,
    PartsAnnounced,
    Told,
    read_grants,
)
from hbserve_kv.transports.own_sockets import checked_address
from hbserve_rpc import InvalidRequest, RpcClient, RpcServer

NO_TEXT = b"\x81" + msgspec.msgpack.encode("transfer_id") + b"\xa3\xff\xfe\xfd"
DEEP = b"\x81" + msgspec.msgpack.encode("x") + b"\x91" * 100_000 + b"\x00"


@contextlib.asynccontextmanager
async def linked(receiver, **lies: Any) -> AsyncIterator[tuple[RpcClient, str]]:
    """A sender that says what it likes, whose link the receiver has."""
    hello = Handshake(
        messages.PROTOCOL_VERSION, 7, "evil", "127.0.0.1:9", receiver.fingerprint, receiver.heads,
        receiver._memory.layout, {name: each.describe() for name, each in receiver._transports.items()}, "evil",
    )  # fmt: skip
    hello = msgspec.structs.replace(hello, **lies)
    async with (
        RpcClient(receiver.address, heartbeat_timeout_s=60) as client,
        asyncio.timeout(30),
        client.stream(messages.LINK, hello) as stream,
    ):
        await anext(stream)
        yield client, hello.link


@pytest.mark.parametrize("backend", ["ipc", "nccl", "mooncake"])
async def test_a_transport_that_is_described_by_nonsense_is_passed_over(managers, backend, caplog):
    if backend == "mooncake":
        pytest.importorskip("mooncake.engine", reason="Mooncake is missing", exc_type=ImportError)
    receiver = await managers(0, backend)
    for nonsense in (b"", b"\xc1", NO_TEXT, DEEP):
        with pytest.raises(InvalidRequest, match=f"no transport connects rank 7 and rank 0: {backend}: cannot be read"):
            async with linked(receiver, offers={backend: nonsense}):
                pass
    assert "Traceback" not in caplog.text


async def test_a_tensor_for_which_there_is_no_room_is_refused_without_a_traceback(managers, caplog):
    receiver = await managers(0, "ipc", timeout_s=0.5)
    async with linked(receiver) as (client, link):
        with pytest.raises(InvalidRequest, match=r"raise kv_transfer\.buffer_size"):
            await client.call(messages.BEGIN, Begin("huge", link, 1 << 62), timeout_s=30)
        all_of_it = await receiver._buffer.place("all", 3 << 18)
        with pytest.raises(InvalidRequest, match=r"late: no room for \d+ bytes"):
            await client.call(messages.BEGIN, Begin("late", link, 1 << 19), timeout_s=30)
        await receiver._buffer.free(all_of_it)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("backend", ["ipc", "nccl"])
async def test_who_has_not_begun_a_transfer_cannot_end_it(managers, backend):
    """Nor ask, by checksums that are compared, what lies in its blocks."""
    sender, receiver = await managers(1, backend), await managers(0, backend, checksum=True)
    posted = receiver.post_receive("t", [1, 2])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([1], 0)
    async with linked(receiver) as (client, link):
        with pytest.raises(InvalidRequest, match=r"commit of transfer t .* has not begun by this link"):
            await client.call(messages.COMMIT, Commit("t", link, 0, 0, 0.0, b"", {0: 1}), timeout_s=30)
        with pytest.raises(InvalidRequest, match="abandon of transfer t is late, or not of its sender"):
            await client.call(messages.ABANDON, Abandon("t", link, "forged", drained=True), timeout_s=30)
    transfer.push([2], 1)
    assert (await transfer.commit()).outcome is Outcome.COMPLETED
    assert (await posted.wait()).outcome is Outcome.COMPLETED


SAID = "first\n\x1b[31msecond " + "x" * 100_000
"""Two lines, in red, and more than fits a log."""


def assert_is_line(text: str) -> None:
    assert text.isprintable()
    assert len(text) < 6000
    assert "first \\x1b[31msecond" in text


async def test_why_a_sender_gives_a_transfer_up_is_told_in_a_line(managers, caplog):
    receiver = await managers(0, "ipc")
    posted = receiver.post_receive("t", [1])
    async with linked(receiver) as (client, link):
        await client.call(messages.BEGIN, Begin("t", link), timeout_s=30)
        await client.call(messages.ABANDON, Abandon("t", link, SAID, drained=True), timeout_s=30)
    assert_is_line((await posted.wait()).error)


async def test_what_a_receiver_says_is_told_in_a_line(managers, caplog):
    sender, given_up = await managers(1, "ipc"), asyncio.Event()
    caplog.set_level(logging.INFO)

    async def serve(hello):
        yield reply_of(sender, passed_over={"x": SAID})
        await given_up.wait()
        yield Cancelled("t", SAID)
        await asyncio.Event().wait()

    async def begin(begin):
        return Accepted("pool", [1], checksum=False)

    server = RpcServer()
    server.serve_stream(messages.LINK, serve)
    server.serve(messages.BEGIN, begin)
    await server.start()
    try:
        async with asyncio.timeout(30):
            transfer = await sender.open_send("t", msgspec.msgpack.encode(Grant("t", server.address, "", sender.heads)))
            given_up.set()
            assert_is_line((await transfer.wait()).error)
    finally:
        await server.stop()
    (said,) = [each.getMessage() for each in caplog.records if "not x: " in each.getMessage()]
    assert_is_line(said)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "x" * 1025, "a\u2028b"])
async def test_an_id_of_several_lines_or_without_an_end_is_refused_on_both_sides(managers, name):
    receiver = await managers(0, "ipc")
    with pytest.raises(ValueError, match=r"^transfer_id='.*: expected (one line|a string of 1 to 1024)"):
        receiver.post_receive(name, [1])
    async with linked(receiver) as (client, link):
        with pytest.raises(InvalidRequest, match=r"kv\.begin: Expected `str` .* at `\$.transfer_id`"):
            await client.call(messages.BEGIN, Begin(name, link, 8), timeout_s=30)
    with pytest.raises(InvalidRequest, match=r"kv\.link: Expected `str` .* at `\$.name`"):
        async with linked(receiver, name=name):
            pass


# ---- a receiver that lies ----------------------------------------------------------------------------------------


def reply_of(manager, **lies: Any) -> LinkReply:
    layout, (transport,) = manager._memory.layout, manager._transports.values()
    reply = LinkReply(0, "evil", manager.heads, layout, transport.name, transport.describe(), {})
    return msgspec.structs.replace(reply, **lies)


LIES: dict[str, tuple[Any, type[Exception], str]] = {
    "no answer": (lambda sender: Cancelled("t", "why"), TransferFailed, "answers a handshake with Cancelled"),
    "transport": (lambda sender: reply_of(sender, transport="x"), TransferFailed, "transport='x', of ipc"),
    "layout": (lambda sender: reply_of(sender, layout=layout_of()), FingerprintMismatch, "rank 0 and .* on rank 1"),
    "heads": (
        lambda sender: reply_of(sender, heads=HeadRange(0, 2, 2)), FingerprintMismatch, "num_kv_heads is 2 on rank 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "error", "says"), LIES.values(), ids=LIES)
async def test_a_receiver_that_answers_a_handshake_with_a_lie_is_named_with_it(managers, answer, error, says):
    sender = await managers(1, "ipc")

    async def serve(hello):
        yield answer(sender)
        await asyncio.Event().wait()

    server = RpcServer()
    server.serve_stream(messages.LINK, serve)
    await server.start()
    try:
        grant = msgspec.msgpack.encode(Grant("t", server.address, "", sender.heads))
        async with asyncio.timeout(30):
            with pytest.raises(error, match=f"{server.address}.*{says}"):
                await sender.open_send("t", grant)
    finally:
        await server.stop()


@pytest.mark.parametrize(
    ("num_bytes", "region", "block_ids", "says"),
    [
        (None, "arena", [1], "region='arena', and not 'pool'"),
        (None, "pool", [1, -1], "block_ids has -1"),
        (None, "pool", [0] * (MOST_UNITS + 1), "4194305 block_ids of 1 units each"),
        (9, "arena", [1, 2, 3], "3 block_ids for 9 bytes"),
        (9, "arena", [], "0 block_ids for 9 bytes"),
        (None, "pool", [], ""),
    ],
)
def test_blocks_that_a_receiver_cannot_have_granted_are_told(num_bytes, region, block_ids, says):
    both = whole_blocks()
    accepted, begin = Accepted(region, block_ids, checksum=False), Begin("t", "l", num_bytes)
    problem = messages.misfit(accepted, begin, both["mine"], both["peer"])
    assert problem.startswith(says)
    assert bool(problem) == bool(says)


def test_blocks_that_are_larger_than_the_senders_are_counted_in_units():
    mine = whole_blocks()["mine"]
    accepted = Accepted("pool", [0] * (MOST_UNITS // 4 + 1), checksum=False)
    problem = messages.misfit(accepted, Begin("t", "l"), mine, dataclasses.replace(mine, ratio=4))
    assert problem.startswith("1048577 block_ids of 4 units each")


COMMIT_OF_NOTHING = messages.Commit("t", "l", 0, 0, 0.0, b"")
PART = messages.AnnouncedPart(0, 0, 1)


@pytest.mark.parametrize(
    ("message", "field", "values"),
    [
        (COMMIT_OF_NOTHING, "num_parts", [-1]),
        (COMMIT_OF_NOTHING, "num_bytes", [-1]),
        (COMMIT_OF_NOTHING, "time_s", [-1.0, 1e10, float("inf"), float("nan")]),
        (COMMIT_OF_NOTHING, "payload", [bytes((1 << 20) + 1)]),
        (Begin("t", "l"), "num_bytes", [-1]),
        (PartsAnnounced("t", "l", []), "parts", [[PART] * 1025, [msgspec.structs.replace(PART, layers=(-1, 1))]]),
        (messages.Keep("t"), "num_receivers", [-1]),
        (messages.Fetch("t", b""), "first", [-1]),
    ],
)
def test_a_value_that_cannot_be_is_not_read(message, field, values):
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message)) == message
    for value in values:
        wrong = msgspec.msgpack.encode(msgspec.structs.replace(message, **{field: value}))
        with pytest.raises(msgspec.ValidationError, match=rf"at `\$\.{field}"):
            msgspec.msgpack.decode(wrong, type=type(message))


def test_what_is_no_grant_is_told_as_that():
    one = Grant("t", "127.0.0.1:9", "e", HeadRange())
    for nonsense in (b"", b"\xc1", NO_TEXT, DEEP, msgspec.msgpack.encode([one] * (MOST_RANKS + 1))):
        with pytest.raises(TransferFailed, match="not a grant"):
            read_grants(nonsense)


# ---- what Gloo is told, which believes it ------------------------------------------------------------------------


async def test_a_peer_that_tells_gloo_nonsense_ends_its_own_link_and_not_the_process(managers):
    sender, receiver = await managers(1, "nccl"), await managers(0, "nccl", timeout_s=3)
    for number, nonsense in enumerate([b"", bytes(7), (1 << 24).to_bytes(8, "little"), b"\xff" * 200]):
        async with linked(receiver, link=f"{number}", address=f"127.0.0.{number + 2}:9") as (client, link):
            theirs = (await client.call(messages.ASK, Asked(link, "0/1"), timeout_s=30)).value
            assert checked_address(theirs, [theirs]) == theirs
            await client.call(messages.TELL, Told(link, "0/0", nonsense), timeout_s=30)
            posted = receiver.post_receive(link, [1])
            await client.call(messages.BEGIN, Begin(link, link), timeout_s=30)
            client.notify(messages.PARTS, PartsAnnounced(link, link, [messages.AnnouncedPart(0, 0, 1)]))
            async with asyncio.timeout(30):
                assert (await posted.wait()).outcome is Outcome.FAILED_DRAINED
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([1], 0)
    assert (await transfer.commit()).outcome is Outcome.COMPLETED


def published(host: bytes, address: bytes, rest: bytes = bytes(16)) -> bytes:
    return b"".join([len(host).to_bytes(8, "little"), host, len(address).to_bytes(8, "little"), address, rest])


def test_lengths_in_what_a_peer_publishes_are_compared_with_ones_own():
    mine = published(b"host-1", bytes(136))
    good = published(b"h", bytes(136))
    assert checked_address(good, [mine]) == good
    for wrong in (good[:-1], good + b"x", good[:20], b"", published(b"", bytes(135)), b"\x02" + good[1:]):
        with pytest.raises(ConnectionError, match=f"{len(wrong)} bytes that are no address of Gloo"):
            checked_address(wrong, [mine])
    for other_form in ([], [b"\xff" * 128], [b""]):
        assert checked_address(b"", other_form) == b""
