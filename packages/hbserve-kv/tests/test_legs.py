"""A sender and the ranks of one receiver: each gets its heads, and all of them the transfer or none."""

import asyncio
from collections import Counter

import pytest
import torch

from hbserve_kv import FingerprintMismatch, HeadRange, Outcome, SourceRank, TransferFailed, join_grants
from hbserve_kv.testing import LoopbackNetwork, is_empty

NUM_HEADS = 4
BACKENDS = ["nccl", "ipc"]
"""Two-sided, and one-sided."""


def cut(num_ranks):
    return [HeadRange.of_rank(rank, num_ranks, NUM_HEADS) for rank in range(num_ranks)]


def heads_of(pool, heads):
    """Of a pool (num_blocks, 3, NUM_HEADS, 8)."""
    return pool[:, :, heads.first : heads.end].contiguous()


@pytest.fixture
def ranks(managers):
    """Starts the ranks of one instance; returns them and their pools."""

    async def start(first, num_ranks, pool, backend="ipc", **settings):
        pools = [heads_of(pool, heads) for heads in cut(num_ranks)]
        started = [
            await managers(first + i, backend, pools[i], heads=heads, **settings)
            for i, heads in enumerate(cut(num_ranks))
        ]
        return started, pools

    return start


@pytest.fixture
def whole():
    return torch.rand(8, 3, NUM_HEADS, 8)


@pytest.fixture
async def one_to_two(ranks, whole):
    """A sender with all heads, and a receiver of two ranks."""
    (sender,), _ = await ranks(0, 1, whole, timeout_s=2)
    receivers, targets = await ranks(1, 2, torch.zeros_like(whole), timeout_s=2)
    return sender, receivers, targets


async def until_empty(*all_managers):
    async with asyncio.timeout(20):
        while not all(map(is_empty, all_managers)):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_senders", "num_receivers"), [(1, 2), (2, 1), (2, 4), (4, 2)])
async def test_a_sender_sends_each_rank_of_the_receiver_the_heads_that_both_have(
    ranks, whole, backend, num_senders, num_receivers, joined
):
    senders, _ = await ranks(0, num_senders, whole, backend)
    receivers, targets = await ranks(num_senders, num_receivers, torch.zeros_like(whole), backend)
    postings = [receiver.post_receive("t", [5, 6]) for receiver in receivers]
    grants = [posted.grant for posted in postings]

    async def send(sender):
        transfer = await sender.open_send("t", join_grants(grants) if joined else grants)
        assert transfer.num_blocks == 2
        transfer.push([1], 0)
        transfer.push([7], 1)
        return await transfer.commit(b"payload")

    sent = await asyncio.gather(*(send(sender) for sender in senders))
    received = [await posted.wait() for posted in postings]
    assert {each.outcome for each in [*sent, *received]} == {Outcome.COMPLETED}
    assert {each.payload for each in received} == {b"payload"}
    for target, heads in zip(targets, cut(num_receivers), strict=True):
        assert torch.equal(target[[5, 6]], heads_of(whole, heads)[[1, 7]])
    num_bytes = 2 * whole[0].nbytes
    assert sum(each.num_bytes for each in sent) == sum(each.num_bytes for each in received) == num_bytes
    assert sum(sender.stats().bytes_sent for sender in senders) == num_bytes
    for sender, heads in zip(senders, cut(num_senders), strict=True):
        concerned = [num_senders + i for i, each in enumerate(cut(num_receivers)) if heads.common(each)]
        assert sorted(link.peer_rank for link in sender.links()) == concerned, (
            "no link to ranks that want nothing of it"
        )


async def test_a_rank_that_refuses_is_named_and_the_others_hear_that_nothing_comes(one_to_two):
    sender, receivers, _ = one_to_two
    for refusing in (0, 1):
        name = f"refused by {refusing}"
        postings = [receiver.post_receive(name, [5]) for receiver in receivers]
        await postings[refusing].cancel("not wanted")
        with pytest.raises(TransferFailed, match=f"transfer {name}: .*not expected"):
            await sender.open_send(name, [posted.grant for posted in postings])
        async with asyncio.timeout(20):
            result = await postings[1 - refusing].wait()
        assert result.outcome is Outcome.FAILED_DRAINED
        assert "not expected" in result.error
        await until_empty(sender, *receivers)
        async with asyncio.timeout(20):
            while sender._outgoing:
                await asyncio.sleep(0.01)
        assert receivers[refusing].stats().dropped_messages == 1, "it is not told again what it has refused"
    assert sender.stats().num_failed == 0, "it never was a transfer"


async def test_a_rank_of_another_model_is_a_mismatch_and_the_others_hear_so(managers, ranks, whole):
    (sender,), _ = await ranks(0, 1, whole)
    alike, other = [
        await managers(1 + i, "ipc", heads_of(whole, heads), heads=heads, fingerprint={"model": "mn"[i]})
        for i, heads in enumerate(cut(2))
    ]
    postings = [each.post_receive("t", [1]) for each in (alike, other)]
    with pytest.raises(FingerprintMismatch, match="model is 'm' on rank 0 and 'n' on rank 2"):
        await sender.open_send("t", [posted.grant for posted in postings])
    async with asyncio.timeout(20):
        assert (await postings[0].wait()).outcome is Outcome.FAILED_DRAINED
    await postings[1].cancel("test over")
    await until_empty(sender)


async def test_ranks_that_want_different_numbers_of_blocks_are_refused(one_to_two):
    sender, receivers, _ = one_to_two
    postings = [receiver.post_receive("t", [1, 2][: 1 + i]) for i, receiver in enumerate(receivers)]
    with pytest.raises(TransferFailed, match="different numbers of blocks"):
        await sender.open_send("t", [posted.grant for posted in postings])
    for posted in postings:
        assert (await posted.wait()).outcome is Outcome.FAILED_DRAINED


@pytest.mark.parametrize("leaving", [0, 1])
async def test_a_rank_that_gives_up_fails_the_transfer_with_its_reason_at_all_others(one_to_two, leaving):
    sender, receivers, _ = one_to_two
    postings = [receiver.post_receive("t", [5, 6]) for receiver in receivers]
    transfer = await sender.open_send("t", [posted.grant for posted in postings])
    transfer.push([1], 0)
    assert await postings[leaving].cancel("not wanted") is Outcome.FAILED_DRAINED
    async with asyncio.timeout(20):
        result = await transfer.wait()
        other = await postings[1 - leaving].wait()
    assert (result.outcome, other.outcome) == (Outcome.FAILED_DRAINED, Outcome.FAILED_DRAINED)
    assert result.error == other.error == "cancelled by the receiver: not wanted"
    transfer.push([2], 1)
    assert await transfer.commit() == result
    await until_empty(sender, *receivers)
    assert sender.stats().num_failed == 1, "one transfer, whatever it is made of"


async def test_a_lost_rank_fails_the_transfer_of_the_others(one_to_two):
    sender, receivers, _ = one_to_two
    postings = [receiver.post_receive("t", [5, 6]) for receiver in receivers]
    transfer = await sender.open_send("t", [posted.grant for posted in postings])
    transfer.push([1], 0)
    await receivers[1].close()
    async with asyncio.timeout(20):
        sent, received = await transfer.wait(), await postings[0].wait()
    assert (sent.outcome, received.outcome) == (Outcome.FAILED_DRAINED, Outcome.FAILED_DRAINED)
    assert sent.error == received.error


async def test_one_rank_that_has_everything_does_not_make_the_transfer_complete(one_to_two):
    sender, receivers, _ = one_to_two
    postings = [receiver.post_receive("t", [5]) for receiver in receivers]
    transfer = await sender.open_send("t", [posted.grant for posted in postings])
    transfer.push([1], 0)
    transfer.state.legs[1].num_pushed += 1  # that never begins
    committing = asyncio.create_task(transfer.commit())
    async with asyncio.timeout(20):
        assert (await postings[0].wait()).outcome is Outcome.COMPLETED
        assert not committing.done()
        await receivers[1].close()
        assert (await committing).outcome is Outcome.FAILED_DRAINED


async def test_whoever_is_cancelled_while_it_opens_a_transfer_leaves_none(managers, monkeypatch):
    network = LoopbackNetwork()
    sender, receiver = [await managers(i, "loopback", transport=network.transport()) for i in range(2)]
    begun, may_answer = asyncio.Event(), asyncio.Event()
    serve = receiver._receiver._granted_or_buffered

    async def wait(*arguments):
        begun.set()
        await may_answer.wait()
        return await serve(*arguments)

    monkeypatch.setattr(receiver._receiver, "_granted_or_buffered", wait)
    posted = receiver.post_receive("t", [1])
    opening = asyncio.create_task(sender.open_send("t", posted.grant))
    async with asyncio.timeout(20):
        await begun.wait()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        may_answer.set()
        result = await posted.wait()
    assert (result.outcome, result.error) == (Outcome.FAILED_DRAINED, "the sender was cancelled")
    await until_empty(sender, receiver)
    async with asyncio.timeout(20):
        while sender._outgoing:
            await asyncio.sleep(0.01)


async def test_a_receiver_that_is_connected_after_the_transfer_has_failed_hears_so(managers, monkeypatch):
    network = LoopbackNetwork()
    sender, receiver = [await managers(i, "loopback", transport=network.transport()) for i in range(2)]
    connect, is_connecting, may_connect = sender._peers.link_to, asyncio.Event(), asyncio.Event()

    async def connection(*arguments):
        is_connecting.set()
        await may_connect.wait()
        return await connect(*arguments)

    monkeypatch.setattr(sender._peers, "link_to", connection)
    posted = receiver.post_receive("t", [1])
    opening = asyncio.create_task(sender.open_send("t", posted.grant))
    async with asyncio.timeout(20):
        await is_connecting.wait()
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        may_connect.set()
        while sender._outgoing:
            await asyncio.sleep(0.01)
        result = await posted.wait()
    assert (result.outcome, result.error) == (Outcome.FAILED_DRAINED, "the sender was cancelled")
    assert posted._transfer.links == {}
    assert receiver.stats().dropped_messages == 0


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_transfer_takes_one_task_of_its_sender_however_many_parts_it_has(managers, backend):
    sender, receiver = await managers(0, backend), await managers(1, backend)
    made: Counter[str] = Counter()

    def counting(loop, job, **settings):
        code = getattr(job, "cr_code", None)
        made[code.co_filename.partition("hbserve_kv/")[2] if code else ""] += 1
        return asyncio.Task(job, loop=loop, **settings)

    for number in range(2):  # the first one connects
        made.clear()
        asyncio.get_running_loop().set_task_factory(counting if number else None)
        posted = receiver.post_receive(f"t{number}", list(range(8)))
        transfer = await sender.open_send(f"t{number}", posted.grant)
        for block in range(8):
            transfer.push([block], block)
            await asyncio.sleep(0.01)
        assert (await transfer.commit()).outcome is Outcome.COMPLETED
        await posted.wait()
    asyncio.get_running_loop().set_task_factory(None)
    assert {name: count for name, count in made.items() if name.startswith("sending/")} == {"sending/transfer.py": 1}


# ---- what the receiver fetches ---------------------------------------------------------------------------------------


def offer_of(sender, blocks=(1, 2)):
    offer = sender.offer("t")
    offer.push(blocks)
    offer.commit()
    return offer


async def test_an_offer_is_fetched_by_all_ranks_that_need_heads_of_it(one_to_two, whole):
    sender, receivers, targets = one_to_two
    offer = offer_of(sender)
    claims = [each.claim("t", [SourceRank(sender.address, sender.epoch, 2)]) for each in receivers]
    first = claims[0].fetch([5, 6])
    assert await claims[0].kept()
    assert await claims[1].kept()
    assert not offer.result.done()
    results = [await each.wait() for each in (first, claims[1].fetch([3, 4]))]
    assert {each.outcome for each in [*results, await offer.wait()]} == {Outcome.COMPLETED}
    for target, blocks, heads in zip(targets, [[5, 6], [3, 4]], cut(2), strict=True):
        assert torch.equal(target[blocks], heads_of(whole, heads)[[1, 2]])


async def fetched_by_one_of_two(one_to_two):
    """The offer, the claims of both receivers, which it is kept for, and what the first of them has posted."""
    sender, receivers, _ = one_to_two
    offer = offer_of(sender)
    claims = [each.claim("t", [SourceRank(sender.address, sender.epoch, 2)]) for each in receivers]
    posted = claims[0].fetch([5, 6])
    assert await claims[1].kept()
    return offer, claims, posted


async def test_a_rank_that_leaves_ends_the_offer_for_the_others_too(one_to_two):
    offer, claims, posted = await fetched_by_one_of_two(one_to_two)
    claims[1].release()
    assert (await posted.wait()).error.endswith("its receiver has left")
    assert (await offer.wait()).outcome is Outcome.FAILED_DRAINED


async def test_ranks_that_disagree_on_what_they_fetch_are_refused(one_to_two):
    offer, claims, posted = await fetched_by_one_of_two(one_to_two)
    while not any(offer.grants.values()):
        await asyncio.sleep(0.001)
    results = [await each.wait() for each in (claims[1].fetch([3], first=1), posted)]
    assert "is being fetched already" in results[0].error
    assert {each.outcome for each in [*results, await offer.wait()]} == {Outcome.FAILED_DRAINED}


async def test_a_claim_of_several_ranks_is_complete_when_all_heads_have_come(ranks, whole):
    senders, _ = await ranks(0, 2, whole)
    (receiver,), (target,) = await ranks(2, 1, torch.zeros_like(whole))
    offers = [offer_of(each) for each in senders]
    posted = receiver.claim("t", [SourceRank(each.address, each.epoch) for each in senders]).fetch([5, 6])
    assert (await posted.wait()).outcome is Outcome.COMPLETED
    assert torch.equal(target[[5, 6]], whole[[1, 2]])
    assert {(await each.wait()).outcome for each in offers} == {Outcome.COMPLETED}


@pytest.mark.parametrize("moment", ["before it is offered", "offered"])
async def test_a_rank_that_nobody_fetches_from_is_told_so_and_has_its_blocks_back(ranks, whole, moment):
    (sender,), _ = await ranks(0, 1, whole)
    (spare,), _ = await ranks(1, 1, whole)
    (receiver,), _ = await ranks(2, 1, torch.zeros_like(whole))
    offers = [offer_of(each) for each in (sender, spare)] if moment == "offered" else []
    claim = receiver.claim("t", [SourceRank(sender.address), SourceRank(spare.address, num_receivers=0)])
    posted = claim.fetch([5, 6])
    offers = offers or [offer_of(each) for each in (sender, spare)]
    assert (await posted.wait()).outcome is Outcome.COMPLETED
    sent, forgotten = [await each.wait() for each in offers]
    assert (sent.outcome, forgotten.outcome, forgotten.num_bytes) == (Outcome.COMPLETED, Outcome.COMPLETED, 0)


@pytest.mark.parametrize("lost", [0, 1])
async def test_a_rank_that_cannot_be_fetched_from_fails_the_claim_and_frees_the_others(ranks, whole, lost):
    senders, _ = await ranks(0, 2, whole)
    (receiver,), _ = await ranks(2, 1, torch.zeros_like(whole))
    offers = [offer_of(each) for each in senders]
    posted = receiver.claim("t", [SourceRank(each.address, each.epoch) for each in senders]).fetch([5, 6])
    offers[lost].withdraw("the client went away")
    assert "the client went away" in (await posted.wait()).error
    for each in offers:
        assert (await each.wait()).outcome is Outcome.FAILED_DRAINED


async def test_ranks_without_the_heads_that_are_needed_are_refused_by_their_heads(ranks, whole):
    senders, _ = await ranks(0, 2, whole)
    (receiver,), _ = await ranks(2, 1, torch.zeros_like(whole))
    offer = offer_of(senders[1])
    received = await receiver.claim("t", senders[1].address).fetch([5, 6]).wait()
    assert "with heads [2, 4) of 4, where [0, 4) of 4 are needed" in received.error
    assert (await offer.wait()).outcome is Outcome.FAILED_DRAINED


async def test_a_receive_ends_if_one_of_its_senders_never_begins_though_another_has(ranks, whole):
    senders, _ = await ranks(0, 2, whole)
    (receiver,), _ = await ranks(2, 1, torch.zeros_like(whole), expiry_s=0.3)
    posted = receiver.post_receive("t", [1])
    transfer = await senders[0].open_send("t", posted.grant)
    async with asyncio.timeout(20):
        result = await posted.wait()
        ended = await transfer.wait()
    assert result.error == "no sender of heads [2, 3] began within 0.3 s"
    assert ended.outcome is Outcome.FAILED_DRAINED
    assert result.error in ended.error
    await until_empty(receiver, *senders)
