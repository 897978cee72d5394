"""Tensors of a model by name, whole or in part, whether they are read from files or generated (load_format "dummy").

They have their Hugging Face names, such as "model.layers.0.self_attn.q_proj.weight".
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Literal, NamedTuple, Protocol

import torch

from hbserve_core.model.narrow_weight import NarrowWeight, can_be_read_by_groups

Shapes = Mapping[str, tuple[int, ...]]
_SAMPLES = 1 << 17
"""Number of elements of a model from which its digest is made. Each is read from a file by itself, which takes a second
in all."""
_FEWEST_SAMPLES_OF_TENSOR, _MOST_SAMPLES_OF_TENSOR = 4, 64
"""Bounds of the number of elements taken from each tensor; models with experts have tens of thousands of tensors."""


class TensorPart(NamedTuple):
    """Some rows of a tensor and, if it is a matrix, some of their columns. What lies beyond the tensor's end is left
    out."""

    name: str
    rows: slice = slice(None)
    columns: slice = slice(None)

    def ranges(self, shape: tuple[int, ...]) -> tuple[range, range]:
        """Return the rows and columns of this part in a whole tensor of this shape; a vector is a matrix with one
        column."""
        num_rows, num_columns = (*shape, 1)[:2]
        return range(num_rows)[self.rows], range(num_columns)[self.columns]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that this part of a tensor of that shape has."""
        return tuple(map(len, self.ranges(shape)))[: len(shape)]


class SplitGroups(Exception):
    """Error of a part of a narrow weight that does not consist of whole groups. The message says which inputs it would
    have."""


def check_whole_groups(name: str, columns: range, group: int, num_inputs: int) -> None:
    """Raise SplitGroups if the columns of a matrix with `num_inputs` columns begin or end within a group."""
    if columns.start % group or (columns.stop % group and columns.stop != num_inputs):
        raise SplitGroups(
            f"{name}: {group} inputs share a scale, and a rank would have inputs {columns.start} to {columns.stop}"
        )


def columns_by_group(name: str, columns: range, group: int, num_inputs: int) -> tuple[int, range] | None:
    """Return how many of some columns of an 8-bit or 4-bit matrix share a scale, and which columns of scales they have.
    Returns None if kernels cannot read groups of that size, or if the last group is smaller.

    Raises:
        SplitGroups: the columns begin or end within a group.
    """
    if group >= num_inputs:
        return (len(columns), range(1)) if can_be_read_by_groups(len(columns)) else None
    if num_inputs % group or not can_be_read_by_groups(group):
        return None
    check_whole_groups(name, columns, group, num_inputs)
    return group, range(columns.start // group, columns.stop // group)


class TensorSource(Protocol):
    def read(self, parts: Sequence[TensorPart], target: torch.Tensor) -> None:
        """Write parts of tensors below each other to a contiguous target, in its dtype and on its device.

        On a GPU they are ready for later work on the default stream.
        """

    def read_narrow(self, parts: Sequence[TensorPart], device: torch.device) -> NarrowWeight | None:
        """Read parts of matrices with the same inputs below each other, as they are stored. Returns None unless that is
        narrower than 16 bits and kernels can read it.

        Raises:
            SplitGroups: a part begins or ends within inputs that share a scale.
        """

    def sample(self, name: str, count: int) -> torch.Tensor:
        """Return the numbers at `sampled_places` of the whole tensor, float32, on the CPU. They are the same on every
        rank."""

    def kv_scale(self, attention: str, kind: Literal["k", "v"]) -> float:
        """Return the scale of a layer's keys or values in a pool of 8-bit floats. attention: name of the layer's
        attention."""

    def close(self) -> None:
        """Close the source. Nothing can be read afterwards."""


def targets_of(
    parts: Sequence[TensorPart], shapes: Shapes, target: torch.Tensor
) -> Iterator[tuple[TensorPart, torch.Tensor]]:
    """Yield each part with its rows in a target that has all parts below each other. shapes: shapes of the whole
    tensors."""
    first = 0
    for part in parts:
        last = first + part.shape(shapes[part.name])[0]
        yield part, target[first:last]
        first = last


def sampled_places(shape: tuple[int, ...], count: int) -> range:
    """Return `count` places or some more, but fewer than twice as many, spread over a flattened tensor."""
    size = prod(shape)
    return range(0, size, max(1, size // count))


def weights_digest(source: TensorSource, shapes: Shapes) -> str:
    """Return a digest of a sample of all tensors' numbers. By it, two instances can tell whether they have the same
    weights without reading each other's files."""
    whole = hashlib.sha256()
    count = min(_MOST_SAMPLES_OF_TENSOR, max(_FEWEST_SAMPLES_OF_TENSOR, _SAMPLES // len(shapes)))
    for name, shape in sorted(shapes.items()):
        whole.update(hashlib.sha256(f"{name} {shape}".encode() + source.sample(name, count).numpy().tobytes()).digest())
    return whole.hexdigest()[:32]


def row_pieces(num_rows: int, row_size: int, most: int) -> Iterator[slice]:
    """Split rows into runs of at most `most`, in the unit of `row_size`, but of at least one row."""
    count = max(1, most // max(1, row_size))  # a row may be empty
    return (slice(first, min(first + count, num_rows)) for first in range(0, num_rows, count))
