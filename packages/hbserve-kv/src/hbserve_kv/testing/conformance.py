"""Conformance tests: what every transport and every backend must do. With pytest, use them in your project like this:

    @pytest.mark.parametrize("check", CHECKS)
    async def test_my_backend_conforms(check):
        await run_check(check, backend="my_module:MyBackend")     # or transport=MyTransport: one is made per instance

A check uses real managers in one process, on CPU memory unless `device` says otherwise. It raises AssertionError, or
TimeoutError after CHECK_TIMEOUT_S. Whatever it started is closed in any case.
"""

import asyncio
import gc
import os
import random
import threading
from collections.abc import Awaitable, Callable

import torch

from hbserve_kv.errors import TransferFailed
from hbserve_kv.manager import KVTransferManager
from hbserve_kv.memory.layout import HeadRange
from hbserve_kv.protocol.transfer_state import Outcome
from hbserve_kv.testing.rig import BLOCK_MAJOR, BLOCK_SIZE, NUM_BLOCKS, NUM_HEADS, NUM_LAYERS, Rig, send
from hbserve_kv.transports.base import Transport

CHECK_TIMEOUT_S = 60.0


Check = Callable[[Rig], Awaitable[None]]


async def run_check(
    check: Check,
    *,
    backend: str = "nccl",
    transport: Callable[[], Transport] | None = None,
    device: str = "cpu",
    layouts: tuple[str, str] = (BLOCK_MAJOR, BLOCK_MAJOR),
) -> None:
    """Run one of CHECKS, with the backend of that name or with the transports that `transport()` makes. `layouts` are
    the names, in LAYOUTS, of the layout of pools that are sent from and of that of all other pools.

    Raises:
        AssertionError, or whatever the backend raises: the backend does not conform.
        RuntimeError: Python was told to leave assertions out, so nothing would be checked.
    """
    if not __debug__:
        raise RuntimeError("checks are assertions: run them without python -O and without PYTHONOPTIMIZE")
    rig = Rig(backend, transport, device, layouts)
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            await check(rig)
            await rig.until_empty()
    finally:
        await rig.close()


async def blocks_land_where_they_were_granted_and_nowhere_else(rig: Rig) -> None:
    source, target = rig.patterned(), rig.pool()
    sender, receiver = await rig.pair(source, target)
    dice = random.Random(0)
    free = dice.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    expected = target.clone()
    for number, count in enumerate([1, 2, 7, 20]):
        wanted, free = free[:count], free[count:]
        given = dice.sample(range(NUM_BLOCKS), count)
        posted = receiver.post_receive(f"t{number}", wanted)
        await send(sender, posted, f"t{number}", given, part_size=5)
        result = await posted.wait()
        assert result.outcome is Outcome.COMPLETED, result.error
        assert result.payload == f"t{number}".encode()
        assert result.num_bytes == count * target[0].nbytes
        expected[wanted] = source[given]
    assert torch.equal(target, expected)
    assert sender.stats().bytes_sent == receiver.stats().bytes_received == 30 * target[0].nbytes


async def a_full_prefix_hit_moves_only_the_commit(rig: Rig) -> None:
    sender, receiver = await rig.pair(rig.pool(), rig.pool())
    posted = receiver.post_receive("t", [])
    await send(sender, posted, "t", [])
    result = await posted.wait()
    assert (result.outcome, result.payload, result.num_bytes) == (Outcome.COMPLETED, b"t", 0)


async def many_transfers_go_both_ways_at_once(rig: Rig) -> None:
    pools = [rig.patterned(), rig.patterned() + 1e6]
    originals = [pool.clone() for pool in pools]
    both = await rig.pair(pools[0], pools[1])

    async def move(number: int) -> None:
        sender, receiver = number % 2, 1 - number % 2
        given, wanted = [number % 32], [32 + number % 32]
        posted = both[receiver].post_receive(f"t{number}", wanted)
        await send(both[sender], posted, f"t{number}", given)
        assert (await posted.wait()).outcome is Outcome.COMPLETED
        assert torch.equal(pools[receiver][wanted], originals[sender][given])

    await asyncio.gather(*(move(number) for number in range(32)))


async def one_sender_serves_two_receivers_and_one_leaves(rig: Rig) -> None:
    source = rig.patterned()
    sender = await rig.start(0, source)
    targets = [rig.pool() for _ in range(2)]
    receivers = [await rig.start(1 + i, target) for i, target in enumerate(targets)]
    for life in range(2):
        for number, (receiver, target) in enumerate(zip(receivers, targets, strict=True)):
            posted = receiver.post_receive(f"t{life}-{number}", [3])
            await send(sender, posted, f"t{life}-{number}", [number])
            assert (await posted.wait()).outcome is Outcome.COMPLETED
            assert torch.equal(target[3], source[number])
        await receivers.pop(0).close()
        targets.pop(0)


async def an_aborted_send_frees_the_receiver_and_says_why(rig: Rig) -> None:
    sender, receiver = await rig.pair(rig.pool(), rig.pool())
    posted = receiver.post_receive("t", [1, 2])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([5], 0)
    assert await transfer.abort("the client went away") is Outcome.FAILED_DRAINED
    result = await posted.wait()
    assert (result.outcome, result.error) == (Outcome.FAILED_DRAINED, "the client went away")


async def a_cancelled_receive_ends_the_send_and_not_the_link(rig: Rig) -> None:
    source, target = rig.patterned(), rig.pool()
    sender, receiver = await rig.pair(source, target)
    for number in range(5):
        posted = receiver.post_receive(f"t{number}", [1, 2, 3, 4])
        transfer = await sender.open_send(f"t{number}", posted.grant)
        for block in range(number):
            transfer.push([block], block)
        links = sender.links()
        assert await posted.cancel("no longer wanted") is Outcome.FAILED_DRAINED
        result = await transfer.commit()
        assert result.outcome is Outcome.FAILED_DRAINED
        assert "no longer wanted" in result.error
        assert sender.links() == links
    posted = receiver.post_receive("after", [1])
    await send(sender, posted, "after", [9])
    assert torch.equal(target[1], source[9])


async def a_sender_whose_right_to_write_was_revoked_writes_no_more(rig: Rig) -> None:
    """Check `Transport.revoke`. If the right cannot be revoked, nothing changes."""
    source, target = rig.patterned(), rig.pool()
    sender, receiver = await rig.pair(source, target)
    posted = receiver.post_receive("t", [1, 2, 3])
    transfer = await sender.open_send("t", posted.grant)
    (link,) = receiver._receiver.links.values()
    is_revoked = await receiver._receiver.quarantine.revoke(link)
    transfer.push([5, 6, 7], 0)
    sent, received = await transfer.commit(), await posted.wait()
    assert (sent.outcome is Outcome.COMPLETED) is (received.outcome is Outcome.COMPLETED) is not is_revoked
    expected = rig.pool()
    if not is_revoked:
        expected[[1, 2, 3]] = source[[5, 6, 7]]
    assert torch.equal(target, expected)
    posted = receiver.post_receive("after", [1])
    while is_revoked and sender.links():  # noqa: ASYNC110  no event says that the sender has heard of it
        await asyncio.sleep(0.01)
    await send(sender, posted, "after", [9])
    assert torch.equal(target[1], source[9])


async def a_receiver_that_was_restarted_gets_nothing_of_its_earlier_life(rig: Rig) -> None:
    source, old, new = rig.patterned(), rig.pool(), rig.pool()
    sender, receiver = await rig.pair(source, old)
    posted = receiver.post_receive("t", [1, 2])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([1], 0)
    port = int(receiver.address.rpartition(":")[2])
    await receiver.close()
    again = await rig.start(1, new, port=port)
    transfer.push([2], 1)
    assert (await transfer.commit()).outcome is not Outcome.COMPLETED
    await transfer.drained()
    posted = again.post_receive("t", [7])
    while True:
        try:
            await send(sender, posted, "t", [7])
        except TransferFailed:  # until the sender has noticed
            await asyncio.sleep(0.05)
        else:
            break
    expected = rig.pool()
    expected[7] = source[7]
    assert torch.equal(new, expected)


async def a_receiver_fetches_what_was_offered_before_or_will_be(rig: Rig) -> None:
    source, target = rig.patterned(), rig.pool()
    sender, receiver = await rig.pair(source, target)
    offer = sender.offer("early")
    offer.push([7, 1])
    offer.push([30, 9])
    offer.commit(b"early")
    early = receiver.claim("early", sender.address, sender.epoch).fetch([5, 6, 2], first=1)
    late = receiver.claim("late", sender.address).fetch([40, 50])
    result = await early.wait()
    assert (result.outcome, result.payload) == (Outcome.COMPLETED, b"early"), result.error
    offer = sender.offer("late")
    for block in (20, 21):
        offer.push([block])
    offer.commit()
    for outcome in (await late.wait(), await offer.wait()):
        assert outcome.outcome is Outcome.COMPLETED, outcome.error
    expected = rig.pool()
    expected[[5, 6, 2, 40, 50]] = source[[1, 30, 9, 20, 21]]
    assert torch.equal(target, expected)


async def whole_tensors_come_in_any_order(rig: Rig) -> None:
    sender, receiver = await rig.pair(rig.pool(), rig.pool())
    sender.add_peer(1, receiver.address)
    tensors = [torch.arange(3 * 5 * 700, device=rig.device).view(3, 5, 700) + i for i in range(3)]
    waiting = asyncio.create_task(receiver.receive_kv_cache("r0", 0))
    for number, tensor in enumerate(tensors):
        await sender.send_kv_cache(f"r{number}", tensor, 1)
    received = {number: await receiver.receive_kv_cache(f"r{number}", 0) for number in (2, 1)} | {0: await waiting}
    assert all(torch.equal(received[number], tensor) for number, tensor in enumerate(tensors))


async def a_checksum_accepts_what_was_sent(rig: Rig) -> None:
    source, target = rig.patterned(), rig.pool()
    sender, receiver = await rig.start(0, source), await rig.start(1, target, checksum=True)
    posted = receiver.post_receive("t", [4, 9, 10])
    await send(sender, posted, "t", [8, 1, 2], part_size=2)
    assert (await posted.wait()).outcome is Outcome.COMPLETED
    assert torch.equal(target[[4, 9, 10]], source[[8, 1, 2]])


async def ranks_with_other_heads_get_their_slices(rig: Rig) -> None:
    """Check 1→2, 2→1 and 2→4 ranks: each decode rank gets its heads of all blocks, from whichever rank holds them."""
    for num_senders, num_receivers in ((1, 2), (2, 1), (2, 4)):
        whole = rig.patterned()
        senders = [
            await rig.start(i, rig.heads_of(whole, heads, of_sender=True), heads)
            for i, heads in enumerate(_cut(num_senders))
        ]
        targets = [rig.heads_of(rig.pool(), heads, of_sender=False) for heads in _cut(num_receivers)]
        receivers = [
            await rig.start(num_senders + i, target, heads)
            for i, (target, heads) in enumerate(zip(targets, _cut(num_receivers), strict=True))
        ]
        postings = [receiver.post_receive("t", [5, 6, 60]) for receiver in receivers]
        pairs = [(sender, posted) for sender in senders for posted in postings if sender.concerns(posted.grant)]
        assert len(pairs) == max(num_senders, num_receivers)
        await asyncio.gather(*(send(sender, posted, "t", [7, 40, 41], 2) for sender, posted in pairs))
        for posted, target, heads in zip(postings, targets, _cut(num_receivers), strict=True):
            result = await posted.wait()
            assert result.outcome is Outcome.COMPLETED, result.error
            assert result.num_bytes == 3 * target[0].nbytes
            expected = rig.heads_of(rig.pool(), heads, of_sender=False)
            expected[[5, 6, 60]] = whole[[7, 40, 41]][..., heads.first : heads.end, :]
            assert torch.equal(target, expected)
        for manager in [*senders, *receivers]:
            await manager.close()


def _cut(num_ranks: int) -> list[HeadRange]:
    return [HeadRange.of_rank(rank, num_ranks, NUM_HEADS) for rank in range(num_ranks)]


async def blocks_of_other_sizes_are_filled_token_by_token(rig: Rig) -> None:
    """Check a sender whose blocks are twice or half as large. Some tokens of the larger blocks are not wanted, or not
    there."""
    source, target = rig.patterned(32, 2 * BLOCK_SIZE), rig.pool(64, BLOCK_SIZE)
    sender, receiver = await rig.start(0, source, is_raw=False), await rig.start(1, target, is_raw=False)
    expected = target.clone()
    posted = receiver.post_receive("smaller", [9, 3, 50, 51, 4])
    transfer = await sender.open_send("smaller", posted.grant)
    assert (transfer.num_blocks, transfer.block_size) == (5, BLOCK_SIZE)
    transfer.push([20], -1)  # the receiver has its first half already
    transfer.push([7, 8], 1)
    assert (await transfer.commit()).outcome is (await posted.wait()).outcome is Outcome.COMPLETED
    for place, (block, half) in zip([9, 3, 50, 51, 4], [(20, 1), (7, 0), (7, 1), (8, 0), (8, 1)], strict=True):
        expected[place] = source[block][:, :, half * BLOCK_SIZE :][:, :, :BLOCK_SIZE]
    assert torch.equal(target, expected)
    await _send_back(rig, receiver, sender, target, source)


async def _send_back(
    rig: Rig, sender: KVTransferManager, receiver: KVTransferManager, source: torch.Tensor, target: torch.Tensor
) -> None:
    expected = target.clone()
    posted = receiver.post_receive("larger", [3, 30])
    transfer = await sender.open_send("larger", posted.grant)
    assert (transfer.num_blocks, transfer.block_size) == (4, BLOCK_SIZE)
    transfer.push([50, 9, 4], 0)  # the last block of a prompt is seldom full
    assert (await transfer.commit()).outcome is (await posted.wait()).outcome is Outcome.COMPLETED
    for (block, half), place in zip([(3, 0), (3, 1), (30, 0)], [50, 9, 4], strict=True):
        expected[block][:, :, half * BLOCK_SIZE :][:, :, :BLOCK_SIZE] = source[place]
    assert torch.equal(target, expected)


async def a_layer_moves_as_soon_as_it_is_computed(rig: Rig) -> None:
    source, target = rig.pool(), rig.pool()
    numbers, expected = rig.patterned(), target.clone()
    sender = await rig.start(0, source, is_raw=False)
    receiver = await rig.start(1, target, is_raw=False, checksum=True)
    posted = receiver.post_receive("t", [5, 6, 60])
    transfer = await sender.open_send("t", posted.grant)
    for layer in range(NUM_LAYERS):
        source[:, layer] = numbers[:, layer]
        transfer.push([9, 1], 0, layers=range(layer, layer + 1))
    transfer.push([2], 2)
    sent, received = await transfer.commit(), await posted.wait()
    assert sent.outcome is received.outcome is Outcome.COMPLETED, (sent.error, received.error)
    assert sent.num_bytes == received.num_bytes == 3 * target[0].nbytes
    expected[[5, 6, 60]] = source[[9, 1, 2]]
    assert torch.equal(target, expected)
    posted = receiver.post_receive("lacks a layer", [5])
    transfer = await sender.open_send("lacks a layer", posted.grant)
    transfer.push([3], 0, layers=range(NUM_LAYERS - 1))
    assert (await transfer.commit()).outcome is not Outcome.COMPLETED
    assert "0 blocks of the 1" in (await posted.wait()).error


async def what_comes_and_goes_leaves_no_file_and_no_thread(rig: Rig) -> None:
    receiver, baseline = await rig.start(0, rig.pool()), (0, 0)
    for life in range(6):
        sender = await rig.start(1 + life, rig.pool())
        posted = receiver.post_receive(f"t{life}", [1])
        await send(sender, posted, f"t{life}", [1])
        await rig.stop(sender)
        await rig.until_empty()
        while receiver.links():  # noqa: ASYNC110  no event says so
            await asyncio.sleep(0.01)
        if life == 2:  # the first lives open what the process keeps, such as an event loop's pipes
            baseline = _held()
    await _until_held(baseline)


async def a_start_that_is_cancelled_leaves_no_file_and_no_thread(rig: Rig) -> None:
    """Check `start`, each time a little later, until it is over before it is cancelled."""
    for _ in range(2):  # the first life opens what the process keeps
        await rig.stop(await rig.start(0, rig.pool()))
    baseline, num_turns, is_over = _held(), 1, False
    while not is_over:
        starting = asyncio.create_task(rig.start(0, rig.pool()))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        num_turns, is_over = 2 * num_turns, starting.done()
        starting.cancel()
        await asyncio.wait([starting])
        if not starting.cancelled():
            await rig.stop(starting.result())
    del starting
    await _until_held(baseline)


async def _until_held(most: tuple[int, int]) -> None:
    while any(now > before for now, before in zip(_held(), most, strict=True)):  # noqa: ASYNC110  no event
        await asyncio.sleep(0.05)  # a thread that was told to end takes a moment


def _held() -> tuple[int, int]:
    """Count (open files, threads) of this process, without the event loop's own few threads, which it keeps."""
    gc.collect()
    threads = [thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]
    return len(os.listdir("/proc/self/fd")), len(threads)


CHECKS: list[Check] = [
    blocks_land_where_they_were_granted_and_nowhere_else,
    a_full_prefix_hit_moves_only_the_commit,
    many_transfers_go_both_ways_at_once,
    one_sender_serves_two_receivers_and_one_leaves,
    an_aborted_send_frees_the_receiver_and_says_why,
    a_cancelled_receive_ends_the_send_and_not_the_link,
    a_sender_whose_right_to_write_was_revoked_writes_no_more,
    a_receiver_that_was_restarted_gets_nothing_of_its_earlier_life,
    a_receiver_fetches_what_was_offered_before_or_will_be,
    whole_tensors_come_in_any_order,
    a_checksum_accepts_what_was_sent,
    ranks_with_other_heads_get_their_slices,
    blocks_of_other_sizes_are_filled_token_by_token,
    a_layer_moves_as_soon_as_it_is_computed,
    what_comes_and_goes_leaves_no_file_and_no_thread,
    a_start_that_is_cancelled_leaves_no_file_and_no_thread,
]
