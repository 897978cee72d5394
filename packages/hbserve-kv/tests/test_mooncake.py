"""Mooncake's engines: few, shared, and left by everybody when one peer spoils one."""

import asyncio
import dataclasses
import errno
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid

import msgspec
import pytest
import torch
from hbserve_kv_layouts import whole_blocks

from hbserve_kv import BackendUnavailable, Outcome
from hbserve_kv.memory.memory import Memory
from hbserve_kv.transports.base import DrainUnknown, Link, Part

pytest.importorskip("mooncake.engine", reason="Mooncake or its libraries are missing", exc_type=ImportError)

from hbserve_kv.transports import own_sockets
from hbserve_kv.transports.mooncake import engines as mooncake_engines
from hbserve_kv.transports.mooncake.transport import Description, MooncakeTransport
from hbserve_kv.transports.own_sockets import _own_sockets, listening_everywhere
from hbserve_testing.narrowing import present
from hbserve_testing.processes import freeze

NUM_BLOCKS, BLOCK_BYTES = 4, 8 << 20
PEER = """
import ctypes, mmap, sys, time
try:
    from mooncake.engine import TransferEngine
except ImportError:  # the CUDA wheels find libcudart through torch, which takes seconds
    import torch
    from mooncake.engine import TransferEngine
engine = TransferEngine()
engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
memory = mmap.mmap(-1, int(sys.argv[1]))
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
engine.register_memory(address, len(memory))
print(engine.get_rpc_port(), address, flush=True)
time.sleep(600)
"""


@pytest.fixture
def peer(monkeypatch):
    """Starts a receiving process, which is Mooncake and nothing else; returns it and its description."""
    processes = []

    def start() -> tuple[subprocess.Popen[str], bytes]:
        command = [sys.executable, "-c", PEER, str(NUM_BLOCKS * BLOCK_BYTES)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        port, address = present(processes[-1].stdout).readline().split()
        description = Description(f"127.0.0.1:{port}", {"pool": [int(address)]}, 0)
        return processes[-1], msgspec.msgpack.encode(description)

    monkeypatch.setenv("MC_FORCE_TCP", "1")
    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=30)


@pytest.fixture
async def sender(monkeypatch):
    """A transport all of whose links share one engine, which is what happens to a group of them."""
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "5")
    transport = MooncakeTransport("127.0.0.1", 5)
    transport._engines.most = 1
    await transport.start(Memory(torch.ones(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8), 1 << 24))
    yield transport
    async with asyncio.timeout(10):
        await transport.close()
    assert len(transport._engines) == 0


@pytest.fixture
async def receiver():
    memory = Memory(torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8), 1 << 24)
    transport = MooncakeTransport("127.0.0.1", 5)
    await transport.start(memory)
    yield transport, memory
    await transport.close()


SIDES = whole_blocks(NUM_BLOCKS, BLOCK_BYTES)


def link_to(description: bytes) -> Link:
    return Link(uuid.uuid4().hex, is_sender=True, peer_rank=1, peer_description=description, **SIDES)


async def admitted(transport: MooncakeTransport) -> tuple[Link, bytes]:
    """The receiving end of a link, and its description."""
    link = Link(uuid.uuid4().hex, is_sender=False, peer_rank=0, peer_description=transport.describe(), **SIDES)
    return link, await transport.admit(link)


async def link_with(transport: MooncakeTransport) -> Link:
    return link_to((await admitted(transport))[1])


def part(*blocks: int) -> Part:
    return Part("t", 0, "pool", list(blocks), target_block_ids=list(blocks))


async def test_many_peers_share_a_few_engines(managers):
    # Known elsewhere: SGLang #34450, #31922, Mooncake #2044.
    sender = await managers(0, "mooncake")
    receivers = [await managers(1 + i, "mooncake", buffer_size=1 << 16) for i in range(10)]
    for life in range(2):
        for number, receiver in enumerate(receivers):
            posted = receiver.post_receive(f"t{life}-{number}", [1])
            transfer = await sender.open_send(f"t{life}-{number}", posted.grant)
            transfer.push([2], 0)
            assert (await transfer.commit()).outcome is Outcome.COMPLETED
    (transport,) = sender._transports.values()
    assert len(transport._engines) == mooncake_engines.MOST_ENGINES


async def test_a_peer_that_freezes_when_it_is_met_stops_no_write_to_others_of_its_engine(
    sender, receiver, peer, monkeypatch
):
    """It freezes after it was probed, so its engine waits for it with the mutex held that every write needs."""
    # Known elsewhere: SGLang #34865, #31144, #31306, #19900.
    monkeypatch.setattr(MooncakeTransport, "_probe", lambda self, link: None)
    healthy = await link_with(receiver[0])
    await sender.connect(healthy)
    before = sender._engines.of(healthy)
    process, description = peer()
    freeze(process.pid)
    frozen, is_meeting, read = link_to(description), threading.Event(), MooncakeTransport._read_something

    def noting(self, engine, link):
        is_meeting.set()
        read(self, engine, link)

    # Whether the engine is open tells less: it is closed for two seconds only, and on a busy machine nobody may look.
    monkeypatch.setattr(MooncakeTransport, "_read_something", noting)
    meeting = asyncio.create_task(sender.connect(frozen))
    async with asyncio.timeout(20):
        assert await asyncio.to_thread(is_meeting.wait, 20)
        await sender.push(healthy, part(1))
    assert not meeting.done(), meeting
    assert sender._engines.of(healthy) is not before
    assert int(receiver[1].pool.sum()) == BLOCK_BYTES
    process.kill()  # which is what the engine's thread waits for
    with pytest.raises(ConnectionError, match="cannot read from"):
        await meeting
    async with asyncio.timeout(20):
        await before.ended.wait()
    for link in (healthy, frozen):
        await sender.disconnect(link)


@pytest.mark.parametrize("when", ["probed", "met"])
async def test_whoever_connects_to_a_peer_that_has_frozen_need_not_wait_for_it(sender, peer, monkeypatch, when):
    """Mooncake's call waits for a minute, and nothing ends it."""
    # Known elsewhere: SGLang #34865, #31144, #31306, #19900.
    if when == "met":
        monkeypatch.setattr(MooncakeTransport, "_probe", lambda self, link: None)
    process, description = peer()
    freeze(process.pid)
    frozen = link_to(description)
    async with asyncio.timeout(10):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await sender.connect(frozen)
        await sender.disconnect(frozen)


async def test_a_write_that_timed_out_ends_its_engine_and_the_others_of_it_go_on_with_another(sender, receiver, peer):
    # Known elsewhere: vLLM #32255, SGLang #24527, #27372, #32564, #35049, #37077, #38961, Mooncake #4247.
    process, description = peer()
    healthy, frozen = await link_with(receiver[0]), link_to(description)
    await sender.connect(healthy)
    await sender.connect(frozen)
    before = sender._engines.of(frozen)
    assert before is sender._engines.of(healthy)
    freeze(process.pid)
    writing = asyncio.create_task(sender.push(frozen, part(0, 1, 2, 3)))
    async with asyncio.timeout(20):
        for block in range(NUM_BLOCKS):
            await sender.push(healthy, part(block))
        assert not writing.done()
        with pytest.raises(DrainUnknown, match="may still land"):
            await writing
        await sender.disconnect(frozen)
        assert before.ended.is_set(), "nothing is read any more, although the peer is still frozen"
        await sender.push(healthy, part(0))
    assert sender._engines.of(healthy) not in (None, before)
    assert int(receiver[1].pool.sum()) == NUM_BLOCKS * BLOCK_BYTES
    await sender.disconnect(healthy)


async def test_an_engine_that_many_links_have_left_ends_with_its_connections_to_their_peers(sender, receiver, peer):
    # Known elsewhere: SGLang #34450, #31922, Mooncake #2044.
    healthy = await link_with(receiver[0])
    await sender.connect(healthy)
    before = sender._engines.of(healthy)
    _, description = peer()
    for count in range(1, mooncake_engines.MOST_LEFT + 1):
        left = link_to(description)
        await sender.connect(left)
        assert sender._engines.of(left) is before
        await sender.disconnect(left)
        assert bool(before.retired) == (count == mooncake_engines.MOST_LEFT)
    async with asyncio.timeout(20):
        await before.ended.wait()
        await sender.push(healthy, part(0))
    assert int(receiver[1].pool.sum()) == BLOCK_BYTES
    await sender.disconnect(healthy)


async def test_a_session_that_failed_is_tried_again_with_an_engine_that_does_not_know_it(sender, receiver):
    """An engine remembers what it was told of a session, and another process may be behind it now."""
    # Known elsewhere: SGLang #25287, #35823, #37022.
    link = await link_with(receiver[0])
    await sender.connect(link)
    engine = sender._engines.of(link)
    engine.failed.add(f"127.0.0.1:{receiver[0]._receiving._engines[0].native.get_rpc_port()}")
    await sender.disconnect(link)
    again = link_to(link.peer_description)
    await sender.connect(again)
    assert sender._engines.of(again) is not engine
    await sender.disconnect(again)


async def test_what_a_sender_is_writing_lands_no_more_once_its_right_was_revoked(sender, receiver):
    """Not even what its kernel has taken, which otherwise lands whenever its network lets it."""
    # Known elsewhere: vLLM #32255, SGLang #24527, #27372, #32564, #35049, #37077, #38961, Mooncake #4247.
    transport, memory = receiver
    end, description = await admitted(transport)
    link = link_to(description)
    await sender.connect(link)

    async def write() -> None:
        while True:
            await sender.push(link, part(0, 1, 2, 3))

    for _ in range(5):
        writing = asyncio.create_task(write())
        async with asyncio.timeout(20):
            while not memory.pool.any():
                await asyncio.sleep(0.001)
        assert await transport.revoke(end) == {end.key}
        memory.pool.zero_()
        with pytest.raises(DrainUnknown, match="failed"):
            await writing
        await asyncio.sleep(0.2)
        assert not memory.pool.any()
        await sender.disconnect(link)
        await transport.disconnect(end)
        end, description = await admitted(transport)
        link = link_to(description)
        await sender.connect(link)
    await sender.disconnect(link)


async def test_a_write_of_which_one_piece_fails_is_not_over_with_that(sender, receiver):
    """Mooncake says so at once, while it goes on with the others."""
    transport, memory = receiver
    end, description = await admitted(transport)
    link = link_to(description)
    link.peer = whole_blocks(NUM_BLOCKS + 1000, BLOCK_BYTES)["peer"]
    await sender.connect(link)
    engine = sender._engines.of(link)
    wrong = dataclasses.replace(part(3, 2, 1, 0, 0), target_block_ids=[3, 2, 1, 0, NUM_BLOCKS + 999])
    began_s = time.monotonic()
    with pytest.raises(DrainUnknown, match="may still land"):
        await sender.push(link, wrong)
    assert time.monotonic() - began_s < 4, "it was refused, and did not time out"
    async with asyncio.timeout(10):
        await sender.disconnect(link)
        assert engine.ended.is_set()
        await transport.revoke(end)
    memory.pool.zero_()
    await asyncio.sleep(0.2)
    assert not memory.pool.any()


async def test_links_that_share_what_is_taken_from_one_of_them_lose_it_together(receiver):
    transport, _ = receiver
    transport._receiving.most = 1
    links = [(await admitted(transport))[0] for _ in range(3)]
    await transport.disconnect(links[2])
    assert await transport.revoke(links[0]) == {links[0].key, links[1].key}
    assert await transport.revoke(links[1]) >= {links[1].key}, "it is gone already"
    assert await transport.revoke(links[2]) >= {links[2].key}, "also of a link that was lost before"
    assert await transport.revoke(link_to(b"")) == set(), "nothing was given to it"
    assert len(transport._receiving) == 0


async def test_each_sender_has_what_it_writes_through_to_itself_and_takes_it_with_it(receiver):
    transport, _ = receiver
    for _ in range(2):
        links = [(await admitted(transport))[0] for _ in range(8)]
        assert len(transport._receiving) == 8
        for link in links:
            await transport.disconnect(link)
        assert len(transport._receiving) == 1, "one is kept for the next"


async def test_an_engine_looks_often_enough_whether_it_ends(receiver):
    """Its end waits for that with Python's lock held: a second, as Mooncake comes."""
    native = receiver[0]._receiving._engines[0].native
    port = native.get_rpc_port()
    for interval_s in (0.02, mooncake_engines.LOOK_INTERVAL_S):
        mooncake_engines.look_often(native, interval_s)
        found = [seconds for listening, seconds in listening_sockets() if listening == port]
        assert found == [pytest.approx(interval_s, abs=0.01)]


async def test_what_it_listens_at_hears_nothing_that_is_sent_to_another_address(caplog):
    """It has no setting for where it listens, and knows no keys: see SECURITY.md."""
    before = listening_everywhere()
    transport = MooncakeTransport("127.0.0.3", 5)
    await transport.start(Memory(torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8), 1 << 24))
    if "CAP_NET_ADMIN" in caplog.text:
        await transport.close()
        pytest.skip(caplog.text)
    its_own = listening_everywhere() - before
    ports = {found.getsockname()[1] for inode, found in _own_sockets() if inode in its_own}
    assert transport._receiving._engines[0].native.get_rpc_port() in ports
    for port in ports:
        with pytest.raises(TimeoutError):
            socket.create_connection(("127.0.0.2", port), 0.1)
        for own in ("127.0.0.3", "127.0.0.1"):
            socket.create_connection((own, port), 20).close()
    await transport.close()


@pytest.mark.parametrize("reason", ["contradicts MC_FORCE_TCP", "cannot register memory"])
async def test_a_start_that_fails_leaves_nothing_that_listens(reason, monkeypatch, tmp_path):
    memory = Memory(torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8), 1 << 24)
    if reason == "cannot register memory":
        memory.extents["arena"] = memory.extents["pool"]  # Mooncake refuses memory that overlaps
    else:
        (tmp_path / "mooncake.json").write_text('{"protocol": "efa"}')
        monkeypatch.setenv("MOONCAKE_CONFIG_PATH", str(tmp_path / "mooncake.json"))
        monkeypatch.setenv("MC_FORCE_TCP", "1")
    before = listening_everywhere()
    transport = MooncakeTransport("127.0.0.1", 5)
    with pytest.raises(BackendUnavailable, match=reason) as told:
        await transport.start(memory)
    assert listening_everywhere() <= before, told.value


async def test_where_the_kernel_lets_it_filter_nothing_it_works_and_warns_once(caplog, monkeypatch):
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(own_sockets, "_filter", refused)
    transport = MooncakeTransport("127.0.0.1", 5)
    await transport.start(Memory(torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8), 1 << 24))
    await transport.close()
    (warned,) = [each for each in caplog.records if each.levelname == "WARNING"]
    assert "mooncake listens on every interface of this host" in warned.getMessage()


def listening_sockets() -> list[tuple[int, float]]:
    """(port, how long accept() waits) of this process."""
    found = []
    for _, each in _own_sockets():
        if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            seconds, rest_us = struct.unpack("ll", each.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16))
            found.append((each.getsockname()[1], seconds + rest_us / 1e6))
    return found
