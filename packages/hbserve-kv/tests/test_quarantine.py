"""Blocks that a sender may still write to, when its host has vanished without a word."""

import asyncio
import re
import socket
import time

import pytest
from hbserve_kv_layouts import layout_of, whole_blocks

from hbserve_kv import HeadRange, Link, Outcome, PostedReceive, TransferFailed
from hbserve_kv.protocol.messages import ALIVE, Alive, Handshake, Nothing
from hbserve_kv.receiving.quarantine import Quarantine
from hbserve_kv.receiving.transfer import IncomingLink, IncomingTransfer
from hbserve_kv.testing import LoopbackNetwork
from hbserve_rpc import Peer, RpcServer


def fail_a_transfer(address: str, quarantine: Quarantine, *, is_connected: bool) -> IncomingTransfer:
    """Three blocks that were granted to a one-sided sender at `address`, which has not said that it writes no more."""
    hello = Handshake(2, 0, "epoch", address, {}, HeadRange(), layout_of(), {}, "link")
    link = Link("link", is_sender=False, peer_rank=0, peer_description=b"", **whole_blocks())
    sender = IncomingLink(hello, link, LoopbackNetwork().transport(), HeadRange(), Peer(b"it", None, "127.0.0.1"))
    transfer = IncomingTransfer("t", "pool", [4, 5, 6], [0], quarantine.watch)
    assert transfer.begin(sender)
    if not is_connected:
        sender.ended.set()
    transfer.fail("no longer wanted")
    return transfer


async def test_blocks_of_a_host_that_vanished_stay_out_of_use_and_the_log_says_again_and_again_whose_they_are(
    monkeypatch, caplog
):
    monkeypatch.setattr("hbserve_kv.receiving.quarantine.FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr("hbserve_kv.receiving.quarantine.ANSWER_TIMEOUT_S", 0.2)
    # It takes connections and never answers, as an address does behind which there is nothing any more.
    with socket.create_server(("127.0.0.1", 0)) as host:
        address = f"127.0.0.1:{host.getsockname()[1]}"
        quarantine = Quarantine(longest_s=60.0, on_revoked=lambda *_: None)
        transfer = fail_a_transfer(address, quarantine, is_connected=False)
        async with asyncio.timeout(30):
            assert (await transfer.result).outcome is Outcome.UNKNOWN
            while len(caplog.messages) < 3:
                await asyncio.sleep(0.01)
        assert (len(quarantine), quarantine.num_blocks) == (1, 3)
        assert not transfer.drained.is_set()
    said = re.compile(rf"transfer t: its 3 blocks are out of use since it failed \d+ s ago: {address} may still write")
    assert all(said.match(message) for message in caplog.messages)
    async with asyncio.timeout(30):
        await transfer.drained.wait()  # the host is back, and says that nobody is there
        while len(quarantine):
            await asyncio.sleep(0.01)
    assert quarantine.num_blocks == 0
    await quarantine.close()


async def test_a_sender_that_is_there_but_does_not_end_its_write_in_time_makes_its_transfer_unknown(monkeypatch):
    monkeypatch.setattr("hbserve_kv.receiving.quarantine.CHECK_INTERVAL_S", 0.01)
    quarantine = Quarantine(longest_s=0.1, on_revoked=lambda *_: None)
    transfer = fail_a_transfer("127.0.0.1:1", quarantine, is_connected=True)
    async with asyncio.timeout(20):
        assert (await transfer.result).outcome is Outcome.UNKNOWN
        assert not transfer.drained.is_set()
        transfer.sender_drained("link")
        await transfer.drained.wait()
        while len(quarantine):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("says_so", [True, False])
async def test_what_the_system_of_a_sender_had_taken_may_arrive_for_a_while_after_the_sender_has_ended(
    monkeypatch, says_so
):
    monkeypatch.setattr("hbserve_kv.receiving.quarantine.GRACE_S", 0.5)
    quarantine = Quarantine(longest_s=60.0, on_revoked=lambda *_: None)
    began_s = time.monotonic()
    transfer = fail_a_transfer("127.0.0.1:1", quarantine, is_connected=says_so)  # where nobody is
    if says_so:
        quarantine.drain_later(transfer, transfer.links["link"])
    async with asyncio.timeout(20):
        await transfer.drained.wait()
    assert time.monotonic() - began_s > 0.4
    await quarantine.close()


async def test_a_receiver_that_is_closed_ends_what_is_not_drained_and_says_that_nobody_will_know():
    quarantine = Quarantine(longest_s=60.0, on_revoked=lambda *_: None)
    posted = PostedReceive(fail_a_transfer("127.0.0.1:1", quarantine, is_connected=False), b"")
    draining = asyncio.create_task(posted.drained())
    async with asyncio.timeout(20):
        await quarantine.close()
        assert (await posted.wait()).outcome is Outcome.UNKNOWN
        with pytest.raises(TransferFailed, match="the receiver was closed before its sender was known to have ended"):
            await draining
    assert len(quarantine) == 0


@pytest.mark.parametrize(
    ("epoch", "writing", "has_ended"),
    [("epoch", ["link"], False), ("epoch", ["another"], True), ("next", [], True), ("next", ["link"], True)],
)
async def test_a_sender_writes_no_more_if_it_is_another_life_or_has_ended_the_link(epoch, writing, has_ended):
    async def alive(_: Nothing) -> Alive:
        return Alive(epoch, writing)

    server = RpcServer()
    server.serve(ALIVE, alive)
    await server.start()
    quarantine = Quarantine(longest_s=60.0, on_revoked=lambda *_: None)
    transfer = fail_a_transfer(server.address, quarantine, is_connected=False)
    async with asyncio.timeout(30):
        outcome = (await transfer.result).outcome
        await quarantine.close()
    assert outcome is (Outcome.FAILED_DRAINED if has_ended else Outcome.UNKNOWN)
    await server.stop()


@pytest.mark.parametrize("processes_backend", ["mooncake"], indirect=True)
async def test_a_link_that_loses_its_engine_to_another_ones_end_is_made_again(managers, processes_backend):
    receiver = await managers(0, processes_backend)
    receiver._transports["mooncake"]._receiving.most = 1
    senders = [await managers(1 + i, processes_backend) for i in range(2)]

    async def move(sender, name):
        posted = receiver.post_receive(name, [1])
        transfer = await sender.open_send(name, posted.grant)
        transfer.push([2], 0)
        return (await transfer.commit()).outcome

    for number, sender in enumerate(senders):
        assert await move(sender, f"t{number}") is Outcome.COMPLETED
    assert await receiver._receiver.quarantine.revoke(next(iter(receiver._receiver.links.values())))
    async with asyncio.timeout(20):
        while any(sender.links() for sender in senders):
            await asyncio.sleep(0.01)
    for number, sender in enumerate(senders):
        assert await move(sender, f"again {number}") is Outcome.COMPLETED
