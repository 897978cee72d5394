"""Whole tensors by request id: any order, bounded, and gone when nobody wants them."""

import asyncio
import time

import msgspec
import pytest
import torch

from hbserve_kv import (
    BufferTooLarge,
    BufferTooSmall,
    KVTransferConfig,
    KVTransferManager,
    Outcome,
    TransferFailed,
    TransferTimeout,
)
from hbserve_kv.memory.memory import Memory
from hbserve_kv.receiving.lookup_buffer import LookupBuffer
from hbserve_kv.receiving.transfer import IncomingTransfer


@pytest.fixture
async def pair(managers):
    """A sender (rank 0) and a receiver (rank 1) that know each other."""

    async def make(**settings):
        sender, receiver = await managers(0, "ipc", **settings), await managers(1, "ipc", **settings)
        sender.add_peer(1, receiver.address)
        return sender, receiver

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
async def test_a_tensor_arrives_as_it_was(pair, dtype):
    sender, receiver = await pair()
    tensor = torch.arange(3 * 5 * 7).view(3, 5, 7).to(dtype)
    await sender.send_kv_cache("r", tensor, 1)
    received = await receiver.receive_kv_cache("r", 0)
    assert received.dtype == dtype
    assert torch.equal(received, tensor)


async def test_requests_may_be_received_in_another_order_than_they_were_sent(pair):
    sender, receiver = await pair()
    for number in range(4):
        await sender.send_kv_cache(f"r{number}", torch.full((10,), float(number)), 1)
    for number in (2, 0, 3, 1):
        assert (await receiver.receive_kv_cache(f"r{number}", 0))[0] == number


async def test_a_receive_may_be_there_before_its_send(pair):
    sender, receiver = await pair()
    waiting = asyncio.create_task(receiver.receive_kv_cache("r", 0))
    await asyncio.sleep(0)
    await sender.send_kv_cache("r", torch.ones(3), 1)
    assert torch.equal(await waiting, torch.ones(3))


async def test_a_sender_waits_while_the_buffer_is_full(pair):
    # Known elsewhere: LMCache #1339.
    sender, receiver = await pair(buffer_size=4 * 1536)
    big = torch.ones(3 * 384)  # three of the four blocks
    await sender.send_kv_cache("first", big, 1)
    second = asyncio.create_task(sender.send_kv_cache("second", 2 * big, 1))
    done, _ = await asyncio.wait([second], timeout=0.3)
    assert not done
    assert torch.equal(await receiver.receive_kv_cache("first", 0), big)
    await second
    assert torch.equal(await receiver.receive_kv_cache("second", 0), 2 * big)


async def test_tensors_without_numbers_are_no_more_than_the_buffer_has_blocks(pair):
    """Their payload would be kept without a bound."""
    sender, receiver = await pair(buffer_size=2 * 1536)
    nothing = torch.empty(0)
    for name in ("first", "second"):
        await sender.send_kv_cache(name, nothing, 1)
    third = asyncio.create_task(sender.send_kv_cache("third", nothing, 1))
    done, _ = await asyncio.wait([third], timeout=0.3)
    assert not done
    assert not (await receiver.receive_kv_cache("first", 0)).numel()
    await third
    for name in ("second", "third"):
        assert not (await receiver.receive_kv_cache(name, 0)).numel()
    await asyncio.sleep(0)
    keeping = receiver._buffer._keeping
    assert all(each.done() for each in keeping), "what has been taken is waited for until it would expire"


async def test_a_tensor_that_can_never_fit_is_refused_at_once(pair):
    sender, _ = await pair(buffer_size=4 * 1536)
    with pytest.raises(BufferTooSmall, match=r"raise kv_transfer\.buffer_size"):
        await sender.send_kv_cache("r", torch.ones(5 * 384), 1)


def manager_with(buffer_size):
    config = KVTransferConfig(backend="ipc", buffer_size=buffer_size)
    return KVTransferManager(rank=0, pool=torch.zeros(4, 64), fingerprint={}, config=config)


@pytest.mark.parametrize("buffer_size", [1 << 46, 1 << 62, 1 << 80])
def test_a_buffer_larger_than_the_machine_is_refused_with_its_field_its_bytes_and_the_cure(buffer_size):
    with pytest.raises(BufferTooLarge) as caught:
        manager_with(buffer_size)
    assert f"kv_transfer.buffer_size={buffer_size}: cpu has no {buffer_size} bytes" in str(caught.value)
    assert str(caught.value).endswith("lower kv_transfer.buffer_size")


@pytest.mark.parametrize("error", [OSError(12, "Cannot allocate memory"), RuntimeError("out of memory"), MemoryError()])
def test_what_the_allocator_says_is_told_with_the_field(monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("hbserve_kv.memory.memory.shared_buffer", refuse)
    with pytest.raises(BufferTooLarge, match=r"kv_transfer\.buffer_size=4096: .*\((\[Errno 12\] C|out of|Memory)"):
        manager_with(4096)


def test_a_negative_buffer_is_refused():
    with pytest.raises(ValueError, match=r"kv_transfer\.buffer_size=-1: expected a number of bytes"):
        manager_with(-1)


async def test_nothing_that_arrives_is_a_timeout(pair):
    _, receiver = await pair(timeout_s=0.3)
    with pytest.raises(TransferTimeout, match=r"nothing arrived within 0\.3 s"):
        await receiver.receive_kv_cache("r", 0)


async def test_what_nobody_asks_for_expires_and_gives_its_room_back(pair, caplog):
    # Known elsewhere: SGLang #39428, #39623, #28652, vLLM #28779.
    expiry_s, capacity = 1.0, 4 * 1536
    sender, receiver = await pair(buffer_size=capacity, expiry_s=expiry_s)
    everything = torch.ones(4 * 384)
    began_s = time.monotonic()
    await sender.send_kv_cache("forgotten", everything, 1)
    assert receiver.stats().buffered_bytes == capacity, "it is full"
    async with asyncio.timeout(20):
        await sender.send_kv_cache("second", 2 * everything, 1)
    assert time.monotonic() - began_s >= expiry_s, "it waited until the first one had expired"
    assert "message forgotten was dropped: nobody asked for it within 1.0 s" in caplog.text
    assert torch.equal(await receiver.receive_kv_cache("second", 0), 2 * everything)
    assert receiver.stats().buffered_bytes == 0


async def test_all_who_wait_for_room_get_it_when_one_gives_it_back():
    memory = Memory(torch.zeros(1, 64, dtype=torch.uint8), 2 * 64)
    buffer = LookupBuffer(memory, timeout_s=20, expiry_s=20)
    everything = await buffer.place("large", 2 * 64)
    waiting = [asyncio.create_task(buffer.place(name, 64)) for name in ("first", "second")]
    for _ in range(3):
        await asyncio.sleep(0)
    await buffer.free(everything)
    async with asyncio.timeout(10):
        given = await asyncio.gather(*waiting)
    assert sorted(block_id for block_ids in given for block_id in block_ids) == sorted(everything)


async def test_who_waits_for_a_tensor_hears_at_once_that_its_sender_has_failed_and_its_room_is_free():
    buffer = LookupBuffer(Memory(torch.zeros(1, 64, dtype=torch.uint8), 64), timeout_s=20, expiry_s=20)
    transfer = IncomingTransfer("r", "arena", await buffer.place("r", 64), [0], lambda _: None)
    buffer.keep(transfer)
    waiting = asyncio.create_task(buffer.take("r"))
    await asyncio.sleep(0)
    transfer.fail("its sender has gone")
    async with asyncio.timeout(10):
        with pytest.raises(TransferFailed, match=r"^r: its sender has gone$"):
            await waiting
        await buffer.free(await buffer.place("another", 64))
    await buffer.close()


async def test_room_of_a_tensor_that_failed_is_given_back_when_nothing_reads_it_or_lands_there_any_more(
    lasting_pair, monkeypatch
):
    sender, receiver, has_ended = lasting_pair
    monkeypatch.setattr(receiver._receiver.quarantine, "_longest_s", 0.0)
    sending = asyncio.create_task(sender.send_kv_cache("r", torch.ones(3), 1))
    async with asyncio.timeout(20):
        with pytest.raises(TransferFailed, match="timed out"):
            await receiver.receive_kv_cache("r", 0)
        await asyncio.wait([sending], timeout=0.1)
        assert sender.stats().buffered_bytes == receiver.stats().buffered_bytes == 1536
        has_ended.set()
        with pytest.raises(TransferFailed, match="timed out"):
            await sending
        while receiver.stats().buffered_bytes:
            await asyncio.sleep(0.01)


async def test_a_sender_that_is_lost_while_it_waits_for_room_keeps_none(pair, monkeypatch):
    sender, receiver = await pair()
    place = receiver._buffer.place

    async def place_and_lose(*arguments):
        block_ids = await place(*arguments)
        receiver._receiver.end_links(set(receiver._receiver.links), "the link broke")
        return block_ids

    monkeypatch.setattr(receiver._buffer, "place", place_and_lose)
    with pytest.raises(TransferFailed):
        await sender.send_kv_cache("r", torch.ones(3), 1)
    async with asyncio.timeout(20):
        while receiver.stats().active_transfers or receiver.stats().buffered_bytes:
            await asyncio.sleep(0.01)


async def test_a_manager_that_is_closed_has_given_the_buffers_memory_back(pair):
    sender, receiver = await pair()
    await sender.send_kv_cache("r", torch.ones(4), 1)
    await receiver.close()
    assert receiver._memory.arena.numel() == receiver.stats().buffered_bytes == 0


async def test_an_id_that_is_sent_again_before_it_was_received_is_refused_and_takes_no_room(pair):
    sender, receiver = await pair(expiry_s=0.5)
    await sender.send_kv_cache("r", torch.ones(3), 1)
    with pytest.raises(TransferFailed, match="transfer r has begun already, or waits to be received"):
        await sender.send_kv_cache("r", 2 * torch.ones(3), 1)
    assert torch.equal(await receiver.receive_kv_cache("r", 0), torch.ones(3))
    assert receiver.stats().buffered_bytes == 0
    await sender.send_kv_cache("r", 3 * torch.ones(3), 1)
    assert torch.equal(await receiver.receive_kv_cache("r", 0), 3 * torch.ones(3)), "the id is free again"


async def test_a_tensor_under_the_id_of_a_granted_transfer_is_refused_and_that_one_goes_on(pair):
    sender, receiver = await pair()
    posted = receiver.post_receive("t", [1])
    with pytest.raises(TransferFailed, match="transfer t was granted blocks of the pool"):
        await sender.send_kv_cache("t", torch.ones(3), 1)
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([1], 0)
    assert (await transfer.commit()).outcome is (await posted.wait()).outcome is Outcome.COMPLETED


async def test_a_tensor_is_for_one_receive_and_another_hears_so_at_once(pair):
    """Both would give its room back: then two later ones would have the same."""
    sender, receiver = await pair()
    first = asyncio.create_task(receiver.receive_kv_cache("r", 0))
    await asyncio.sleep(0)
    with pytest.raises(TransferFailed, match="another receive waits for it already"):
        await receiver.receive_kv_cache("r", 0)
    await sender.send_kv_cache("r", torch.ones(3), 1)
    assert torch.equal(await first, torch.ones(3))
    free = receiver._memory._free
    assert len(set(free)) == len(free)


async def test_a_receive_that_is_cancelled_as_its_tensor_comes_leaves_it_to_the_next(pair, monkeypatch):
    sender, receiver = await pair()
    first = asyncio.create_task(receiver.receive_kv_cache("r", 0))
    await asyncio.sleep(0)
    wake = receiver._buffer._wake

    def wake_and_cancel(request_id: str) -> None:
        wake(request_id)
        first.cancel()

    monkeypatch.setattr(receiver._buffer, "_wake", wake_and_cancel)
    await sender.send_kv_cache("r", torch.ones(3), 1)
    with pytest.raises(asyncio.CancelledError):
        await first
    assert torch.equal(await receiver.receive_kv_cache("r", 0), torch.ones(3))


async def test_who_waits_for_a_tensor_hears_at_once_that_the_receiver_is_closed(pair):
    _, receiver = await pair(timeout_s=60)
    waiting = asyncio.create_task(receiver.receive_kv_cache("r", 0))
    await asyncio.sleep(0)
    await receiver.close()
    async with asyncio.timeout(10):
        with pytest.raises(TransferFailed, match="r: the receiver was closed"):
            await waiting


@pytest.mark.parametrize(
    "said",
    [
        {"dtype": "foo", "shape": [3]},
        {"dtype": "nn", "shape": [3]},
        {"dtype": "Tensor", "shape": [3]},
        {"dtype": "float32", "shape": [-3]},
        {"dtype": "float32", "shape": [385]},
        {"dtype": "float32", "shape": [0]},
        {"dtype": "float32", "shape": [1 << 62, 1 << 62]},
        {"dtype": "float32"},
        7,
    ],
)
async def test_a_sender_that_says_what_cannot_be_fails_that_receive_only(pair, monkeypatch, said):
    """One block of 384 floats has come. Of more of them, the last would be what was there before."""
    sender, receiver = await pair()
    monkeypatch.setattr("hbserve_kv.manager.shape_of", lambda _: msgspec.msgpack.encode(said))
    await sender.send_kv_cache("r", torch.ones(3), 1)
    with pytest.raises(TransferFailed, match="r: its sender describes another tensor"):
        await receiver.receive_kv_cache("r", 0)
    monkeypatch.undo()
    await sender.send_kv_cache("r", torch.ones(3), 1)
    assert torch.equal(await receiver.receive_kv_cache("r", 0), torch.ones(3))
    assert receiver.stats().buffered_bytes == 0


@pytest.mark.parametrize("shape", [(0,), (0, 4), ()])
async def test_a_tensor_without_numbers_and_one_without_dimensions_arrive_as_they_were(pair, shape):
    sender, receiver = await pair()
    await sender.send_kv_cache("r", torch.ones(shape), 1)
    received = await receiver.receive_kv_cache("r", 0)
    assert (received.shape, received.dtype) == (torch.Size(shape), torch.float32)
    assert torch.equal(received, torch.ones(shape))


async def test_a_send_that_is_cancelled_gives_its_room_back_only_when_nothing_reads_it_any_more(pair, monkeypatch):
    """Another tensor would be put there, and the receiver would take it for the first."""
    sender, receiver = await pair(buffer_size=4 * 1536)
    transport = next(iter(sender._transports.values()))
    push, may_go_on, is_pushing = transport.push, asyncio.Event(), asyncio.Event()

    async def wait_and_push(link, part):
        is_pushing.set()
        await may_go_on.wait()
        return await push(link, part)

    monkeypatch.setattr(transport, "push", wait_and_push)
    first = asyncio.create_task(sender.send_kv_cache("first", torch.ones(4 * 384), 1))
    await is_pushing.wait()
    first.cancel()
    await asyncio.wait([first], timeout=0.3)
    assert sender.stats().buffered_bytes == 4 * 1536, "the part that is moving still reads it"
    may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    async with asyncio.timeout(20):
        while receiver.stats().buffered_bytes or sender.stats().buffered_bytes:
            await asyncio.sleep(0.01)
    assert "first" not in receiver._buffer
