"""How parts are cut into messages of Gloo, and that every cut brings each block to its place."""

import asyncio
import errno
import gc
import multiprocessing
import os
import random
import signal
import socket
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import hbserve_kv_victims as victims
import pytest
import torch

from hbserve_kv import KVTransferManager, Outcome
from hbserve_kv.transports import nccl, own_sockets
from hbserve_kv.transports.base import Link, disconnect
from hbserve_kv.transports.nccl import LONGEST_BYTES, PACKED_BYTES, RECEIVER, SENDER, _pieces
from hbserve_kv.transports.own_sockets import _own_sockets
from hbserve_rpc.address import is_own_address
from hbserve_testing.processes import freeze


def test_a_large_block_is_a_message_of_its_own_whatever_its_neighbours_are():
    assert list(_pieces(PACKED_BYTES, [4, 5, 6, 2])) == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_of_small_blocks_a_long_run_is_a_message_and_the_rest_is_packed():
    quarter = PACKED_BYTES // 4
    assert list(_pieces(quarter, [9, 7, 20, 21, 22, 23, 24, 3, 1])) == [(0, 2), (2, 7), (7, 9)]


def test_no_message_is_longer_than_the_longest():
    quarter, most = PACKED_BYTES // 4, LONGEST_BYTES // (PACKED_BYTES // 4)
    assert list(_pieces(quarter, list(range(2 * most + 2)))) == [(0, most), (most, 2 * most), (2 * most, 2 * most + 2)]


@pytest.mark.parametrize("block_bytes", [PACKED_BYTES // 16, PACKED_BYTES // 2, PACKED_BYTES, 2 * PACKED_BYTES + 4096])
@pytest.mark.parametrize("order", ["neighbours", "scattered", "mixed"])
async def test_blocks_of_every_size_and_order_arrive_as_they_were(managers, monkeypatch, block_bytes, order):
    monkeypatch.setattr(nccl, "LONGEST_BYTES", 3 * PACKED_BYTES)
    source = torch.randint(0, 256, (24, block_bytes), dtype=torch.uint8)
    target = torch.zeros_like(source)
    sender, receiver = await managers(0, "nccl", source), await managers(1, "nccl", target)
    dice = random.Random(1)
    given, wanted = list(range(4, 20)), list(range(2, 18))
    if order == "scattered":
        dice.shuffle(given)
    if order != "neighbours":
        dice.shuffle(wanted)
        wanted = wanted[:8] + sorted(wanted[8:])
    posted = receiver.post_receive("t", wanted)
    transfer = await sender.open_send("t", posted.grant)
    transfer.push(given[:11], 0)
    transfer.push(given[11:], 11)
    assert (await transfer.commit()).outcome is Outcome.COMPLETED
    expected = torch.zeros_like(source)
    expected[wanted] = source[given]
    assert torch.equal(target, expected)


def refused_filter(*_: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


def listening(host: str) -> set[int]:
    """Ports of this process at an address."""
    return {
        found.getsockname()[1]
        for _, found in _own_sockets()
        if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and found.getsockname()[0] == host
    }


async def one_transfer(transfer_id: str, sender: KVTransferManager, receiver: KVTransferManager) -> None:
    posted = receiver.post_receive(transfer_id, [1, 2])
    transfer = await sender.open_send(transfer_id, posted.grant)
    transfer.push([3, 4], 0)
    assert (await transfer.commit()).outcome is Outcome.COMPLETED


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("may_filter", [True, False], ids=["by a filter", "without CAP_NET_ADMIN"])
async def test_what_gloo_listens_at_takes_no_connection_once_its_link_is_there_and_the_link_goes_on(
    managers, host, may_filter, monkeypatch
):
    """It would keep each for as long as the link lives: a thousand of them were a thousand files."""
    if not may_filter:
        monkeypatch.setattr(own_sockets, "_filter", refused_filter)
    if not is_own_address(host):
        pytest.skip("this machine has no IPv6")
    of_others = listening(host)  # of tests before, perhaps, whose groups are on their way out
    sender, receiver = [await managers(rank, "nccl", host=host) for rank in range(2)]
    before = listening(host) - of_others
    await sender.open_link(receiver.endpoint)
    await one_transfer("first", sender, receiver)  # the receiver has its half of the link, too
    of_gloo = listening(host) - before - of_others
    assert len(of_gloo) == 2
    for port in of_gloo:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as stranger:
            stranger.settimeout(0.1)
            with pytest.raises(TimeoutError):
                stranger.connect((host, port))
    for port in before:  # and others do
        socket.create_connection((host, port), 20).close()
    await one_transfer("second", sender, receiver)


@pytest.mark.parametrize("ends", ["one", "all"])
async def test_a_group_that_ends_slowly_keeps_nobody_waiting(ends):
    """NCCL takes half a second to abort one. Two end at the same time."""
    nothing: Any = None
    patience_s = 10.0
    is_over, met = threading.Event(), threading.Barrier(2 if ends == "all" else 1)

    class Slow:
        def abort(self) -> None:
            met.wait(patience_s)
            assert is_over.wait(patience_s)

    transport = nccl.NcclTransport("127.0.0.1", 5.0)
    links = [Link(f"key {number}", True, RECEIVER, b"", nothing, nothing) for number in range(2)]
    for link in links:
        transport._groups[link] = nccl._Group(Slow(), nothing, on_gpu=True, stream=None, link=link)
    ending = asyncio.create_task(transport.disconnect(links[0]) if ends == "one" else transport.close())
    try:
        await asyncio.sleep(0.05)  # the loop goes on
        assert not ending.done()
        is_over.set()
        async with asyncio.timeout(victims.DEADLINE_S):
            await ending
        assert list(transport._groups) == ([links[1]] if ends == "one" else [])
    finally:
        is_over.set()
        for link in links:
            link.executor.shutdown(wait=False)


@pytest.fixture
async def unmade() -> AsyncIterator[tuple[nccl.NcclTransport, Link]]:
    """A link to nobody."""
    nothing: Any = None
    transport = nccl.NcclTransport("127.0.0.1", 0.2)
    await transport.start(SimpleNamespace(is_on_gpu=False))  # type: ignore[arg-type]
    link = Link("key", True, RECEIVER, transport.describe(), nothing, nothing)
    yield transport, link
    await disconnect(transport, link)


async def test_a_link_that_is_not_made_leaves_no_socket_for_as_long_as_its_error_is_kept(unmade):
    transport, link = unmade
    before = listening("127.0.0.1")
    gc.disable()
    try:
        with pytest.raises((RuntimeError, TimeoutError)) as raised:  # in words of a version of torch
            await transport.connect(link)
        assert listening("127.0.0.1") <= before
    finally:
        gc.enable()
    assert raised.tb is not None


async def test_a_group_that_is_made_after_its_link_was_given_up_is_ended(unmade, monkeypatch):
    transport, link = unmade
    may_go_on, has_ended = threading.Event(), threading.Event()
    group = SimpleNamespace(process_group=SimpleNamespace(abort=has_ended.set))

    def make(*_: object) -> Any:
        assert may_go_on.wait(victims.DEADLINE_S)
        return group

    monkeypatch.setattr(transport, "_make_group", make)
    connecting = asyncio.create_task(transport.connect(link))
    await asyncio.sleep(0.05)
    connecting.cancel()
    await asyncio.gather(connecting, return_exceptions=True)
    assert not has_ended.is_set()
    may_go_on.set()
    assert await asyncio.to_thread(has_ended.wait, victims.DEADLINE_S)
    assert not transport._groups


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_who_waits_for_a_half_written_message_to_a_dead_or_frozen_process_goes_on_when_the_link_is_given_up(
    tmp_path, end
):
    """Gloo forgets it when the connection ends, and ends the wait after its timeout."""
    mine, theirs = multiprocessing.Pipe()
    num_bytes, store = 256 << 20, str(tmp_path / "store")  # more than sockets hold
    peer = victims.start_process(victims.receive_by_gloo, theirs, store, num_bytes)
    nothing: Any = None
    link = Link("key", True, RECEIVER, b"", nothing, nothing)
    assert peer.pid is not None
    try:
        gloo = await asyncio.to_thread(victims.make_gloo, store, SENDER)
        assert await asyncio.to_thread(mine.poll, victims.DEADLINE_S)
        freeze(peer.pid)
        sending = gloo.send([torch.empty(num_bytes, dtype=torch.uint8)], RECEIVER, 0)
        group = nccl._Group(gloo, nothing, on_gpu=False, stream=None, link=link)
        waiting = asyncio.create_task(link.run(nccl._wait, group, [sending]))
        os.kill(peer.pid, end)
        link.give_up()
        async with asyncio.timeout(victims.DEADLINE_S / 2):
            with pytest.raises((ConnectionError, RuntimeError)):
                await waiting
        with pytest.raises(RuntimeError):  # its sockets are closed
            gloo.send([torch.empty(1)], RECEIVER, 0)
    finally:
        peer.kill()
        await asyncio.to_thread(peer.join, victims.DEADLINE_S)
        link.executor.shutdown(wait=False)
