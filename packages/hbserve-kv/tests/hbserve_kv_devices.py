"""Devices that are none: what they compute and move happens when a test says so."""

import contextlib
import threading
from typing import Any

import torch

from hbserve_kv.receiving.transfer import IncomingLink
from hbserve_kv.testing.loopback import TwoSidedLoopbackTransport
from hbserve_kv.transports import ipc, nccl


class Event:
    """Like a CUDA event; happens when `happen` is called, or fails as the device of one does."""

    def __init__(self):
        self._happened = threading.Event()
        self.error = None
        self.num_asked = 0

    def happen(self, error=None):
        self.error = error
        self._happened.set()

    def wait(self):
        assert self._happened.wait(20), "it has not happened"
        self.query()

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


class RecordedEvent(Event):
    """A CUDA event of a device that does everything at once."""

    def __init__(self, enable_timing=False):
        super().__init__()
        self.record = self.happen


class Stream:
    cuda_stream, device = 0, "cuda:0"

    def __init__(self, *_, **__): ...

    def wait_event(self, event):
        """Whatever is queued behind it waits too."""
        event.wait()

    def synchronize(self): ...


def pretend_cuda(monkeypatch):
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

    def map_gpu_memory(transport, link):
        target = map_memory(transport, link)
        target.copy_pieces = transport._compiled_copy(link, target)
        return target

    monkeypatch.setattr(nccl.NcclTransport, "_make_group", make_gpu_group)
    monkeypatch.setattr(ipc.IpcTransport, "_map", map_gpu_memory)
    monkeypatch.setattr(ipc.IpcTransport, "waits_on_device", True)
