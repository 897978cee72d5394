"""Memory of others, as an address, a shape and strides: torch tensors, whatever has the buffer protocol, and whatever
has `__dlpack__`. torch is needed for memory of a GPU only, and is not imported here: who brings tensors has it.

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
"""PyBUF_STRIDES, FORMAT, WRITABLE."""


@dataclass(frozen=True, eq=False)
class Array:
    owner: Any
    """Keeps the memory alive; a torch tensor, where there is one, tells the address anew after it was moved."""
    start: int
    """The address of its first element, as it was when this was made."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Of each dimension, in bytes."""
    itemsize: int
    device: Any = None
    """A torch device; None: the host, of a process that need not have torch."""

    @property
    def address(self) -> int:
        """`share_memory_` moves a tensor."""
        return int(self.owner.data_ptr()) if is_tensor(self.owner) else self.start

    @property
    def span(self) -> int:
        """Bytes from its first to behind its last element."""
        steps = zip(self.shape, self.strides, strict=True)
        return self.itemsize + sum((size - 1) * stride for size, stride in steps)

    @property
    def dims(self) -> "Dims":
        """Its dimensions, the widest stride first."""
        named = [(stride, size) for stride, size in zip(self.strides, self.shape, strict=True) if size > 1]
        return sorted(named, reverse=True)


Dims = list[tuple[int, int]]
"""(stride in bytes, size) of each dimension that has more than one place, the widest first."""
_MOST_STEPS = 1 << 12
"""Of a comparison of two arrays."""


def have_common_bytes(one: Array, other: Array) -> bool:
    """Whether two arrays overlap, and do not only lie in between each other. Of strides that have nothing to do with
    each other it sees what it can within some milliseconds."""
    steps = iter(range(_MOST_STEPS))
    return _meet(other.address - one.address, one.dims, one.itemsize, other.dims, other.itemsize, steps)


def _meet(distance: int, one: Dims, size: int, other: Dims, other_size: int, steps: Iterator[int]) -> bool:
    """distance: from the first byte of one to that of the other."""
    span, other_span = (
        bytes_ + sum(s * (n - 1) for s, n in dims) for dims, bytes_ in ((one, size), (other, other_size))
    )
    if distance >= span or distance + other_span <= 0 or next(steps, None) is None:
        return False
    if not one and not other:
        return True
    if one and other and one[0][0] == other[0][0]:  # only how many such strides they are apart matters
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
    """Raises TypeError: it is no memory that this process can write, or on a GPU and no torch tensor; ValueError: it is
    empty, its strides are not above 0, or numbers share a place."""
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
"""In a format of the struct module, as it is for records of numpy too."""


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
    except (TypeError, BufferError, ValueError):  # ValueError: numpy's answer for types that the protocol does not know
        return None
    if view.readonly:
        raise TypeError(f"pool: expected memory that can be written, got a read-only {type(found).__name__}")
    if _REFERENCES.search(view.format):
        raise TypeError(
            f"pool: expected numbers, got references to objects ({type(found).__name__} of {view.format!r})"
        )
    raw = _Buffer()
    # The view holds the memory for as long as it lives; this only asks where that is.
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
    """The capsule is never marked as used: it frees what it holds when it goes, as DLPack wants it then."""
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
