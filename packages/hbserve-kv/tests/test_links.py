"""What the links of all transports have: a thread of their own, and a deadline of what is under way."""

import asyncio
import threading

import pytest
import torch
from hbserve_kv_layouts import whole_blocks

from hbserve_kv import KVTransferConfig, KVTransferManager, Link, TransferFailed, shared_empty
from hbserve_kv.transports.base import Deadline
from hbserve_kv.transports.ipc import IpcTransport


async def test_who_is_cancelled_waits_until_what_runs_in_the_thread_has_ended():
    """Bytes move until then: the caller must know when they have stopped."""
    link = Link("key", is_sender=True, peer_rank=1, peer_description=b"", **whole_blocks())
    has_begun, may_end = threading.Event(), threading.Event()

    def blocking() -> None:
        has_begun.set()
        may_end.wait(20)

    running = asyncio.create_task(link.run(blocking))
    await asyncio.to_thread(has_begun.wait, 20)
    running.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not running.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    link.executor.shutdown()


async def test_a_deadline_is_of_the_first_that_is_under_way_and_begins_when_those_before_it_have_ended():
    loop, late, timeout_s = asyncio.get_running_loop(), asyncio.Queue[list[str]](), 0.05
    deadline, (a, b, c, d) = Deadline(timeout_s, late.put_nowait), ([name] for name in "abcd")
    for part in (a, b, c):
        deadline.begin(part)
    deadline.end(b)
    began_s = loop.time()
    deadline.end(a)
    async with asyncio.timeout(20):
        assert await late.get() is c
    assert loop.time() - began_s > 0.9 * timeout_s
    deadline.end(c)
    deadline.begin(d)
    deadline.end(d)
    await asyncio.sleep(2 * timeout_s)
    assert late.empty()


async def test_memory_that_was_mapped_for_a_link_which_was_given_up_meanwhile_is_given_back(monkeypatch):
    find, has_begun, may_end, has_ended = IpcTransport._find_on_host, *(threading.Event() for _ in range(3))

    def slow(peer, extents, target):
        target.mapped.callback(has_ended.set)  # as where the memory is a GPU's
        has_begun.set()
        may_end.wait(20)
        return find(peer, extents, target)

    monkeypatch.setattr(IpcTransport, "_find_on_host", staticmethod(slow))
    config = KVTransferConfig(backend="ipc", buffer_size=0)
    sender, receiver = (
        KVTransferManager(rank=rank, pool=shared_empty((4, 64), dtype=torch.int64), fingerprint={}, config=config)
        for rank in range(2)
    )
    await sender.start()
    await receiver.start()
    connecting = asyncio.create_task(sender.open_link(receiver.endpoint))
    await asyncio.to_thread(has_begun.wait, 20)
    closing = asyncio.create_task(sender.close())
    await asyncio.sleep(0)
    may_end.set()
    with pytest.raises(TransferFailed, match="the sender was closed"):
        await connecting
    await closing
    await receiver.close()
    assert has_ended.is_set()
