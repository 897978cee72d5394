"""Peers that come, go, freeze, die and are restarted, and what they leave behind: nothing."""

import asyncio
import gc
import os
import sys
import threading
from pathlib import Path

import msgspec
import pytest
import torch
from hbserve_kv_layouts import whole_blocks

from hbserve_kv import (
    FingerprintMismatch,
    HeadRange,
    KVTransferConfig,
    KVTransferManager,
    Link,
    Outcome,
    TransferFailed,
)
from hbserve_kv.memory.memory import Memory
from hbserve_kv.protocol.checksum import checksums, link_checksums
from hbserve_kv.protocol.messages import BEGIN, LINK, PROTOCOL_VERSION, Alive, Handshake, UnknownLink
from hbserve_kv.receiving.quarantine import ask_sender
from hbserve_kv.sending.peers import FIRST_PAUSE_S, LONGEST_PAUSE_S, Breaker
from hbserve_kv.testing import Faults, LoopbackNetwork, LoopbackTransport
from hbserve_rpc import RpcClient

NUM_PEERS = int(os.environ.get("HBSERVE_NUM_PEERS", "150"))


def held() -> dict[str, int]:
    gc.collect()
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "tasks": len(asyncio.all_tasks()),
        "shared memory": len(list(Path("/dev/shm").iterdir())),
    }


async def move(sender, receiver, name, blocks=(1,)):
    posted = receiver.post_receive(name, list(blocks))
    transfer = await sender.open_send(name, posted.grant)
    transfer.push(list(blocks), 0)
    return await transfer.commit(), await posted.wait()


async def test_peers_that_came_and_went_leave_no_file_thread_task_or_shared_memory(managers):
    """HBSERVE_NUM_PEERS=1000 for the full number."""
    # Known elsewhere: SGLang #34450, #31922, Mooncake #2044.
    receiver, before = await managers(0, "ipc"), held()
    for number in range(NUM_PEERS):
        peer = KVTransferManager(
            rank=1, pool=torch.zeros(64, 2, 3, 64), fingerprint={"model": "m"},
            config=KVTransferConfig(backend="ipc", buffer_size=1 << 16, timeout_s=10),
        )  # fmt: skip
        await peer.start()
        sent, received = await move(peer, receiver, f"a{number}")
        back, _ = await move(receiver, peer, f"b{number}")
        assert (sent.outcome, received.outcome, back.outcome) == (Outcome.COMPLETED,) * 3
        await peer.close()
        del peer
        if number == 10:
            before = held()
    async with asyncio.timeout(30):
        while receiver.links() or any(now > before[what] for what, now in held().items()):
            await asyncio.sleep(0.05)


def test_a_breaker_pauses_longer_after_each_failure_and_always_tries_again():
    # Known elsewhere: SGLang #25287, #35823, #37022.
    breaker, now_s = Breaker(), 100.0
    assert breaker.refusal(now_s) == ""
    pauses = []
    for number in range(12):
        breaker.failed(f"error {number}", now_s)
        pauses.append(breaker.retry_at_s - now_s)
        assert f"last: error {number}" in breaker.refusal(now_s)
        now_s = breaker.retry_at_s
        assert breaker.refusal(now_s) == "", "half open"
    assert pauses[0] == FIRST_PAUSE_S
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_S


async def test_a_peer_that_was_not_there_is_reached_when_it_comes_and_meanwhile_refused_at_once(managers):
    # Known elsewhere: SGLang #25287, #35823, #37022.
    sender = await managers(0, "ipc", timeout_s=0.5)
    first = await managers(1, "ipc")
    port = int(first.address.rpartition(":")[2])
    posted = first.post_receive("t", [1])
    await first.close()
    with pytest.raises(TransferFailed, match="no connection to"):
        await sender.open_send("t", posted.grant)
    with pytest.raises(TransferFailed, match="tried again in"):
        await sender.open_send("t", posted.grant)
    again = await managers(1, "ipc", port=port)
    sent, _ = await move(sender, again, "t")
    assert sent.outcome is Outcome.COMPLETED, "its grant shows that it lives"


async def test_a_peer_that_was_reached_is_not_blamed_for_what_it_failed_by_before(managers, free_ports, monkeypatch):
    """The longest pauses are for those that fail again and again, without having been there in between."""
    monkeypatch.setattr("hbserve_kv.sending.peers.FIRST_PAUSE_S", 0.0)
    sender, (port,) = await managers(0, "ipc", timeout_s=0.5), free_ports(1)
    sender.add_peer(1, f"127.0.0.1:{port}")
    for number in (1, 2):
        with pytest.raises(TransferFailed, match="no connection to"):
            await sender.send_kv_cache("t", torch.ones(4), 1)
        assert [each.num_failures for each in sender._peers._breakers.values()] == [number]
    receiver = await managers(1, "ipc", port=port)
    await sender.send_kv_cache("t", torch.ones(4), 1)
    assert torch.equal(await receiver.receive_kv_cache("t", 0), torch.ones(4))
    assert sender._peers._breakers == {}


async def test_a_link_that_was_opened_ahead_is_the_one_that_transfers_go_over(processes_backend, managers):
    sender, receiver = [await managers(rank, processes_backend, timeout_s=10) for rank in (0, 1)]
    await asyncio.gather(*(sender.open_link(receiver.endpoint) for _ in range(3)))
    (ahead,) = sender._peers.links.values()
    assert [link.is_sender for link in sender.links()] == [True]
    sent, _ = await move(sender, receiver, "t")
    assert sent.outcome is Outcome.COMPLETED
    assert list(sender._peers.links.values()) == [ahead]
    await sender.open_link(receiver.endpoint)
    assert list(sender._peers.links.values()) == [ahead]


async def test_a_link_to_a_life_that_has_ended_is_not_opened_and_one_to_the_present_life_is(managers):
    sender, receiver = await managers(0, "ipc", timeout_s=2), await managers(1, "ipc")
    old, port = receiver.endpoint, int(receiver.address.rpartition(":")[2])
    await sender.open_link(old)
    await receiver.close()
    again = await managers(1, "ipc", port=port)
    with pytest.raises(TransferFailed, match=r"was restarted|no connection"):
        await sender.open_link(old)
    await sender.open_link(again.endpoint)
    assert len(sender.links()) == 1
    other = await managers(2, "ipc", fingerprint={"model": "n"})
    with pytest.raises(FingerprintMismatch, match="model is 'm' on rank 0 and 'n' on rank 2"):
        await sender.open_link(other.endpoint)


async def test_a_receiver_that_is_gone_fails_the_send_by_its_address(processes_backend, managers):
    sender, receiver = [await managers(rank, processes_backend, timeout_s=2) for rank in (0, 1)]
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    await receiver.close()
    transfer.push([1], 0)
    async with asyncio.timeout(60):
        result = await transfer.commit()
    assert result.outcome is not Outcome.COMPLETED
    with pytest.raises(TransferFailed, match=receiver.address):
        await sender.open_send("t2", posted.grant)


async def test_a_grant_of_an_earlier_life_does_not_disturb_the_connection_to_the_present_one(managers):
    sender, receiver = await managers(0, "ipc"), await managers(1, "ipc")
    old = receiver.post_receive("t", [1])
    port = int(receiver.address.rpartition(":")[2])
    await receiver.close()
    again = await managers(1, "ipc", port=port)
    await move(sender, again, "connects")
    links = sender.links()
    with pytest.raises(TransferFailed, match="restarted since it granted"):
        await sender.open_send("t", old.grant)
    assert sender.links() == links


async def forge_link(sender, receiver, epoch):
    """Anybody's LINK that names the sender's address; open until the test leaves it."""
    client = RpcClient(receiver.address)
    await client.start()
    offers = {name: transport.describe() for name, transport in sender._transports.items()}
    mine = sender.address, sender.fingerprint, sender.heads, sender._memory.layout
    hello = Handshake(PROTOCOL_VERSION, 0, epoch, *mine, offers, "forged")
    stream = client.stream(LINK, hello)
    await anext(stream)
    return client


async def test_a_forged_link_breaks_no_pair_and_disturbs_no_transfer(backend, managers):
    """One that says to be another life of the sender."""
    sender, receiver = await managers(0, backend), await managers(1, backend)
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    ours, asked = set(receiver._receiver.links), receiver._receiver._asking
    client = await forge_link(sender, receiver, "another")
    async with asyncio.timeout(20):
        while asked:
            await asyncio.sleep(0.001)
        assert ours < set(receiver._receiver.links)
        transfer.push([1], 0)
        assert (await transfer.commit()).outcome is Outcome.COMPLETED
    await client.close()


async def test_an_address_is_asked_once_at_a_time_however_often_a_link_is_forged(managers, monkeypatch):
    sender, receiver = await managers(0, "ipc"), await managers(1, "ipc")
    await move(sender, receiver, "connects")
    (link,) = receiver._receiver.links.values()
    questions, may_answer = [], asyncio.Event()

    async def has_ended(asked, keys):
        questions.append(asked)
        return not await may_answer.wait()

    monkeypatch.setattr("hbserve_kv.receiving.receiver.has_ended", has_ended)
    for _ in range(3):
        receiver._receiver._replace(msgspec.structs.replace(link.hello, epoch="another"), link.peer)
        await asyncio.sleep(0)
    asked_meanwhile = list(questions)
    may_answer.set()
    async with asyncio.timeout(20):
        while receiver._receiver._asking:
            await asyncio.sleep(0)
    receiver._receiver._replace(msgspec.structs.replace(link.hello, epoch="another"), link.peer)
    await asyncio.sleep(0)
    assert asked_meanwhile == [link]
    assert questions == [link, link]
    assert list(receiver._receiver.links.values()) == [link]


async def test_a_sender_whose_link_was_replaced_hears_so_and_connects_anew(backend, managers):
    """Also by one that says to be the sender in this very life."""
    sender, receiver = await managers(0, backend), await managers(1, backend)
    await move(sender, receiver, "connects")
    (old,) = sender._peers.links.values()
    client = await forge_link(sender, receiver, sender.epoch)
    async with asyncio.timeout(20):
        while not old.lost:
            await asyncio.sleep(0.001)
        assert old.lost == f"{receiver.address} closed the link"
        sent, received = await move(sender, receiver, "t")
    assert (sent.outcome, received.outcome) == (Outcome.COMPLETED, Outcome.COMPLETED)
    await client.close()


async def test_a_sender_that_hears_of_an_unknown_link_connects_anew_and_its_transfer_goes_on(backend, managers):
    sender, receiver = await managers(0, backend), await managers(1, backend)
    await move(sender, receiver, "connects")
    (old,) = sender._peers.links.values()
    old._listening.cancel()  # it never hears that the receiver has ended the link
    receiver._receiver._lose(next(iter(receiver._receiver.links.values())), "forgotten")
    async with asyncio.timeout(20):
        sent, received = await move(sender, receiver, "t")
    assert (sent.outcome, received.outcome) == (Outcome.COMPLETED, Outcome.COMPLETED)
    assert old.lost == f"{receiver.address} does not know the link any more"


async def test_who_does_not_know_the_new_link_either_fails_the_transfer(managers):
    sender, receiver = await managers(0, "ipc"), await managers(1, "ipc")

    async def never_knows(_):
        return UnknownLink()

    receiver._server.serve(BEGIN, never_knows)
    posted = receiver.post_receive("t", [1])
    async with asyncio.timeout(20):
        with pytest.raises(TransferFailed, match="has ended the connection, and a new one too"):
            await sender.open_send("t", posted.grant)
    await posted.cancel("test over")


async def test_a_sender_that_was_restarted_ends_the_link_of_its_earlier_life(managers):
    sender, receiver = await managers(0, "ipc"), await managers(1, "ipc", timeout_s=60)
    port = int(sender.address.rpartition(":")[2])
    await move(sender, receiver, "connects")
    (old,) = receiver._receiver.links.values()
    (connection,) = sender._peers.links.values()
    connection.client._socket.close()  # as a process that is killed leaves it: nobody says anything
    connection.client._heart.cancel()
    await sender._server.stop()
    again = await managers(0, "ipc", port=port)
    async with asyncio.timeout(20):
        sent, _ = await move(again, receiver, "t")
        await old.ended.wait()
    assert sent.outcome is Outcome.COMPLETED


async def test_a_corrupted_block_fails_its_transfer_by_its_checksum(managers):
    # Known elsewhere: vLLM #52617.
    network = LoopbackNetwork()
    source = torch.rand(64, 2, 3, 64)
    sender = await managers(0, "loopback", source, transport=network.transport())
    receiver = await managers(1, "loopback", transport=network.transport(), checksum=True)
    posted = receiver.post_receive("t", [1, 2, 3])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([4, 5, 6], 0)
    async with asyncio.timeout(20):
        while transfer.state.legs[0].num_moved == 0:
            await asyncio.sleep(0.01)
    receiver._memory.pool[2, 7] ^= 1
    sent = await transfer.commit()
    result = await posted.wait()
    assert (sent.outcome, result.outcome) == (Outcome.FAILED_DRAINED, Outcome.FAILED_DRAINED)
    assert "checksum: granted blocks [1]" in result.error


async def test_checksums_of_blocks_that_were_not_granted_are_nobodys(managers):
    network = LoopbackNetwork()
    sender = await managers(0, "loopback", transport=network.transport())
    receiver = await managers(1, "loopback", transport=network.transport(), checksum=True)
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([4], 0)
    transfer._legs[0]._checksums |= {-1: 7, 1: 7}
    async with asyncio.timeout(20):
        assert (await transfer.commit()).outcome is Outcome.COMPLETED


@pytest.mark.parametrize("block_bytes", [16, 20, 4096])
def test_a_checksum_is_the_same_without_torch(block_bytes, monkeypatch):
    pool = torch.randint(0, 256, (3, block_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    memory = Memory(pool, 0)
    link = Link("key", is_sender=True, peer_rank=1, peer_description=b"", **whole_blocks(3, block_bytes))
    with_torch = link_checksums(memory, link, "pool", [2, 0])
    assert with_torch == checksums(pool[[2, 0]])
    monkeypatch.delitem(sys.modules, "torch")
    assert link_checksums(memory, link, "pool", [2, 0]) == with_torch


@pytest.mark.parametrize("block_bytes", [16, 20])
def test_a_checksum_sees_each_changed_byte_and_each_exchange(block_bytes):
    block = torch.randint(0, 256, (1, block_bytes), dtype=torch.uint8)
    (before,) = checksums(block)
    for place in range(block_bytes):
        changed = block.clone()
        changed[0, place] ^= 0x80
        assert checksums(changed) != [before]
    halves = torch.cat([block[:, block_bytes // 2 :], block[:, : block_bytes // 2]], dim=1)
    assert checksums(halves) != [before]


async def test_a_receive_whose_sender_has_begun_does_not_expire(managers):
    sender, receiver = await managers(0, "ipc"), await managers(1, "ipc")
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    receiver._receiver._expire(receiver._receiver.transfers["t"])
    transfer.push([5], 0)
    async with asyncio.timeout(20):
        assert (await transfer.commit()).outcome is Outcome.COMPLETED
        assert (await posted.wait()).outcome is Outcome.COMPLETED


async def test_a_receive_whose_sender_never_begins_ends(managers):
    # Known elsewhere: vLLM #35943, #55870, #46283, #53250, SGLang #10110, #31800, #10204, #11648, #6857.
    receiver = await managers(1, "ipc", expiry_s=0.2)
    result = await receiver.post_receive("t", [1]).wait()
    assert (result.outcome, result.error) == (Outcome.FAILED_DRAINED, "no sender began within 0.2 s")


async def until_noticed(receiver, *, num_links):
    """That links were lost, and what follows from it."""
    async with asyncio.timeout(20):
        while len(receiver._receiver.links) > num_links or receiver._receiver._losing:
            await asyncio.sleep(0.005)


@pytest.fixture
def answers(monkeypatch) -> list[Alive | None]:
    """What senders have answered whose links were lost."""
    given: list[Alive | None] = []

    async def noting(lost, keys):
        given.append(await ask_sender(lost, keys))
        return given[-1]

    monkeypatch.setattr("hbserve_kv.receiving.receiver.ask_sender", noting)
    return given


async def test_a_grant_outlives_a_link_that_breaks_while_its_sender_lives(managers, backend, answers):
    sender, receiver = await managers(0, backend, name="p"), await managers(1, backend)
    await sender.open_link(receiver.endpoint)
    posted = receiver.post_receive("t", [1], sender="p")
    (connection,) = sender._peers.links.values()
    connection.lose("broken by the test")
    async with asyncio.timeout(20):
        while receiver._receiver.links or len(answers) < 2:
            await asyncio.sleep(0.005)
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([1], 0)
    assert (await transfer.commit()).outcome is (await posted.wait()).outcome is Outcome.COMPLETED


async def test_both_sides_say_for_how_long_parts_were_moving(managers, backend):
    sent, received = await move(await managers(0, backend), await managers(1, backend), "t", blocks=(1, 2, 3))
    assert sent.time_s > 0
    assert received.time_s > 0


async def test_a_link_that_was_lost_leaves_no_task_at_its_sender(managers, backend):
    sender, receiver = await managers(0, backend), await managers(1, backend)
    await sender.open_link(receiver.endpoint)
    (outgoing,) = sender._peers.links.values()
    outgoing.lose("broken by the test")
    async with asyncio.timeout(20):
        while any("OutgoingLink" in repr(task.get_coro()) for task in asyncio.all_tasks()):
            await asyncio.sleep(0.005)


async def test_a_grant_outlives_an_earlier_life_of_its_sender_if_a_later_one_is_there(managers):
    receiver, lives = await managers(2, "ipc"), [await managers(0, "ipc", name="p") for _ in range(2)]
    for sender in lives:
        await sender.open_link(receiver.endpoint)
    posted = receiver.post_receive("t", [1], sender="p")
    await lives[0].close()
    await until_noticed(receiver, num_links=1)
    transfer = await lives[1].open_send("t", posted.grant)
    transfer.push([1], 0)
    assert (await transfer.commit()).outcome is (await posted.wait()).outcome is Outcome.COMPLETED


async def test_the_end_of_a_sender_ends_only_what_was_granted_to_it(managers):
    receiver, network = await managers(2, "ipc"), [await managers(rank, "ipc", name=f"p{rank}") for rank in range(2)]
    for sender in network:
        await sender.open_link(receiver.endpoint)
    posted = {name: receiver.post_receive(f"to {name}", [i], sender=name) for i, name in enumerate(["p0", "p1", ""])}
    await network[0].close()
    async with asyncio.timeout(20):
        assert (await posted["p0"].wait()).error == "its sender 'p0' was lost before it began"
    await until_noticed(receiver, num_links=1)
    for name in ("p1", ""):
        transfer = await network[1].open_send(f"to {name}", posted[name].grant)
        transfer.push([1], 0)
        assert (await transfer.commit()).outcome is Outcome.COMPLETED


async def test_a_sender_that_ends_after_its_link_is_noticed_too(managers, answers):
    receiver, sender = await managers(1, "ipc"), await managers(0, "ipc", name="p")
    await sender.open_link(receiver.endpoint)
    posted = receiver.post_receive("t", [1], sender="p")
    (outgoing,) = sender._peers.links.values()
    outgoing.lose("broken by the test")
    async with asyncio.timeout(20):
        while not answers:
            await asyncio.sleep(0.005)
        assert answers[0] is not None
        assert answers[0].epoch == sender.epoch
        await sender.close()
        assert (await posted.wait()).error == "its sender 'p' was lost before it began"


async def test_late_writes_end_in_quarantine_and_the_quarantine_ends_with_them(managers):
    # Known elsewhere: vLLM #32255, SGLang #24527, #27372, #32564, #35049, #37077, #38961, Mooncake #4247.
    network = LoopbackNetwork(Faults(late_write=1.0, delay_s=3.0), seed=3)
    sender = await managers(0, "loopback", transport=network.transport())
    receiver = await managers(1, "loopback", transport=network.transport())
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([1], 0)
    await transfer.commit()
    assert (await posted.wait()).outcome is not Outcome.COMPLETED
    async with asyncio.timeout(30):
        await transfer.drained()
        await posted.drained()


async def test_heads_that_nobody_has_in_common_are_refused_with_both_ranges(managers):
    heads = [HeadRange.of_rank(rank, 2, 4) for rank in range(2)]
    sender = await managers(0, "ipc", torch.zeros(8, 3, 2, 8), heads=heads[0])
    receiver = await managers(1, "ipc", torch.zeros(8, 3, 2, 8), heads=heads[1])
    posted = receiver.post_receive("t", [1])
    assert not sender.concerns(posted.grant)
    with pytest.raises(ValueError, match=r"heads is \[0, 1\] on rank 0 and \[2, 3\] on rank 1"):
        await sender.open_send("t", posted.grant)
    await posted.cancel("test over")


@pytest.mark.parametrize("fails", [True, False])
async def test_a_link_that_cannot_be_made_is_forgotten_by_its_transport(managers, fails):
    class Unreached(LoopbackTransport):
        async def connect(self, link):
            await super().connect(link)
            if fails:
                raise ConnectionError("no way there")
            await asyncio.Event().wait()

    network = LoopbackNetwork()
    transport = Unreached(network)
    sender = await managers(0, "loopback", transport=transport, timeout_s=1.0)
    receiver = await managers(1, "loopback", transport=network.transport())
    posted = receiver.post_receive("t", [1])
    with pytest.raises(TransferFailed):
        await sender.open_send("t", posted.grant)
    assert not transport._targets
    await posted.cancel("test over")


async def test_a_receiver_that_refuses_the_link_leaves_no_task_at_its_sender(managers):
    sender, receiver = [await managers(i, "ipc", fingerprint={"model": f"m{i}"}) for i in range(2)]
    posted, before = receiver.post_receive("t", [1]), asyncio.all_tasks()
    with pytest.raises(FingerprintMismatch):
        await sender.open_send("t", posted.grant)
    async with asyncio.timeout(20):
        while asyncio.all_tasks() - before:
            await asyncio.sleep(0.01)
    await posted.cancel("test over")


async def test_auto_falls_back_when_the_better_transport_fails_in_practice(managers, monkeypatch, caplog):
    sender, receiver = await managers(0, "auto"), await managers(1, "auto")
    monkeypatch.setattr("hbserve_kv.transports.ipc.Mapping", lambda *_: (_ for _ in ()).throw(OSError("denied")))
    sent, _ = await move(sender, receiver, "t")
    assert sent.outcome is Outcome.COMPLETED
    assert sender.links()[0].transport == "nccl"
    assert "by ipc, next is nccl: denied" in caplog.text


async def test_auto_says_why_it_passed_over_a_transport_of_another_host(managers, monkeypatch, caplog):
    caplog.set_level("INFO", "hbserve_kv")
    receiver = await managers(1, "auto")
    monkeypatch.setattr("hbserve_kv.transports.ipc._host", lambda: "elsewhere")
    sender = await managers(0, "auto")
    sent, _ = await move(sender, receiver, "t")
    assert sent.outcome is Outcome.COMPLETED
    assert "not ipc: the other is on another host" in caplog.text
