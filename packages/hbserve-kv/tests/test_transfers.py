"""What managers do with each other, whatever carries the bytes."""

import asyncio
import math

import msgspec
import pytest

from hbserve_kv import AddressNotAvailable, FingerprintMismatch, Outcome, TransferFailed
from hbserve_kv.protocol.messages import BEGIN, COMMIT, Abandon, Commit
from hbserve_kv.testing import LoopbackNetwork
from hbserve_kv.testing.loopback import LoopbackTransport
from hbserve_rpc import InvalidRequest, RpcClient


@pytest.fixture
def backend():
    return "nccl"


async def test_a_receive_cancelled_before_its_sender_came_refuses_it(backend, managers):
    sender, receiver = await managers(0, backend), await managers(1, backend)
    posted = receiver.post_receive("t", [1])
    assert await posted.cancel("gone") is Outcome.FAILED_DRAINED
    with pytest.raises(TransferFailed, match="not expected"):
        await sender.open_send("t", posted.grant)
    assert receiver.stats().dropped_messages == 1


async def test_a_receiver_may_close_as_soon_as_it_has_all(managers):
    """Its answer and the end of the link come together; the answer is first."""
    sender = await managers(0, "nccl")
    for number in range(10):
        receiver = await managers(1 + number, "nccl", buffer_size=1 << 16)
        posted = receiver.post_receive("t", [1])

        async def receive_and_close(posted=posted, receiver=receiver):
            assert (await posted.wait()).outcome is Outcome.COMPLETED
            await receiver.close()

        closing = asyncio.create_task(receive_and_close())
        transfer = await sender.open_send("t", posted.grant)
        transfer.push([5], 0)
        result = await transfer.commit()
        assert result.outcome is Outcome.COMPLETED, result.error
        await closing


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
async def test_a_receiver_that_is_closed_has_its_blocks_back_from_a_sender_that_is_there(
    managers, backend, monkeypatch
):
    monkeypatch.setattr("hbserve_kv.receiving.receiver.GOODBYE_TIMEOUT_S", 20.0)
    sender, receiver = await managers(0, backend), await managers(1, backend)
    posted = receiver.post_receive("t", [1, 2])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([5], 0)
    await receiver.close()
    sent, received = await transfer.wait(), await posted.wait()
    assert (received.outcome, received.error) == (Outcome.FAILED_DRAINED, "the receiver was closed")
    assert (sent.outcome, sent.error) == (Outcome.FAILED_DRAINED, "cancelled by the receiver: the receiver was closed")


async def test_a_commit_that_lacks_blocks_is_not_accepted_as_complete(managers):
    # Known elsewhere: vLLM #20263.
    sender, receiver = await managers(0, "nccl"), await managers(1, "nccl")
    posted = receiver.post_receive("t", [1, 2])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([5], 0)
    transfer.push([6], 1)
    async with asyncio.timeout(20):
        while transfer.state.legs[0].num_moved < 2:
            await asyncio.sleep(0.001)
    transfer.state.legs[0].num_pushed = transfer.state.legs[0].num_begun = 7
    result = await transfer.commit()
    assert result.outcome is Outcome.FAILED_DRAINED
    assert "parts" in (await posted.wait()).error


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
@pytest.mark.parametrize("pushed", [[], [0], [0, 2], [1, 0]])
async def test_a_commit_counts_for_all_blocks_that_were_granted_or_fails(backend, managers, pushed):
    # Known elsewhere: vLLM #20263.
    sender, receiver = await managers(0, backend), await managers(1, backend)
    posted = receiver.post_receive("t", [1, 2, 3])
    transfer = await sender.open_send("t", posted.grant)
    for place in pushed:
        transfer.push([5 + place], place)
    async with asyncio.timeout(20):
        sent, received = await transfer.commit(), await posted.wait()
    assert (sent.outcome, received.outcome) == (Outcome.FAILED_DRAINED, Outcome.FAILED_DRAINED)
    assert received.error == f"committed with {len(set(pushed))} blocks of the 3 that were granted"


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
async def test_a_block_is_pushed_once_whole_or_by_layers(backend, managers):
    sender, receiver = await managers(0, backend), await managers(1, backend)
    posted = receiver.post_receive("t", [1, 2, 3])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([5], 0)
    transfer.push([6], 1, layers=range(1))
    for first, layers in ((0, None), (0, range(1)), (1, None), (1, range(1))):
        with pytest.raises(ValueError, match=r"some were pushed already"):
            transfer.push([5], first, layers=layers)
    with pytest.raises(ValueError, match=r"blocks \[0, 3\): some were pushed already"):
        transfer.push([5, 6, 7], 0)
    transfer.push([7], 2)
    async with asyncio.timeout(20):
        assert (await transfer.commit()).outcome is (await posted.wait()).outcome is Outcome.COMPLETED


@pytest.mark.parametrize("num_pushed", [0, 2, 3])
async def test_who_can_do_with_fewer_blocks_hears_whether_all_have_come(backend, managers, num_pushed):
    sender, receiver = await managers(0, backend), await managers(1, backend)
    posted = receiver.post_receive("t", [1, 2, 3], may_be_partial=True)
    transfer = await sender.open_send("t", posted.grant)
    if num_pushed:
        transfer.push(list(range(num_pushed)), 0)
    async with asyncio.timeout(20):
        sent, received = await transfer.commit(b"enough"), await posted.wait()
    assert (sent.outcome, received.outcome, received.payload) == (Outcome.COMPLETED, Outcome.COMPLETED, b"enough")
    assert received.is_partial is (num_pushed < 3)
    assert received.num_bytes == sent.num_bytes


FORGED = {
    "parts that never came": lambda key: Commit("t", key, 10**12, 0, 0.0, b""),
    "no part": lambda key: Commit("t", key, 0, 0, 0.0, b""),
    "more than was granted": lambda key: Commit("t", key, 3, 1 << 62, 0.0, b""),
    "less than nothing": lambda key: Commit("t", key, -1, -1, 0.0, b""),
    "a time that is none": lambda key: Commit("t", key, 3, 0, float("nan"), b""),
}


@pytest.mark.parametrize("case", FORGED)
async def test_a_commit_says_nothing_that_was_not_granted(backend, managers, case):
    sender, receiver = await managers(0, backend), await managers(1, backend)
    posted = receiver.post_receive("t", [1, 2, 3])
    transfer = await sender.open_send("t", posted.grant)
    (connection,) = sender._peers.links.values()
    async with asyncio.timeout(20):
        with pytest.raises(InvalidRequest):
            await connection.client.call(COMMIT, FORGED[case](connection.link.key), timeout_s=10)
        await transfer.abort("test over")
        received = await posted.wait()
    assert received.outcome is Outcome.FAILED_DRAINED
    assert math.isfinite(receiver.stats().busy_time_s)


@pytest.mark.parametrize("wrong", [{"block_ids": [1, -2]}, {"region": "arena"}, {"block_ids": [1, 64]}])
async def test_a_receiver_is_written_to_only_where_it_has_memory(managers, wrong):
    """Also by its own word: what lies behind its pool is somebody else's."""
    sender, receiver = await managers(0, "ipc"), await managers(1, "ipc")
    posted = receiver.post_receive("t", [1, 2])
    accepted = receiver._receiver._begin

    async def begin(message):
        return msgspec.structs.replace(await accepted(message), **wrong)

    receiver._server.serve(BEGIN, begin)

    async def send() -> None:
        transfer = await sender.open_send("t", posted.grant)
        transfer.push([5, 6], 0)
        raise TransferFailed((await transfer.commit()).error)

    async with asyncio.timeout(20):
        with pytest.raises(TransferFailed, match=r"cannot have granted|has 64 blocks"):
            await send()
        assert (await posted.wait()).outcome is Outcome.FAILED_DRAINED


async def test_a_fingerprint_mismatch_names_the_field_and_both_values(backend, managers):
    # Known elsewhere: vLLM #42895, #23587.
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
    # Known elsewhere: vLLM #58063, #49238, SGLang #28596, #27039.
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


@pytest.mark.parametrize(
    ("host", "why"),
    [("192.0.2.1", "this machine does not have it"), ("no-such-host.invalid", "this name is unknown")],
)
async def test_an_address_that_this_machine_does_not_have_is_refused_before_anything_waits_for_it(host, why, managers):
    """192.0.2.0/24 and .invalid are nobody's, by RFC 5737 and RFC 2606."""
    # Known elsewhere: vLLM #27083, dynamo #2706.
    with pytest.raises(AddressNotAvailable, match=rf"kv_transfer\.ip='{host}': {why}; use an address of"):
        await managers(0, "nccl", host=host)


class Stuck(LoopbackTransport):
    """Whose pushes, and whose end, last until they are let go."""

    def __init__(self, network):
        super().__init__(network)
        self.pushed, self.may_push, self.may_disconnect = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def push(self, link, part):
        self.pushed.set()
        await self.may_push.wait()

    async def disconnect(self, link):
        await self.may_disconnect.wait()
        await super().disconnect(link)


async def test_a_part_that_goes_on_after_its_transfer_and_then_its_connection_has_failed_is_waited_for(
    managers, monkeypatch
):
    """First for as long as it takes, then with patience, then as UNKNOWN; the receiver is told what is known."""
    monkeypatch.setattr("hbserve_kv.sending.link.DRAIN_PATIENCE_S", 0.2)
    network, told = LoopbackNetwork(), []
    stuck, call = Stuck(network), RpcClient.call

    async def spy(self, method, request, *, timeout_s):
        told.extend([(request.drained, request.may_be_buffered)] if isinstance(request, Abandon) else [])
        return await call(self, method, request, timeout_s=timeout_s)

    monkeypatch.setattr(RpcClient, "call", spy)
    sender = await managers(0, "loopback", transport=stuck)
    receiver = await managers(1, "loopback", transport=network.transport())
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([5], 0)
    async with asyncio.timeout(20):
        await stuck.pushed.wait()
        aborting = asyncio.create_task(transfer.abort("not wanted"))
        await asyncio.wait([aborting], timeout=0.5)
        assert not aborting.done(), "the part is read, and its peer is there"
        assert told == []
        sender._peers.links[receiver.address].lose("the peer is gone")
        assert await aborting is Outcome.UNKNOWN
        draining = asyncio.create_task(transfer.drained())
        await asyncio.wait([draining], timeout=0.2)
        assert not draining.done()
        assert told == [(False, False)]
        stuck.may_disconnect.set()
        await draining
        assert (await posted.wait()).error == "not wanted"
    assert told == [(False, False), (True, True)]
    assert (await transfer.wait()).outcome is Outcome.UNKNOWN, "what was said once is not said otherwise"
    stuck.may_push.set()
