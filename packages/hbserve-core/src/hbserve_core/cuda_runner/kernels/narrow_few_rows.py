"""Products of up to 8 rows with narrow weights, written in Gluon, for which one stream or a few wait.

A program has a few outputs, and its warps share the inputs. Each thread loads 16 bytes of weights at once into the
registers from which its tensor core instruction reads. So there is only the widening between memory and product: no
shared memory, and no barrier before the warps' sums are added. The first weights, which most products need only, are
loaded before the previous kernel has ended, because they never change.
Shapes: M rows, I inputs, O outputs, W warps.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from hbserve_core.cuda_runner.kernels.attention_parts import widened_8
from hbserve_core.cuda_runner.kernels.dependent_launch import DEPENDENT, LAUNCH, begin
from hbserve_core.cuda_runner.kernels.hopper import activated
from hbserve_core.cuda_runner.kernels.widening import offset_4, parts_of_4

RUN = gl.constexpr(128)
"""Number of inputs of a run, which share a scale: see model/narrow_weight.py."""
MOST_ROWS = 8
ROWS = gl.constexpr(8)
HALF = gl.constexpr(64)
_MANY_INPUTS, _MANY_OUTPUTS, _FEW_OUTPUTS = 8192, 12288, 4096
"""Sizes of a weight at which the tiling of products changes: what was fastest for the products of Qwen3-8B."""


@constexpr_function
def sums_layout(warps):
    """Return the layout of sums (W, outputs, rows)."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@constexpr_function
def words_layout(warps, outputs, bits):
    """Return the layout of words (W, outputs, words of a run). With 4 bits, two parts below each other are what a
    tensor core reads of 64 inputs."""
    if bits == 8:
        return gl.DotOperandLayout(0, sums_layout(warps), 8)
    more = [[0, each, 0] for each in (16, 32) if each < outputs]
    by_warp = [[1 << bit, 0, 0] for bit in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 8, 0], *more],
        [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        by_warp,
        [],
        [warps, outputs, 32],
    )


@gluon.jit
def along(axis: gl.constexpr, size: gl.constexpr, layout: gl.constexpr):
    """Return 0 to size - 1 along one of three axes."""
    if axis == 0:
        places = gl.expand_dims(gl.arange(0, size, gl.SliceLayout(1, gl.SliceLayout(2, layout))), 1)
        places = gl.expand_dims(places, 2)
    elif axis == 1:
        places = gl.expand_dims(gl.arange(0, size, gl.SliceLayout(0, gl.SliceLayout(2, layout))), 0)
        places = gl.expand_dims(places, 2)
    else:
        places = gl.expand_dims(gl.arange(0, size, gl.SliceLayout(0, gl.SliceLayout(1, layout))), 0)
        places = gl.expand_dims(places, 1)
    return places


@gluon.jit
def rows_of(tile, num_outputs, OUTPUTS: gl.constexpr, GATED: gl.constexpr, layout: gl.constexpr):
    """Return the weight rows of a tile (1, OUTPUTS, 1), as `weight_rows` does."""
    r = along(1, OUTPUTS, layout)
    if GATED:
        COUNT: gl.constexpr = OUTPUTS // 2
        rows = gl.minimum(tile * COUNT + r % COUNT, num_outputs - 1) + r // COUNT * num_outputs
    else:
        rows = gl.minimum(tile * OUTPUTS + r, num_outputs - 1)
    return rows


@gluon.jit
def places(
    words, scales, rows, first_run, total, INPUTS: gl.constexpr, BITS: gl.constexpr, ONE_GROUP: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Compute the places of the words of some weight rows, and of their scales, from each warp's first run (W, 1, 1)
    on. total: number of rows of the weight."""
    RUN_WORDS: gl.constexpr = RUN * BITS // 16
    words += rows.to(gl.int64) * (INPUTS // RUN * RUN_WORDS) + first_run * RUN_WORDS + along(2, RUN_WORDS, layout)
    scales += rows
    if not ONE_GROUP:
        scales += first_run * total
    return words, scales


@gluon.jit
def _loaded(words, scales, inside_from, total, RUN_WORDS: gl.constexpr, RUNS: gl.constexpr):
    """Load words and scales of some consecutive runs: tuples of (W, outputs, .). inside_from: number of runs that exist
    from the first on, (W, 1, 1)."""
    values, factors = (), ()
    for run in gl.static_range(RUNS):
        inside = inside_from > run
        values += (gl.load(words + run * RUN_WORDS, mask=inside, other=0),)  # type: ignore[assignment]
        factors += (gl.load(scales + run * total, mask=inside, other=0),)  # type: ignore[assignment]
    return values, factors


@gluon.jit
def _below(one, other, LAYOUT: gl.constexpr):
    """Join two tensors (W, outputs, 32) to one (W, outputs, 64)."""
    both = gl.permute(gl.join(one, other), (0, 1, 3, 2))
    return gl.convert_layout(gl.reshape(both, [one.shape[0], one.shape[1], 64]), LAYOUT)


@gluon.jit
def _halves(words, factor, dtype: gl.constexpr, BITS: gl.constexpr, LAYOUT: gl.constexpr):
    """Widen the weights of the first and of the second half of a run."""
    if BITS == 8:
        low, high = widened_8(words, dtype)
    else:
        taken = ((factor >> 16).to(gl.float32) + offset_4(dtype)).to(dtype)
        words, taken = gl.broadcast(words, taken)
        one, two, three, four = parts_of_4(words, taken, dtype)
        low = _below(one, two, LAYOUT)
        high = _below(three, four, LAYOUT)
    return low, high


@gluon.jit
def _scale(factor, BITS: gl.constexpr, LAYOUT: gl.constexpr):
    if BITS == 4:
        factor = (factor & 0xFFFF).to(gl.uint16).to(gl.float16, bitcast=True).to(gl.float32)
    return gl.convert_layout(factor, LAYOUT)


@gluon.jit
def _inputs(x, run, used, inside_from):
    """Load both halves of a run's inputs, (W, 64, rows) each."""
    inside = used & (inside_from > run)
    first = gl.load(x + run * RUN, mask=inside, other=0.0)
    return first, gl.load(x + run * RUN + HALF, mask=inside, other=0.0)


@gluon.jit
def _first_inputs(x, inside_from, used, RUNS: gl.constexpr, AHEAD: gl.constexpr):
    """Load the inputs of as many runs as `_sum_of_runs` loads ahead."""
    given = ()
    for run in gl.static_range(AHEAD):
        if run < RUNS:
            given += _inputs(x, run, used, inside_from)
    return given


@gluon.jit
def _sum_of_runs(
    values, factors, given, x, inside_from, used, result, RUNS: gl.constexpr, AHEAD: gl.constexpr, BITS: gl.constexpr,
    ONE_GROUP: gl.constexpr,
):  # fmt: skip
    """Add the products of some runs to `result` (W, outputs, rows). x: places (W, 64, rows) of the first run's inputs.
    used: which of them exist."""
    sums: gl.constexpr = result.type.layout
    layout: gl.constexpr = gl.DotOperandLayout(0, sums, 8)
    for run in gl.static_range(RUNS):
        if run + AHEAD < RUNS:
            given += _inputs(x, run + AHEAD, used, inside_from)
        low, high = _halves(values[run], factors[run], x.dtype.element_ty, BITS, layout)
        if ONE_GROUP:
            result = mma_v2(high, given[2 * run + 1], mma_v2(low, given[2 * run], result))
        else:
            part = mma_v2(low, given[2 * run], gl.zeros([result.shape[0], result.shape[1], ROWS], gl.float32, sums))
            part = mma_v2(high, given[2 * run + 1], part)
            result += part * _scale(factors[run], BITS, sums)
    return result


@gluon.jit
def first_runs(
    words, scales, there, total, RUNS: gl.constexpr, BITS: gl.constexpr, ONE_GROUP: gl.constexpr
):  # fmt: skip
    """Load the first runs for `product`, which may be done while the previous kernel still runs."""
    if ONE_GROUP:
        total = 0
    return _loaded(words, scales, there, total, RUN * BITS // 16, RUNS)


@gluon.jit
def product(
    first, words, scales, x, there, there_of_x, used, total, OUTPUTS: gl.constexpr, ALL: gl.constexpr,
    RUNS: gl.constexpr, AHEAD: gl.constexpr, BITS: gl.constexpr, ONE_GROUP: gl.constexpr,
):  # fmt: skip
    """Compute each warp's sum (W, outputs, rows) over at most ALL runs. first: see `first_runs`. words, scales, x:
    places of each warp's first run. there, there_of_x: number of runs that it has. used: which rows of x exist. total:
    number of rows of the weight."""
    W: gl.constexpr = gl.num_warps()
    sums: gl.constexpr = sums_layout(W)
    RUN_WORDS: gl.constexpr = RUN * BITS // 16
    if ONE_GROUP:
        total = 0
    values, factors = first
    # The scale of a single group is kept from the first runs: a warp that has fewer runs than others does not load it
    # with its last ones.
    of_all = factors[0]
    result = gl.zeros([W, OUTPUTS, ROWS], gl.float32, sums)
    for start in range(RUNS, ALL, RUNS):
        before = start - RUNS
        given = _first_inputs(x + before * RUN, there_of_x - before, used, RUNS, AHEAD)
        more, more_factors = _loaded(
            words + start * RUN_WORDS, scales + start * total, there - start, total, RUN_WORDS, RUNS
        )
        result = _sum_of_runs(
            values, factors, given, x + before * RUN, there_of_x - before, used, result, RUNS, AHEAD, BITS, ONE_GROUP
        )
        values, factors = more, more_factors
    LAST: gl.constexpr = (ALL - 1) // RUNS * RUNS
    given = _first_inputs(x + LAST * RUN, there_of_x - LAST, used, RUNS, AHEAD)
    result = _sum_of_runs(
        values, factors, given, x + LAST * RUN, there_of_x - LAST, used, result, RUNS, AHEAD, BITS, ONE_GROUP
    )
    if ONE_GROUP:
        result *= _scale(of_all, BITS, sums)
    return result


@gluon.jit
def row_squares(squares, num_rows, TILES: gl.constexpr, PADDED: gl.constexpr, STRIDE: gl.constexpr):
    """Load sums of squares (padded tiles, rows) from (TILES, STRIDE). They are loaded before the product to which
    `row_scales` is applied, so that nothing is waited for after it."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [gl.num_warps(), 1], [1, 0])
    tiles = gl.expand_dims(gl.arange(0, PADDED, gl.SliceLayout(1, layout)), 1)
    rows = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(0, layout)), 0)
    return gl.load(squares + tiles * STRIDE + rows, mask=(tiles < TILES) & (rows < num_rows), other=0.0)


@gluon.jit
def row_scales(squares, m, size, eps):
    """Compute 1 / rms of each row (1, rows), in m's layout, from the result of `row_squares`."""
    scales = gl.rsqrt(gl.sum(squares, 0) / size + eps)
    return gl.expand_dims(gl.convert_layout(scales, gl.SliceLayout(0, m)), 0)


@gluon.jit
def residual(out, tile, num_rows, num_outputs, OUTPUTS: gl.constexpr, layout: gl.constexpr, ADDS: gl.constexpr):
    """Load the numbers (outputs, rows) of a tile to which `finish` adds. They are loaded before the product too."""
    place, inside = _places_of_tile(tile, num_rows, num_outputs, OUTPUTS, layout)
    if ADDS:
        before = gl.load(out + place, mask=inside, other=0.0).to(gl.float32)
    else:
        before = gl.zeros([OUTPUTS, ROWS], gl.float32, layout)
    return before


@gluon.jit
def _places_of_tile(tile, num_rows, num_outputs, COUNT: gl.constexpr, layout: gl.constexpr):
    outputs = gl.expand_dims(tile * COUNT + gl.arange(0, COUNT, gl.SliceLayout(1, layout)), 1)
    m = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(0, layout)), 0)
    return m * num_outputs + outputs, (m < num_rows) & (outputs < num_outputs)


@gluon.jit(do_not_specialize=["num_rows"])
def _narrow_few_rows(
    x, words, scales, bias, out, given_squares, eps, next_norm, scaled, squares, num_rows, num_outputs,
    INPUTS: gl.constexpr, OUTPUTS: gl.constexpr, RUNS: gl.constexpr, AHEAD: gl.constexpr, PADDED_ROWS: gl.constexpr,
    GATED: gl.constexpr, GELU: gl.constexpr, HAS_BIAS: gl.constexpr, ADDS: gl.constexpr, SCALES: gl.constexpr,
    TILES: gl.constexpr, PADDED_TILES: gl.constexpr, BITS: gl.constexpr, ONE_GROUP: gl.constexpr,
):  # fmt: skip
    W: gl.constexpr = gl.num_warps()
    sums: gl.constexpr = sums_layout(W)
    of_words: gl.constexpr = words_layout(W, OUTPUTS, BITS)
    of_x: gl.constexpr = gl.DotOperandLayout(1, sums, 8)
    COUNT: gl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    ALL_RUNS: gl.constexpr = INPUTS // RUN
    OF_WARP: gl.constexpr = (ALL_RUNS + W - 1) // W
    tile = gl.program_id(0)
    total = num_outputs * 2 if GATED else num_outputs
    first_run, first_of_x = along(0, W, of_words) * OF_WARP, along(0, W, of_x) * OF_WARP
    rows = rows_of(tile, num_outputs, OUTPUTS, GATED, of_words)
    words, scales = places(words, scales, rows, first_run, total, INPUTS, BITS, ONE_GROUP, of_words)
    n = along(2, ROWS, of_x)
    x += n * INPUTS + first_of_x * RUN + along(1, HALF, of_x)
    there, there_of_x = gl.minimum(ALL_RUNS - first_run, OF_WARP), gl.minimum(ALL_RUNS - first_of_x, OF_WARP)
    first = first_runs(words, scales, there, total, RUNS, BITS, ONE_GROUP)
    begin()
    of_tile: gl.constexpr = gl.SliceLayout(0, sums)
    if TILES > 0:
        given = row_squares(given_squares, num_rows, TILES, PADDED_TILES, PADDED_ROWS)
    before = residual(out, tile, num_rows, num_outputs, OUTPUTS, of_tile, ADDS)
    result = product(
        first, words, scales, x, there, there_of_x, n < num_rows, total, OUTPUTS, OF_WARP, RUNS, AHEAD, BITS, ONE_GROUP
    )
    whole = gl.sum(result, 0)
    if TILES > 0:
        whole *= row_scales(given, of_tile, INPUTS, eps)
    finish(
        whole, before, bias, out, next_norm, scaled, squares, tile, num_rows, num_outputs, COUNT, PADDED_ROWS, GATED,
        GELU, HAS_BIAS, ADDS, SCALES,
    )  # fmt: skip


@gluon.jit
def finish(
    result, before, bias, out, next_norm, scaled, squares, tile, num_rows, num_outputs, COUNT: gl.constexpr,
    PADDED_ROWS: gl.constexpr, GATED: gl.constexpr, GELU: gl.constexpr, HAS_BIAS: gl.constexpr, ADDS: gl.constexpr,
    SCALES: gl.constexpr,
):  # fmt: skip
    """Write a whole tile of products, like `finish_tile` in few_rows_linear.py. before: see `residual`."""
    if GATED:
        result, up = gl.split(gl.permute(gl.reshape(result, [2, COUNT, ROWS]), (1, 2, 0)))
    layout: gl.constexpr = result.type.layout
    outputs = tile * COUNT + gl.arange(0, COUNT, gl.SliceLayout(1, layout))
    m = gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    clamped = gl.minimum(outputs, num_outputs - 1)
    if HAS_BIAS:
        result += gl.expand_dims(gl.load(bias + clamped).to(gl.float32), 1)
        if GATED:
            up += gl.expand_dims(gl.load(bias + num_outputs + clamped).to(gl.float32), 1)
    if GATED:
        result = activated(result, GELU) * up
    place, inside = _places_of_tile(tile, num_rows, num_outputs, COUNT, layout)
    if ADDS:
        result += before
    rounded = result.to(out.dtype.element_ty)
    gl.store(out + place, rounded, mask=inside)
    if SCALES:
        exact = gl.where(inside, rounded.to(gl.float32), 0.0)
        weights = gl.expand_dims(gl.load(next_norm + clamped).to(gl.float32), 1)
        gl.store(scaled + place, (exact * weights).to(out.dtype.element_ty), mask=inside)
        gl.store(squares + tile * PADDED_ROWS + m, gl.sum(exact * exact, 0), mask=m < num_rows)


@dataclass(frozen=True, slots=True)
class FewRowsTiling:
    """Tiling of one product."""

    outputs: int
    """Number of outputs of a program; with gates, half of them are ups."""
    warps: int
    runs: int
    """Number of runs whose weights a warp loads at once."""
    ahead: int = 2
    """Number of runs whose inputs are loaded before they are multiplied."""


def few_rows_tiling(weight: tuple[int, int], bits: int) -> FewRowsTiling:
    """Choose the tiling of a product with a weight of this shape, (O, I)."""
    outputs, inputs = weight
    if inputs >= _MANY_INPUTS:
        return FewRowsTiling(32, 8, 2) if bits == 4 else FewRowsTiling(32, 8, 1, 1)
    if bits == 4 and outputs >= _MANY_OUTPUTS:
        return FewRowsTiling(32, 2, 2)
    warps = 8 if bits == 4 and outputs <= _FEW_OUTPUTS else 4
    return FewRowsTiling(16, warps, min(4, max(1, inputs // RUN.value // warps)))


def suits_few_rows(x: torch.Tensor, run: int, group: int) -> bool:
    """Return whether rows (M, I) can be multiplied here with weights that have such runs.

    group: number of inputs that share a scale; 0 means all of them.
    """
    return DEPENDENT.value and len(x) <= MOST_ROWS and x.dtype.itemsize == 2 and run == RUN.value and group in (0, run)


def few_rows_linear(
    x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, bits: int, others: tuple[Any, ...],
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Launch the product of rows (M, I). words, scales: see `NarrowMatrix`; others, options: see `OwnKernel`."""
    bias, out, given_squares, eps, next_norm, scaled, squares, _, _, rows, inputs, outputs, _ = others
    gated = options["GATED"]
    tiling = few_rows_tiling((len(words), inputs), bits)
    _narrow_few_rows[(triton.cdiv(outputs, tiling.outputs // 2 if gated else tiling.outputs),)](
        x, words, scales, bias, out, given_squares, eps, next_norm, scaled, squares, rows, outputs, INPUTS=inputs,
        OUTPUTS=tiling.outputs, RUNS=tiling.runs, AHEAD=tiling.ahead, PADDED_ROWS=options["ROWS"], BITS=bits,
        ONE_GROUP=len(scales) == 1, num_warps=tiling.warps,
        **{name: options[name] for name in ("GATED", "GELU", "HAS_BIAS", "ADDS", "SCALES", "TILES", "PADDED_TILES")},
        **LAUNCH,
    )  # fmt: skip
