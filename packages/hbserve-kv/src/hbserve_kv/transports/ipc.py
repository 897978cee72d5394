"""Between processes of one host: the receiver's memory is mapped into the sender, which writes into it.

CPU: anonymous shared memory (memory/shared_memory.py) and memmove. GPU: CUDA IPC (memory/cuda_ipc.py) and a
kernel of the sender's GPU that writes into the receiver's, the same one or another, over NVLink if they have it. It
runs in the link's own stream, which is ordered behind the computation by an event; no other stream waits or is waited
for.
"""

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
from hbserve_kv.memory.memory import REGIONS, Memory, Region, gather, head_view, pieces, scatter
from hbserve_kv.memory.shared_memory import SharedRegion
from hbserve_kv.transports.base import GPU_PART_BYTES, Link, Part, Transport


class _Description(msgspec.Struct, frozen=True):
    host: str
    """Boot of the host and its namespace of process ids."""
    pid: int
    gpu: str
    """UUID of the pool's GPU, or ""."""
    host_regions: dict[str, SharedRegion]
    device_regions: dict[str, DeviceRegion]


@dataclass
class _Target:
    """The peer's memory, mapped."""

    rows: dict[str, torch.Tensor]
    """By region, (num_blocks, block_bytes of the peer)."""
    stream: Any = None
    copy_blocks: Any = None
    """On a GPU; see `hbserve_kv.memory.block_copy`."""
    mapped: ExitStack = field(default_factory=ExitStack)


class IpcTransport(Transport):
    name = "ipc"
    one_sided = True

    def __init__(self) -> None:
        if not Path("/proc/self/fd").is_dir() or not shared_memory.is_available():
            raise BackendUnavailable("kv_transfer.backend='ipc' needs Linux")
        self._targets: dict[str, _Target] = {}

    async def start(self, memory: Memory) -> None:
        self._memory = memory
        if memory.device.type == "cuda":
            self.max_part_bytes = GPU_PART_BYTES
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
            device, new_stream = self._memory.device, cast(Any, torch.cuda.Stream)
            target.stream = new_stream(device)
            if peer.pid == os.getpid() and peer.gpu != self._mine.gpu:
                cuda_ipc.enable_access(device, cuda_ipc.device_of(peer.gpu))
            flat = {
                name: target.mapped.enter_context(cuda_ipc.mapped(region, peer.pid, device))
                for name, region in peer.device_regions.items()
            }
            target.copy_blocks = self._compiled_copy(target, link, block_bytes)
        target.rows = {name: memory.view(-1, block_bytes) for name, memory in flat.items()}
        return target

    def _compiled_copy(self, target: _Target, link: Link, peer_block_bytes: int) -> Any:
        """`copy_blocks`, compiled for blocks as this link has them, away from the data path."""
        from hbserve_kv.memory.block_copy import copy_blocks  # Triton is not there on every system that has no CUDA

        memory = self._memory
        with torch.cuda.stream(target.stream):
            mine, theirs = (
                torch.zeros((1, size), dtype=torch.uint8, device=memory.device)
                for size in (memory.block_bytes, peer_block_bytes)
            )
            mine = head_view(mine, link.heads, memory.num_heads, memory.head_bytes)
            copy_blocks(mine, [0], self._target_view(link, theirs), [0])
            target.stream.synchronize()
        return copy_blocks

    async def push(self, link: Link, part: Part) -> None:
        if link.key not in self._targets:
            raise ConnectionError("the link is closed")
        target = self._targets[link.key]
        await link.run(self._write_host if target.stream is None else self._write_device, target, link, part)

    def _write_host(self, target: _Target, link: Link, part: Part) -> None:
        source, rows = self._memory.rows(part.region), target.rows[part.target_region]
        assert max(part.target_block_ids) < rows.shape[0]
        if link.heads is None and link.peer_heads is None:
            moves = pieces(self._memory, None, None, 1, part.block_ids, part.target_block_ids)
            for mine, theirs, size in moves:
                shared_memory.copy(rows.data_ptr() + theirs, source.data_ptr() + mine, size)
            return
        blocks = gather(self._memory.part(part.region, link.heads), part.block_ids).contiguous()
        scatter(self._target_view(link, rows), part.target_block_ids, blocks)

    def _write_device(self, target: _Target, link: Link, part: Part) -> None:
        rows = target.rows[part.target_region]
        assert max(part.target_block_ids) < rows.shape[0]
        with torch.cuda.stream(target.stream):
            if part.ready is not None:
                target.stream.wait_event(part.ready)
            mine, theirs = self._memory.part(part.region, link.heads), self._target_view(link, rows)
            target.copy_blocks(mine, part.block_ids, theirs, part.target_block_ids)
            target.stream.synchronize()

    def _target_view(self, link: Link, rows: torch.Tensor) -> torch.Tensor:
        return head_view(rows, link.peer_heads, link.peer_num_heads, self._memory.head_bytes)

    async def disconnect(self, link: Link) -> None:
        target = self._targets.pop(link.key, None)
        await link.idle()
        if target is not None:
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
