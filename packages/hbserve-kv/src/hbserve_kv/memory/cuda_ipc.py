"""GPU memory that another process can map: CUDA IPC, by the driver's own functions.

torch shares tensors too, but counts references across processes and keeps memory until the other side has given it
back, which a killed peer never does. Here the owner only names its memory, and a peer maps and unmaps it.
Functions: CUDA Driver API, "cuIpcGetMemHandle", "cuIpcOpenMemHandle_v2", "cuIpcCloseMemHandle", "cuMemGetAddressRange",
"cuMemcpyDtoDAsync".
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import msgspec
import torch

HANDLE_BYTES = 64
LAZY_ENABLE_PEER_ACCESS = 1


class DeviceRegion(msgspec.Struct, frozen=True):
    """Where a tensor lies, for another process of this host."""

    handle: bytes
    """Of the allocation."""
    offset: int
    """Of the tensor in it."""
    num_bytes: int
    address: int
    """In the owning process."""


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


def export(tensor: torch.Tensor) -> DeviceRegion:
    """Name the memory of a contiguous CUDA tensor.

    Raises:
        OSError: it cannot be shared, for example because it lies in an expandable segment.
    """
    handle, base, size = _Handle(), ctypes.c_uint64(), ctypes.c_size_t()
    with torch.cuda.device(tensor.device):
        try:
            _check(
                "cuMemGetAddressRange",
                _driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), tensor.data_ptr()),
            )
            _check("cuIpcGetMemHandle", _driver().cuIpcGetMemHandle(ctypes.byref(handle), tensor.data_ptr()))
        except OSError as error:
            raise OSError(
                f"the pool cannot be shared ({error}); with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True "
                "no memory can"
            ) from error
    raw = ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES)
    return DeviceRegion(raw, tensor.data_ptr() - base.value, tensor.nbytes, tensor.data_ptr())


def device_of(uuid: str) -> torch.device:
    """The GPU of that UUID. Raises OSError if this process does not see it."""
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid:
            return torch.device("cuda", index)
    raise OSError(f"GPU {uuid} is not visible to this process; see CUDA_VISIBLE_DEVICES")


def enable_access(device: torch.device, other: torch.device) -> None:
    """Let kernels on `device` use memory of `other` that this process itself has: torch does so when it copies."""
    torch.zeros(1, device=other).copy_(torch.zeros(1, device=device))


@contextmanager
def mapped(region: DeviceRegion, pid: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Process `pid`'s region as uint8 (num_bytes,), while the context lasts: for kernels on `device`, whichever GPU of
    this host has the memory. This process need not see that GPU.

    Raises:
        OSError: it cannot be mapped: the owner is gone, or the GPUs do not reach each other.
    """
    if pid == os.getpid():  # CUDA does not open a handle in the process that made it
        yield _tensor_at(region.address, region.num_bytes, device)
        return
    base = ctypes.c_uint64()
    with torch.cuda.device(device):
        torch.cuda.current_stream().query()  # makes the context, if this process has none on that GPU yet
        handle = _Handle.from_buffer_copy(region.handle)
        _check(
            "cuIpcOpenMemHandle",
            _driver().cuIpcOpenMemHandle_v2(ctypes.byref(base), handle, LAZY_ENABLE_PEER_ACCESS),
        )
    try:
        yield _tensor_at(base.value + region.offset, region.num_bytes, device)
    finally:
        with torch.cuda.device(device):
            _check("cuIpcCloseMemHandle", _driver().cuIpcCloseMemHandle(base))


def copy(target: int, source: int, num_bytes: int, stream: int) -> None:
    """Queue a copy between addresses on a stream of the current device, by a copy engine. torch's own copy between two
    GPUs takes the way that it finds by their numbers: PCI Express, where one of them is not this process's."""
    _check("cuMemcpyDtoDAsync", _driver().cuMemcpyDtoDAsync_v2(target, source, num_bytes, stream))


def _tensor_at(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """uint8 (num_bytes,) over memory of somebody else. Not by __cuda_array_interface__, which needs numpy."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, num_bytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
