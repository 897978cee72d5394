"""Rows as 8-bit floats, for products of many rows with weights of 8-bit floats.

Tensor cores multiply these at twice the rate of 16 bits. Each row, or each group of its inputs, is divided by a scale
that makes its largest number the largest 8-bit float (dynamic scales).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin
from hbserve_core.cuda_runner.kernels.experts import ExpertParts

_LARGEST = tl.constexpr(448.0)
_AT_ONCE = 2048
"""Number of inputs of a program, which has whole groups."""
_ROWS = 16
"""Divisor that cuBLAS needs of the number of rows. The contents of rows that are added for it are not used."""


@dataclass(frozen=True, slots=True)
class EightBitRows:
    values: torch.Tensor
    """Rows (padded M, I) float8_e4m3fn, with inputs in the order that words of weights have (see
    model/narrow_weight.py)."""
    scales: torch.Tensor
    """Scales (I / group, padded M) float32, by which the values must be multiplied."""


@dataclass(frozen=True, slots=True)
class EightBitForm:
    """Form of rows that are multiplied with a weight: the number of inputs that share a scale, a run or all, and the
    run of its words."""

    group: int
    run: int

    def of(self, x: torch.Tensor) -> EightBitRows:
        return eight_bit_rows(x, self.group, self.run)

    def of_normed(
        self, x: torch.Tensor, norm: torch.Tensor, eps: float, parts: ExpertParts | None = None
    ) -> tuple[torch.Tensor, EightBitRows]:
        """Norm rows (M, E) by weights (E,). Returns them as they are, and in 8 bits. parts: experts' output, which is
        first added to x in place, rounded once."""
        rows, size = x.shape
        normed, found = torch.empty_like(x), _empty(rows, size, self.group, x.device)
        runs, k = triton.next_power_of_2(size // self.run), 0 if parts is None else parts.experts.shape[1]
        of_parts = (x, x, 0) if parts is None else (parts.rows, parts.experts, parts.first)
        _normed_8_bits[(rows,)](
            x, *of_parts, norm, normed, found.values, found.scales, eps, len(found.values), size, runs, self.run,
            self.group == size, k, 0 if parts is None else parts.count, num_warps=4 if runs * self.run <= 4096 else 8,
            **LAUNCH,
        )  # fmt: skip
        return normed, found


@triton.jit
def _store_8_bits(
    low, high, values, scales, row, runs, num_rows, num_inputs, RUNS: tl.constexpr, RUN: tl.constexpr,
    ONE_GROUP: tl.constexpr,
):  # fmt: skip
    """Write some runs of a row as 8-bit floats. low, high: (RUNS, RUN / 2) float32, halves of the runs. num_rows:
    padded."""
    largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    if ONE_GROUP:
        largest = tl.broadcast_to(tl.max(largest, 0), (RUNS,))
    # Rows of zeros stay zeros.
    scale = tl.maximum(largest, 1e-30) / _LARGEST
    both = tl.reshape(tl.join(low / scale[:, None], high / scale[:, None]), (RUNS, RUN))
    place = values + row * num_inputs + runs[:, None] * RUN + tl.arange(0, RUN)[None, :]
    tl.store(place, both.to(tl.float8e4nv), mask=(runs * RUN < num_inputs)[:, None])
    if ONE_GROUP:
        tl.store(scales + row + 0 * runs, scale, mask=runs == 0)
    else:
        tl.store(scales + runs * num_rows + row, scale, mask=runs * RUN < num_inputs)


@triton.jit(do_not_specialize=["num_rows"])
def _eight_bit_rows(
    x, values, scales, num_rows, num_inputs, RUNS: tl.constexpr, RUN: tl.constexpr, ONE_GROUP: tl.constexpr
):
    begin()
    HALF: tl.constexpr = RUN // 2
    row, runs = tl.program_id(0).to(tl.int64), tl.program_id(1) * RUNS + tl.arange(0, RUNS)
    inside = (runs * RUN < num_inputs)[:, None]
    first = x + row * num_inputs + runs[:, None] * RUN + tl.arange(0, HALF)[None, :]
    low = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(first + HALF, mask=inside, other=0.0).to(tl.float32)
    _store_8_bits(low, high, values, scales, row, runs, num_rows, num_inputs, RUNS, RUN, ONE_GROUP)


@triton.jit(do_not_specialize=["num_rows", "first"])
def _normed_8_bits(
    x, parts, experts, first, weight, normed, values, scales, eps, num_rows, SIZE: tl.constexpr, RUNS: tl.constexpr,
    RUN: tl.constexpr, ONE_GROUP: tl.constexpr, K: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    # A program has one row. If there are parts (K > 0), see `ExpertParts`, they are first added to x.
    begin()
    HALF: tl.constexpr = RUN // 2
    row, runs = tl.program_id(0).to(tl.int64), tl.arange(0, RUNS)
    columns = runs[:, None] * RUN + tl.arange(0, HALF)[None, :]
    inside = columns < SIZE
    here = row * SIZE + columns
    low = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + here + HALF, mask=inside, other=0.0).to(tl.float32)
    if K > 0:
        for each in tl.static_range(K):
            expert = tl.load(experts + row * K + each)
            is_own = columns < tl.where((expert >= first) & (expert < first + X), SIZE, 0)
            part = parts + (row * K + each) * SIZE + columns
            low += tl.load(part, mask=is_own, other=0.0).to(tl.float32)
            high += tl.load(part + HALF, mask=is_own, other=0.0).to(tl.float32)
        low, high = low.to(x.dtype.element_ty), high.to(x.dtype.element_ty)
        tl.store(x + here, low, mask=inside)
        tl.store(x + here + HALF, high, mask=inside)
        low, high = low.to(tl.float32), high.to(tl.float32)
    scale = tl.rsqrt((tl.sum(tl.sum(low * low, 1), 0) + tl.sum(tl.sum(high * high, 1), 0)) / SIZE + eps)
    low = _times(low * scale, weight + columns, inside, normed.dtype.element_ty)
    high = _times(high * scale, weight + HALF + columns, inside, normed.dtype.element_ty)
    tl.store(normed + here, low, mask=inside)
    tl.store(normed + here + HALF, high, mask=inside)
    _store_8_bits(
        low.to(tl.float32), high.to(tl.float32), values, scales, row, runs, num_rows, SIZE, RUNS, RUN, ONE_GROUP
    )


@triton.jit
def _times(x, weight, inside, dtype: tl.constexpr):
    """Multiply by the norm's weights, rounding as `normed_row` in pointwise.py does."""
    return (x.to(dtype).to(tl.float32) * tl.load(weight, mask=inside, other=0.0).to(tl.float32)).to(dtype)


def _empty(rows: int, inputs: int, group: int, device: torch.device) -> EightBitRows:
    padded = triton.cdiv(rows, _ROWS) * _ROWS
    values = torch.empty((padded, inputs), dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty((inputs // group, padded), dtype=torch.float32, device=device)
    return EightBitRows(values, scales)


def eight_bit_rows(x: torch.Tensor, group: int, run: int) -> EightBitRows:
    """Convert rows (M, I) to 8-bit floats. group: number of inputs that share a scale, a run or all of them. run: run
    of the weight's words."""
    (rows, inputs), one_group = x.shape, group == x.shape[1]
    assert one_group or group == run
    found = _empty(rows, inputs, group, x.device)
    runs = triton.next_power_of_2(inputs // run)
    at_once = runs if one_group else min(_AT_ONCE // run, runs)
    _eight_bit_rows[(rows, triton.cdiv(inputs // run, at_once))](
        x, found.values, found.scales, len(found.values), inputs, at_once, run, one_group,
        num_warps=4 if at_once * run <= 4096 else 8, **LAUNCH,
    )  # fmt: skip
    return found
