"""An engine's pool as the engine describes it: its tensors, and the names of their dimensions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hbserve_kv.memory.arrays import Array, as_array, contiguous_strides, have_common_bytes
from hbserve_kv.memory.layout import HeadRange, Layout, Plane

AXES = ("blocks", "layers", "kv", "tokens", "heads", "dim", "key+value")
"""Names of dimensions of a pool's tensors. `kv` has keys and values, and `dim` the numbers of one head; `key+value` is
both in one dimension."""


class PoolLayout:
    """An engine's pool, for `KVTransferManager`: its tensors, and the names of their dimensions.

    `tensors` is one tensor, or one for each layer, or for each layer several that make it up, such as keys and values.
    `axes` names the dimensions of each of them in order, with names of `AXES`. `blocks` must be among them, in any
    place. The numbers of `dim`, if there is one, must be side by side; other dimensions may have any stride. Examples:

        PoolLayout(pool, "blocks layers kv tokens heads dim")          one tensor, block-major
        PoolLayout(caches, "kv blocks tokens heads dim")               a tensor for each layer
        PoolLayout(zip(keys, values), "blocks tokens heads dim")       two for each layer
        PoolLayout(caches, "blocks heads tokens key+value")            one for each layer, a value behind each key
        PoolLayout(caches, "blocks tokens dim")                        latents (MLA), for all heads

    A tensor is a torch tensor or, on the host, any object that has the buffer protocol or `__dlpack__`. It must not be
    moved or freed while a manager has it.
    """

    def __init__(self, tensors: Any, axes: str) -> None:
        """Raises TypeError or ValueError; says which tensor or axis is wrong."""
        if not isinstance(axes, str):
            raise TypeError(f"axes={axes!r}: expected names in one string, such as 'blocks tokens heads dim'")
        has_keys_beside_values, names = "key+value" in axes.split(), axes.replace("key+value", "dim").split()
        if len(set(names)) != len(names) or not {"blocks"} <= set(names) <= set(AXES):
            raise ValueError(f"axes={axes!r}: expected different ones of {' '.join(AXES)!r}, with 'blocks'")
        if has_keys_beside_values and "kv" in names:
            raise ValueError(f"axes={axes!r}: keys and values are in 'kv' or in 'key+value', not in both")
        self.axes = axes
        layers = [each if isinstance(each, list | tuple) else [each] for each in _one_by_one(tensors)]
        counts = [len(layer) for layer in layers]
        if not all(count == max(counts[0], 1) for count in counts):
            raise ValueError(f"pool: layers of {counts} tensors: expected as many for each, one at least")
        groups = [[_Named(as_array(each), names) for each in layer] for layer in layers]
        found = [each for group in groups for each in group]
        first = found[0]
        for each in found:
            if each.array.device != first.array.device:
                raise ValueError(
                    f"pool: tensors on {first.array.device} and on {each.array.device}: expected one device"
                )
            for name in ("blocks", "layers", "kv", "tokens", "heads"):
                if each.size(name) != first.size(name):
                    raise ValueError(f"pool: tensors of {first.size(name)} and of {each.size(name)} {name}")
        _refuse_overlap([each.array for each in found])
        self.device = _known(first.array.device)
        self.extents = _extents([each.array for each in found])
        planes = [plane for group in groups for plane in self._planes(group)]
        self.layout = Layout(
            first.size("blocks"),
            first.size("tokens"),
            first.size("heads"),
            len(groups) * first.size("layers"),
            planes,
            [extent.num_bytes for extent in self.extents],
            has_keys_beside_values=has_keys_beside_values,
        )

    def _planes(self, group: "Sequence[_Named]") -> Iterator[Plane]:
        for layer in range(group[0].size("layers")):
            for each in group:
                number, start = next(
                    (i, extent.offset_of(each.array)) for i, extent in enumerate(self.extents) if extent.has(each.array)
                )
                for kv in range(each.size("kv")):
                    offset = start + layer * each.stride("layers") + kv * each.stride("kv")
                    block, token, head = (each.stride(name) for name in ("blocks", "tokens", "heads"))
                    yield Plane(number, offset, block, token, head, each.size("dim") * each.array.itemsize)

    @classmethod
    def of_blocks(cls, pool: Any, heads: HeadRange | None) -> "PoolLayout":
        """Make the layout of a contiguous tensor: (num_blocks, …), of which nothing else is known, or with `heads`
        (num_blocks, …, heads, head_dim)."""
        array = as_array(pool)
        size, shape = array.itemsize, array.shape
        if len(shape) < 2 or array.strides != contiguous_strides(shape, size):
            raise ValueError("pool: expected a contiguous tensor (num_blocks, …), or a PoolLayout")
        if heads is not None and (len(shape) < 3 or shape[-2] != heads.count):
            raise ValueError(
                f"pool: heads={heads} need a pool of shape (num_blocks, …, {heads.count}, head_dim), got {shape}"
            )
        made = cls.__new__(cls)
        made.axes, made.device, made.extents = "blocks …", _known(array.device), _extents([array])
        row = array.span // shape[0]
        head = shape[-1] * size if heads is not None else row
        num_heads = heads.count if heads is not None else 1
        plane = Plane(0, 0, row, num_heads * head, head, head)
        num_places = row // (num_heads * head)
        made.layout = Layout(shape[0], num_places, num_heads, 1, [plane], [array.span], is_opaque=True)
        return made


def _known(device: Any) -> Any:
    if device is not None and device.type not in ("cpu", "cuda"):
        raise TypeError(f"pool: expected tensors in memory of the CPU or of a CUDA device, got one on {device}")
    return device


def _refuse_overlap(arrays: Sequence[Array]) -> None:
    """Raise ValueError if tensors share bytes: receiving a block would then change another one. Tensors may interleave
    in the same memory."""
    ordered, near = sorted(arrays, key=lambda each: each.address), list[Array]()
    for array in ordered:
        near = [each for each in near if array.address < each.address + each.span]
        if any(have_common_bytes(each, array) for each in near):
            raise ValueError(
                f"pool: a tensor of shape {array.shape} lies in the same place as another one: expected each once"
            )
        near.append(array)


def _one_by_one(tensors: Any) -> Sequence[Any]:
    """Return the layers of what was given; a single tensor counts as one."""
    if isinstance(tensors, list | tuple | zip):
        found = list(tensors)
        if not found:
            raise ValueError("pool: expected at least one tensor")
        return found
    return [tensors]


class _Named:
    """A tensor with named dimensions. A dimension that it does not have is of size 1."""

    def __init__(self, array: Array, names: Sequence[str]) -> None:
        if len(array.shape) != len(names):
            raise ValueError(f"pool: a tensor of shape {array.shape}; axes={' '.join(names)!r} are {len(names)}")
        self.array = array
        self._axes = dict(zip(names, zip(array.shape, array.strides, strict=True), strict=True))
        if self.size("dim") > 1 and self.stride("dim") != array.itemsize:
            raise ValueError(f"pool: the numbers of a head lie {self.stride('dim')} bytes apart: expected side by side")

    def size(self, name: str) -> int:
        return self._axes.get(name, (1, 0))[0]

    def stride(self, name: str) -> int:
        return self._axes.get(name, (1, 0))[1]


@dataclass(eq=False)
class Extent:
    """Contiguous memory in which one or more tensors of a pool lie. Transports map and register it once."""

    array: Array
    """The array that begins where this memory begins."""
    num_bytes: int

    @property
    def address(self) -> int:
        return self.array.address

    def offset_of(self, array: Array) -> int:
        return array.address - self.address

    def has(self, array: Array) -> bool:
        return 0 <= self.offset_of(array) <= self.num_bytes - array.span


def _extents(arrays: Sequence[Array]) -> list[Extent]:
    """Find the contiguous memory of arrays. Arrays whose spans overlap share an extent: for example views of keys and
    of values that interleave block by block."""
    found: list[Extent] = []
    for array in sorted(arrays, key=lambda each: each.address):
        last = found[-1] if found else None
        if last is not None and array.address < last.address + last.num_bytes:
            last.num_bytes = max(last.num_bytes, last.offset_of(array) + array.span)
        else:
            found.append(Extent(array, array.span))
    return found


def extents_of(memory: Any) -> list[Extent]:
    """Return the extents of one piece of memory; `memory` may be None, which has none."""
    return [] if memory is None else _extents([as_array(memory)])
