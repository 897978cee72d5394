"""Parts that are announced, and queued on both sides' devices, shortly before their blocks are computed."""

import asyncio
import time
from math import inf
from typing import Any

import pytest
import torch
from hbserve_kv_devices import Event, open_two, pretend_cuda, spy_on_announcements, spy_on_pushes

from hbserve_kv import Outcome
from hbserve_testing.waits import until

LONG_S = 1000.0


@pytest.fixture
async def pair(managers, monkeypatch):
    """Two ends of a link whose devices wait for what is to be computed; of both, announced parts and pushed ones."""
    pretend_cuda(monkeypatch)
    source, target = torch.rand(64, 2, 3, 64), torch.zeros(64, 2, 3, 64)
    sender, receiver = await managers(0, "nccl", source), await managers(1, "nccl", target)
    heard, pushed = spy_on_announcements(monkeypatch), spy_on_pushes(monkeypatch, sender)

    opened: list[Any] = []

    async def open_them(ahead_s):
        """Transfers a and b, and what was posted for them."""
        opened[:] = await open_two(sender, receiver)
        next(iter(sender._peers.connections.values())).link.ahead_s = ahead_s
        return opened

    yield open_them, source, target, heard, pushed
    for transfer in opened[0]:
        await transfer.abort("the test has ended")


async def test_a_part_that_is_nearly_ready_is_announced_and_moves_what_is_there_when_it_is(pair):
    open_them, source, target, heard, pushed = pair
    (a, _), postings = await open_them(LONG_S)
    event = Event()
    async with asyncio.timeout(20):
        a.push([10, 11], 0, event, due_s=time.monotonic() + LONG_S / 2)
        await until(lambda: heard == pushed == [("a", 0)])
        committing = asyncio.create_task(a.commit(b"payload"))
        await asyncio.wait([committing], timeout=0.2)
        assert not committing.done()
        assert not target[:2].any()
        source[10:12] = 5.0  # the end of the step
        event.happen()
        assert (await committing).outcome is Outcome.COMPLETED
        assert (await postings[0].wait()).payload == b"payload"
    assert (target[:2] == 5.0).all()


@pytest.mark.parametrize("due_in_s", [inf, 3 * LONG_S, -2 * LONG_S], ids=["nobody knows when", "early", "late"])
async def test_a_part_that_is_not_nearly_ready_is_announced_when_it_is_ready(pair, due_in_s):
    open_them, _, _, heard, pushed = pair
    (a, b), _ = await open_them(LONG_S)
    event = Event()
    async with asyncio.timeout(20):
        a.push([10, 11], 0, event, due_s=time.monotonic() + due_in_s)
        b.push([20, 21], 0)
        assert (await b.commit()).outcome is Outcome.COMPLETED
        assert heard == pushed == [("b", 0)]
        event.happen()
        assert (await a.commit()).outcome is Outcome.COMPLETED
    assert heard == pushed == [("b", 0), ("a", 0)]


async def test_a_part_is_announced_when_it_has_come_near(pair):
    open_them, _, _, heard, _ = pair
    (a, _), _ = await open_them(0.2)
    event, due_s = Event(), time.monotonic() + 0.5
    async with asyncio.timeout(20):
        a.push([10, 11], 0, event, due_s=due_s)
        await until(lambda: heard)
        assert time.monotonic() >= due_s - 0.2
        event.happen()
        assert (await a.commit()).outcome is Outcome.COMPLETED


async def test_a_part_that_is_ready_before_its_time_does_not_wait_for_that(pair):
    open_them, _, _, heard, _ = pair
    (a, _), _ = await open_them(1.0)
    event = Event()
    a.push([10, 11], 0, event, due_s=time.monotonic() + LONG_S)
    event.happen()
    async with asyncio.timeout(20):
        assert (await a.commit()).outcome is Outcome.COMPLETED
    assert heard == [("a", 0)]


async def test_a_transport_that_cannot_wait_gets_parts_when_they_are_ready(pair):
    open_them, _, _, heard, _ = pair
    (a, b), _ = await open_them(0.0)
    event = Event()
    async with asyncio.timeout(20):
        a.push([10, 11], 0, event, due_s=time.monotonic() + 0.05)
        await asyncio.sleep(0.1)
        b.push([20, 21], 0)
        await b.commit()
        assert heard == [("b", 0)]
        event.happen()
        assert (await a.commit()).outcome is Outcome.COMPLETED


async def test_parts_behind_an_announced_one_come_after_it(pair):
    open_them, source, target, heard, pushed = pair
    (a, b), _ = await open_them(LONG_S)
    event = Event()
    async with asyncio.timeout(20):
        a.push([10, 11], 0, event, due_s=time.monotonic())
        await until(lambda: heard)
        b.push([20, 21], 0)
        committing = [asyncio.create_task(each.commit()) for each in (a, b)]
        await asyncio.wait(committing, timeout=0.2)
        assert not any(each.done() for each in committing)
        event.happen()
        assert {(await each).outcome for each in committing} == {Outcome.COMPLETED}
    assert heard == pushed == [("a", 0), ("b", 0)]
    assert torch.equal(target[:4], source[[10, 11, 20, 21]])


async def test_blocks_of_an_announced_part_are_read_until_it_has_moved_though_its_transfer_is_given_up(pair):
    open_them, _, _, heard, _ = pair
    (a, b), postings = await open_them(LONG_S)
    event = Event()
    async with asyncio.timeout(20):
        a.push([10, 11], 0, event, due_s=time.monotonic())
        await until(lambda: heard)
        aborting = asyncio.create_task(a.abort("not wanted"))
        await asyncio.wait([aborting], timeout=0.2)
        assert not aborting.done(), "a device will read them"
        event.happen()
        assert await aborting is Outcome.FAILED_DRAINED
        received = await postings[0].wait()
        assert (received.outcome, received.error) == (Outcome.FAILED_DRAINED, "not wanted")
        b.push([20, 21], 0)
        assert (await b.commit()).outcome is Outcome.COMPLETED, "over the same link"


async def test_a_step_that_fails_after_the_announcement_ends_the_link_and_nothing_of_it_is_told_as_moved(pair):
    open_them, _, _, heard, _ = pair
    (a, b), postings = await open_them(LONG_S)
    event = Event()
    async with asyncio.timeout(20):
        a.push([10, 11], 0, event, due_s=time.monotonic())
        await until(lambda: heard)
        event.happen(RuntimeError("CUDA error: an illegal memory access was encountered"))
        sent, received = await a.commit(), await postings[0].wait()
        assert (sent.outcome, received.outcome) == (Outcome.FAILED_DRAINED, Outcome.FAILED_DRAINED)
        assert "an illegal memory access" in sent.error
        assert (await b.wait()).outcome is Outcome.FAILED_DRAINED
        await postings[1].wait()


async def test_a_step_that_never_ends_after_the_announcement_ends_the_link_at_the_deadline(managers, monkeypatch):
    pretend_cuda(monkeypatch)
    sender, receiver = await managers(0, "nccl", timeout_s=0.5), await managers(1, "nccl", timeout_s=0.5)
    (a, b), postings = await open_two(sender, receiver)
    link = next(iter(sender._peers.connections.values())).link
    link.ahead_s = LONG_S
    event = Event()
    async with asyncio.timeout(20):
        a.push([10, 11], 0, event, due_s=time.monotonic())
        await until(lambda: a.state.failed)
        event.happen()  # the device is told to stop, or the process ends
        sent, received = await a.wait(), await postings[0].wait()
        assert (await b.wait()).outcome is Outcome.FAILED_DRAINED, "it went over the same link"
    assert (sent.outcome, received.outcome) == (Outcome.FAILED_DRAINED, Outcome.FAILED_DRAINED)
    assert "did not come within 0.5 s" in received.error
