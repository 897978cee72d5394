"""Products with weights that are narrower than 16 bits (see model/narrow_weight.py), which are widened in registers.

`narrow_skinny` is the skinny product of few_rows_linear.py, tile by tile and with everything that is done when a tile
is written, but its weights are 8-bit floats or 4-bit numbers. Only their bytes and scales are read. They are converted
exactly to the inputs' type on the way to the tensor cores, and each group's sum is multiplied by its scale in float32.
The rows keep their 16 bits: if there are few, only the weights' bytes count. More than 128 rows are several tiles, and
programs with the same weights run beside each other, so that the second of them finds the weights in the second-level
cache.

`widen` makes 16-bit weights of them, in a scratch, for cuBLAS. With many rows the tensor cores are the limit, and each
weight is widened once instead of once for each tile of rows.
Shapes: M rows, I inputs, O outputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.attention_parts import widened_8
from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin, num_processors, prefetch
from hbserve_core.cuda_runner.kernels.eight_bit_rows import EightBitRows, eight_bit_rows
from hbserve_core.cuda_runner.kernels.few_rows_linear import (
    TILE_OUTPUTS,
    finish_tile,
    num_tiles,
    row_scales_of,
    sum_of_splits,
    weight_rows,
)
from hbserve_core.cuda_runner.kernels.narrow_few_rows import few_rows_linear, few_rows_tiling, suits_few_rows
from hbserve_core.cuda_runner.kernels.widening import widened_4, widened_4_of_bytes
from hbserve_core.model.narrow_weight import MOST_STEP, NarrowWeight

_AHEAD = 256
"""Bytes of each weight row that a program fetches while the previous kernel still runs."""
_STAGES = {
    8: {16: (3, 6, 4), 32: (2, 6, 4), 64: (2, 4, 3), 128: (1, 4, 4)},
    4: {16: (4, 6, 4), 32: (3, 6, 4), 64: (2, 4, 3), 128: (1, 4, 4)},
}
"""Steps of the loop over inputs that are in flight, by bits and padded rows: a number of programs per processor, the
steps up to that number, and the steps beyond it. With more steps, fewer programs share a processor."""
_MOST_TILE_ROWS, _FEWEST_TILE_ROWS = 128, 64
"""Bounds of the number of rows of one tile, if there are several tiles."""
_WIDENED_OUTPUTS = 32
"""Number of outputs of a program of `widen`."""
_SMALL_MATRIX = 1 << 26
"""Number of 8-bit floats in a matrix from which `narrow_skinny` is faster than the kernel for few rows."""


@triton.jit
def _group_product(x, words, zeros, start, used, result, STEP: tl.constexpr, BITS: tl.constexpr):
    """Add the product of STEP inputs from `start` on to `result` (OUTPUTS, ROWS). x, words: places of rows. zeros:
    (OUTPUTS,), for 4 bits."""
    if x.dtype.element_ty == tl.float8e4nv:
        columns = (start + tl.arange(0, STEP))[None, :]
        given = tl.load(x + columns, mask=used[:, None], other=0.0)
        result = tl.dot(tl.load(words + columns), tl.trans(given), result)
    else:
        PARTS: tl.constexpr = words.dtype.element_ty.primitive_bitwidth // BITS
        PART: tl.constexpr = STEP // PARTS
        j = tl.arange(0, PART)[None, :]
        block = tl.load(words + start // PARTS + j)
        first = tl.load(x + start + j, mask=used[:, None], other=0.0)
        second = tl.load(x + start + PART + j, mask=used[:, None], other=0.0)
        if PARTS == 2:
            if BITS == 8:
                low, high = widened_8(block, first.dtype)
            else:
                low, high = widened_4_of_bytes(block, zeros, first.dtype)
            result = tl.dot(low, tl.trans(first), result, input_precision="ieee")
            result = tl.dot(high, tl.trans(second), result, input_precision="ieee")
        else:
            third = tl.load(x + start + 2 * PART + j, mask=used[:, None], other=0.0)
            fourth = tl.load(x + start + 3 * PART + j, mask=used[:, None], other=0.0)
            one, two, three, four = widened_4(block, zeros, first.dtype)
            result = tl.dot(one, tl.trans(first), result, input_precision="ieee")
            result = tl.dot(two, tl.trans(second), result, input_precision="ieee")
            result = tl.dot(three, tl.trans(third), result, input_precision="ieee")
            result = tl.dot(four, tl.trans(fourth), result, input_precision="ieee")
    return result


@triton.jit
def scales_and_zeros(scales, places, BITS: tl.constexpr):
    """Load scales and zeros, (OUTPUTS,) each, at these places. 8-bit floats only have scales; 4 bits have both in one
    word of 32 bits."""
    if BITS == 8:
        scale = tl.load(scales + places)
        zero = tl.zeros(places.shape, tl.int32)
    else:
        both = tl.load(scales + places)
        scale = (both & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        zero = both >> 16
    return scale, zero


@triton.jit
def sum_of_groups(
    x, x_scales, num_scales, words, scales, rows, first, last, used, total, group_size, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, BITS: tl.constexpr, ONE_GROUP: tl.constexpr,
):  # fmt: skip
    """Compute the product (OUTPUTS, ROWS) over inputs from `first` to `last`. x, words: places of rows. used: which
    rows of x exist. rows: rows of the weight. total: the weight's number of rows. If x is in 8 bits (see
    `EightBitRows`), x_scales: places of the rows' first scales; num_scales: distance to the next scales."""
    result = tl.zeros((OUTPUTS, ROWS), tl.float32)
    scale, zero = scales_and_zeros(scales, rows, BITS)
    for start in tl.range(first, last, STEP, num_stages=STAGES):
        if ONE_GROUP:
            result = _group_product(x, words, zero, start, used, result, STEP, BITS)
        else:
            group = start // group_size
            of_group, zero = scales_and_zeros(scales, group * total + rows, BITS)
            part = tl.zeros((OUTPUTS, ROWS), tl.float32)
            part = _group_product(x, words, zero, start, used, part, STEP, BITS)
            part *= of_group[:, None]
            if x.dtype.element_ty == tl.float8e4nv:
                part *= tl.load(x_scales + group * num_scales, mask=used, other=0.0)[None, :]
            result += part
    if ONE_GROUP:
        result *= scale[:, None]
        if x.dtype.element_ty == tl.float8e4nv:
            result *= tl.load(x_scales, mask=used, other=0.0)[None, :]
    return result


@triton.jit(do_not_specialize=["num_rows"])
def _narrow_skinny(
    x, weight, bias, out, given_squares, eps, next_norm, scaled, squares, parts, arrived, num_rows, num_inputs,
    num_outputs, span, scales, x_scales, num_scales, group_size, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    STEP: tl.constexpr, AHEAD: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr,
    GELU: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, SCALES: tl.constexpr, TILES: tl.constexpr,
    PADDED_TILES: tl.constexpr, ROW_TILES: tl.constexpr, BITS: tl.constexpr, ONE_GROUP: tl.constexpr,
):  # fmt: skip
    tile, split, m = tl.program_id(0) // ROW_TILES, tl.program_id(1), tl.arange(0, ROWS)
    first_row = tl.program_id(0) % ROW_TILES * ROWS
    out += first_row.to(tl.int64) * num_outputs
    num_rows -= first_row
    first = split * span
    last = tl.minimum(first + span, num_inputs)
    rows = weight_rows(tile, num_outputs, OUTPUTS, GATED)
    PARTS: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // BITS
    weight += rows[:, None].to(tl.int64) * (num_inputs // PARTS)
    ahead = first // PARTS + tl.arange(0, AHEAD // 128) * (128 * 8 // BITS // PARTS)
    prefetch(weight + tl.minimum(ahead, last // PARTS - 1)[None, :])
    begin()
    row_scales = tl.full((1, ROWS), 1.0, tl.float32)
    if TILES > 0:
        row_scales = row_scales_of(given_squares, num_inputs, eps, TILES, PADDED_TILES, ROWS)
    x += (first_row + m).to(tl.int64)[:, None] * num_inputs
    result = row_scales * sum_of_groups(
        x, x_scales + first_row + m, num_scales, weight, scales, rows, first, last, m < num_rows,
        num_outputs * 2 if GATED else num_outputs, group_size, ROWS, OUTPUTS, STEP, STAGES, BITS, ONE_GROUP,
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
    """Narrow weight in the form that `skinny_linear` and `add_skinny_linear` take: an `OwnKernel`."""

    def __init__(self, weight: NarrowWeight) -> None:
        assert weight.values.is_contiguous()
        self.bits, self.shape, self.group, self.run = weight.bits, weight.shape, weight.group, weight.run
        self.words = weight.values
        self.scales = weight.scales.float() if weight.zeros is None else _in_one_word(weight.scales, weight.zeros)
        """Scales (groups, O): float32, or int32 that holds a float16 scale and, above it, a zero."""
        self._input_order, self._keeps_inputs = weight.input_order, weight.keeps_inputs

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def tiling(self, padded_rows: int, programs: int) -> tuple[int, int]:
        """Return the number of inputs of a step, which is a run, and the number of steps in flight."""
        few, stages_of_few, stages = _STAGES[self.bits][padded_rows]
        return self.run, stages_of_few if programs <= few * num_processors(self.words.device) else stages

    def tile_outputs(self, x: torch.Tensor) -> int:
        return few_rows_tiling(self.shape, self.bits).outputs if self._is_of_few(x) else TILE_OUTPUTS

    def suits_few(self, x: torch.Tensor) -> bool:
        """Return whether kernels for few rows can take these rows."""
        return suits_few_rows(x, self.run, self.group if len(self.scales) > 1 else 0)

    def _is_of_few(self, x: torch.Tensor) -> bool:
        """Return whether a product with these rows uses the kernel for few rows."""
        is_small = self.shape[0] * self.shape[1] < _SMALL_MATRIX
        return (self.bits == 4 or is_small) and self.suits_few(x)

    def arranged(self, x: torch.Tensor) -> torch.Tensor:
        """Return rows (M, I) with their inputs in the weight's order."""
        return x if self._input_order is None else x.index_select(1, self._input_order)

    def takes_8_bits(self) -> bool:
        """Return whether rows in 8-bit floats can be multiplied with this weight, with the same groups of inputs as the
        weight's."""
        if self.bits != 8 or self._keeps_inputs:
            return False
        return self.group == self.run == MOST_STEP or len(self.scales) == 1

    def operands(self, x: torch.Tensor | EightBitRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rows, weights and the rows' scales as kernels take them. With 8-bit rows, both rows and weights are
        single 8-bit floats."""
        if isinstance(x, EightBitRows):
            return x.values, self.words.view(torch.float8_e4m3fn), x.scales
        return x, self.words, self.scales

    def launch(
        self, grid: tuple[int, int], x: torch.Tensor | EightBitRows, others: tuple[Any, ...], options: dict[str, Any],
        row_tiles: int = 1, num_warps: int = 4,
    ) -> None:  # fmt: skip
        """Launch the product. others, options: see `OwnKernel.launch`."""
        if isinstance(x, torch.Tensor) and row_tiles == 1 and self._is_of_few(x):
            few_rows_linear(x, self.words, self.scales, self.bits, others, options)
            return
        given, words, x_scales = self.operands(x)
        options = options | {"AHEAD": _AHEAD}
        _narrow_skinny[(grid[0] * row_tiles, grid[1])](
            given, words, *others, self.scales, x_scales, x_scales.shape[1], self.group, **options,
            ROW_TILES=row_tiles, BITS=self.bits, ONE_GROUP=len(self.scales) == 1, num_warps=num_warps, **LAUNCH,
        )  # fmt: skip


def _in_one_word(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    return (scales.half().view(torch.int16).int() & 0xFFFF) | zeros.int() << 16


def tiled_linear(
    x: torch.Tensor, weight: NarrowMatrix, bias: torch.Tensor | None, out: torch.Tensor, adds: bool
) -> None:
    """Write x (M, I) times the weight transposed, plus bias (O,), to `out` (M, O), or add it there, rounded once."""
    count, tiles = len(x), num_tiles(len(weight), False)
    is_wide = x.dtype.itemsize > 2
    tile_rows = max(16, min(_MOST_TILE_ROWS, triton.next_power_of_2(count)))
    if is_wide or tiles * triton.cdiv(count, tile_rows) < num_processors(x.device):
        tile_rows = min(tile_rows, _FEWEST_TILE_ROWS)
    stages = 2 if is_wide else weight.tiling(tile_rows, tiles)[1]
    tiling = {"ROWS": tile_rows, "OUTPUTS": TILE_OUTPUTS, "STEP": weight.run, "STAGES": stages}
    _launch_tiles(weight.arranged(x), x, weight, bias, out, {"ADDS": adds, "GATED": False, "GELU": False} | tiling)


def eight_bit_linear(
    x: torch.Tensor, weight: NarrowMatrix, bias: torch.Tensor | None, out: torch.Tensor, adds: bool,
    rows: EightBitRows | None = None,
) -> None:  # fmt: skip
    """Do the same as `tiled_linear` with rows in 8-bit floats, to which they are converted first unless given."""
    rows = rows or eight_bit_rows(x, weight.group, weight.run)
    tiling = {"ROWS": _MOST_TILE_ROWS, "OUTPUTS": TILE_OUTPUTS, "STEP": weight.run, "STAGES": 4}
    options = {"ADDS": adds, "GATED": False, "GELU": False}
    _launch_tiles(rows, x, weight, bias, out, options | tiling)


def _launch_tiles(
    rows: torch.Tensor | EightBitRows, x: torch.Tensor, weight: NarrowMatrix, bias: torch.Tensor | None,
    out: torch.Tensor, options: dict[str, Any],
) -> None:  # fmt: skip
    """Launch the product tile by tile. x: any tensor, as a placeholder for arguments that are not used."""
    (count, outputs), inputs, step = out.shape, weight.shape[1], options["STEP"]
    tiles = triton.cdiv(outputs, options["OUTPUTS"] // 2 if options["GATED"] else options["OUTPUTS"])
    span = triton.cdiv(inputs, step) * step
    others = x if bias is None else bias, out, x, 0.0, x, x, x, x, x, count, inputs, outputs, span
    options |= {
        "SPLITS": 1, "HAS_BIAS": bias is not None, "SCALES": False, "TILES": 0, "PADDED_TILES": 1,
    }  # fmt: skip
    weight.launch((tiles, 1), rows, others, options, triton.cdiv(count, options["ROWS"]))


@triton.jit
def _widen(
    words, scales, out, num_inputs, num_outputs, group_size, OUTPUTS: tl.constexpr, STEP: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    begin()
    rows, start = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS), tl.program_id(0) * STEP
    rows = tl.minimum(rows, num_outputs - 1)  # the last row may be written several times
    scale, zero = scales_and_zeros(scales, start // group_size * num_outputs + rows, BITS)
    PARTS: tl.constexpr = words.dtype.element_ty.primitive_bitwidth // BITS
    PART: tl.constexpr = STEP // PARTS
    j = tl.arange(0, PART)[None, :]
    block = tl.load(words + rows[:, None].to(tl.int64) * (num_inputs // PARTS) + start // PARTS + j).to(tl.int32)
    target = out + rows[:, None].to(tl.int64) * num_inputs + start + j
    for part in tl.static_range(PARTS):
        number = block >> part * BITS
        if BITS == 8:
            wide = (number & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            wide = ((number & 15) - zero[:, None]).to(tl.float32)
        tl.store(target + part * PART, (wide * scale[:, None]).to(out.dtype.element_ty))


def widen(weight: NarrowMatrix, dtype: torch.dtype) -> torch.Tensor:
    """Widen a weight to (O, I) of `dtype`, with inputs in the weight's own order."""
    outputs, inputs = weight.shape
    out = torch.empty((outputs, inputs), dtype=dtype, device=weight.words.device)
    _widen[(inputs // weight.run, triton.cdiv(outputs, _WIDENED_OUTPUTS))](
        weight.words, weight.scales, out, inputs, outputs, weight.group, OUTPUTS=_WIDENED_OUTPUTS, STEP=weight.run,
        BITS=weight.bits, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return out
