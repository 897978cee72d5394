"""Between processes of one host: the receiver's memory is mapped into the sender, which writes into it.

CPU: anonymous shared memory (memory/shared_memory.py) and memmove. GPU: CUDA IPC (memory/cuda_ipc.py) and a
kernel of the sender's GPU that writes into the receiver's, the same one or another, over NVLink if they have it. Each
part has a stream to itself while it waits for the computation, by an event, and moves; no other stream waits or is
waited for, nor does the host wait.
"""

import asyncio
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import msgspec
import torch

from hbserve_kv.errors import BackendUnavailable
from hbserve_kv.memory import cuda_ipc, shared_memory
from hbserve_kv.memory.cuda_ipc import DeviceRegion
from hbserve_kv.memory.events import on_stream
from hbserve_kv.memory.memory import REGIONS, Memory, Region, gather, head_view, pieces, scatter
from hbserve_kv.memory.shared_memory import SharedRegion
from hbserve_kv.transports.base import COPY_PRIORITY, GPU_PART_BYTES, Link, Moving, Part, Transport


class _Description(msgspec.Struct, frozen=True):
    host: str
    """Boot of the host and its namespace of process ids."""
    pid: int
    gpu: str
    """UUID of the pool's GPU, or ""."""
    host_regions: dict[str, SharedRegion]
    device_regions: dict[str, DeviceRegion]


ENGINE_BLOCK_BYTES = 512 << 10
"""Whole blocks from this length on are copied by the GPU's copy engines, one call for each run of neighbours; others by
a kernel, which is some faster alone and takes processors from the computation: beside the products of a prefill, a
gigabyte costs these 2.7 ms by a kernel and 1.0 ms by an engine, at the same rate (docs/performance.md)."""


@dataclass
class _Target:
    """The peer's memory, mapped."""

    rows: dict[str, torch.Tensor]
    """By region, (num_blocks, block_bytes of the peer)."""
    copy_blocks: Any = None
    """On a GPU; see `hbserve_kv.memory.block_copy`."""
    mapped: ExitStack = field(default_factory=ExitStack)
    moving: set[asyncio.Future[float]] = field(default_factory=set)
    """Parts that the GPU moves."""


class IpcTransport(Transport):
    name = "ipc"
    one_sided = True

    def __init__(self) -> None:
        if not Path("/proc/self/fd").is_dir() or not shared_memory.is_available():
            raise BackendUnavailable("kv_transfer.backend='ipc' needs Linux")
        self._targets: dict[str, _Target] = {}
        self._idle_streams: list[Any] = []

    async def start(self, memory: Memory) -> None:
        self._memory = memory
        if memory.device.type == "cuda":
            self.max_part_bytes, self.waits_on_device = GPU_PART_BYTES, True
        regions: tuple[Region, ...] = tuple(region for region in REGIONS if memory.rows(region).numel())
        host_regions: dict[str, SharedRegion] = {}
        device_regions: dict[str, DeviceRegion] = {}
        gpu = ""
        try:
            if memory.device.type == "cpu":
                host_regions = {region: shared_memory.export(memory.rows(region)) for region in regions}
            else:
                gpu = str(torch.cuda.get_device_properties(memory.device).uuid)
                device_regions = {region: cuda_ipc.export(memory.rows(region)) for region in regions}
        except OSError as error:
            raise BackendUnavailable(f"kv_transfer.backend='ipc': {error}") from error
        self._mine = _Description(_host(), os.getpid(), gpu, host_regions, device_regions)

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(self._mine)

    def unreachable(self, description: bytes) -> str:
        theirs = _decode(description)
        if theirs.host != self._mine.host:
            return "the other is on another host, or in a container with process ids of its own"
        if bool(theirs.gpu) != bool(self._mine.gpu):
            return "one side's blocks are on a GPU, the other's are not"
        return ""

    async def connect(self, link: Link) -> None:
        self._targets[link.key] = await link.run(self._map, link)
        link.detail = f"memory of {_decode(link.peer_description).gpu or 'this host'}"

    def _map(self, link: Link) -> _Target:
        peer = _decode(link.peer_description)
        block_bytes = self._memory.block_bytes // self._memory.num_heads * link.peer_num_heads
        target = _Target({})
        if not peer.gpu:
            flat = {name: shared_memory.map_region(peer.pid, region) for name, region in peer.host_regions.items()}
        else:
            device = self._memory.device
            if peer.pid == os.getpid() and peer.gpu != self._mine.gpu:
                cuda_ipc.enable_access(device, cuda_ipc.device_of(peer.gpu))
            flat = {
                name: target.mapped.enter_context(cuda_ipc.mapped(region, peer.pid, device))
                for name, region in peer.device_regions.items()
            }
            target.copy_blocks = self._compiled_copy(link, block_bytes)
        target.rows = {name: memory.view(-1, block_bytes) for name, memory in flat.items()}
        return target

    def _compiled_copy(self, link: Link, peer_block_bytes: int) -> Any:
        """`copy_blocks`, compiled for blocks as this link has them, away from the data path."""
        from hbserve_kv.memory.block_copy import copy_blocks  # Triton is not there on every system that has no CUDA

        memory, stream = self._memory, self._stream()
        with on_stream(stream):
            mine, theirs = (
                torch.zeros((1, size), dtype=torch.uint8, device=memory.device)
                for size in (memory.block_bytes, peer_block_bytes)
            )
            mine = head_view(mine, link.heads, memory.num_heads, memory.head_bytes)
            copy_blocks(mine, [0], self._target_view(link, theirs), [0])
            stream.synchronize()
        self._idle_streams.append(stream)
        return copy_blocks

    def _stream(self) -> Any:
        """One in which nothing waits or moves. Called in threads of several links."""
        try:
            return self._idle_streams.pop()
        except IndexError:
            new_stream = cast(Any, torch.cuda.Stream)
            return new_stream(self._memory.device, priority=COPY_PRIORITY)

    async def push(self, link: Link, part: Part) -> Moving:
        if link.key not in self._targets:
            raise ConnectionError("the link is closed")
        target = self._targets[link.key]
        if not self.waits_on_device:
            await link.run(self._write_host, target, link, part)
            return None
        stream, began, ended = await link.run(self._queue_copy, target, link, part)
        moving = self._memory.events.until(ended, since=began)
        target.moving.add(moving)

        def moved(_: asyncio.Future[float]) -> None:
            target.moving.discard(moving)
            self._idle_streams.append(stream)

        moving.add_done_callback(moved)
        return moving

    def _write_host(self, target: _Target, link: Link, part: Part) -> None:
        source, rows = self._memory.rows(part.region), target.rows[part.target_region]
        part.require_targets_below(rows.shape[0])
        if link.heads is None and link.peer_heads is None:
            moves = pieces(self._memory, None, None, 1, part.block_ids, part.target_block_ids)
            for mine, theirs, size in moves:
                shared_memory.copy(rows.data_ptr() + theirs, source.data_ptr() + mine, size)
            return
        blocks = gather(self._memory.part(part.region, link.heads), part.block_ids).contiguous()
        scatter(self._target_view(link, rows), part.target_block_ids, blocks)

    def _queue_copy(self, target: _Target, link: Link, part: Part) -> tuple[Any, Any, Any]:
        """Its stream, and events before and after it."""
        rows = target.rows[part.target_region]
        part.require_targets_below(rows.shape[0])
        new_event, stream = cast(Any, torch.cuda.Event), self._stream()
        began, ended = new_event(enable_timing=True), new_event(enable_timing=True)
        with on_stream(stream):
            if part.ready is not None:
                stream.wait_event(part.ready)
            began.record()
            if self._memory.block_bytes >= ENGINE_BLOCK_BYTES and link.heads is None and link.peer_heads is None:
                to, of = rows.data_ptr(), self._memory.rows(part.region).data_ptr()
                for here, there, size in pieces(self._memory, None, None, 1, part.block_ids, part.target_block_ids):
                    cuda_ipc.copy(to + there, of + here, size, stream.cuda_stream)
            else:
                mine, theirs = self._memory.part(part.region, link.heads), self._target_view(link, rows)
                target.copy_blocks(mine, part.block_ids, theirs, part.target_block_ids)
            ended.record()
        return stream, began, ended

    def _target_view(self, link: Link, rows: torch.Tensor) -> torch.Tensor:
        return head_view(rows, link.peer_heads, link.peer_num_heads, self._memory.head_bytes)

    async def disconnect(self, link: Link) -> None:
        target = self._targets.pop(link.key, None)
        await link.idle()
        if target is not None:
            if target.moving:
                await asyncio.wait(target.moving)
            target.rows.clear()
            await link.run(target.mapped.close)

    async def close(self) -> None:
        for target in self._targets.values():
            target.rows.clear()
            target.mapped.close()
        self._targets.clear()


@cache
def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def _decode(description: bytes) -> _Description:
    return msgspec.msgpack.decode(description, type=_Description)
