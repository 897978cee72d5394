"""Failures of other systems that no other test here repeats. docs/known-failures.md has all of them."""

import asyncio
import contextlib
import os
import time

import pytest
import torch
from hbserve_kv_layouts import whole_blocks

from hbserve_kv import HeadRange, Outcome, Part, TransferFailed
from hbserve_kv.memory.layout import CopyPlan, sides
from hbserve_kv.memory.pool_layout import PoolLayout
from hbserve_kv.protocol import messages
from hbserve_kv.testing import Faults, LoopbackNetwork, LoopbackTransport
from hbserve_rpc import InvalidRequest, RpcClient


async def move(sender, receiver, name, blocks):
    """Sends blocks to those of the same number."""
    posted = receiver.post_receive(name, blocks)
    transfer = await sender.open_send(name, posted.grant)
    transfer.push(blocks, 0)
    return await transfer.commit(name.encode()), await posted.wait()


async def test_messages_that_come_twice_are_counted_and_change_nothing(pair, monkeypatch):
    """A late or repeated completion ended the engine: vLLM #43226, #37837, #46240, #55286, #50565, #25067, #18631,
    llm-d #187.
    """
    sender, receiver, target, _ = pair
    once, repeated = RpcClient.call, []

    async def twice(self, method, request, **keywords):
        answer = await once(self, method, request, **keywords)
        if method in (messages.BEGIN, messages.COMMIT):
            repeated.append(method)
            with pytest.raises(InvalidRequest):
                await once(self, method, request, **keywords)
        return answer

    monkeypatch.setattr(RpcClient, "call", twice)
    for number in range(3):
        sent, received = await move(sender, receiver, f"t{number}", [number])
        assert (sent.outcome, received.outcome) == (Outcome.COMPLETED, Outcome.COMPLETED)
        assert received.payload == f"t{number}".encode()
    assert receiver.stats().dropped_messages == len(repeated) == 6
    assert target[:, 0].tolist() == [0, 1, 2] + [-1] * 61


async def test_a_transfer_whose_id_is_in_use_is_refused_and_the_first_one_goes_on(pair):
    """Two requests of one room number ended both schedulers: SGLang #40125."""
    sender, receiver, target, _ = pair
    posted = receiver.post_receive("t", [1])
    with pytest.raises(ValueError, match="transfer_id='t' is in use"):
        receiver.post_receive("t", [2])
    transfer = await sender.open_send("t", posted.grant)
    with pytest.raises(TransferFailed, match="under way already"):
        await sender.open_send("t", posted.grant)
    transfer.push([1], 0)
    assert (await transfer.commit()).outcome is Outcome.COMPLETED
    assert (await posted.wait()).outcome is Outcome.COMPLETED
    assert target[:3, 0].tolist() == [-1, 1, -1]


async def test_a_sender_that_is_stopped_in_mid_transfer_says_so_and_its_receiver_goes_on(managers, pair):
    """SIGTERM on a prefill worker in mid-pull ended its decode workers: dynamo #9344, #7319, #9345.

    It has no drain either: SGLang #22200.
    """
    sender, receiver, _, network = pair
    posted = receiver.post_receive("t", [1, 2])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([1], 0)
    await sender.close()
    async with asyncio.timeout(5):
        result = await posted.wait()
    assert (result.outcome, result.error) == (Outcome.FAILED_DRAINED, "the sender was closed")
    other = await managers(2, "loopback", torch.zeros(64, 96), transport=network.transport())
    assert (await move(other, receiver, "next", [1]))[1].outcome is Outcome.COMPLETED


class Raising(LoopbackTransport):
    error: Exception | None = None

    async def push(self, link, part: Part) -> None:
        if self.error is not None:
            raise self.error
        await super().push(link, part)


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), MemoryError("no room"), torch.OutOfMemoryError("CUDA")])
async def test_whatever_a_backend_raises_fails_its_transfer_and_nothing_else(error, managers):
    """There one transfer's exception ends the prefill process (SGLang), or garbage is decoded (vLLM #20263)."""
    network = LoopbackNetwork()
    transport = Raising(network)
    sender = await managers(0, "loopback", transport=transport)
    receiver = await managers(1, "loopback", transport=network.transport())
    links = None
    for number, raised in enumerate([None, error, None]):
        transport.error = raised
        sent, received = await move(sender, receiver, f"t{number}", [1])
        expected = Outcome.FAILED_DRAINED if raised else Outcome.COMPLETED
        assert (sent.outcome, received.outcome) == (expected, expected)
        assert (type(error).__name__ in received.error) is (raised is not None)
        links = links or sender.links()
    assert sender.links() == links


async def test_one_connection_carries_any_number_of_transfers(pair):
    """Sockets by room or pair of ranks ran out: SGLang #34450, #31922; storms of them: Mooncake #2044."""
    sender, receiver, _, _ = pair
    await move(sender, receiver, "connects", [0])
    before = len(os.listdir("/proc/self/fd"))
    results = asyncio.gather(*(move(sender, receiver, f"t{number}", [number]) for number in range(64)))
    await asyncio.sleep(0)
    most = 0
    while not results.done():
        most = max(most, len(os.listdir("/proc/self/fd")))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.shield(results)
    assert all(received.outcome is Outcome.COMPLETED for _, received in results.result())
    assert most <= before + 1, "the folder itself is one while it is read"


async def test_the_time_of_transfers_side_by_side_is_not_counted_twice(managers):
    """Rates were wrong by the number of transfers at once: vLLM #48224, #33170, #35876."""
    network = LoopbackNetwork(Faults(delay=1.0, delay_s=0.1), seed=1)
    sender = await managers(0, "loopback", transport=network.transport())
    receiver = await managers(1, "loopback", transport=network.transport())
    await move(sender, receiver, "connects", [0])
    began_s = time.monotonic()
    ended = await asyncio.gather(*(move(sender, receiver, f"t{number}", [number]) for number in range(8)))
    took_s = time.monotonic() - began_s
    assert 0 < sum(received.time_s for _, received in ended) <= took_s


def test_neighbouring_blocks_are_one_piece():
    """Tens of thousands of descriptors of one block or less: vLLM #50913, #55434, #23780."""
    side = whole_blocks(16, head_bytes=32)["mine"]
    ids, targets = [3, 4, 5, 9, 10, 2], [7, 8, 9, 10, 12, 13]
    found = list(CopyPlan(side, [0], side, [0]).moves(ids, targets))
    assert found == [(3 * 32, 7 * 32, 96), (9 * 32, 10 * 32, 32), (10 * 32, 12 * 32, 32), (2 * 32, 13 * 32, 32)]


def test_some_heads_of_a_block_are_a_piece_for_each_place_and_no_other_byte():
    """Heads that were cut otherwise on the other side came out wrong or crashed: vLLM #37333, #43523, SGLang #12157."""
    mine, theirs = HeadRange(0, 4, 8), HeadRange(2, 2, 8)
    pools = [torch.zeros(4, 3, heads.count, 2, dtype=torch.uint8) for heads in (mine, theirs)]  # 3 places, heads of 2 B
    layouts = [PoolLayout.of_blocks(pool, heads).layout for pool, heads in zip(pools, (mine, theirs), strict=True)]
    source, target = sides(layouts[0], mine, layouts[1], theirs)
    found = list(CopyPlan(source, [0], target, [0]).moves([1], [0]))
    assert found == [(24 + 8 * place + 4, 4 * place, 4) for place in range(3)]


@pytest.mark.parametrize("num_ranks", [3, 8])
def test_ranks_that_the_heads_cannot_be_cut_into_are_refused_with_both_numbers(num_ranks):
    """More ranks than KV heads were an assertion when the two sides met: vLLM #45330."""
    with pytest.raises(ValueError, match=f"4 heads cannot be split into {num_ranks} equal parts"):
        HeadRange.of_rank(0, num_ranks, 4)
