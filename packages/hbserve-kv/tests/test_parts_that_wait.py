"""Parts whose blocks are not computed yet, and parts that a device moves by itself: neither holds up another one."""

import asyncio
import contextlib
import threading
from typing import Any

import pytest
import torch

from hbserve_kv import Outcome
from hbserve_kv.memory import shared_memory
from hbserve_kv.memory.events import EventWatch
from hbserve_kv.receiving.transfer import IncomingLink
from hbserve_kv.sending.link import MAX_ANNOUNCED_PARTS
from hbserve_kv.testing import CHECKS, LoopbackNetwork, run_check
from hbserve_kv.testing.loopback import LoopbackTransport, TwoSidedLoopbackTransport
from hbserve_kv.transports import ipc, nccl
from hbserve_testing.waits import until


class Event:
    """Like a CUDA event; happens when `happen` is called, or fails as the device of one does."""

    def __init__(self):
        self._happened = threading.Event()
        self.error = None
        self.num_asked = 0

    def happen(self, error=None):
        self.error = error
        self._happened.set()

    def query(self):
        self.num_asked += 1
        if self._happened.is_set() and self.error is not None:
            raise self.error
        return self._happened.is_set()

    def elapsed_time(self, later):
        return 7.0


class Device:
    """Of one link's end: moves the next part that it was given when `happen` lets it."""

    def __init__(self):
        self.given = []
        self.events = []

    def give(self, memory, part):
        self.given.append(part.index)
        self.events.append(Event())
        return memory.events.until(self.events[-1], since=Event())

    def happen(self):
        self.events.pop(0).happen()


class WaitingDevice(LoopbackTransport):
    """One-sided: each part waits for its own event, and for nothing else."""

    waits_on_device = True

    def __init__(self, network):
        super().__init__(network)
        self.given = []

    async def push(self, link, part):
        self.given.append((part.transfer_id, part.index))
        wait, ended = part.ready or Event(), Event()
        if part.ready is None:
            wait.happen()

        def query():
            if not wait.query():
                return False
            self._write(link, part, len(part.block_ids))
            return True

        ended.query = query  # type: ignore[method-assign]
        return self._memory.events.until(ended, since=Event())


class QueueingDevice(TwoSidedLoopbackTransport):
    """Two-sided: parts are queued on a device by both ends."""

    def __init__(self, network):
        super().__init__(network)
        self.device = Device()

    async def push(self, link, part):
        await super().push(link, part)
        return self.device.give(self._memory, part)

    async def accept(self, link, part):
        await super().accept(link, part)
        return self.device.give(self._memory, part)


@pytest.fixture(autouse=True)
def _no_thread_asks_any_more():
    yield
    deadline = threading.Event()
    for _ in range(200):
        if not any(thread.name == "kv-events" for thread in threading.enumerate()):
            return
        deadline.wait(0.01)
    pytest.fail("a thread still asks about events")


def spy_on_pushes(monkeypatch, sender):
    pushed = []
    for transport in sender._transports.values():

        async def noting(link, part, push=transport.push):
            pushed.append((part.transfer_id, part.index))
            return await push(link, part)

        monkeypatch.setattr(transport, "push", noting)
    return pushed


def spy_on_announcements(monkeypatch):
    heard, take = list[Any](), IncomingLink.take

    def noting(link, transfer, message):
        heard.extend((message.transfer_id, part.index) for part in message.parts)
        return take(link, transfer, message)

    monkeypatch.setattr(IncomingLink, "take", noting)
    return heard


async def open_two(sender, receiver, num_blocks=2):
    """Transfers a and b over one link, and what was posted for them: blocks [0, n) and [n, 2n)."""
    postings = [
        receiver.post_receive(name, list(range(i * num_blocks, (i + 1) * num_blocks))) for i, name in enumerate("ab")
    ]
    return [await sender.open_send(name, posted.grant) for name, posted in zip("ab", postings, strict=True)], postings


async def push_both(a, b, event):
    """Two parts of one transfer, the first of which waits for `event`, then one of another, which ends meanwhile."""
    a.push([10], 0, event)
    a.push([11], 1)
    b.push([20, 21], 0)
    assert (await b.commit()).outcome is Outcome.COMPLETED


async def test_a_part_that_is_not_ready_holds_up_no_other_transfer_and_none_of_its_own_passes_it(
    backend, managers, monkeypatch
):
    source, target = torch.rand(64, 2, 3, 64), torch.zeros(64, 2, 3, 64)
    sender, receiver = await managers(0, backend, source), await managers(1, backend, target)
    pushed, heard = spy_on_pushes(monkeypatch, sender), spy_on_announcements(monkeypatch)
    (a, b), postings = await open_two(sender, receiver)
    event = Event()
    async with asyncio.timeout(20):
        await push_both(a, b, event)
        assert pushed == [("b", 0)]
        assert a.state.legs[0].num_begun == 0
        assert not target[:2].any()
        event.happen()
        assert (await a.commit()).outcome is Outcome.COMPLETED
        assert {(await posted.wait()).outcome for posted in postings} == {Outcome.COMPLETED}
    assert pushed == [("b", 0), ("a", 0), ("a", 1)]
    is_two_sided = not next(iter(sender._peers.links.values())).transport.one_sided
    assert heard == (pushed if is_two_sided else []), "announced in the order in which they are sent, when they are"
    assert torch.equal(target[:4], source[[10, 11, 20, 21]])


async def test_only_the_parts_of_an_announcement_that_are_ready_go_with_it(managers, monkeypatch):
    sender, receiver = await managers(0, "nccl"), await managers(1, "nccl")
    pushed = spy_on_pushes(monkeypatch, sender)
    (a, b), _ = await open_two(sender, receiver, num_blocks=3)
    event = Event()
    async with asyncio.timeout(20):
        a.push([10], 0)
        a.push([11], 1, event)
        a.push([12], 2)
        await until(lambda: a.state.legs[0].num_moved == 1)
        await b.commit()
        assert pushed == [("a", 0)]
        event.happen()
        assert (await a.commit()).num_parts == 3


async def test_blocks_that_the_device_fails_to_compute_fail_their_transfer_alone(backend, managers):
    sender, receiver = await managers(0, backend), await managers(1, backend)
    (a, b), _ = await open_two(sender, receiver)
    event = Event()
    a.push([10], 0, event)
    async with asyncio.timeout(20):
        event.happen(RuntimeError("CUDA error: an illegal memory access was encountered"))
        result = await a.wait()
        b.push([20, 21], 0)
        assert (await b.commit()).outcome is Outcome.COMPLETED
    assert result.outcome is Outcome.FAILED_DRAINED
    assert "its blocks were not computed: RuntimeError: CUDA error: an illegal" in result.error


async def test_a_transfer_that_is_given_up_before_its_part_is_ready_is_drained_at_once(backend, managers):
    sender, receiver = await managers(0, backend), await managers(1, backend)
    (a, b), postings = await open_two(sender, receiver)
    event = Event()
    a.push([10], 0, event)
    async with asyncio.timeout(20):
        assert await a.abort("not wanted") is Outcome.FAILED_DRAINED
        assert (await postings[0].wait()).error == "not wanted"
        event.happen()
        b.push([20, 21], 0)
        assert (await b.commit()).outcome is Outcome.COMPLETED
    assert a.state.legs[0].num_begun == 0


@pytest.fixture
async def waiting_device(managers):
    network = LoopbackNetwork()
    source, target = torch.rand(64, 2, 3, 64), torch.zeros(64, 2, 3, 64)
    device = WaitingDevice(network)

    async def start(**settings):
        sender = await managers(0, "loopback", source, transport=device)
        receiver = await managers(1, "loopback", target, transport=network.transport(), **settings)
        return sender, receiver, source, target, device

    return start


async def test_a_device_that_waits_gets_parts_at_once_and_another_transfer_ends_before_them(waiting_device):
    sender, receiver, source, target, device = await waiting_device()
    (a, b), _ = await open_two(sender, receiver)
    event = Event()
    async with asyncio.timeout(20):
        await push_both(a, b, event)
        assert device.given == [("a", 0), ("b", 0), ("a", 1)], "in turn"
        assert not target[0].any()
        event.happen()
        result = await a.commit()
    assert (result.outcome, result.num_parts) == (Outcome.COMPLETED, 2)
    assert result.time_s == pytest.approx(0.014), "as the device measured it, without its wait"
    assert torch.equal(target[:4], source[[10, 11, 20, 21]])


async def test_blocks_of_a_part_that_a_device_has_are_read_until_it_has_moved_them(waiting_device):
    sender, receiver, _, _, device = await waiting_device()
    (a, _), postings = await open_two(sender, receiver)
    event = Event()
    async with asyncio.timeout(20):
        a.push([10], 0, event)
        await until(lambda: device.given)
        aborting = asyncio.create_task(a.abort("not wanted"))
        await asyncio.wait([aborting, asyncio.create_task(postings[0].wait())], timeout=0.3)
        assert not aborting.done()
        event.happen()
        assert await aborting is Outcome.FAILED_DRAINED
        assert (await postings[0].wait()).error == "not wanted"
        await postings[1].cancel("test over")


async def test_a_checksum_is_made_when_the_blocks_are_there(waiting_device):
    sender, receiver, source, target, device = await waiting_device(checksum=True)
    (a, b), _ = await open_two(sender, receiver)
    event = Event()
    async with asyncio.timeout(20):
        a.push([10], 0, event)
        b.push([20, 21], 0)
        assert (await b.commit()).outcome is Outcome.COMPLETED
        assert device.given == [("b", 0)]
        source[10] = 5.0
        event.happen()
        a.push([11], 1)
        assert (await a.commit()).outcome is Outcome.COMPLETED
    assert torch.equal(target[:2], source[[10, 11]])


async def test_a_device_that_fails_in_a_part_fails_its_transfer_alone(managers):
    network = LoopbackNetwork()

    class Failing(WaitingDevice):
        async def push(self, link, part):
            if part.transfer_id == "b":
                return await super().push(link, part)
            event = Event()
            event.happen(RuntimeError("CUDA error: an illegal memory access was encountered"))
            return self._memory.events.until(event)

    sender = await managers(0, "loopback", transport=Failing(network))
    receiver = await managers(1, "loopback", transport=network.transport())
    (a, b), _ = await open_two(sender, receiver, num_blocks=1)
    a.push([10], 0)
    b.push([20], 0)
    async with asyncio.timeout(20):
        result = await a.wait()
        assert (await b.commit()).outcome is Outcome.COMPLETED
    assert (result.outcome, result.error.partition(":")[0]) == (Outcome.FAILED_DRAINED, "part 0")


@pytest.fixture
async def queueing(managers):
    """A pair whose devices do what they are told, one part at a time; and transfers a and b between them."""
    network = LoopbackNetwork(two_sided=True)
    source, target = torch.rand(64, 2, 3, 64), torch.zeros(64, 2, 3, 64)
    ends = [QueueingDevice(network) for _ in range(2)]

    async def start(timeout_s=(10, 10)):
        pools = [source, target]
        both = [await managers(i, "loopback", pools[i], transport=ends[i], timeout_s=timeout_s[i]) for i in range(2)]
        return (*both, source, target, *(end.device for end in ends))

    return start


async def test_the_parts_of_a_link_are_queued_on_both_devices_without_waiting_for_one_another(queueing):
    sender, receiver, source, target, sending, receiving = await queueing()
    (a, b), postings = await open_two(sender, receiver)
    async with asyncio.timeout(20):
        a.push([10], 0)
        a.push([11], 1)
        b.push([20, 21], 0)
        await until(lambda: len(sending.given) == 3)
        assert sending.given == [0, 1, 0]
        assert a.state.legs[0].num_moved == 0, "none has moved"
        for _ in range(3):
            sending.happen()
        await until(lambda: len(receiving.given) == 3)
        committing = [asyncio.create_task(each.commit()) for each in (a, b)]
        await asyncio.wait(committing, timeout=0.2)
        assert not any(each.done() for each in committing), "none has landed"
        for _ in range(3):
            receiving.happen()
        sent = await asyncio.gather(*committing)
        received = [await posted.wait() for posted in postings]
    assert {each.outcome for each in [*sent, *received]} == {Outcome.COMPLETED}
    assert [each.time_s for each in received] == pytest.approx([0.014, 0.007]), "as the device measured it"
    assert torch.equal(target[:4], source[[10, 11, 20, 21]])


async def test_no_more_parts_are_queued_than_two_announcements_name(queueing):
    sender, receiver, _, _, sending, receiving = await queueing()
    num_parts = 3 * MAX_ANNOUNCED_PARTS
    posted = receiver.post_receive("t", list(range(num_parts)))
    transfer = await sender.open_send("t", posted.grant)
    async with asyncio.timeout(20):
        for block in range(num_parts):
            transfer.push([block], block)
        await until(lambda: len(sending.given) >= MAX_ANNOUNCED_PARTS)
        await asyncio.sleep(0.2)
        assert len(sending.given) < 2 * MAX_ANNOUNCED_PARTS
        committing = asyncio.create_task(transfer.commit())
        while not committing.done():
            for device in (sending, receiving):
                if device.events:
                    device.happen()
            await asyncio.sleep(0.001)
    assert (await committing).num_parts == num_parts


@pytest.mark.parametrize("end", ["sender", "receiver"])
async def test_a_part_that_a_device_never_moves_ends_the_link_at_its_deadline(queueing, end):
    """When the link has ended the device is stopped, which it says as it says that it has moved something."""
    sender, receiver, _, _, sending, receiving = await queueing(timeout_s=[0.5, 0.5])
    (a, b), postings = await open_two(sender, receiver)
    async with asyncio.timeout(20):
        a.push([10], 0)
        await until(lambda: sending.given)
        if end == "receiver":
            sending.happen()
            await until(lambda: receiving.given)
        await until(lambda: a.state.failed and b.state.failed)
        for device in (sending, receiving):
            while device.events:
                device.happen()
        sent, received = await a.wait(), await postings[0].wait()
        await b.wait()
        await postings[1].wait()
    assert (sent.outcome, received.outcome) == (Outcome.FAILED_DRAINED, Outcome.FAILED_DRAINED)
    assert "part 0 of transfer a did not come within 0.5 s" in sent.error


async def test_a_sender_ends_a_link_whose_receiver_never_says_that_a_part_is_late(queueing):
    """A receiver that gives a part more time than the sender has: its word would come too late."""
    sender, receiver, _, _, sending, receiving = await queueing(timeout_s=[0.25, 60])
    (a, b), postings = await open_two(sender, receiver)
    async with asyncio.timeout(20):
        a.push([10], 0)
        await until(lambda: sending.given)
        await until(lambda: a.state.failed and b.state.failed)
        for device in (sending, receiving):
            while device.events:
                device.happen()
        sent = await a.wait()
        for each in (b, *postings):
            await each.wait()
    assert sent.outcome is Outcome.FAILED_DRAINED
    assert "part 0 was not taken within 0.5 s" in sent.error


async def test_an_event_watch_asks_about_all_at_once_and_stops_asking_when_all_have_happened():
    watch, events = EventWatch(), [Event() for _ in range(3)]
    waiting = [watch.until(event) for event in events]
    events[2].happen()
    async with asyncio.timeout(20):
        assert await waiting[2] == 0.0
        assert not waiting[0].done()
        waiting[0].cancel()
        events[0].happen()
        events[1].happen(RuntimeError("the device is gone"))
        with pytest.raises(RuntimeError, match="the device is gone"):
            await waiting[1]
    await until(lambda: not watch._is_running)
    asked = [event.num_asked for event in events]
    await asyncio.sleep(0.05)
    assert [event.num_asked for event in events] == asked
    event = Event()
    event.happen()
    assert await watch.until(event, since=Event()) == pytest.approx(0.007)


async def test_an_event_may_be_watched_from_another_thread_for_a_future_that_is_there():
    watch, loop = EventWatch(), asyncio.get_running_loop()
    early, late = Event(), Event()
    early.happen()
    futures = [loop.create_future() for _ in range(3)]
    async with asyncio.timeout(20):
        for future, event in zip(futures, (early, late, late), strict=True):
            await asyncio.to_thread(watch.tell, future, event, Event())
        assert await futures[0] == pytest.approx(0.007)
        futures[1].cancel()  # whoever waited
        late.happen()
        assert await futures[2] == pytest.approx(0.007)


async def test_events_that_follow_each_other_are_asked_about_by_one_thread():
    watch, threads = EventWatch(), set()
    async with asyncio.timeout(20):
        for _ in range(3):
            event = Event()
            waiting = watch.until(event)
            threads |= {thread.ident for thread in threading.enumerate() if thread.name == "kv-events"}
            event.happen()
            await waiting
        assert len(threads) == 1
        await until(lambda: not watch._is_running)
        event = Event()
        waiting = watch.until(event)
        event.happen()
        await waiting


class RecordedEvent(Event):
    """A CUDA event of a device that does everything at once."""

    def __init__(self, enable_timing=False):
        super().__init__()
        self.record = self.happen


class Stream:
    cuda_stream, device = 0, "cuda:0"

    def __init__(self, *_, **__): ...

    def wait_event(self, event):
        assert event.query()

    def synchronize(self): ...


@pytest.fixture
def without_cuda(monkeypatch):
    """What transports do on a GPU is done on the CPU, with events and streams that look like CUDA's."""
    monkeypatch.setattr(torch.cuda, "Event", RecordedEvent)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    make_group, map_memory = nccl.NcclTransport._make_group, ipc.IpcTransport._map

    def make_gpu_group(transport, *arguments):
        group = make_group(transport, *arguments)
        group.on_gpu, group.stream = True, Stream()
        return group

    def map_gpu_memory(transport, link, target):
        map_memory(transport, link, target)
        target.copy_pieces = transport._compiled_copy(link, target)

    monkeypatch.setattr(nccl.NcclTransport, "_make_group", make_gpu_group)
    monkeypatch.setattr(ipc.IpcTransport, "_map", map_gpu_memory)
    monkeypatch.setattr(ipc.IpcTransport, "waits_on_device", True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests below show more")
@pytest.mark.parametrize("way", ["nccl", "ipc, kernel", "ipc, copy engine"])
async def test_what_is_queued_for_a_device_moves_every_block(way, managers, monkeypatch, without_cuda):
    source, target = torch.rand(64, 2, 3, 64), torch.zeros(64, 2, 3, 64)
    engine_copies = []

    def copy(to, of, num_bytes, stream):
        engine_copies.append(num_bytes)
        shared_memory.copy(to, of, num_bytes)

    monkeypatch.setattr("hbserve_kv.memory.cuda_ipc.copy", copy)
    monkeypatch.setattr(ipc, "ENGINE_BLOCK_BYTES", 0 if "engine" in way else 1 << 62)
    backend = way.partition(",")[0]
    sender, receiver = await managers(0, backend, source), await managers(1, backend, target)
    ready = RecordedEvent()
    ready.record()
    async with asyncio.timeout(20):
        for name, given in [("first", [1, 7, 30, 31]), ("second", [12, 13, 14, 2])]:
            posted = receiver.post_receive(name, [5, 6, 9, 1])
            transfer = await sender.open_send(name, posted.grant)
            transfer.push(given[:2], 0, ready)
            transfer.push(given[2:], 2)
            sent, received = await transfer.commit(), await posted.wait()
            assert (sent.outcome, received.outcome) == (Outcome.COMPLETED, Outcome.COMPLETED)
            assert (sent.time_s, received.time_s) == pytest.approx((0.014, 0.014)), "as the device measured it"
            assert torch.equal(target[[5, 6, 9, 1]], source[given])
    block = source[0].nbytes
    assert engine_copies == ([block, block, block, block, 2 * block, block, block] if "engine" in way else [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the checks of test_conformance.py show more")
async def test_a_part_of_several_messages_comes_whole(managers, monkeypatch, without_cuda):
    source, target = torch.rand(64, 2, 3, 64), torch.zeros(64, 2, 3, 64)
    monkeypatch.setattr(nccl, "NCCL_MESSAGE_BYTES", 3 * source[0].nbytes)
    sender, receiver = await managers(0, "nccl", source), await managers(1, "nccl", target)
    blocks, granted = [1, 7, 30, 31, 32, 9, 2, 50], [5, 3, 8, 20, 21, 22, 60, 4]  # the second message is of neighbours
    async with asyncio.timeout(20):
        posted = receiver.post_receive("t", granted)
        transfer = await sender.open_send("t", posted.grant)
        transfer.push(blocks, 0)
        assert (await transfer.commit()).outcome is (await posted.wait()).outcome is Outcome.COMPLETED
    assert torch.equal(target[granted], source[blocks])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["nccl", "ipc"])
async def test_on_a_gpu_a_transfer_waits_for_its_step_and_another_does_not(backend, managers):
    source, target = torch.rand(64, 2, 3, 64, device="cuda"), torch.zeros(64, 2, 3, 64, device="cuda")
    sender, receiver = await managers(0, backend, source), await managers(1, backend, target)
    # CUDA loads a kernel when it is first wanted, and may wait for the device then.
    source[10] = 4.0
    first = await sender.open_send("loads", receiver.post_receive("loads", [40, 42, 50, 51]).grant)
    for place, block_ids in enumerate(([30], [32], [34, 35])):
        first.push(block_ids, place)
    assert (await first.commit()).outcome is Outcome.COMPLETED
    (a, b), _ = await open_two(sender, receiver)
    step, event = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(step):
        torch.cuda._sleep(2_000_000_000)  # cycles: about a second
        source[10] = 5.0
        event.record()
    async with asyncio.timeout(20):
        await push_both(a, b, event)
        assert not event.query(), "the other one waits still"
        result = await a.commit()
    assert (result.outcome, result.num_parts) == (Outcome.COMPLETED, 2)
    assert result.time_s < 0.5, "without its wait"
    assert torch.equal(target[:4], source[[10, 11, 20, 21]])
    assert (target[0] == 5.0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_copy_engines_conform(check, monkeypatch):
    monkeypatch.setattr("hbserve_kv.transports.ipc.ENGINE_BLOCK_BYTES", 0)
    await run_check(check, backend="ipc", device="cuda")
