"""A transport between processes of one host: the sender maps the receiver's memory, and writes into it.

On the CPU it uses anonymous shared memory (memory/shared_memory.py) and memmove, without torch. On GPUs it uses CUDA
IPC (memory/cuda_ipc.py): a kernel or copy engine of the sender's GPU writes into the receiver's, which is the same GPU
or another one, over NVLink if they have it. Each part has a stream of its own, in which it waits for the computation's
event and then moves. Neither other streams nor the host wait for it.
"""

import asyncio
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from hbserve_kv.errors import BackendUnavailable
from hbserve_kv.memory import shared_memory
from hbserve_kv.memory.events import COPY_PRIORITY, GPU_PART_BYTES
from hbserve_kv.memory.layout import CopyPlan
from hbserve_kv.memory.memory import REGIONS, WORD_BYTES, Memory, copy_on_host, tensor_at
from hbserve_kv.memory.shared_memory import Mapping, SharedRegion
from hbserve_kv.transports.base import Link, Moving, Part, Transport


class DeviceRegion(msgspec.Struct, frozen=True):
    """GPU memory of one process, described for another process of this host."""

    handle: bytes
    """CUDA IPC handle of the allocation in which the memory lies."""
    offset: int
    """Offset of the memory within its allocation, in bytes."""
    num_bytes: int
    address: int
    """Address in the owning process."""


class _Description(msgspec.Struct, frozen=True):
    host: str
    """Id of the host's boot, and of the process-id namespace."""
    pid: int
    gpu: str
    """UUID of the pool's GPU; "" on the CPU."""
    host_regions: dict[str, list[SharedRegion]]
    """Extents of each region of memory on the CPU; empty on a GPU."""
    device_regions: dict[str, list[DeviceRegion]]
    """Extents of each region of memory on a GPU; empty on the CPU."""


ENGINE_BLOCK_BYTES = 512 << 10
"""Length from which on pieces of blocks are copied by the GPU's copy engines, with one call for each run of pieces. A
kernel copies shorter ones. Alone, a kernel is slightly faster, but it takes multiprocessors from the computation: a
gigabyte that moves next to the matrix products of a prefill delays these by 2.7 ms with a kernel and by 1.0 ms with an
engine, at the same rate (docs/performance-handoff.md)."""


@dataclass
class _Target:
    """The peer's memory, as it is mapped here."""

    addresses: dict[str, list[int]] = field(default_factory=dict)
    """Addresses of the extents of each region, in this process."""
    num_bytes: dict[str, int] = field(default_factory=dict)
    """Number of bytes of each region."""
    copy_pieces: Any = None
    """`hbserve_kv.memory.block_copy.copy_pieces`, on a GPU; None on the CPU."""
    mappings: list[Mapping] = field(default_factory=list)
    """Mappings of host memory."""
    mapped: ExitStack = field(default_factory=ExitStack)
    """Mappings of GPU memory."""
    moving: set[asyncio.Future[float]] = field(default_factory=set)
    """Ends of the parts that the GPU moves now."""

    def close(self) -> None:
        self.addresses.clear()
        self.mappings.clear()
        self.mapped.close()


class IpcTransport(Transport):
    name = "ipc"
    one_sided = True
    connects_to_itself = True

    def __init__(self) -> None:
        if not Path("/proc/self/fd").is_dir() or not shared_memory.is_available():
            raise BackendUnavailable("kv_transfer.backend='ipc' needs Linux")
        self._targets: dict[str, _Target] = {}
        self._idle_streams: list[Any] = []

    async def start(self, memory: Memory) -> None:
        self._memory = memory
        host_regions: dict[str, list[SharedRegion]] = {}
        device_regions: dict[str, list[DeviceRegion]] = {}
        gpu = ""
        try:
            if memory.is_on_gpu:
                import torch

                from hbserve_kv.memory import cuda_ipc

                self.max_part_bytes, self.waits_on_device = GPU_PART_BYTES, True
                gpu = str(torch.cuda.get_device_properties(memory.device).uuid)
                device_regions = {
                    region: [DeviceRegion(*cuda_ipc.export(each)) for each in memory.extents[region]]
                    for region in REGIONS
                }
            else:
                host_regions = {
                    region: [shared_memory.export(each) for each in memory.extents[region]] for region in REGIONS
                }
        except OSError as error:
            raise BackendUnavailable(f"kv_transfer.backend='ipc': {error}") from error
        finally:
            memory.locate()  # some may have moved before one could not
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
        # Noted before anything is mapped: if this is cancelled, `disconnect` releases what the link's thread has.
        target = self._targets[link.key] = _Target()
        await link.run(self._map, link, target)
        link.detail = f"memory of {_decode(link.peer_description).gpu or 'this host'}"

    def _map(self, link: Link, target: _Target) -> None:
        peer = _decode(link.peer_description)
        regions: dict[str, list[Any]] = {**peer.host_regions, **peer.device_regions}
        expected = link.peer.layout.extents
        if [each.num_bytes for each in regions.get("pool", [])] != expected:
            raise ConnectionError(f"the peer says that its pool is of {expected} bytes, but describes other memory")
        for name, extents in regions.items():
            target.num_bytes[name] = sum(each.num_bytes for each in extents)
            find = self._find_on_gpu if peer.gpu else self._find_on_host
            target.addresses[name] = find(peer, extents, target)
        if peer.gpu:
            target.copy_pieces = self._compiled_copy(link, target)

    @staticmethod
    def _find_on_host(peer: _Description, extents: list[SharedRegion], target: _Target) -> list[int]:
        found = [Mapping(peer.pid, each) for each in extents]
        target.mappings += found
        return [each.address for each in found]

    def _find_on_gpu(self, peer: _Description, extents: list[DeviceRegion], target: _Target) -> list[int]:
        """Map the peer's GPU memory, and return the addresses of its extents. Each allocation is mapped once, however
        many of the peer's tensors lie in it."""
        from hbserve_kv.memory import cuda_ipc

        device = self._memory.device
        if peer.pid == os.getpid():  # CUDA does not open a handle in the process that made it
            if peer.gpu != self._mine.gpu:
                cuda_ipc.enable_access(device, cuda_ipc.device_of(peer.gpu))
            return [each.address for each in extents]
        bases = {
            handle: target.mapped.enter_context(cuda_ipc.mapped(handle, device))
            for handle in dict.fromkeys(each.handle for each in extents)
        }
        return [bases[each.handle] + each.offset for each in extents]

    def _compiled_copy(self, link: Link, target: _Target) -> Any:
        """Return `copy_pieces` after compiling it for this link's blocks, which a copy of no blocks does. So the
        compiler does not run in the data path."""
        from hbserve_kv.memory.block_copy import copy_pieces  # Triton is not available on every system without CUDA
        from hbserve_kv.memory.events import on_stream

        stream = self._stream()
        with on_stream(stream):
            self._copy_by_kernel(copy_pieces, target, link, Part("", 0, "pool", []))
            stream.synchronize()
        self._idle_streams.append(stream)
        return copy_pieces

    def _stream(self) -> Any:
        """Take a stream in which nothing waits or moves. The threads of several links call this."""
        try:
            return self._idle_streams.pop()
        except IndexError:
            import torch

            new_stream: Any = torch.cuda.Stream
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

    def _plan(self, target: _Target, link: Link, part: Part) -> tuple[CopyPlan, int, int]:
        """Return the plan of a part, and the addresses at which the memory of this side and of the peer begin."""
        plan = link.plan(self._memory, part, target.addresses[part.target_region])
        return plan, self._memory.addresses[part.region][0], target.addresses[part.target_region][0]

    def _require_targets(self, target: _Target, link: Link, part: Part) -> None:
        is_pool = part.target_region == "pool"
        part.require_targets_below(
            link.peer.num_units if is_pool else target.num_bytes["arena"] // link.peer.layout.block_bytes
        )

    def _write_host(self, target: _Target, link: Link, part: Part) -> None:
        self._require_targets(target, link, part)
        plan, here, there = self._plan(target, link, part)
        copy_on_host(plan, here, part.block_ids, there, part.target_block_ids)

    def _queue_copy(self, target: _Target, link: Link, part: Part) -> tuple[Any, Any, Any]:
        """Queue the copy of a part. Returns its stream, and the events before and after it."""
        import torch

        from hbserve_kv.memory import cuda_ipc
        from hbserve_kv.memory.events import on_stream

        self._require_targets(target, link, part)
        plan, here, there = self._plan(target, link, part)
        new_event: Any = torch.cuda.Event
        stream, began, ended = self._stream(), new_event(enable_timing=True), new_event(enable_timing=True)
        with on_stream(stream):
            if part.ready is not None:
                stream.wait_event(part.ready)
            began.record()
            if plan.shortest >= ENGINE_BLOCK_BYTES:
                for mine, theirs, size in plan.moves(part.block_ids, part.target_block_ids):
                    cuda_ipc.copy(there + theirs, here + mine, size, stream.cuda_stream)
            else:
                self._copy_by_kernel(target.copy_pieces, target, link, part)
            ended.record()
        return stream, began, ended

    def _copy_by_kernel(self, copy_pieces: Any, target: _Target, link: Link, part: Part) -> None:
        plan, here, there = self._plan(target, link, part)
        mine, theirs = (tensor_at(address, WORD_BYTES, self._memory.device) for address in (here, there))
        copy_pieces(plan, mine, part.block_ids, theirs, part.target_block_ids)

    async def disconnect(self, link: Link) -> None:
        target = self._targets.pop(link.key, None)
        await link.idle()
        if target is not None:
            if target.moving:
                await asyncio.wait(target.moving)
            await link.run(target.close)

    async def close(self) -> None:
        for target in self._targets.values():
            target.close()
        self._targets.clear()


@cache
def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def _decode(description: bytes) -> _Description:
    return msgspec.msgpack.decode(description, type=_Description)
