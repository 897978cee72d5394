"""Products with weights that are narrower than 16 bits (see model/narrow_weight.py), which are widened in registers.

`narrow_skinny` is the skinny product of few_rows_linear.py, tile by tile and with all that is done on the way out, but
its weights are 8-bit floats or 4-bit numbers. What is read of them are their bytes and their scales; they become
numbers of the inputs' type, exactly, on the way to the tensor cores, and each group's sum is multiplied by its scale in
float32. The rows keep their 16 bits: for few of them nothing but the weights' bytes counts. More than 128 rows are
several tiles, and programs with the same weights run beside each other, so that the second of them finds those in the
second-level cache.

`widen` makes 16-bit weights of them, in a scratch, for cuBLAS: with many rows the tensor cores are what counts, and
each weight is widened once instead of once for each tile of rows.
Shapes: M rows, I inputs, O outputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin, num_processors, prefetch
from hbserve_core.cuda_runner.kernels.few_rows_linear import (
    TILE_OUTPUTS,
    finish_tile,
    num_tiles,
    row_scales_of,
    sum_of_splits,
    weight_rows,
)
from hbserve_core.model.narrow_weight import MOST_STEP, NarrowWeight

_AHEAD = 256
"""Bytes of each weight row that a program fetches while the kernel in front still runs."""
_MOST_TILE_ROWS, _FEWEST_TILE_ROWS = 128, 64
"""Of one tile, where there are several of them."""
_WIDENED = 32, 128
"""Outputs, and inputs, of a program of `widen`."""


@triton.jit
def _group_product(
    x, weight, zeros, start, last, m, num_rows, result, STEP: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """(OUTPUTS, ROWS) more, of STEP inputs from `start` on. x, weight: places of rows. zeros: (OUTPUTS,), of 4 bits."""
    used = (m < num_rows)[:, None]
    if BITS == 8:
        columns = (start + tl.arange(0, STEP))[None, :]
        block = tl.load(weight + columns, mask=columns < last, other=0.0)
        given = tl.load(x + columns, mask=used & (columns < last), other=0.0)
        result = tl.dot(block.to(given.dtype), tl.trans(given), result, input_precision="ieee")
    else:
        HALF: tl.constexpr = STEP // 2
        j = tl.arange(0, HALF)[None, :]
        both = tl.load(weight + start // 2 + j)
        low = (both & 15).to(tl.int16) - zeros[:, None]
        high = (both >> 4).to(tl.int16) - zeros[:, None]
        first = tl.load(x + start + j, mask=used, other=0.0)
        second = tl.load(x + start + HALF + j, mask=used, other=0.0)
        result = tl.dot(low.to(first.dtype), tl.trans(first), result, input_precision="ieee")
        result = tl.dot(high.to(second.dtype), tl.trans(second), result, input_precision="ieee")
    return result


@triton.jit
def _sum_of_groups(
    x, weight, scales, zeros, rows, first, last, m, num_rows, total, group_size, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, BITS: tl.constexpr, ONE_GROUP: tl.constexpr,
):  # fmt: skip
    """(OUTPUTS, ROWS) of inputs from `first` to `last`. rows: of the weight; total: all of them."""
    result = tl.zeros((OUTPUTS, ROWS), tl.float32)
    zero = tl.zeros((OUTPUTS,), tl.int16)
    if ONE_GROUP and BITS == 4:
        zero = tl.load(zeros + rows).to(tl.int16)
    for start in tl.range(first, last, STEP, num_stages=STAGES):
        if ONE_GROUP:
            result = _group_product(x, weight, zero, start, last, m, num_rows, result, STEP, BITS)
        else:
            place = start // group_size * total + rows
            if BITS == 4:
                zero = tl.load(zeros + place).to(tl.int16)
            part = tl.zeros((OUTPUTS, ROWS), tl.float32)
            part = _group_product(x, weight, zero, start, last, m, num_rows, part, STEP, BITS)
            result += part * tl.load(scales + place).to(tl.float32)[:, None]
    if ONE_GROUP:
        result *= tl.load(scales + rows).to(tl.float32)[:, None]
    return result


@triton.jit(do_not_specialize=["num_rows"])
def _narrow_skinny(
    x, weight, bias, out, given_squares, eps, next_norm, scaled, squares, parts, arrived, num_rows, num_inputs,
    num_outputs, span, scales, zeros, group_size, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr,
    AHEAD: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr,
    HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, SCALES: tl.constexpr, TILES: tl.constexpr, PADDED_TILES: tl.constexpr,
    ROW_TILES: tl.constexpr, BITS: tl.constexpr, ONE_GROUP: tl.constexpr,
):  # fmt: skip
    tile, split, m = tl.program_id(0) // ROW_TILES, tl.program_id(1), tl.arange(0, ROWS)
    first_row = tl.program_id(0) % ROW_TILES * ROWS
    out += first_row.to(tl.int64) * num_outputs
    num_rows -= first_row
    first = split * span
    last = tl.minimum(first + span, num_inputs)
    rows = weight_rows(tile, num_outputs, OUTPUTS, GATED)
    weight += rows[:, None].to(tl.int64) * (num_inputs * BITS // 8)
    ahead = first * BITS // 8 + tl.arange(0, AHEAD // 128) * 128
    prefetch(weight + tl.minimum(ahead, last * BITS // 8 - 1)[None, :])
    begin()
    row_scales = tl.full((1, ROWS), 1.0, tl.float32)
    if TILES > 0:
        row_scales = row_scales_of(given_squares, num_inputs, eps, TILES, PADDED_TILES, ROWS)
    x += (first_row + m).to(tl.int64)[:, None] * num_inputs
    result = row_scales * _sum_of_groups(
        x, weight, scales, zeros, rows, first, last, m, num_rows, num_outputs * 2 if GATED else num_outputs,
        group_size, ROWS, OUTPUTS, STEP, STAGES, BITS, ONE_GROUP,
    )  # fmt: skip
    is_whole = SPLITS == 1
    if SPLITS > 1:
        own = parts + tile * (SPLITS * OUTPUTS * ROWS)
        is_whole, result = sum_of_splits(result, own, arrived + tile, split, SPLITS, OUTPUTS, ROWS)
    if is_whole:
        finish_tile(
            result, bias, out, next_norm, scaled, squares, tile, num_rows, num_outputs, ROWS, OUTPUTS, GATED, GELU,
            HAS_BIAS, ADDS, SCALES,
        )  # fmt: skip


class NarrowMatrix:
    """A narrow weight as `skinny_linear` and `add_skinny_linear` take one that brings its own kernel."""

    def __init__(self, weight: NarrowWeight) -> None:
        assert all(each is None or each.is_contiguous() for each in (weight.values, weight.scales, weight.zeros))
        self.weight = weight
        self.values = weight.values
        self.shape = weight.shape
        self._most_step = weight.run if weight.zeros is not None or weight.group < weight.shape[1] else MOST_STEP
        self.scales = weight.scales
        self.zeros = weight.scales if weight.zeros is None else weight.zeros
        """Something to point at, where there are none."""
        self.bits = 8 if weight.zeros is None else 4

    def __len__(self) -> int:
        return self.shape[0]

    def step(self, step: int) -> int:
        """Inputs that are taken at once where it would be so many of 16 bits. Those of 4 bits are whole runs."""
        return self._most_step if self.bits == 4 else min(step, self._most_step)

    def arranged(self, x: torch.Tensor) -> torch.Tensor:
        """Rows (M, I) with their inputs in the weight's order."""
        order = self.weight.input_order
        return x if order is None else x.index_select(1, order)

    def launch(
        self, grid: tuple[int, int], x: torch.Tensor, others: tuple[Any, ...], options: dict[str, Any],
        row_tiles: int = 1,
    ) -> None:  # fmt: skip
        """Launch the product. others, options: see `OwnKernel`."""
        _narrow_skinny[(grid[0] * row_tiles, grid[1])](
            x, self.values, *others, self.scales, self.zeros, self.weight.group, **options, ROW_TILES=row_tiles,
            BITS=self.bits, ONE_GROUP=len(self.scales) == 1, num_warps=4, **LAUNCH,
        )  # fmt: skip


def tiled_linear(
    x: torch.Tensor, weight: NarrowMatrix, bias: torch.Tensor | None, out: torch.Tensor, adds: bool
) -> None:
    """Write x (M, I) times the weight transposed, plus bias (O,), to `out` (M, O), or add it there, rounded once."""
    count, inputs = x.shape
    outputs, tiles = weight.shape[0], num_tiles(weight.shape[0], False)
    is_wide = x.dtype.itemsize > 2
    tile_rows = max(16, min(_MOST_TILE_ROWS, triton.next_power_of_2(count)))
    if is_wide or tiles * triton.cdiv(count, tile_rows) < num_processors(x.device):
        tile_rows = min(tile_rows, _FEWEST_TILE_ROWS)
    row_tiles, step = triton.cdiv(count, tile_rows), weight.step(64 if is_wide or tile_rows > 64 else MOST_STEP)
    x = weight.arranged(x)
    span = triton.cdiv(inputs, step) * step
    others = x if bias is None else bias, out, x, 0.0, x, x, x, x, x, count, inputs, outputs, span
    options = {
        "ROWS": tile_rows, "OUTPUTS": TILE_OUTPUTS, "STEP": step, "AHEAD": _AHEAD, "SPLITS": 1,
        "STAGES": 2 if is_wide else 4, "GATED": False, "GELU": False, "HAS_BIAS": bias is not None, "ADDS": adds,
        "SCALES": False, "TILES": 0, "PADDED_TILES": 1,
    }  # fmt: skip
    weight.launch((tiles, 1), x, others, options, row_tiles)


@triton.jit
def _widen(
    weight, scales, zeros, out, num_inputs, num_outputs, group_size, OUTPUTS: tl.constexpr, STEP: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    begin()
    rows, start = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS), tl.program_id(0) * STEP
    inside = rows < num_outputs
    place = start // group_size * num_outputs + rows
    scale = tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)[:, None]
    columns = (start + tl.arange(0, STEP))[None, :]
    target = out + rows[:, None].to(tl.int64) * num_inputs
    if BITS == 8:
        both = inside[:, None] & (columns < num_inputs)
        block = tl.load(weight + rows[:, None].to(tl.int64) * num_inputs + columns, mask=both, other=0.0)
        tl.store(target + columns, (block.to(tl.float32) * scale).to(out.dtype.element_ty), mask=both)
    else:
        HALF: tl.constexpr = STEP // 2
        j = tl.arange(0, HALF)[None, :]
        zero = tl.load(zeros + place, mask=inside, other=0).to(tl.float32)[:, None]
        here = weight + rows[:, None].to(tl.int64) * (num_inputs // 2) + start // 2 + j
        both = tl.load(here, mask=inside[:, None], other=0)
        low = ((both & 15).to(tl.float32) - zero) * scale
        high = ((both >> 4).to(tl.float32) - zero) * scale
        tl.store(target + start + j, low.to(out.dtype.element_ty), mask=inside[:, None])
        tl.store(target + start + HALF + j, high.to(out.dtype.element_ty), mask=inside[:, None])


def widen(weight: NarrowMatrix, dtype: torch.dtype) -> torch.Tensor:
    """(O, I) of a wider type, inputs in the weight's own order."""
    outputs, inputs = weight.shape
    out = torch.empty((outputs, inputs), dtype=dtype, device=weight.values.device)
    at_once, step = _WIDENED[0], weight.step(_WIDENED[1])
    _widen[(triton.cdiv(inputs, step), triton.cdiv(outputs, at_once))](
        weight.values, weight.scales, weight.zeros, out, inputs, outputs, weight.weight.group, OUTPUTS=at_once,
        STEP=step, BITS=weight.bits, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return out
