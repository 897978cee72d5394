"""What every backend must do, between two managers of one process."""

import asyncio
import random

import pytest
import torch

from hbserve_kv import FingerprintMismatch, Outcome, TransferFailed

NUM_BLOCKS, BLOCK_SHAPE = 64, (2, 3, 64)


def patterned() -> torch.Tensor:
    """A pool in which every number is different."""
    return torch.arange(NUM_BLOCKS * 2 * 3 * 64, dtype=torch.float32).view(NUM_BLOCKS, *BLOCK_SHAPE)


async def test_blocks_land_where_they_were_granted_and_nowhere_else(backend, managers):
    source, target = patterned(), torch.full((NUM_BLOCKS, *BLOCK_SHAPE), -1.0)
    sender, receiver = await managers(0, backend, source), await managers(1, backend, target)
    draw = random.Random(0)
    free = list(range(NUM_BLOCKS))
    draw.shuffle(free)
    expected = target.clone()
    for number, count in enumerate([1, 2, 7, 20]):
        wanted, free = free[:count], free[count:]
        given = draw.sample(range(NUM_BLOCKS), count)
        posted = receiver.post_receive(f"t{number}", wanted)
        transfer = await sender.open_send(f"t{number}", posted.grant)
        assert transfer.num_blocks == count
        for first in range(0, count, 5):
            transfer.push(given[first : first + 5], first)
        sent = await transfer.commit(b"first token")
        result = await posted.wait()
        assert (sent.outcome, result.outcome) == (Outcome.COMPLETED, Outcome.COMPLETED)
        assert result.payload == b"first token"
        assert result.num_bytes == count * target[0].nbytes
        expected[wanted] = source[given]
    assert torch.equal(target, expected)
    assert sender.stats().bytes_sent == receiver.stats().bytes_received == 30 * target[0].nbytes


async def test_a_full_prefix_hit_moves_only_the_commit(backend, managers):
    sender, receiver = await managers(0, backend), await managers(1, backend)
    posted = receiver.post_receive("t", [])
    transfer = await sender.open_send("t", posted.grant)
    assert transfer.num_blocks == 0
    await transfer.commit(b"x")
    result = await posted.wait()
    assert (result.payload, result.num_bytes) == (b"x", 0)


async def test_many_transfers_go_both_ways_at_once(backend, managers):
    pools = [patterned(), patterned() + 1e6]
    originals = [pool.clone() for pool in pools]
    both = [await managers(rank, backend, pools[rank]) for rank in (0, 1)]

    async def move(number: int) -> None:
        sender, receiver = number % 2, 1 - number % 2
        given, wanted = [number % 32], [32 + number % 32]
        posted = both[receiver].post_receive(f"t{number}", wanted)
        transfer = await both[sender].open_send(f"t{number}", posted.grant)
        transfer.push(given, 0)
        await transfer.commit(b"")
        assert (await posted.wait()).outcome is Outcome.COMPLETED
        assert torch.equal(pools[receiver][wanted], originals[sender][given])

    await asyncio.gather(*(move(number) for number in range(32)))


async def test_one_sender_serves_two_receivers(backend, managers):
    source = patterned()
    sender = await managers(0, backend, source)
    targets = [torch.zeros((NUM_BLOCKS, *BLOCK_SHAPE)) for _ in range(2)]
    receivers = [await managers(1 + i, backend, target) for i, target in enumerate(targets)]
    for number, (receiver, target) in enumerate(zip(receivers, targets, strict=True)):
        posted = receiver.post_receive(f"t{number}", [3])
        transfer = await sender.open_send(f"t{number}", posted.grant)
        transfer.push([number], 0)
        await transfer.commit()
        assert (await posted.wait()).outcome is Outcome.COMPLETED
        assert torch.equal(target[3], source[number])


async def test_an_aborted_send_frees_the_receiver_and_says_why(backend, managers):
    sender, receiver = await managers(0, backend), await managers(1, backend)
    posted = receiver.post_receive("t", [1, 2])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([5], 0)
    assert await transfer.abort("the client went away") is Outcome.FAILED_DRAINED
    result = await posted.wait()
    assert (result.outcome, result.error) == (Outcome.FAILED_DRAINED, "the client went away")


async def test_a_cancelled_receive_ends_the_send(backend, managers):
    sender, receiver = await managers(0, backend), await managers(1, backend)
    posted = receiver.post_receive("t", [1, 2])
    transfer = await sender.open_send("t", posted.grant)
    assert await posted.cancel("no longer wanted") is Outcome.FAILED_DRAINED
    result = await transfer.commit()
    assert result.outcome is Outcome.FAILED_DRAINED
    assert "no longer wanted" in result.error


async def test_a_receive_cancelled_before_its_sender_came_refuses_it(backend, managers):
    sender, receiver = await managers(0, backend), await managers(1, backend)
    posted = receiver.post_receive("t", [1])
    assert await posted.cancel("gone") is Outcome.FAILED_DRAINED
    with pytest.raises(TransferFailed, match="not expected"):
        await sender.open_send("t", posted.grant)
    assert receiver.stats().dropped_messages == 1


async def test_a_commit_that_lacks_blocks_is_not_accepted_as_complete(managers):
    sender, receiver = await managers(0, "nccl"), await managers(1, "nccl")
    posted = receiver.post_receive("t", [1, 2])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([5], 0)
    transfer.push([6], 1)
    transfer._num_parts = 7
    result = await transfer.commit()
    assert result.outcome is Outcome.FAILED_DRAINED
    assert "parts" in (await posted.wait()).error


async def test_a_fingerprint_mismatch_names_the_field_and_both_values(backend, managers):
    sender = await managers(0, backend, fingerprint={"dtype": "float16"})
    receiver = await managers(1, backend, fingerprint={"dtype": "bfloat16"})
    posted = receiver.post_receive("t", [1])
    with pytest.raises(FingerprintMismatch, match=r"dtype is 'float16' on rank 0 and 'bfloat16' on rank 1"):
        await sender.open_send("t", posted.grant)
    await posted.cancel("test over")


async def test_more_blocks_than_granted_are_refused(managers):
    sender, receiver = await managers(0, "nccl"), await managers(1, "nccl")
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    with pytest.raises(ValueError, match="1 granted"):
        transfer.push([1, 2], 0)
    await transfer.abort("test over")


async def test_a_grant_of_an_earlier_life_is_refused(managers):
    sender, receiver = await managers(0, "nccl"), await managers(1, "nccl")
    posted = receiver.post_receive("t", [1])
    port = int(receiver.address.rpartition(":")[2])
    await receiver.close()
    await managers(1, "nccl", port=port)
    with pytest.raises(TransferFailed, match="restarted"):
        await sender.open_send("t", posted.grant)


async def test_a_receiver_that_is_not_there_is_named(managers):
    sender, receiver = await managers(0, "nccl", timeout_s=1), await managers(1, "nccl")
    posted = receiver.post_receive("t", [1])
    await receiver.close()
    with pytest.raises(TransferFailed, match=receiver.address):
        await sender.open_send("t", posted.grant)
