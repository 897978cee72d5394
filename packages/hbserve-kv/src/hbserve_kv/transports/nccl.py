"""The transport over torch.distributed, with a two-rank process group per link: NCCL between GPUs, else Gloo.

Groups are made directly on the link's rendezvous, not by init_process_group: there is no world of fixed membership, no
global default group and no port for a store, and peers come and go. Rank 0 of a group is the sender.

Path of a part:  blocks ─gather─▶ one tensor ─send─▶ recv ─▶ one tensor ─scatter─▶ blocks
On a GPU the messages of a part overlap: one is gathered and another scattered while a third is sent. Both sides only
queue a part there, so the next one follows without the host. A part is not announced before its blocks are computed:
sends of a group are in order, and a receive waits in a kernel, on multiprocessors that a decode step needs. On the CPU,
neighbouring or large blocks are neither gathered nor scattered: see `_pieces`. All pieces of a part are sent at once,
and the sender waits for the last one first: waking up for each would take the processor from Gloo's own thread.

Shapes: the message of positions [start, end) of a part is uint8 (end - start, unit_bytes). See `Rows`, which gathers or
scatters a message in one kernel, wherever the pieces of its blocks lie.
"""

import asyncio
import importlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from hbserve_kv.memory.events import COPY_PRIORITY, GPU_PART_BYTES, on_stream
from hbserve_kv.memory.layout import runs_of
from hbserve_kv.memory.memory import Memory, Rows
from hbserve_kv.transports.base import (
    Link,
    LinkValues,
    Moving,
    Part,
    Rendezvous,
    Transport,
    abandonable,
)
from hbserve_kv.transports.own_sockets import checked_address, let_nobody_in
from hbserve_rpc.address import look_up

if TYPE_CHECKING:
    import torch

SENDER, RECEIVER = 0, 1
CLOSING, AT_ONCE = 1, timedelta(milliseconds=1)
"""Tag of a message that never arrives, and how long to wait for it. Messages of parts have tag 0."""
PACKED_BYTES, LONGEST_BYTES = 1 << 20, 16 << 20
NCCL_MESSAGE_BYTES, STAGED_MESSAGE_BYTES = 128 << 20, 32 << 20
"""Sizes of messages of GPU memory. NCCL needs 0.07 ms per message besides its bytes, in which 25 MB could move between
two GPUs. Gloo's messages go through pinned host memory, which is slow to allocate."""
MOST_CTAS = 32
"""Limit of thread blocks of NCCL's kernels. Each takes a multiprocessor of the GPU from a prefill or decode step for as
long as a message moves, and at the receiver also while it waits for one. Half as many move half as much, and a gigabyte
then delays the products of a prefill by 5.0 ms, not 3.3 (docs/performance-handoff.md). Both sides need the same."""
MESSAGES_AT_ONCE = 1
"""Messages under way at once, besides one that is gathered or scattered. So a link's staging memory is two messages."""


class _Description(msgspec.Struct, frozen=True):
    device: str
    """"cpu", or the UUID of the GPU."""
    ip_version: int


@dataclass
class _Group:
    """Process group of one link."""

    process_group: Any
    store: LinkValues
    on_gpu: bool
    """Whether the group moves GPU memory itself; otherwise GPU blocks are staged through host memory."""
    stream: Any
    """The link's own CUDA stream; None on the CPU."""
    link: Link
    moving: set[asyncio.Future[float]] = field(default_factory=set)
    """Ends of the parts that the GPU moves now."""


_Way = Callable[[_Group, Rows, Part], None]


def link_store(rendezvous: Rendezvous, timeout_s: float) -> Any:
    """Make `LinkValues` a torch store. The class is defined here because its base class is torch's, and this file does
    not import torch, which takes seconds: with `auto` this transport exists even if another one carries everything."""
    from torch.distributed.distributed_c10d import Store

    class LinkStore(LinkValues, Store):  # type: ignore[misc]  # the stubs say str, torch gives bytes
        def __init__(self) -> None:
            Store.__init__(self)
            LinkValues.__init__(self, rendezvous, timeout_s)

        def get(self, name: str) -> bytes:
            return checked_address(LinkValues.get(self, name), self.published)

    return LinkStore()


class NcclTransport(Transport):
    """Moves parts by NCCL between GPUs, else by Gloo."""

    name = "nccl"
    one_sided = False
    connects_to_itself = True

    def __init__(self, host: str, timeout_s: float) -> None:
        self._host = host
        self._timeout = timedelta(seconds=timeout_s)
        self._groups: dict[Link, _Group] = {}  # not by key: both ends of a link may be here, see `connects_to_itself`

    async def start(self, memory: Memory) -> None:
        self._memory = memory
        self._device = "cpu"
        if memory.is_on_gpu:
            import torch

            self._device = str(torch.cuda.get_device_properties(memory.device).uuid)
            self.max_part_bytes = GPU_PART_BYTES
        self._ip = await look_up(self._host)

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(self._mine)

    @property
    def _mine(self) -> _Description:
        return _Description(self._device, 6 if ":" in self._ip else 4)

    def unreachable(self, description: bytes) -> str:
        theirs, mine = _decode(description).ip_version, self._mine.ip_version
        return "" if theirs == mine else f"one address is IPv{theirs}, the other IPv{mine}; Gloo needs the same"

    async def connect(self, link: Link) -> None:
        # With a pool that is not torch's, under `auto`, only here: importing takes seconds, in which the loop goes on.
        await link.run(importlib.import_module, "torch.distributed")
        store = link_store(link.rendezvous, self._timeout.total_seconds())
        making = abandonable(self._make_group, link, store, end=lambda group: group.process_group.abort())
        self._groups[link] = await making

    def _make_group(self, link: Link, store: LinkValues) -> _Group:
        peer = _decode(link.peer_description)
        rank = SENDER if link.is_sender else RECEIVER
        on_gpu = self._device != "cpu" and peer.device != "cpu" and self._may_use_nccl(peer.device)
        stream: Any = self._new_stream() if self._device != "cpu" else None
        link.detail = "NCCL" if on_gpu else "Gloo"
        if on_gpu:
            with on_stream(stream):
                group = _Group(self._make_nccl(store, rank), store, True, stream, link)
                _warm_up_nccl(group, link.rows(self._memory, "pool"), link.is_sender)
                stream.synchronize()
            return group
        return _Group(self._make_gloo(store, rank), store, False, stream, link)

    def _new_stream(self) -> Any:
        import torch

        stream: Any = torch.cuda.Stream
        return stream(self._memory.device, priority=COPY_PRIORITY)

    def _may_use_nccl(self, peer_device: str) -> bool:
        """Whether to use NCCL, which refuses two ranks on one GPU, unless it is 2.30 or newer and told to allow it."""
        return peer_device != self._device or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"

    def _make_nccl(self, store: Any, rank: int) -> Any:
        import torch.distributed as dist

        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=COPY_PRIORITY < 0)
        options._timeout = self._timeout
        options.config.min_ctas, options.config.max_ctas = 1, MOST_CTAS
        return dist.ProcessGroupNCCL(store, rank, 2, options)

    def _make_gloo(self, store: LinkValues, rank: int) -> Any:
        import torch.distributed as dist

        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = self._timeout
        # Gloo would guess an interface from the host's name, which on many hosts is a loopback address.
        options._devices = [gloo.create_device(hostname=self._ip)]
        made = gloo(store, rank, 2, options)
        # Gloo listens, and accepts connections from anybody, as long as the group lives.
        let_nobody_in(store.published)
        return made

    async def push(self, link: Link, part: Part) -> Moving:
        return await self._move(link, part, self._push_from_host, self._push_staged, self._push_from_gpu)

    async def accept(self, link: Link, part: Part) -> Moving:
        return await self._move(link, part, self._accept_on_host, self._accept_staged, self._accept_on_gpu)

    async def _move(self, link: Link, part: Part, on_host: _Way, staged: _Way, on_gpu: _Way) -> Moving:
        """Move a part in the link's thread. On a GPU, this only queues it, so the next one follows without the host."""
        if (group := self._groups.get(link)) is None:
            raise ConnectionError("the link is closed")
        rows = link.rows(self._memory, part.region, part.layers)
        if group.stream is None or not group.on_gpu:
            await link.run(on_host if group.stream is None else staged, group, rows, part)
            return None
        moving: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        try:
            await link.run(self._queue, on_gpu, group, rows, part, moving)
        except asyncio.CancelledError:
            moving.cancel()
            await link.run(group.stream.synchronize)  # what was queued ends when `disconnect` aborts the group
            raise
        group.moving.add(moving)
        moving.add_done_callback(group.moving.discard)
        return moving

    def _queue(self, way: _Way, group: _Group, rows: Rows, part: Part, moving: asyncio.Future[float]) -> None:
        """Queue a part on the group's stream, and have `moving` watched from here, which is faster than by the loop."""
        import torch

        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with on_stream(group.stream):
            began.record()
            way(group, rows, part)
            ended.record()
        self._memory.events.tell(moving, ended, since=began)

    def _push_from_host(self, group: _Group, rows: Rows, part: Part) -> None:
        sent = []
        for start, end in _pieces(rows.unit_bytes, part.target_block_ids):
            blocks = rows.gather(part.block_ids[start:end])
            sent.append((group.process_group.send([blocks], RECEIVER, 0), blocks))  # blocks must live until sent
        _wait(group, [work for work, _ in reversed(sent)])

    def _push_from_gpu(self, group: _Group, rows: Rows, part: Part) -> None:
        """Queue a part. A message is gathered while the one before it is sent."""
        messages = _messages(group, rows, part.block_ids)
        _send_in_turn(group, (rows.gather(part.block_ids[start:end]) for start, end in messages))

    def _push_staged(self, group: _Group, rows: Rows, part: Part) -> None:
        """Send a part of a GPU through pinned host memory."""

        def staged() -> "Iterator[torch.Tensor]":
            for start, end in _messages(group, rows, part.block_ids):
                blocks = rows.gather(part.block_ids[start:end])
                message = _staging(rows, end - start, False).copy_(blocks, non_blocking=True)
                group.stream.synchronize()
                yield message

        with on_stream(group.stream):
            _send_in_turn(group, staged())

    def _accept_on_gpu(self, group: _Group, rows: Rows, part: Part) -> None:
        """Take a part. A message is scattered while the next one arrives. Neighbouring blocks are received in place."""
        moving: deque[tuple[Any, torch.Tensor, int, int, bool]] = deque()
        places: Any = None

        def land() -> None:
            nonlocal places
            work, received, start, end, is_there = moving.popleft()
            _wait(group, [work])
            if not is_there:
                places = rows.places(part.block_ids) if places is None else places  # the first one is on its way by now
                new = received if group.on_gpu else received.to(rows.device, non_blocking=True)
                rows.scatter(places[start:end], new)

        for start, end in _messages(group, rows, part.block_ids):
            own = rows.neighbours(part.block_ids[start:end]) if group.on_gpu else None
            received = own if own is not None else _staging(rows, end - start, group.on_gpu)
            work = group.process_group.recv([received], SENDER, 0)
            moving.append((work, received, start, end, own is not None))
            if len(moving) > MESSAGES_AT_ONCE:
                land()
        while moving:
            land()

    def _accept_staged(self, group: _Group, rows: Rows, part: Part) -> None:
        with on_stream(group.stream):
            self._accept_on_gpu(group, rows, part)
            group.stream.synchronize()

    def _accept_on_host(self, group: _Group, rows: Rows, part: Part) -> None:
        moving = []
        for start, end in _pieces(rows.unit_bytes, part.block_ids):
            block_ids = part.block_ids[start:end]
            own = rows.neighbours(block_ids)
            blocks = own if own is not None else rows.empty(len(block_ids))
            moving.append((group.process_group.recv([blocks], SENDER, 0), block_ids, blocks, own is not None))
        packed = [each for each in moving if not each[3]]
        works = [work for work, *_ in (*packed, *(each for each in reversed(moving) if each[3]))]
        _wait(group, works, lambda i: rows.scatter(*packed[i][1:3]) if i < len(packed) else None)

    async def disconnect(self, link: Link) -> None:
        group = self._groups.pop(link, None)
        if group is not None:
            await abandonable(group.process_group.abort)  # NCCL takes half a second, in which others' parts go on
        link.give_up()
        await link.idle()
        if group is not None and group.moving:
            await asyncio.wait(group.moving)

    async def close(self) -> None:
        groups, self._groups = self._groups, {}
        await asyncio.gather(*(abandonable(group.process_group.abort) for group in groups.values()))
        for link in groups:
            link.give_up()


def _decode(description: bytes) -> _Description:
    return msgspec.msgpack.decode(description, type=_Description)


def _wait(group: _Group, works: list[Any], landed: Callable[[int], None] = lambda _: None) -> None:
    """Wait for messages, in this order. With NCCL this only queues a wait, which an abort of the group ends.

    When a connection ends, Gloo forgets whoever waits for a message that is half written or half read; when a peer
    freezes, it tells nobody. So the link gives up such a wait, and then closes the sockets, which only a wait that
    times out does. After that nothing is read or written any more.
    """
    if group.on_gpu:
        works[0].wait()
        return
    import torch

    try:
        for i, _ in enumerate(group.link.each([work.wait for work in works])):
            landed(i)
    except BaseException:
        with suppress(RuntimeError):  # raised because the wait times out, or the sockets are closed already
            peer = RECEIVER if group.link.is_sender else SENDER
            group.process_group.recv([torch.empty(1)], peer, CLOSING).wait(AT_ONCE)
        raise


def _pieces(block_bytes: int, target_block_ids: list[int]) -> Iterator[tuple[int, int]]:
    """Yield positions [start, end) of each message on the CPU. Both sides know the target, so both find the same.

    A block of PACKED_BYTES or more is a message of its own, which neither side copies, whatever its neighbours are. Of
    smaller blocks, a run of neighbours of at least that size is a message, which the receiver does not copy. What is
    left between such runs is packed together up to that size. No message is longer than LONGEST_BYTES.

    For blocks of 256 KiB, four are enough for a message:

        target_block_ids    3  7  8  9 10 11 20 30 31 40 50
        runs                |  |-----------| |  |---| |  |
        messages           [0,1)    [1,6)       [6,10)  [10,11)
                             |        |            |       what is left at the end
                             |        |            three short runs, copied: together four blocks
                             |        a long run, received in place
                             not packed with the long run behind it, which would then have to be copied
    """
    if block_bytes >= PACKED_BYTES:
        yield from ((i, i + 1) for i in range(len(target_block_ids)))
        return
    enough, most = -(-PACKED_BYTES // block_bytes), LONGEST_BYTES // block_bytes
    start = end = 0
    for _, _, length in runs_of(target_block_ids, target_block_ids, 1):
        if length >= enough and start < end:
            yield start, end
            start = end
        end += length
        while end - start > most:
            yield start, start + most
            start += most
        if end - start >= enough:
            yield start, end
            start = end
    if start < end:
        yield start, end


def _warm_up_nccl(group: _Group, rows: Rows, is_sender: bool) -> None:
    """Send one block of zeros, so that the first transfer need not wait for what is done at first use: NCCL connects,
    and the device loads the kernels that gather and scatter, and allocates messages. Together that takes 0.15 s."""
    room = [_staging(rows, max(1, NCCL_MESSAGE_BYTES // rows.unit_bytes), True) for _ in range(MESSAGES_AT_ONCE + 1)]
    block = room[0][:1].zero_()
    rows.load_kernels()
    process_group = group.process_group
    (process_group.send([block], RECEIVER, 0) if is_sender else process_group.recv([block], SENDER, 0)).wait()


def _messages(group: _Group, rows: Rows, block_ids: list[int]) -> Iterator[tuple[int, int]]:
    """Return the positions [start, end) of each message of GPU memory, which are the same on both sides."""
    step = max(1, (NCCL_MESSAGE_BYTES if group.on_gpu else STAGED_MESSAGE_BYTES) // rows.unit_bytes)
    return ((start, min(start + step, len(block_ids))) for start in range(0, len(block_ids), step))


def _send_in_turn(group: _Group, messages: "Iterable[torch.Tensor]") -> None:
    """Make and send messages one after another, with at most MESSAGES_AT_ONCE under way while the next is made."""
    moving: deque[tuple[Any, torch.Tensor]] = deque()  # the tensors must live until they are sent
    for message in messages:
        moving.append((group.process_group.send([message], RECEIVER, 0), message))
        if len(moving) > MESSAGES_AT_ONCE:
            _wait(group, [moving.popleft()[0]])
    while moving:
        _wait(group, [moving.popleft()[0]])


def _staging(rows: Rows, num_blocks: int, on_gpu: bool) -> "torch.Tensor":
    """Allocate room for blocks, on the GPU or in pinned host memory."""
    return rows.empty(num_blocks) if on_gpu else rows.empty(num_blocks, device="cpu", pin_memory=True)
