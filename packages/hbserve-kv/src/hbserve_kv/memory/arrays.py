"""Memory that others own, described by address, shape and strides: torch tensors, and objects that have the buffer
protocol or `__dlpack__`. torch is needed only for memory of a GPU, and is not imported here: whoever passes a tensor
has imported it.

Structures: CPython's `Py_buffer` (PEP 3118), and `DLManagedTensor` of DLPack before version 1.
"""

import ctypes
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

DLPACK_CPU, DLPACK_PINNED = 1, 3
PYBUF_RECORDS = 0x0018 | 0x0004 | 0x0001
"""CPython's flags PyBUF_STRIDES, PyBUF_FORMAT and PyBUF_WRITABLE."""


@dataclass(frozen=True, eq=False)
class Array:
    owner: Any
    """The object that keeps the memory alive. If it is a torch tensor, it also knows the address after a move."""
    start: int
    """Address of the first element when this was made."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Stride of each dimension, in bytes."""
    itemsize: int
    device: Any = None
    """The torch device; None: host memory, for which the process need not have torch."""

    @property
    def address(self) -> int:
        """Address of the first element now: `share_memory_` moves a tensor."""
        return int(self.owner.data_ptr()) if is_tensor(self.owner) else self.start

    @property
    def span(self) -> int:
        """Number of bytes from the beginning of the first element to the end of the last one."""
        steps = zip(self.shape, self.strides, strict=True)
        return self.itemsize + sum((size - 1) * stride for size, stride in steps)

    @property
    def dims(self) -> "Dims":
        """Dimensions of the array that have more than one place, the widest stride first."""
        named = [(stride, size) for stride, size in zip(self.strides, self.shape, strict=True) if size > 1]
        return sorted(named, reverse=True)


Dims = list[tuple[int, int]]
"""(stride in bytes, size) of each dimension that has more than one place, the widest first."""
_MOST_STEPS = 1 << 12
"""Limit of steps for comparing two arrays."""


def have_common_bytes(one: Array, other: Array) -> bool:
    """Whether two arrays have bytes in common; arrays that only interleave do not.

    If their strides are unrelated, the search ends after some milliseconds, and finds only what it can until then.
    """
    steps = iter(range(_MOST_STEPS))
    return _meet(other.address - one.address, one.dims, one.itemsize, other.dims, other.itemsize, steps)


def _meet(distance: int, one: Dims, size: int, other: Dims, other_size: int, steps: Iterator[int]) -> bool:
    """Whether elements meet. `distance` is from the first byte of `one` to that of `other`."""
    span, other_span = (
        bytes_ + sum(s * (n - 1) for s, n in dims) for dims, bytes_ in ((one, size), (other, other_size))
    )
    if distance >= span or distance + other_span <= 0 or next(steps, None) is None:
        return False
    if not one and not other:
        return True
    if one and other and one[0][0] == other[0][0]:  # only the number of such strides between them matters
        stride, (rest, other_rest) = one[0][0], (one[1:], other[1:])
        inner, other_inner = span - stride * (one[0][1] - 1), other_span - stride * (other[0][1] - 1)
        least, most = -((distance + other_inner) // stride), -((distance - inner) // stride)
        apart = range(max(least, 1 - one[0][1]), min(most, other[0][1] - 1) + 1)
        return any(_meet(distance + k * stride, rest, size, other_rest, other_size, steps) for k in apart)
    if not other or (one and one[0] > other[0]):
        (stride, count), rest = one[0], one[1:]
        return any(_meet(distance - i * stride, rest, size, other, other_size, steps) for i in range(count))
    return _meet(-distance, other, other_size, one, size, steps)


def is_tensor(found: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(found, torch.Tensor)


def as_array(found: Any) -> Array:
    """Describe memory that someone else owns.

    Raises TypeError: it is not memory that this process can write, or it is on a GPU and not a torch tensor.
    Raises ValueError: it is empty, a stride is not above 0, or numbers share a place.
    """
    array = _of_tensor(found) if is_tensor(found) else _of_buffer(found) or _of_dlpack(found)
    steps = zip(array.shape, array.strides, strict=True)
    if 0 in array.shape or any(stride <= 0 < size - 1 for size, stride in steps) or _overlaps(array):
        raise ValueError(
            f"pool: expected memory that is not empty, with each number in a place of its own and in order, got shape "
            f"{array.shape} and strides of {array.strides} bytes"
        )
    return array


def _overlaps(array: Array) -> bool:
    """Whether a step along a dimension is shorter than what lies within it, as in windows over other memory."""
    within = array.itemsize
    for stride, size in reversed(array.dims):
        if stride < within:
            return True
        within += (size - 1) * stride
    return False


def _of_tensor(tensor: Any) -> Array:
    if str(tensor.layout) != "torch.strided":
        raise TypeError(f"pool: expected dense tensors, got one of {tensor.layout}")
    size = tensor.element_size()
    strides = tuple(stride * size for stride in tensor.stride())
    return Array(tensor, tensor.data_ptr(), tuple(tensor.shape), strides, size, tensor.device)


_REFERENCES = re.compile(r"(^|[^a-zA-Z])O($|:)")
"""A reference to an object, in a format of the struct module; numpy describes its records in such formats too."""


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_ssize_t)),
        ("strides", ctypes.POINTER(ctypes.c_ssize_t)),
        ("suboffsets", ctypes.POINTER(ctypes.c_ssize_t)),
        ("internal", ctypes.c_void_p),
    )


def _of_buffer(found: Any) -> Array | None:
    try:
        view = memoryview(found)
    except (TypeError, BufferError, ValueError):  # numpy raises ValueError for types that the protocol does not know
        return None
    if view.readonly:
        raise TypeError(f"pool: expected memory that can be written, got a read-only {type(found).__name__}")
    if _REFERENCES.search(view.format):
        raise TypeError(
            f"pool: expected numbers, got references to objects ({type(found).__name__} of {view.format!r})"
        )
    raw = _Buffer()
    # The view keeps the memory for as long as it lives; this only asks for the address.
    api = ctypes.pythonapi
    if api.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(raw), PYBUF_RECORDS):
        raise TypeError(f"pool: the memory of {type(found).__name__} cannot be described")
    address = int(raw.buf or 0)
    api.PyBuffer_Release(ctypes.byref(raw))
    return Array(view, address, tuple(view.shape or ()), tuple(view.strides or ()), view.itemsize)


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _of_dlpack(found: Any) -> Array:
    """Describe memory that is exported by DLPack. The capsule is never marked as used, so it frees what it holds when
    it is collected, as DLPack asks for."""
    if not hasattr(found, "__dlpack__"):
        raise TypeError(
            f"pool: expected torch tensors, or writable memory with the buffer protocol or __dlpack__, got "
            f"{type(found).__name__}"
        )
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    try:
        capsule = found.__dlpack__()
        tensor = _DLTensor.from_address(pointer(capsule, b"dltensor"))
    except Exception as error:  # whatever its owner raises
        raise TypeError(
            f"pool: the memory of {type(found).__name__} cannot be exported by __dlpack__: {error}"
        ) from error
    if tensor.device_type not in (DLPACK_CPU, DLPACK_PINNED):
        raise TypeError("pool: memory of a GPU is taken as torch tensors: torch.from_dlpack makes them")
    shape = tuple(tensor.shape[: tensor.ndim])
    itemsize = tensor.bits * tensor.lanes // 8
    steps = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else contiguous_strides(shape, 1)
    strides = tuple(step * itemsize for step in steps)
    return Array((found, capsule), (tensor.data or 0) + tensor.byte_offset, shape, strides, itemsize)


def contiguous_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    strides = [itemsize]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))
