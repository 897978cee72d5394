"""GPU memory that another process can map, through CUDA IPC and the driver's own functions.

torch shares tensors too, but it counts references across processes and keeps the memory until the other side has given
it back, which a killed peer never does. Here the owner only names its memory, and a peer maps and unmaps it. The ranks
of an hbserve_core instance do so too.
Functions: CUDA Driver API, "cuIpcGetMemHandle", "cuIpcOpenMemHandle_v2", "cuIpcCloseMemHandle", "cuMemGetAddressRange",
"cuMemcpyDtoDAsync".
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from hbserve_kv.memory.pool_layout import Extent

HANDLE_BYTES = 64
LAZY_ENABLE_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


@cache
def _driver() -> Any:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), _Handle, ctypes.c_uint]
    driver.cuIpcGetMemHandle.argtypes = [ctypes.POINTER(_Handle), ctypes.c_uint64]
    driver.cuMemcpyDtoDAsync_v2.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    driver.cuIpcCloseMemHandle.argtypes = [ctypes.c_uint64]
    driver.cuMemGetAddressRange_v2.argtypes = [
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.c_uint64,
    ]
    return driver


def _check(what: str, result: int) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise OSError(f"{what}: {(text.value or b'').decode() or 'error'} ({result})")


def name_memory(address: int, num_bytes: int, device: torch.device) -> tuple[bytes, int]:
    """Name GPU memory for another process, which passes the name to `mapped`. Returns the handle of the allocation and
    the offset in it. The memory must stay allocated for as long as it is mapped.

    Raises:
        OSError: it cannot be shared, because it lies in an expandable segment, or was mapped piece by piece in another
            way, as engines do that give memory back while they sleep.
    """
    handle, base, size = _Handle(), ctypes.c_uint64(), ctypes.c_size_t()
    with torch.cuda.device(device):
        _check(
            "cuMemGetAddressRange", _driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address)
        )
        if address + num_bytes > base.value + size.value:
            raise OSError("it is mapped from several allocations")
        _check("cuIpcGetMemHandle", _driver().cuIpcGetMemHandle(ctypes.byref(handle), address))
    return ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES), address - base.value


def export(extent: Extent) -> tuple[bytes, int, int, int]:
    """Name a pool's memory: the handle of its allocation, the offset in it, the length, and the address here.

    Raises OSError: see `name_memory`.
    """
    try:
        handle, offset = name_memory(extent.address, extent.num_bytes, extent.array.device)
    except OSError as error:
        raise OSError(
            f"the pool cannot be shared by name ({error}): no memory can that lies in an expandable segment "
            "(PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True), or in a pool that can be put to sleep; allocate "
            "the KV pool without these, or use another backend"
        ) from error
    return handle, offset, extent.num_bytes, extent.address


def device_of(uuid: str) -> torch.device:
    """Return the GPU with this UUID. Raises OSError if this process does not see it."""
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid:
            return torch.device("cuda", index)
    raise OSError(f"GPU {uuid} is not visible to this process; see CUDA_VISIBLE_DEVICES")


def enable_access(device: torch.device, other: torch.device) -> None:
    """Let kernels on `device` use memory that this process itself has on `other`: torch allows it when it copies."""
    torch.zeros(1, device=other).copy_(torch.zeros(1, device=device))


@contextmanager
def mapped(handle: bytes, device: torch.device) -> Iterator[int]:
    """Map an allocation of another process for kernels on `device` while the context lasts, and yield the address at
    which it begins. Any GPU of this host may have the memory; this process need not see that GPU. Several tensors may
    lie in one allocation.

    Raises:
        OSError: it cannot be mapped, because the owner is gone or the GPUs do not reach each other.
    """
    base = ctypes.c_uint64()
    with torch.cuda.device(device):
        torch.cuda.current_stream().query()  # makes the context, if this process has none on that GPU yet
        _check(
            "cuIpcOpenMemHandle",
            _driver().cuIpcOpenMemHandle_v2(
                ctypes.byref(base), _Handle.from_buffer_copy(handle), LAZY_ENABLE_PEER_ACCESS
            ),
        )
    try:
        yield base.value
    finally:
        with torch.cuda.device(device):
            _check("cuIpcCloseMemHandle", _driver().cuIpcCloseMemHandle(base))


def copy(target: int, source: int, num_bytes: int, stream: int) -> None:
    """Queue a copy between addresses on a stream of the current device, done by a copy engine. torch's own copy between
    two GPUs takes the path that it finds by their numbers: PCI Express, if this process does not see one of them."""
    _check("cuMemcpyDtoDAsync", _driver().cuMemcpyDtoDAsync_v2(target, source, num_bytes, stream))
