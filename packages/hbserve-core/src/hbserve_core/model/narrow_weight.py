"""Weights that stay as narrow as a checkpoint has them: 8-bit floats, or numbers of 4 bits, with their scales.

All that a checkpoint may have is brought to one form as it is loaded, which is the one that kernels read:
    values   (O, I) float8_e4m3fn, or (O, I / 2) uint8 of two 4-bit numbers each
    scales   (I / group, O): one for each output and group of inputs, next to those of the neighbouring outputs
    zeros    as scales, uint8: of 4-bit numbers, of which a weight is (number - zero) * scale
Scales of blocks are written out for each of their rows: with blocks of 128 x 128 that makes an 8-bit weight 3 % larger,
and so the rows of several projections may be put below each other, in any order, and shared among ranks.
A byte of 4-bit numbers has two that are half a run apart: inputs j (low) and j + run / 2 of a run that is a group or a
part of it. Then a kernel has whole halves of a run as soon as it has masked and shifted, and moves nothing between
threads.
Shapes: I inputs, O outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MOST_STEP = 128
"""Inputs that a kernel takes at once, at most."""
_FEWEST_STEP = 32
"""With half as many a tensor core has nothing to multiply."""


@dataclass(frozen=True, slots=True)
class NarrowWeight:
    """One matrix, of one projection or of several below each other."""

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    """None: 8-bit floats."""
    group: int
    """Inputs that share a scale; the last group may be smaller."""
    input_order: torch.Tensor | None = None
    """(I,) int64: which input comes at which place (GPTQ's act-order); None: as they are."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
        outputs, width = self.values.shape
        return outputs, width if self.zeros is None else 2 * width

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.values, self.scales, self.zeros) if each is not None)

    @property
    def run(self) -> int:
        """Inputs of a run of 4-bit numbers."""
        return step_of(self.group)

    def with_rows(self, order: torch.Tensor) -> "NarrowWeight":
        """The same outputs in another order."""
        # As bytes: not every device can gather 8-bit floats.
        values = self.values.view(torch.uint8)[order].view(self.values.dtype)
        zeros = None if self.zeros is None else self.zeros[:, order].contiguous()
        return NarrowWeight(values, self.scales[:, order].contiguous(), zeros, self.group, self.input_order)

    def widened(self) -> torch.Tensor:
        """(O, I) float32, its inputs as they are."""
        numbers = self.values.float() if self.zeros is None else unpacked(self.values, self.run).float()
        places = torch.arange(self.shape[1], device=numbers.device) // self.group
        if self.zeros is not None:
            numbers -= self.zeros.t()[:, places]
        numbers *= self.scales.float().t()[:, places]
        if self.input_order is None:
            return numbers
        return torch.empty_like(numbers).index_copy_(1, self.input_order, numbers)


def step_of(group: int) -> int:
    """The largest number of inputs, a power of two, that a group consists of and a kernel takes at once."""
    return min(MOST_STEP, group & -group)


def can_be_read_by_groups(group: int) -> bool:
    """Whether kernels can read weights with so many inputs to a scale."""
    return step_of(group) >= _FEWEST_STEP


def packed(numbers: torch.Tensor, run: int) -> torch.Tensor:
    """(O, I / 2) uint8 of numbers (O, I) of 0 to 15."""
    halves = numbers.to(torch.uint8).contiguous().view(len(numbers), -1, 2, run // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def unpacked(values: torch.Tensor, run: int) -> torch.Tensor:
    """What `packed` was given."""
    bytes_of_runs = values.view(len(values), -1, 1, run // 2)
    return torch.cat((bytes_of_runs & 15, bytes_of_runs >> 4), dim=2).flatten(1)


def fused(parts: Sequence[NarrowWeight | None]) -> NarrowWeight | None:
    """Projections of the same inputs below each other; None where one has other groups, or is not narrow."""
    narrow = [part for part in parts if part is not None]
    if len(narrow) < len(parts):
        return None
    first = narrow[0]
    if any(not _are_alike(first, part) for part in narrow):
        return None
    if len(narrow) == 1:
        return first
    zeros = [part.zeros for part in narrow if part.zeros is not None]
    return NarrowWeight(
        torch.cat([part.values.view(torch.uint8) for part in narrow]).view(first.values.dtype),
        torch.cat([part.scales for part in narrow], dim=1),
        torch.cat(zeros, dim=1) if zeros else None,
        first.group,
        first.input_order,
    )


def _are_alike(one: NarrowWeight, other: NarrowWeight) -> bool:
    def described(weight: NarrowWeight) -> tuple[object, ...]:
        return weight.shape[1], weight.group, weight.values.dtype, weight.scales.dtype, weight.input_order is None

    if described(one) != described(other):
        return False
    return one.input_order is None or other.input_order is None or torch.equal(one.input_order, other.input_order)
