"""Weights that stay as narrow as they are in a checkpoint: 8-bit floats, or numbers of 4 bits, with their scales.

All formats that a checkpoint may have are converted at loading to the one form that kernels read:
    values   int16 words of two 8-bit floats (O, I / 2), or of four 4-bit numbers (O, I / 4)
    scales   (I / group, O): one for each output and group of inputs, next to those of the neighbouring outputs
    zeros    like scales, uint8, for 4-bit numbers only: a weight is (number - zero) * scale
The scale of a block is repeated for each of its rows. With blocks of 128 x 128 that makes an 8-bit weight 3 % larger,
and lets the rows of several projections be stacked in any order and divided among ranks. A run is a group of inputs or
a part of it. A word has numbers that are a half, or a quarter, of a run apart, the first of them in the lowest bits. So
a kernel only needs to mask and shift to get whole parts of a run, moves nothing between threads, and finds words where
16-bit numbers would be. Runs of 32 inputs have uint8 words of two 4-bit numbers instead: quarters of 8 inputs would be
too small for a tensor core.
Shapes: I inputs, O outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

MOST_STEP = 128
"""Largest number of inputs that a kernel takes at once."""
_FEWEST_STEP = 32
_FEWEST_OF_4_PARTS = 64


@dataclass(frozen=True, slots=True)
class NarrowWeight:
    """Matrix of one projection, or of several stacked below each other."""

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    """Zero points of 4-bit numbers; None if the numbers are 8-bit floats."""
    group: int
    """Number of inputs that share a scale."""
    input_order: torch.Tensor | None = None
    """Input at each place, (I,) int64 (GPTQ's act-order); None if inputs are in their own order."""
    keeps_inputs: bool = False
    """Whether inputs keep their dtype, instead of becoming 8-bit floats, however many rows there are."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix, (O, I)."""
        outputs, width = self.values.shape
        return outputs, width * self.values.element_size() * 8 // self.bits

    @property
    def bits(self) -> int:
        """Bits of each number: 8 or 4."""
        return 8 if self.zeros is None else 4

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.values, self.scales, self.zeros) if each is not None)

    @property
    def run(self) -> int:
        """Number of inputs in a run, as described at the top of this file."""
        return step_of(self.group)

    def with_rows(self, order: torch.Tensor) -> "NarrowWeight":
        """Return the weight with its outputs in another order."""
        zeros = None if self.zeros is None else self.zeros[:, order].contiguous()
        scales = self.scales[:, order].contiguous()
        return replace(self, values=self.values[order], scales=scales, zeros=zeros)

    def widened(self) -> torch.Tensor:
        """Return the weight as (O, I) float32, with its inputs in their own order."""
        if self.zeros is None:
            numbers = in_order(self.values, self.run).float()
        else:
            numbers = unpacked(self.values, self.run).float()
        places = torch.arange(self.shape[1], device=numbers.device) // self.group
        if self.zeros is not None:
            numbers -= self.zeros.t()[:, places]
        numbers *= self.scales.float().t()[:, places]
        if self.input_order is None:
            return numbers
        return torch.empty_like(numbers).index_copy_(1, self.input_order, numbers)


def step_of(group: int) -> int:
    """Return the largest power of two that divides a group of inputs and that a kernel can take at once."""
    return min(MOST_STEP, group & -group)


def can_be_read_by_groups(group: int) -> bool:
    """Return whether kernels can read weights with this many inputs to a scale."""
    return step_of(group) >= _FEWEST_STEP


def packed(numbers: torch.Tensor, run: int) -> torch.Tensor:
    """Pack numbers (O, I) from 0 to 15 into words."""
    parts, word = (4, torch.int16) if run >= _FEWEST_OF_4_PARTS else (2, torch.uint8)
    by_part = numbers.to(word).contiguous().view(len(numbers), -1, parts, run // parts)
    words = by_part[:, :, 0].clone()
    for part in range(1, parts):
        words |= by_part[:, :, part] << 4 * part
    return words.flatten(1)


def unpacked(words: torch.Tensor, run: int) -> torch.Tensor:
    """Undo `packed`: return the numbers (O, I) of such words."""
    parts = words.element_size() * 2
    of_runs = words.view(len(words), -1, 1, run // parts)
    return torch.cat([of_runs >> 4 * part & 15 for part in range(parts)], dim=2).flatten(1)


def in_words(values: torch.Tensor, run: int) -> torch.Tensor:
    """Pack 8-bit floats (O, I) into words (O, I / 2)."""
    halves = values.view(torch.uint8).view(len(values), -1, 2, run // 2)
    return halves.transpose(2, 3).contiguous().view(torch.int16).flatten(1)


def in_order(words: torch.Tensor, run: int) -> torch.Tensor:
    """Undo `in_words`: return the 8-bit floats (O, I) of such words."""
    pairs = words.view(torch.uint8).view(len(words), -1, run // 2, 2)
    return pairs.transpose(2, 3).contiguous().flatten(1).view(torch.float8_e4m3fn)


def fused(parts: Sequence[NarrowWeight | None]) -> NarrowWeight | None:
    """Stack projections of the same inputs below each other. Returns None if one has other groups, or is not narrow."""
    narrow = [part for part in parts if part is not None]
    if len(narrow) < len(parts):
        return None
    first = narrow[0]
    if any(not _are_alike(first, part) for part in narrow):
        return None
    if len(narrow) == 1:
        return first
    zeros = [part.zeros for part in narrow if part.zeros is not None]
    return replace(
        first,
        values=torch.cat([part.values for part in narrow]),
        scales=torch.cat([part.scales for part in narrow], dim=1),
        zeros=torch.cat(zeros, dim=1) if zeros else None,
    )


def _are_alike(one: NarrowWeight, other: NarrowWeight) -> bool:
    def described(weight: NarrowWeight) -> tuple[object, ...]:
        return weight.shape[1], weight.group, weight.values.dtype, weight.scales.dtype, weight.input_order is None

    if described(one) != described(other):
        return False
    return one.input_order is None or other.input_order is None or torch.equal(one.input_order, other.input_order)
