"""Weights that stay as narrow as a checkpoint has them: 8-bit floats, or numbers of 4 bits, with their scales.

All that a checkpoint may have is brought to one form as it is loaded, which is the one that kernels read:
    values   int16 words of two 8-bit floats (O, I / 2), or of four 4-bit numbers (O, I / 4)
    scales   (I / group, O): one for each output and group of inputs, next to those of the neighbouring outputs
    zeros    as scales, uint8: of 4-bit numbers, of which a weight is (number - zero) * scale
Scales of blocks are written out for each of their rows: with blocks of 128 x 128 that makes an 8-bit weight 3 % larger,
and so the rows of several projections may be put below each other, in any order, and shared among ranks.
A word has numbers that are a half, or a quarter, of a run apart, the first of them lowest; a run is a group of inputs
or a part of it. Then a kernel has whole parts of a run as soon as it has masked and shifted, moves nothing between
threads, and reads words that are where 16-bit numbers would be. Runs of 32 inputs have uint8 words of two 4-bit
numbers: with quarters of 8 inputs a tensor core has nothing to multiply.
Shapes: I inputs, O outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

MOST_STEP = 128
"""Inputs that a kernel takes at once, at most."""
_FEWEST_STEP = 32
_FEWEST_OF_4_PARTS = 64


@dataclass(frozen=True, slots=True)
class NarrowWeight:
    """One matrix, of one projection or of several below each other."""

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    """Zero points of 4-bit numbers; None: the numbers are 8-bit floats."""
    group: int
    """Inputs that share a scale."""
    input_order: torch.Tensor | None = None
    """(I,) int64: which input comes at which place (GPTQ's act-order); None: as they are."""
    keeps_inputs: bool = False
    """Whether inputs keep their dtype, and are not made 8-bit floats, however many rows there are."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
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
        """Number of inputs in a run, as the top of this file has it."""
        return step_of(self.group)

    def with_rows(self, order: torch.Tensor) -> "NarrowWeight":
        """The weight with its outputs in another order."""
        zeros = None if self.zeros is None else self.zeros[:, order].contiguous()
        scales = self.scales[:, order].contiguous()
        return replace(self, values=self.values[order], scales=scales, zeros=zeros)

    def widened(self) -> torch.Tensor:
        """(O, I) float32, its inputs in the order in which they come."""
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
    """The largest number of inputs, a power of two, that a group consists of and a kernel takes at once."""
    return min(MOST_STEP, group & -group)


def can_be_read_by_groups(group: int) -> bool:
    """Whether kernels can read weights with so many inputs to a scale."""
    return step_of(group) >= _FEWEST_STEP


def packed(numbers: torch.Tensor, run: int) -> torch.Tensor:
    """Words of numbers (O, I) of 0 to 15."""
    parts, word = (4, torch.int16) if run >= _FEWEST_OF_4_PARTS else (2, torch.uint8)
    by_part = numbers.to(word).contiguous().view(len(numbers), -1, parts, run // parts)
    words = by_part[:, :, 0].clone()
    for part in range(1, parts):
        words |= by_part[:, :, part] << 4 * part
    return words.flatten(1)


def unpacked(words: torch.Tensor, run: int) -> torch.Tensor:
    """What `packed` was given."""
    parts = words.element_size() * 2
    of_runs = words.view(len(words), -1, 1, run // parts)
    return torch.cat([of_runs >> 4 * part & 15 for part in range(parts)], dim=2).flatten(1)


def in_words(values: torch.Tensor, run: int) -> torch.Tensor:
    """Words (O, I / 2) of 8-bit floats (O, I)."""
    halves = values.view(torch.uint8).view(len(values), -1, 2, run // 2)
    return halves.transpose(2, 3).contiguous().view(torch.int16).flatten(1)


def in_order(words: torch.Tensor, run: int) -> torch.Tensor:
    """What `in_words` was given."""
    pairs = words.view(torch.uint8).view(len(words), -1, run // 2, 2)
    return pairs.transpose(2, 3).contiguous().flatten(1).view(torch.float8_e4m3fn)


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
