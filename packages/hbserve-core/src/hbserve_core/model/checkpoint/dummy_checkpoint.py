"""Generated weights, for load_format "dummy": the same on every kind of device and for every number of ranks.

A number follows from the tensor's name and from its place in the whole tensor, not from the previous number, so a rank
makes no more than its part, on its own device. Only integer arithmetic and float operations that every device rounds
alike are used: logarithms and cosines differ between mathematical libraries, and torch's generators between devices.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from hbserve_core.model.checkpoint.tensor_source import (
    Shapes,
    TensorPart,
    columns_by_group,
    row_pieces,
    sampled_places,
    targets_of,
)
from hbserve_core.model.narrow_weight import NarrowWeight, fused, in_words, packed, step_of
from hbserve_core.model.quantization import Packing

_STD = 0.02
# Mean and standard deviation of the sum of four uniform, independent bytes.
_MEAN_OF_SUM = 510
_STD_OF_SUM = (4 * (256**2 - 1) / 12) ** 0.5
# Numbers that are made at once, which take some 16 bytes each meanwhile. On a CPU these are fewer than torch would
# share among its threads: on a busy machine, threads that meet after every short operation wait for each other most of
# the time.
_CPU_PIECE = (1 << 15) - 1
_GPU_PIECE = 1 << 22
# Scales of narrow weights: with them, no number is larger than the largest 8-bit float, and almost none exceeds 4 bits.
_SCALE_OF_8_BITS = 2.0**-12
_SCALE_OF_4_BITS, _ZERO_OF_4_BITS = 2.0**-7, 8


class DummyCheckpoint:
    """Source of generated weights: norms are 1, biases 0, and all else is about normal with a standard deviation of
    0.02.

    They are only about normal because each is a sum of four uniform numbers, so there are 1021 different ones, none
    beyond 3.5 deviations. In tensors of more than 2^32 elements they repeat. In a quantised model, the projections of
    layers are rounded to its format, with one scale for all.
    """

    def __init__(
        self,
        shapes: Shapes,
        scale_block: tuple[int, int] | None = None,
        packing: Packing | None = None,
        keeps_inputs: bool = False,
    ) -> None:
        """scale_block, packing, keeps_inputs: see `ModelConfig`."""
        self._shapes, self._keeps_inputs = shapes, keeps_inputs
        self._scale_block, self._packing = scale_block, packing

    def read(self, parts: Sequence[TensorPart], target: torch.Tensor) -> None:
        for part, own in targets_of(parts, self._shapes, target):
            self._make(part, own)

    def _make(self, part: TensorPart, target: torch.Tensor) -> None:
        constant = _constant(part.name)
        if constant is not None:
            target.fill_(constant)
            return
        for piece, numbers in self._pieces(part, target.device):
            target[piece].copy_(self._rounded(part.name, numbers))

    def read_narrow(self, parts: Sequence[TensorPart], device: torch.device) -> NarrowWeight | None:
        return fused([self._narrow(part, device) for part in parts])

    def _narrow(self, part: TensorPart, device: torch.device) -> NarrowWeight | None:
        if not self._is_narrow(part.name):
            return None
        rows, columns = part.ranges(self._shapes[part.name])
        whole = self._shapes[part.name][1]
        by_group = columns_by_group(part.name, columns, self._group(whole), whole)
        if by_group is None:
            return None
        group, num_groups = by_group[0], len(by_group[1])
        if self._packing is None:
            values = torch.empty((len(rows), len(columns)), dtype=torch.float8_e4m3fn, device=device)
            for piece, numbers in self._pieces(part, device):
                values[piece].copy_(numbers / _SCALE_OF_8_BITS)
            scales = torch.full((num_groups, len(rows)), _SCALE_OF_8_BITS, device=device)
            words = in_words(values, step_of(group))
            return NarrowWeight(words, scales, None, group, keeps_inputs=self._keeps_inputs)
        pieces = (numbers for _, numbers in self._pieces(part, device))
        values = torch.cat([packed(_of_4_bits(piece) + _ZERO_OF_4_BITS, step_of(group)) for piece in pieces])
        scales = torch.full((num_groups, len(rows)), _SCALE_OF_4_BITS, dtype=torch.float16, device=device)
        return NarrowWeight(values, scales, torch.full_like(scales, _ZERO_OF_4_BITS, dtype=torch.uint8), group)

    def sample(self, name: str, count: int) -> torch.Tensor:
        places = sampled_places(self._shapes[name], count)
        constant = _constant(name)
        if constant is not None:
            return torch.full((len(places),), constant, dtype=torch.float32, device="cpu")
        places_of_numbers = torch.tensor(places, dtype=torch.int64, device="cpu").to(torch.int32)
        return self._rounded(name, _numbers(places_of_numbers, _keys(name)))

    def kv_scale(self, attention: str, kind: Literal["k", "v"]) -> float:
        return 1.0

    def close(self) -> None:
        """Do nothing: there is nothing to close."""

    def _pieces(self, part: TensorPart, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield runs of rows of a part, with their numbers, float32."""
        rows, columns = part.ranges(self._shapes[part.name])
        within_row = torch.arange(columns.start, columns.stop, dtype=torch.int32, device=device)
        most, keys = _CPU_PIECE if device.type == "cpu" else _GPU_PIECE, _keys(part.name)
        for piece in row_pieces(len(rows), len(columns), most):
            first = torch.arange(rows[piece].start, rows[piece].stop, dtype=torch.int64, device=device)
            places = (first * self._shapes[part.name][1]).to(torch.int32)[:, None] + within_row
            yield piece, _numbers(places, keys)

    def _is_narrow(self, name: str) -> bool:
        """Return whether a tensor is quantised in the model's real checkpoints, as all matrices of a layer are except a
        router."""
        if self._scale_block is None and self._packing is None:
            return False
        return ".layers." in name and len(self._shapes[name]) == 2 and not name.endswith(".gate.weight")

    def _group(self, num_inputs: int) -> int:
        """Return how many inputs share a scale in a narrow matrix with `num_inputs`."""
        if self._packing is None:
            assert self._scale_block is not None
            return self._scale_block[1]
        return num_inputs if self._packing.group_size == -1 else self._packing.group_size

    def _rounded(self, name: str, numbers: torch.Tensor) -> torch.Tensor:
        """Round numbers (float32) to the width of the tensor."""
        if not self._is_narrow(name):
            return numbers
        if self._packing is None:
            return (numbers / _SCALE_OF_8_BITS).to(torch.float8_e4m3fn).float() * _SCALE_OF_8_BITS
        return _of_4_bits(numbers) * _SCALE_OF_4_BITS


def _of_4_bits(numbers: torch.Tensor) -> torch.Tensor:
    return (numbers / _SCALE_OF_4_BITS).round_().clamp_(-_ZERO_OF_4_BITS, 15 - _ZERO_OF_4_BITS)


def _constant(name: str) -> float | None:
    if name.endswith(".bias"):
        return 0.0
    return 1.0 if "norm" in name else None


def _keys(name: str) -> tuple[int, int]:
    digest = hashlib.sha256(name.encode()).digest()
    first, second = (int.from_bytes(digest[i : i + 4], "big", signed=True) for i in (0, 4))
    return first, second


def _numbers(places: torch.Tensor, keys: tuple[int, int]) -> torch.Tensor:
    """Compute the numbers, float32, at places in a tensor: int32, counted modulo 2^32. The places are overwritten."""
    bits = _mix(places, keys)
    sums = (bits & 0x00FF00FF) + ((bits >> 8) & 0x00FF00FF)
    sums += sums >> 16
    sums &= 0x7FF
    sums -= _MEAN_OF_SUM
    # The conversion is exact, so the product is all that is rounded.
    return sums.to(torch.float32).mul_(_STD / _STD_OF_SUM)


def _mix(x: torch.Tensor, keys: tuple[int, int]) -> torch.Tensor:
    """Hash integers in place by Wellons's lowbias32, as in kernels/sampling.py, with one key before it and one within
    it.

    A single key before it would not do: tensors would then hold parts of each other's numbers in another order. torch
    shifts int32 arithmetically, so masks remove the copies of the sign. Its products wrap.
    """
    x += keys[0]
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= keys[1]
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - (1 << 32)
    x ^= (x >> 16) & 0xFFFF
    return x
