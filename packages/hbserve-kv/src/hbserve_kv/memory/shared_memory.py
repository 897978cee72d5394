"""Host memory that another process can map. It is in anonymous files (memfd), so it has no name, and nothing is left
behind when the last process that has it is gone, however that ended.

The file of a mapping is found by its address in /proc/self/maps. So any tensor that lies in shared memory can be
exported, whoever made it, and a tensor needs no wrapper that remembers its file.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from hbserve_kv.memory.arrays import is_tensor
from hbserve_kv.memory.pool_layout import Extent

if TYPE_CHECKING:
    import torch

SHM_FOLDER = "/dev/shm"


class SharedRegion(msgspec.Struct, frozen=True):
    """The place of a tensor in shared memory, for another process of this host."""

    fd: int
    """File descriptor in the owning process: /proc/<pid>/fd/<fd>."""
    offset: int
    num_bytes: int
    device: int
    inode: int


def is_available() -> bool:
    return hasattr(os, "memfd_create")


def shared_buffer(num_bytes: int) -> memoryview:
    """Allocate zeroed memory that `export` can name, for processes without torch. The system provides pages as they are
    touched.

    Raises ValueError if `num_bytes` is 0, and OSError if there is no such memory.
    """
    fd = os.memfd_create("hbserve-kv", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, num_bytes)
        return memoryview(mmap.mmap(fd, num_bytes))  # has a duplicate of fd, and closes it with the mapping
    finally:
        os.close(fd)


def shared_empty(
    shape: Sequence[int], *, dtype: "torch.dtype", device: "torch.device | str | None" = None
) -> "torch.Tensor":
    """Return a CPU tensor like that of torch.empty, in memory that `export` can name. The system provides pages as they
    are touched."""
    import torch

    num_bytes = prod(shape) * dtype.itemsize
    if not num_bytes or not is_available():
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return torch.frombuffer(shared_buffer(num_bytes), dtype=dtype).view(tuple(shape))


def export(extent: Extent) -> SharedRegion:
    """Name host memory. A torch tensor that is not in shared memory yet is moved there by its `share_memory_`.

    Raises:
        OSError: it cannot be moved or named; says why, and what would cure that.
    """
    region = _find(extent.address, extent.num_bytes)
    if region is None and is_tensor(owner := extent.array.owner):
        _move(owner)
        region = _find(extent.address, extent.num_bytes)
    if region is None:
        raise OSError(
            "the pool is not in shared memory; make it with hbserve_kv.shared_buffer, or hbserve_kv.shared_empty for "
            "torch"
        )
    return region


def _move(tensor: Any) -> None:
    free, num_bytes = os.statvfs(SHM_FOLDER), tensor.untyped_storage().nbytes()
    if free.f_bavail * free.f_frsize < num_bytes:
        raise OSError(
            f"{SHM_FOLDER} has no room for a pool of {num_bytes} bytes; make the pool with hbserve_kv.shared_empty, "
            "which does not need it, or give the container more (--shm-size)"
        )
    tensor.share_memory_()


def _find(address: int, num_bytes: int) -> SharedRegion | None:
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, offset, device, inode, *_ = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            if "s" not in permissions or address + num_bytes > end:
                return None
            major, minor = (int(part, 16) for part in device.split(":"))
            return _with_open_file(os.makedev(major, minor), int(inode), int(offset, 16) + address - start, num_bytes)
    return None


def _with_open_file(device: int, inode: int, offset: int, num_bytes: int) -> SharedRegion | None:
    for name in os.listdir("/proc/self/fd"):
        try:
            found = os.stat(f"/proc/self/fd/{name}")
        except OSError:  # closed meanwhile, for example the one by which the folder was read
            continue
        if (found.st_dev, found.st_ino) == (device, inode) and found.st_size >= offset + num_bytes:
            return SharedRegion(int(name), offset, num_bytes, device, inode)
    return None


class Mapping:
    """Mapping of another process's region into this process, for as long as this object lives."""

    def __init__(self, pid: int, region: SharedRegion) -> None:
        """Raises OSError if that process is gone, may not be looked into, or is another one by now."""
        fd = os.open(f"/proc/{pid}/fd/{region.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if (found.st_dev, found.st_ino) != (region.device, region.inode):
                raise OSError(f"process {pid} is not the one that described its memory")
            start = region.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            skip = region.offset - start
            self._held = ctypes.c_char.from_buffer(mmap.mmap(fd, skip + region.num_bytes, offset=start))
        finally:
            os.close(fd)
        self.address = ctypes.addressof(self._held) + skip


def copy(target: int, source: int, num_bytes: int) -> None:
    """Copy between addresses by memmove, without the GIL."""
    ctypes.memmove(target, source, num_bytes)
