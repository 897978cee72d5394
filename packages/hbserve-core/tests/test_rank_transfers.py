"""Transfers of several ranks as one, and those of another rank as rank 0 has them. All ranks are of this process."""

import asyncio
import contextlib
import logging
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from hbserve_core import InstanceConfig
from hbserve_core.errors import RankFailed
from hbserve_core.model.shard import Shard
from hbserve_core.transfers import rank_protocol as protocol
from hbserve_core.transfers.instance_transfers import InstanceTransfers
from hbserve_core.transfers.launched_steps import KEPT_STEPS, LaunchedStep, LaunchedSteps
from hbserve_core.transfers.rank_protocol import Receive, Send
from hbserve_core.transfers.rank_transfers import RANK_STRIDE, RankServer, RemoteRank, make_manager
from hbserve_kv import (
    DrainUnknown,
    KVTransferConfig,
    KVTransferManager,
    Outcome,
    PostedReceive,
    SendTransfer,
    TransferFailed,
    TransferStats,
)
from hbserve_kv.testing import LoopbackNetwork, is_empty
from hbserve_kv.testing.loopback import LoopbackTransport
from hbserve_testing.waits import until

pytestmark = pytest.mark.timeout(60)

NUM_HEADS, NUM_BLOCKS = 4, 8
DEADLINE_S = 30


@pytest.fixture(autouse=True)
async def _no_task_is_left():
    yield
    assert asyncio.all_tasks() == {asyncio.current_task()}


class Instance:
    """An InstanceTransfers with the servers of its other ranks, over pools with the heads of `whole`."""

    def __init__(self, kv_rank, whole, num_ranks):
        config = InstanceConfig(
            instance_id="i", role="decode", model_path="m", kv_rank=kv_rank,
            kv_transfer=KVTransferConfig(backend="ipc", buffer_size=0, timeout_s=5),
        )  # fmt: skip
        shards = [Shard(rank, num_ranks) for rank in range(num_ranks)]
        self.heads = [shard.kv_heads(NUM_HEADS) for shard in shards]
        self.pools = [whole[:, :, each.first : each.end].clone() for each in self.heads]
        self.lost, self._config = [], config
        runners = [self.runner(pool) for pool in self.pools]
        managers = [make_manager(config, *each) for each in zip(runners[1:], shards[1:], strict=True)]
        self.steps = [LaunchedSteps() for _ in managers]
        self.servers = [RankServer(manager, steps) for manager, steps in zip(managers, self.steps, strict=True)]
        self._runner = runners[0]

    @staticmethod
    def runner(pool, addresses=()):
        return SimpleNamespace(
            pool=pool[:, None, None], model_config=SimpleNamespace(num_kv_heads=NUM_HEADS), fingerprint={"model": "m"},
            transfer_addresses=addresses,
        )  # fmt: skip

    async def __aenter__(self):
        self._runner.transfer_addresses = [await server.start() for server in self.servers]
        self.transfers = InstanceTransfers(self._config, self._runner, "epoch", self.lost.append)
        await self.transfers.start()
        self.managers = [self.transfers._manager, *(server._manager for server in self.servers)]
        return self

    async def __aexit__(self, *_):
        await until(lambda: all(map(is_empty, self.managers)))
        await until(lambda: not any(server._transfers for server in self.servers))
        await self.transfers.close()
        for server in self.servers:
            await server._server.stop()


@pytest.fixture
def whole():
    """(NUM_BLOCKS, 3, NUM_HEADS, 8)"""
    return torch.rand(NUM_BLOCKS, 3, NUM_HEADS, 8)


@pytest.mark.parametrize(("num_senders", "num_receivers"), [(1, 1), (1, 2), (2, 1), (2, 4), (8, 2), (2, 8)])
async def test_instances_of_any_numbers_of_ranks_move_their_blocks(whole, num_senders, num_receivers):
    """Of 8 ranks two have the same head, and one of these sends it."""
    async with Instance(0, whole, num_senders) as p, Instance(1, whole * 0, num_receivers) as d:
        posted = await d.transfers.post_receive("t", [5, 6])
        send = await p.transfers.open_send("t", posted.grant)
        assert send.num_blocks == 2
        assert isinstance(posted, PostedReceive) == (num_receivers == 1), "nothing is put around what one rank has"
        assert isinstance(send, SendTransfer) == (num_senders == 1)
        send.push([1], 0)
        send.push([7], 1)
        sent, received = await send.commit(b"payload"), await posted.wait()
        assert (sent.outcome, received.outcome, received.payload) == (Outcome.COMPLETED, Outcome.COMPLETED, b"payload")
        for pool, heads in zip(d.pools, d.heads, strict=True):
            assert torch.equal(pool[[5, 6]], whole[[1, 7]][:, :, heads.first : heads.end])
        moved = sum(pool[[5, 6]].nbytes for pool in d.pools)
        assert sent.num_bytes == received.num_bytes == (await d.transfers.stats()).bytes_received == moved
        assert (await p.transfers.stats()).bytes_sent == moved
        assert p.lost == d.lost == []


def pushes_of(managers, monkeypatch):
    """By rank, (block, event) of every push."""
    found: list[list[Any]] = [[] for _ in managers]
    push = SendTransfer.push

    def note(self, block_ids, first, ready=None):
        rank = next(rank for rank, manager in enumerate(managers) if manager._memory is self._memory)
        found[rank].append((*block_ids, ready))
        push(self, block_ids, first)

    monkeypatch.setattr(SendTransfer, "push", note)
    return found


async def test_each_rank_pushes_after_its_own_event_of_the_step_that_it_has_launched_or_will(whole, monkeypatch):
    async with Instance(0, whole, 2) as p, Instance(1, whole * 0, 1) as d:
        (steps,), pushed = p.steps, pushes_of(p.managers, monkeypatch)
        steps.add("rank 1, step 1")
        posted = await d.transfers.post_receive("t", [3, 4, 5])
        send = await p.transfers.open_send("t", posted.grant)
        send.push([0], 0, LaunchedStep(1, "rank 0, step 1"))
        await until(lambda: pushed[1] == [(0, "rank 1, step 1")])
        send.push([1], 1, LaunchedStep(2, "rank 0, step 2"))
        send.push([2], 2)
        committing = asyncio.create_task(send.commit(b"payload"))
        assert (await p.transfers.stats()).active_transfers == 2  # rank 1 has been told of it all
        assert len(pushed[1]) == 1
        assert not committing.done()
        await asyncio.to_thread(steps.add, "rank 1, step 2")
        assert (await committing).outcome is Outcome.COMPLETED
        assert (await posted.wait()).payload == b"payload"
        assert pushed == [
            [(i, None if i == 2 else f"rank {rank}, step {i + 1}") for i in range(3)] for rank in range(2)
        ]
        for pool, heads in zip(d.pools, d.heads, strict=True):
            assert torch.equal(pool[[3, 4, 5]], whole[:3, :, heads.first : heads.end])


def test_events_of_steps_that_have_long_been_computed_are_not_kept():
    steps, called = LaunchedSteps(), list[int]()
    assert not steps.has(2, lambda: called.append(2))
    for number in range(1, KEPT_STEPS + 3):
        steps.add(f"step {number}")
        assert called == [2] * (number >= 2)
    assert steps.has(2, lambda: called.append(3))
    assert [steps.event(number) for number in (0, 2, 3, KEPT_STEPS + 2)] == [
        None, None, "step 3", f"step {KEPT_STEPS + 2}"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("num_senders", "num_receivers", "links"),
    [
        (1, 1, [[0]]),
        (1, 2, [[0, 1]]),
        (2, 1, [[0], [0]]),
        (2, 4, [[0, 1], [2, 3]]),
        (8, 2, [[0], [], [0], [], [1], [], [1], []]),
    ],
)
async def test_ranks_are_connected_ahead_to_those_that_want_heads_of_them(whole, num_senders, num_receivers, links):
    """And the first transfer needs no other link."""
    async with Instance(0, whole, num_senders) as p, Instance(1, whole * 0, num_receivers) as d:
        await p.transfers.open_link(d.transfers.endpoint)
        ahead = [sorted(link.peer_rank // RANK_STRIDE for link in manager.links()) for manager in p.managers]
        assert ahead == links
        before = [dict(manager._peers.links) for manager in p.managers]
        posted = await d.transfers.post_receive("t", [5])
        send = await p.transfers.open_send("t", posted.grant)
        send.push([1], 0)
        assert (await send.commit()).outcome is Outcome.COMPLETED
        assert [manager._peers.links for manager in p.managers] == before


@pytest.mark.parametrize("failing", [0, 1])
async def test_a_rank_that_cannot_be_connected_ahead_says_why_and_is_not_lost(whole, failing):
    async with Instance(0, whole, 2) as p, Instance(1, whole * 0, 2) as d:
        p.managers[failing].fingerprint["model"] = "n"
        with pytest.raises((ValueError, TransferFailed), match=r"model is 'n' on rank"):
            await p.transfers.open_link(d.transfers.endpoint)
        assert p.lost == d.lost == []


@pytest.mark.parametrize("num_ranks", [1, 2])
async def test_a_cancelled_receive_ends_the_send_of_all_ranks_with_its_reason(whole, num_ranks):
    async with Instance(0, whole, num_ranks) as p, Instance(1, whole * 0, 2) as d:
        posted = await d.transfers.post_receive("t", [5, 6])
        send = await p.transfers.open_send("t", posted.grant)
        send.push([1], 0)
        waiting = asyncio.create_task(send.wait())
        assert await posted.cancel("not wanted") is Outcome.FAILED_DRAINED
        sent, received = await waiting, await posted.wait()
        assert (sent.outcome, sent.error) == (Outcome.FAILED_DRAINED, "cancelled by the receiver: not wanted")
        assert (received.outcome, received.error) == (Outcome.FAILED_DRAINED, "not wanted")
        await asyncio.gather(send.drained(), posted.drained())


async def test_a_cancelled_send_ends_the_receive_of_all_ranks_with_its_reason(whole):
    async with Instance(0, whole, 2) as p, Instance(1, whole * 0, 2) as d:
        posted = await d.transfers.post_receive("t", [5, 6])
        send = await p.transfers.open_send("t", posted.grant)
        assert await send.cancel("the client has left") is Outcome.FAILED_DRAINED
        received = await posted.wait()
        assert (received.outcome, received.error) == (Outcome.FAILED_DRAINED, "the client has left")


async def test_when_one_rank_fails_the_others_are_cancelled_with_its_cause(whole):
    """A sender that has no heads of rank 0 would never tell that."""
    async with Instance(0, whole, 2) as p, Instance(1, whole * 0, 2) as d:
        posted = await d.transfers.post_receive("t", [5, 6])
        send = await p.transfers.open_send("t", posted.grant)
        await d.servers[0]._transfers["t"].cancel("out of luck")
        received, sent = await asyncio.gather(posted.wait(), send.wait())
        assert received.error.endswith("out of luck"), "perhaps it comes by the sender"
        assert sent.error == "cancelled by the receiver: out of luck"
        assert {received.outcome, sent.outcome} == {Outcome.FAILED_DRAINED}


@pytest.mark.parametrize("refusing", [0, 1])
async def test_a_rank_that_cannot_take_part_is_told_and_no_other_takes_part(whole, refusing, caplog):
    async with Instance(0, whole, 2) as p, Instance(1, whole * 0, 2) as d:
        of_one = d.managers[refusing].post_receive("t", [1])
        with pytest.raises((ValueError, TransferFailed), match="transfer_id='t' is in use"):
            await d.transfers.post_receive("t", [5, 6])
        await until(lambda: is_empty(d.managers[1 - refusing]))
        await of_one.cancel("test over")
        posted = await d.transfers.post_receive("t", [5, 6])
        p.managers[refusing].fingerprint["model"] = "n"
        with pytest.raises((ValueError, TransferFailed), match="model is 'n' on rank"):
            await p.transfers.open_send("t", posted.grant)
        await posted.cancel("test over")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], "an ordinary refusal"


async def test_whoever_is_cancelled_while_it_posts_or_opens_leaves_nothing(whole):
    async with Instance(0, whole, 2) as p, Instance(1, whole * 0, 2) as d:
        for turns in range(12):  # of the loop, until the cancellation
            posting = asyncio.create_task(d.transfers.post_receive(f"t{turns}", [5, 6]))
            for _ in range(turns):
                await asyncio.sleep(0)
            posting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await (await posting).cancel("it was quicker")
            await until(lambda: all(map(is_empty, d.managers)))
        for turns in range(0, 40, 5):
            posted = await d.transfers.post_receive(f"u{turns}", [5, 6])
            opening = asyncio.create_task(p.transfers.open_send(f"u{turns}", posted.grant))
            for _ in range(turns):
                await asyncio.sleep(0)
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            await posted.cancel("test over")
            await until(lambda: all(map(is_empty, [*p.managers, *d.managers])))


async def test_a_commit_reaches_every_rank_although_whoever_waits_for_it_is_cancelled(whole):
    async with Instance(0, whole, 2) as p, Instance(1, whole * 0, 2) as d:
        posted = await d.transfers.post_receive("t", [5])
        send = await p.transfers.open_send("t", posted.grant)
        send.push([1], 0)
        committing = asyncio.create_task(send.commit())
        await asyncio.sleep(0)
        committing.cancel()
        assert (await posted.wait()).outcome is Outcome.COMPLETED
        assert (await send.wait()).outcome is Outcome.COMPLETED


async def test_a_rank_that_is_lost_fails_what_it_takes_part_in_and_is_told_once_by_name(whole):
    async with Instance(0, whole, 1) as p, Instance(1, whole * 0, 2) as d:
        posted = await d.transfers.post_receive("t", [5, 6])
        send = await p.transfers.open_send("t", posted.grant)
        d.transfers.lose_ranks()
        received = await posted.wait()
        assert (received.outcome, received.error) == (Outcome.FAILED_DRAINED, "rank 1 is lost")
        await posted.drained()
        assert [str(error) for error in d.lost] == [
            f"rank 1 does not answer: {d.servers[0]._server.address}: the instance has failed"
        ]
        assert isinstance(d.lost[0], RankFailed)
        assert await send.cancel("test over") is Outcome.FAILED_DRAINED
        with pytest.raises(TransferFailed, match="transfer u: rank 1 is lost"):
            await d.transfers.post_receive("u", [5, 6])
        assert (await d.transfers.stats()).active_transfers == 0
        await d.servers[0]._manager.close()


async def test_each_rank_has_moved_a_block_to_itself_before_the_instance_is_ready(whole, monkeypatch):
    moved, to_itself = [], KVTransferManager.transfer_to_itself

    async def counted(self):
        await to_itself(self)
        moved.append(self.rank)

    monkeypatch.setattr(KVTransferManager, "transfer_to_itself", counted)
    async with Instance(3, whole, 2) as instance:
        assert moved == [3 + RANK_STRIDE, 3]
        assert await instance.transfers.stats() == TransferStats()
        assert [manager.links() for manager in instance.managers] == [[], []]
        for pool, heads in zip(instance.pools, instance.heads, strict=True):
            assert torch.equal(pool, whole[:, :, heads.first : heads.end])


# ---- one rank --------------------------------------------------------------------------------------------------------


class Stray(LoopbackTransport):
    """Whose parts fail, and may go on until `end` is set."""

    def __init__(self, network):
        super().__init__(network)
        self.end = asyncio.Event()

    async def push(self, link, part):
        raise DrainUnknown("it timed out")

    async def disconnect(self, link):
        await self.end.wait()
        await super().disconnect(link)


@pytest.fixture
async def remote():
    """A sender of stray parts, and a receiver as another rank's."""
    network = LoopbackNetwork()
    stray = Stray(network)
    sender, receiver = [
        KVTransferManager(
            rank=rank, pool=torch.zeros(8, 4), fingerprint={"model": "m"},
            config=KVTransferConfig(buffer_size=0, timeout_s=5, expiry_s=1.0), transport=transport,
        )
        for rank, transport in enumerate([stray, network.transport()])
    ]  # fmt: skip
    await sender.start()
    server, lost = RankServer(receiver, LaunchedSteps()), list[Any]()
    rank = RemoteRank(1, await server.start(), lost.append)
    await rank.client.start()
    yield SimpleNamespace(sender=sender, receiver=receiver, rank=rank, lost=lost, end=stray.end)
    stray.end.set()
    await rank.close()
    await receiver.close()
    await server._server.stop()
    await sender.close()


async def test_a_stream_that_is_left_early_cancels_its_transfer(remote):
    async with remote.rank.client.stream(protocol.RECEIVE, Receive("t", [1])) as stream:
        begun = await anext(stream)
        transfer = await remote.sender.open_send("t", begun.grant)
        assert remote.receiver.stats().active_transfers == 1
    assert (await transfer.wait()).error == "cancelled by the receiver: rank 0 has given it up"
    posted = remote.sender.post_receive("u", [1])
    async with remote.rank.client.stream(protocol.SEND, Send("u", posted.grant)) as stream:
        assert (await anext(stream)).num_blocks == 1
    assert (await posted.wait()).error == "rank 0 has given it up"
    await until(lambda: is_empty(remote.receiver))


async def test_after_an_unknown_end_the_blocks_of_another_rank_are_drained_when_its_stream_ends(remote):
    posted = await remote.rank.post_receive("t", [1])
    transfer = await remote.sender.open_send("t", posted.grant)
    transfer.push([1], 0)
    await transfer.commit()
    received = await posted.wait()
    assert received.outcome is Outcome.UNKNOWN
    assert remote.receiver.stats().num_quarantined == 1
    draining = asyncio.create_task(posted.drained())
    await asyncio.wait([draining], timeout=0.3)
    assert not draining.done()
    remote.end.set()
    await draining
    await until(lambda: is_empty(remote.receiver))
    assert remote.lost == []


async def test_a_transfer_that_is_still_drained_is_not_taken_for_a_later_one_of_its_id(remote):
    first = await remote.rank.post_receive("t", [1])
    transfer = await remote.sender.open_send("t", first.grant)
    transfer.push([1], 0)
    await transfer.commit()
    assert (await first.wait()).outcome is Outcome.UNKNOWN
    receiver = remote.receiver._receiver
    receiver._config = msgspec.structs.replace(receiver._config, expiry_s=2.0 * DEADLINE_S)  # or that would end it
    second = await remote.rank.post_receive("t", [2])
    remote.end.set()
    await first.drained()
    async with asyncio.timeout(DEADLINE_S):
        assert await second.cancel("not wanted") is Outcome.FAILED_DRAINED
    assert (await second.wait()).error == "not wanted"


async def test_blocks_of_which_another_rank_will_never_know_are_not_said_to_be_drained(remote):
    posted = await remote.rank.post_receive("t", [1])
    transfer = await remote.sender.open_send("t", posted.grant)
    transfer.push([1], 0)
    await transfer.commit()
    assert (await posted.wait()).outcome is Outcome.UNKNOWN
    await remote.receiver.close()
    with pytest.raises(TransferFailed, match=r"rank 1: .*closed before its sender was known to have ended"):
        await posted.drained()


async def test_a_rank_that_does_not_answer_keeps_its_last_figures_and_is_told(remote):
    posted = await remote.rank.post_receive("t", [1])
    assert (await remote.rank.stats()).active_transfers == 1
    remote.rank.lose()
    assert (await posted.wait()).error == "rank 1 is lost"
    assert await remote.rank.stats() == TransferStats(active_transfers=1)
    assert all(isinstance(error, RankFailed) for error in remote.lost)
    assert len(remote.lost) == 2
    assert await posted.cancel("late") is Outcome.FAILED_DRAINED
