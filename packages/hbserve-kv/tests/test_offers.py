"""Transfers that their receivers fetch: who keeps what for how long, and what ends it."""

import asyncio

import pytest
import torch

from hbserve_kv import Outcome, PoolLayout
from hbserve_kv.memory.layout import HeadRange
from hbserve_kv.protocol.messages import COMMIT, FETCH, KEEP, Fetch, Keep, Offered, join_grants
from hbserve_kv.receiving.claims import SourceRank
from hbserve_kv.testing import Faults, LoopbackNetwork, is_empty
from hbserve_rpc import InvalidRequest, RpcClient, RpcServer
from hbserve_testing.narrowing import present


def offered(sender, name="t", blocks=(4, 5, 6), **lease):
    """An offer with all its blocks."""
    offer = sender.offer(name, **lease)
    offer.push(blocks)
    offer.commit(name.encode())
    return offer


async def test_an_offer_waits_for_its_receiver_and_gives_it_the_blocks_that_it_lacks(pair):
    sender, receiver, target, _ = pair
    offer = offered(sender)
    claim = receiver.claim("t", sender.address, sender.epoch)
    assert await claim.kept()
    assert not offer.result.done()
    posted = claim.fetch([1, 2], first=1)
    sent, received = await offer.wait(), await posted.wait()
    assert (sent.outcome, received.outcome, received.payload) == (Outcome.COMPLETED, Outcome.COMPLETED, b"t")
    assert target[:4, 0].tolist() == [-1, 5, 6, -1]
    await claim.task
    assert not receiver._claims
    assert not any(link.transfers for link in receiver._receiver.links.values())
    assert sender.stats().dropped_messages == receiver.stats().dropped_messages == 0


async def test_blocks_are_sent_while_others_are_still_computed(pair):
    sender, receiver, target, _ = pair
    posted = receiver.claim("t", sender.address).fetch([1, 2, 3])
    offer = sender.offer("t")
    offer.push([7])
    async with asyncio.timeout(20):
        while target[1, 0] != 7:
            await asyncio.sleep(0.001)
    offer.push([8, 9])
    offer.commit()
    assert (await posted.wait()).outcome is Outcome.COMPLETED
    assert target[:4, 0].tolist() == [-1, 7, 8, 9]


async def test_a_full_hit_of_the_receiver_moves_only_the_commit(pair):
    sender, receiver, target, _ = pair
    for _ in range(2):  # the id is free again
        offer = offered(sender)
        posted = receiver.claim("t", sender.address, sender.epoch).fetch([], first=3)
        assert (await posted.wait()).outcome is Outcome.COMPLETED
        assert (await offer.wait()).num_bytes == 0
    assert (target == -1).all()


async def test_more_blocks_than_were_offered_are_no_complete_transfer(pair):
    sender, receiver, _, _ = pair
    offer = offered(sender)
    posted = receiver.claim("t", sender.address, sender.epoch).fetch([1, 2, 3], first=1)
    received = await posted.wait()
    assert (received.outcome, (await offer.wait()).outcome) == (Outcome.FAILED_DRAINED, Outcome.FAILED_DRAINED)
    assert received.error == "committed with 2 blocks of the 3 that were granted"


async def test_who_does_not_come_in_time_finds_nothing_and_hears_why(pair):
    sender, receiver, _, _ = pair
    offer = offered(sender, lease_s=0.05)
    result = await offer.wait()
    assert (result.outcome, result.error) == (
        Outcome.FAILED_DRAINED,
        "it was offered for 0.05 s, and nobody has fetched it",
    )
    for epoch in (sender.epoch, ""):
        received = await receiver.claim("t", sender.address, epoch).fetch([1]).wait()
        assert received.outcome is Outcome.FAILED_DRAINED
        assert "nobody has fetched it" in received.error


async def test_a_claim_holds_a_lease_for_as_long_as_it_lives_and_no_longer(managers):
    # Known elsewhere: vLLM #58222, #50789, #41269.
    sender, receiver = await managers(0, "nccl"), await managers(1, "nccl")
    offer = sender.offer("t", lease_s=0.05)
    claim = receiver.claim("t", sender.address, sender.epoch)
    assert await claim.kept()
    offer.commit()
    await asyncio.sleep(0.2)
    assert not offer.result.done()
    claim.release()
    result = await offer.wait()
    assert (result.outcome, result.error) == (Outcome.FAILED_DRAINED, "its receiver has left")


async def test_a_claim_that_was_released_fetches_nothing_whether_it_is_offered_or_not(pair):
    sender, receiver, target, _ = pair
    offer = offered(sender, "offered")
    for name in ("never offered", "offered"):
        claim = receiver.claim(name, sender.address)
        claim.release()
        async with asyncio.timeout(20):
            received = await claim.fetch([1]).wait()
        assert (received.outcome, received.error) == (Outcome.FAILED_DRAINED, "it was released")
    assert (target == -1).all()
    offer.withdraw("not wanted")
    assert (await offer.wait()).outcome is Outcome.FAILED_DRAINED


async def test_a_receiver_that_never_has_room_keeps_an_offer_no_longer_than_expiry_s(managers):
    sender, receiver = await managers(0, "nccl", expiry_s=0.2), await managers(1, "nccl")
    offer = offered(sender)
    claim = receiver.claim("t", sender.address, sender.epoch)
    assert (await offer.wait()).error == "it was kept for 0.2 s, and nobody has fetched it"
    await claim.task
    received = await claim.fetch([1]).wait()
    assert "nobody has fetched it" in received.error


async def test_a_claim_of_what_is_never_offered_ends_after_expiry_s(managers):
    sender, receiver = await managers(0, "nccl", expiry_s=0.1), await managers(1, "nccl")
    received = await receiver.claim("t", sender.address).fetch([1]).wait()
    assert received.error == "transfer t was not offered within 0.1 s"
    assert not sender._offers._awaited


@pytest.mark.parametrize("moment", ["before it is offered", "offered", "kept", "being fetched"])
async def test_what_is_withdrawn_ends_its_receiver_at_once_and_says_why(pair, moment):
    # Known elsewhere: vLLM #35943, #46283.
    sender, receiver, target, _ = pair
    posted = receiver.claim("t", sender.address).fetch([1, 2, 3]) if moment == "before it is offered" else None
    offer = sender.offer("t")
    offer.push([4, 5])
    if moment in ("kept", "being fetched"):
        claim = receiver.claim("t", sender.address, sender.epoch)
        assert await claim.kept()
        posted = claim.fetch([1, 2, 3]) if moment == "being fetched" else None
    if moment == "being fetched":
        while not receiver.stats().active_transfers or target[2, 0] != 5:
            await asyncio.sleep(0.001)
        present(offer._transfer).result.add_done_callback(
            lambda _: offer.push([6])
        )  # its engine hears of the end later
    offer.withdraw("the client went away")
    assert (await offer.wait()).outcome is Outcome.FAILED_DRAINED
    if moment == "kept":
        await claim.task
        posted = claim.fetch([1, 2, 3])
    if moment == "offered":
        posted = receiver.claim("t", sender.address, sender.epoch).fetch([1, 2, 3])
    received = await present(posted).wait()
    assert received.outcome is Outcome.FAILED_DRAINED
    assert "the client went away" in received.error


@pytest.mark.parametrize("moment", ["at once", "when it is kept", "when it moves"])
async def test_a_receiver_that_wants_it_no_more_frees_the_senders_blocks(pair, moment):
    sender, receiver, target, _ = pair
    offer = sender.offer("t")
    offer.push([4, 5])
    claim = receiver.claim("t", sender.address, sender.epoch)
    posted = claim.fetch([1, 2, 3])
    if moment != "at once":
        assert await claim.kept()
    while moment == "when it moves" and target[2, 0] != 5:
        await asyncio.sleep(0.001)
    assert await posted.cancel("not wanted") is Outcome.FAILED_DRAINED
    if moment == "at once":  # the sender has heard nothing, or of a claim that was released
        offer.withdraw("test over")
    async with asyncio.timeout(20):
        assert (await offer.wait()).outcome is Outcome.FAILED_DRAINED


async def test_who_leaves_before_it_is_offered_ends_the_offer_when_it_comes(pair):
    sender, receiver, _, _ = pair
    claim = receiver.claim("t", sender.address, sender.epoch)
    async with asyncio.timeout(20):
        while not sender._offers._awaited:
            await asyncio.sleep(0.001)
        async with RpcClient(sender.address) as stranger:
            with pytest.raises(InvalidRequest, match="another receiver waits for it"):
                await anext(stranger.stream(KEEP, Keep("t")))
        claim.release()
        await asyncio.wait([claim.task], timeout=0.1)
        assert not claim.task.done(), "its sender would not hear of it"
        assert (await offered(sender).wait()).error == "its receiver has left"


async def test_an_offer_that_is_being_fetched_has_all_the_time_it_needs_and_its_receiver_stays_until_it_knows(
    managers, monkeypatch
):
    network, call = LoopbackNetwork(Faults(delay=1.0, delay_s=1.8), seed=1), RpcClient.call

    async def late(self, method, request, **keywords):
        answer = await call(self, method, request, **keywords)
        if method is COMMIT:
            await asyncio.sleep(0.1)
        return answer

    monkeypatch.setattr(RpcClient, "call", late)
    sender = await managers(0, "loopback", transport=network.transport(), expiry_s=1.0)
    receiver = await managers(1, "loopback", transport=network.transport())
    offer = offered(sender)
    posted = receiver.claim("t", sender.address, sender.epoch).fetch([1, 2, 3])
    assert (await posted.wait()).error == ""
    assert (await offer.wait()).error == ""


async def test_what_is_withdrawn_in_the_moment_in_which_it_is_fetched_ends_too(pair):
    sender, receiver, _, _ = pair
    offer = offered(sender)
    posted = receiver.post_receive("t", [1, 2, 3])
    assert offer.keep(b"receiver", 1)
    assert offer.fetch(b"receiver", posted.grant, 0)
    offer.withdraw("the client went away")
    async with asyncio.timeout(20):
        assert (await offer.wait()).error == "the client went away"
    assert await posted.cancel("test over") is Outcome.FAILED_DRAINED


async def test_an_offer_is_for_one_receiver_and_is_fetched_once(pair):
    sender, receiver, _, _ = pair
    offer = offered(sender)
    first = receiver.claim("t", sender.address, sender.epoch)
    assert await first.kept()
    async with RpcClient(sender.address) as stranger:
        with pytest.raises(InvalidRequest, match="kept for another"):
            await anext(stranger.stream(KEEP, Keep("t")))
        with pytest.raises(InvalidRequest, match="not kept for this receiver"):
            await stranger.call(FETCH, Fetch("t", b""), timeout_s=10)
    posted = first.fetch([1, 2, 3])
    with pytest.raises(ValueError, match="fetched already"):
        first.fetch([4])
    assert (await posted.wait()).outcome is (await offer.wait()).outcome is Outcome.COMPLETED
    assert sender.stats().dropped_messages == 2


async def test_a_receiver_that_fetches_twice_is_refused_the_second_time(pair):
    sender, receiver, target, _ = pair
    offer, posted = sender.offer("t"), receiver.post_receive("t", [1])
    async with RpcClient(sender.address) as client:
        stream = client.stream(KEEP, Keep("t"))
        await anext(stream)
        await client.call(FETCH, Fetch("t", posted.grant), timeout_s=10)
        with pytest.raises(InvalidRequest, match="transfer t is being fetched already"):
            await client.call(FETCH, Fetch("t", posted.grant), timeout_s=10)
        offer.push([5])
        offer.commit()
        assert (await offer.wait()).outcome is (await posted.wait()).outcome is Outcome.COMPLETED
    assert target[1, 0] == 5


@pytest.mark.parametrize(
    ("grant", "why"),
    [(b"nonsense", "not a grant"), (join_grants([]), "transfer t: its grant names no receiver")],
)
async def test_a_grant_that_is_none_fails_the_transfer_on_both_sides(pair, grant, why):
    sender, _, _, _ = pair
    offer = offered(sender)
    async with RpcClient(sender.address) as client:
        stream = client.stream(KEEP, Keep("t"))
        await anext(stream)
        await client.call(FETCH, Fetch("t", grant), timeout_s=10)
        assert why in (await offer.wait()).error
        with pytest.raises(InvalidRequest, match=why):
            await anext(stream)


async def test_an_offer_to_a_receiver_of_another_model_fails_on_both_sides_and_says_so(managers):
    sender, receiver = [await managers(i, "ipc", fingerprint={"model": f"m{i}"}) for i in range(2)]
    offer = offered(sender)
    posted = receiver.claim("t", sender.address, sender.epoch).fetch([1, 2, 3])
    async with asyncio.timeout(20):
        for result in (await offer.wait(), await posted.wait()):
            assert result.outcome is Outcome.FAILED_DRAINED
            assert "FingerprintMismatch: model is 'm0' on rank 0 and 'm1' on rank 1" in result.error


async def test_blocks_of_an_offer_that_ends_unknown_are_read_until_it_is_drained(lasting_pair):
    sender, receiver, has_ended = lasting_pair
    offer = offered(sender)
    posted = receiver.claim("t", sender.address, sender.epoch).fetch([1, 2, 3])
    async with asyncio.timeout(20):
        assert (await offer.wait()).outcome is Outcome.UNKNOWN
        draining = asyncio.create_task(offer.drained())
        await asyncio.wait([draining], timeout=0.1)
        was_early = draining.done()
        has_ended.set()
        assert not was_early
        await draining
        assert (await posted.wait()).outcome is not Outcome.COMPLETED
        await posted.drained()


async def test_what_an_earlier_life_offered_is_refused(managers, monkeypatch):
    monkeypatch.setattr("hbserve_kv.sending.offers.LATE_S", 0.05)
    sender, receiver = await managers(0, "nccl"), await managers(1, "nccl")
    received = await receiver.claim("t", sender.address, "an earlier one").fetch([1]).wait()
    assert received.error == "transfer t was offered by an earlier life of this instance"
    received = await receiver.claim("t", sender.address, sender.epoch).fetch([1]).wait()
    assert received.error == "transfer t was not offered within 0.05 s"


async def test_blocks_that_are_computed_anew_replace_those_that_were_pushed(pair):
    sender, receiver, target, _ = pair
    offer = sender.offer("t")
    offer.push([4, 5])
    assert offer.restart()
    offer.push([6, 7])
    posted = receiver.claim("t", sender.address, sender.epoch).fetch([1, 2])
    while target[2, 0] != 7:
        await asyncio.sleep(0.001)
    assert not offer.restart(), "it is being fetched"
    offer.commit()
    assert (await posted.wait()).outcome is Outcome.COMPLETED


async def test_an_offer_of_blocks_of_another_size_fails_and_says_so(managers):
    pools = [PoolLayout(torch.zeros(16, size, 8), "blocks tokens dim") for size in (4, 8)]
    for source, target in (pools, reversed(pools)):
        sender, receiver = await managers(0, "ipc", source), await managers(1, "ipc", target)
        offered(sender)
        received = await receiver.claim("t", sender.address, sender.epoch).fetch([1, 2, 3]).wait()
        assert "the same number of tokens on both sides" in received.error


async def test_an_offer_takes_blocks_of_the_pool_until_its_commit(pair):
    sender, _, _, _ = pair
    offer = sender.offer("t")
    with pytest.raises(ValueError, match="is in use"):
        sender.offer("t")
    with pytest.raises(ValueError, match="outside the pool"):
        offer.push([64])
    offer.commit()
    with pytest.raises(ValueError, match="after the commit"):
        offer.push([1])
    offer.withdraw("test over")
    offer.push([1])  # its engine hears of the end later


async def test_who_is_closed_leaves_nothing_of_offers_and_claims(managers):
    sender, receiver = await managers(0, "nccl"), await managers(1, "nccl")
    waiting = receiver.claim("w", sender.address)
    offer = offered(sender, blocks=[])
    claim = receiver.claim("t", sender.address, sender.epoch)
    assert await claim.kept()
    await sender.close()
    assert (await offer.wait()).error == "the sender was closed"
    async with asyncio.timeout(20):
        assert not await waiting.kept()
        await claim.task
    lost = receiver.claim("t", sender.address)
    received = await lost.fetch([1]).wait()
    assert "nobody listens there" in received.error
    assert is_empty(receiver)
    posted = receiver.claim("t", sender.address).fetch([1])
    await receiver.close()
    assert (await posted.wait()).outcome is Outcome.FAILED_DRAINED


async def test_a_checksum_covers_what_was_fetched(managers):
    source = torch.arange(64.0)[:, None].expand(64, 96).contiguous()
    sender, receiver = await managers(0, "ipc", source), await managers(1, "ipc", torch.zeros(64, 96), checksum=True)
    offered(sender)
    posted = receiver.claim("t", sender.address, sender.epoch).fetch([1, 2, 3])
    assert (await posted.wait()).outcome is Outcome.COMPLETED


@pytest.mark.parametrize("num_sources", [1, 2])
async def test_a_sender_that_offers_a_transfer_twice_fails_it_and_does_not_count_for_another(managers, num_sources):
    async def offers_twice(keep):
        yield Offered(HeadRange())
        yield Offered(HeadRange())
        await asyncio.Event().wait()

    async def is_silent(keep):
        await asyncio.Event().wait()
        yield Offered(HeadRange())

    receiver = await managers(1, "ipc")
    servers = [RpcServer("127.0.0.1", 0) for _ in range(num_sources)]
    for server, handler in zip(servers, (offers_twice, is_silent), strict=False):
        server.serve_stream(KEEP, handler)
        await server.start()
    try:
        claim = receiver.claim("t", [SourceRank(server.address) for server in servers])
        async with asyncio.timeout(10):
            result = await claim.fetch([1]).wait()
        assert "offers it a second time" in result.error
    finally:
        await receiver.close()
        await asyncio.gather(*(server.stop() for server in servers))
