"""Products of few rows with a weight matrix, which take most of the time of a step of decodes.

Both kernels are as fast as their weights can be read, so the operations around a product are done inside it.
products.py says which one is used when.

`small_linear` (GEMV) is for one row, or very few. It includes the norm before it, and the residual addition or
silu(gate) * up after it. Each program has all inputs of a few outputs, and requests their weights before the previous
kernel has ended.

`skinny_linear` (skinny GEMM) is for up to 128 rows, on tensor cores. The weights are the long side of each tile, so
that the rows cost next to nothing. If a matrix has too few tiles to keep every multiprocessor reading, its inputs are
split too (split-K), and the program of a tile that ends last adds up all results, always in the same order. The
residual addition, or silu(gate) * up, is done on the way out. An RMS norm between two such products is half of the
first and half of the second: each row is multiplied by the norm's weights as it is written, with its sums of squares by
tile beside it, and the next product's results are divided by the root of their mean.

Shapes: M rows, I inputs, O outputs, T tiles.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin, num_processors, prefetch
from hbserve_core.cuda_runner.kernels.pointwise import activated

_STEP_BYTES = 8192
"""Bytes of a weight row that are loaded at once. `given` then has M times as many numbers, and both stay in
registers."""
_SMALL_OUTPUTS = 4, 8
"""Number of outputs of a program of `small_linear`, for one row and for more. With one row there are many programs, so
the last wave is short; with two, reading the inputs counts."""
TILE_OUTPUTS = 64
_TILINGS = {16: (128, 6, 3), 32: (128, 6, 3), 64: (128, 4, 3), 128: (64, 8, 4)}
"""Number of inputs of one step of the loop over them, by padded rows, and the numbers of steps in flight that fit in
the shared memory of a Hopper processor for one program and for two."""
_AHEAD = 256
"""Number of inputs whose weights each program fetches while the previous kernel still runs. More of them would slow
that kernel down."""

# ---- one row, or very few --------------------------------------------------------------------------------------------


@triton.jit
def _rows(weight, rows, start, INPUTS: tl.constexpr, STEP: tl.constexpr):
    """Load the weight rows (O, STEP) from column `start` on."""
    columns = start + tl.arange(0, STEP)
    place = weight + rows[:, None].to(tl.int64) * INPUTS + columns[None, :]
    return tl.load(place, mask=columns < INPUTS, other=0.0, eviction_policy="evict_first")


@triton.jit
def _inputs(x, norm, start, M: tl.constexpr, INPUTS: tl.constexpr, STEP: tl.constexpr, HAS_NORM: tl.constexpr):
    """Load x (M, STEP) from column `start` on, times the norm's weights, and compute the sums of squares (M,) before
    that."""
    columns = start + tl.arange(0, STEP)
    inside = columns < INPUTS
    given = tl.load(x + tl.arange(0, M)[:, None] * INPUTS + columns[None, :], mask=inside[None, :], other=0.0)
    given = given.to(tl.float32)
    squares = tl.sum(given * given, 1)
    if HAS_NORM:
        given *= tl.load(norm + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return given, squares


@triton.jit
def _product(given, block):
    """Multiply (M, STEP) with (O, STEP) transposed: (M, O)."""
    return tl.sum(given[:, None, :] * block.to(tl.float32)[None, :, :], 2)


@triton.jit
def _small_linear(
    x, weight, bias, norm, out, eps, M: tl.constexpr, INPUTS: tl.constexpr, COUNT: tl.constexpr,
    STEP: tl.constexpr, OUTPUTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, ADDS: tl.constexpr,
    GATED: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.minimum(outputs, COUNT - 1)
    # Weights never change, so their loads are issued before the kernel that computes x has ended.
    block = _rows(weight, rows, 0, INPUTS, STEP)
    if GATED:
        up_block = _rows(weight, rows + COUNT, 0, INPUTS, STEP)
    begin()
    given, squares = _inputs(x, norm, 0, M, INPUTS, STEP, HAS_NORM)
    result = _product(given, block)
    if GATED:
        up = _product(given, up_block)
    for start in tl.static_range(STEP, INPUTS, STEP):
        given, more_squares = _inputs(x, norm, start, M, INPUTS, STEP, HAS_NORM)
        squares += more_squares
        result += _product(given, _rows(weight, rows, start, INPUTS, STEP))
        if GATED:
            up += _product(given, _rows(weight, rows + COUNT, start, INPUTS, STEP))
    if HAS_NORM:
        scale = tl.rsqrt(squares / INPUTS + eps)[:, None]
        result *= scale
    if HAS_BIAS:
        result += tl.load(bias + rows).to(tl.float32)[None, :]
    if GATED:
        if HAS_NORM:
            up *= scale
        if HAS_BIAS:
            up += tl.load(bias + COUNT + rows).to(tl.float32)[None, :]
        result = activated(result, GELU) * up
    place = out + tl.arange(0, M)[:, None] * COUNT + outputs[None, :]
    inside = (outputs < COUNT)[None, :]
    if ADDS:
        result += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)


def small_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    add_to: torch.Tensor | None = None,
    gated: bool = False,
    gelu: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Compute x (M, I) times weight (O, I) transposed, plus bias (O,).

    norm: weights (I,) and eps of an RMS norm that is first applied to x. add_to: (M, O), to which the result is added
    in place, and which is returned. gated: the weight is (2 O, I), gate rows then up rows; the result is silu(gate) *
    up, or with `gelu` gelu(gate) * up. dtype: dtype of the result.
    """
    rows, size = x.shape
    outputs = len(weight) // 2 if gated else len(weight)
    out = add_to
    if out is None:
        out = torch.empty((rows, outputs), dtype=dtype or x.dtype, device=x.device)
    step = min(_STEP_BYTES // weight.dtype.itemsize, triton.next_power_of_2(size))
    per_program = _SMALL_OUTPUTS[0 if rows == 1 or step > 2048 else 1]
    norm_weight, eps = norm or (x, 0.0)
    _small_linear[(triton.cdiv(outputs, per_program),)](
        x, weight, weight if bias is None else bias, norm_weight, out, eps,
        M=rows, INPUTS=size, COUNT=outputs, STEP=step, OUTPUTS=per_program, HAS_BIAS=bias is not None,
        HAS_NORM=norm is not None, ADDS=add_to is not None, GATED=gated, GELU=gelu, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return out


# ---- up to 128 rows --------------------------------------------------------------------------------------------------


@triton.jit
def finish_tile(
    result, bias, out, next_norm, scaled, squares, tile, num_rows, num_outputs, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr,
    SCALES: tl.constexpr,
):  # fmt: skip
    """Write a whole tile (OUTPUTS, ROWS) of products."""
    COUNT: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    outputs = tile * COUNT + tl.arange(0, COUNT)
    clamped = tl.minimum(outputs, num_outputs - 1)
    if GATED:
        result, up = tl.split(tl.permute(tl.reshape(result, (2, COUNT, ROWS)), (1, 2, 0)))
        if HAS_BIAS:
            up += tl.load(bias + num_outputs + clamped).to(tl.float32)[:, None]
    if HAS_BIAS:
        result += tl.load(bias + clamped).to(tl.float32)[:, None]
    if GATED:
        result = activated(result, GELU) * up
    m = tl.arange(0, ROWS)
    place = m[None, :] * num_outputs + outputs[:, None]
    inside = (outputs < num_outputs)[:, None] & (m < num_rows)[None, :]
    if ADDS:
        result += tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    rounded = result.to(out.dtype.element_ty)
    tl.store(out + place, rounded, mask=inside)
    if SCALES:
        exact = tl.where(inside, rounded.to(tl.float32), 0.0)
        weights = tl.load(next_norm + clamped).to(tl.float32)[:, None]
        tl.store(scaled + place, (exact * weights).to(out.dtype.element_ty), mask=inside)
        tl.store(squares + tile * ROWS + m, tl.sum(exact * exact, 0))


@triton.jit
def row_scales_of(squares, size, eps, TILES: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Compute 1 / rms of each row (1, ROWS) from its sums of squares (TILES, ROWS)."""
    tiles, m = tl.arange(0, PADDED), tl.arange(0, ROWS)
    found = tl.load(squares + tiles[:, None] * ROWS + m[None, :], mask=(tiles < TILES)[:, None], other=0.0)
    return tl.rsqrt(tl.sum(found, 0) / size + eps)[None, :]


@triton.jit
def weight_rows(tile, num_outputs, OUTPUTS: tl.constexpr, GATED: tl.constexpr):
    """Return the weight rows of a tile (OUTPUTS,). With gates, half of them are gates, and the other half the ups that
    belong to them."""
    r = tl.arange(0, OUTPUTS)
    if GATED:
        HALF: tl.constexpr = OUTPUTS // 2
        rows = tl.minimum(tile * HALF + r % HALF, num_outputs - 1) + r // HALF * num_outputs
    else:
        rows = tl.minimum(tile * OUTPUTS + r, num_outputs - 1)
    return rows


@triton.jit
def sum_of_splits(result, parts, arrived, split, SPLITS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr):
    """Store this program's part of a tile. Returns whether it is the last program of the tile to arrive, and if so the
    sum of all parts."""
    place = tl.arange(0, OUTPUTS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(parts + split * (OUTPUTS * ROWS) + place, result)
    # All of this program's stores come before its arrival.
    tl.debug_barrier()
    is_last = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    tl.debug_barrier()
    if is_last:
        result = tl.zeros((OUTPUTS, ROWS), tl.float32)
        for part in tl.static_range(SPLITS):
            # The load bypasses the first-level cache, which does not see what other processors have written.
            result += tl.load(parts + part * (OUTPUTS * ROWS) + place, cache_modifier=".cg")
        tl.store(arrived, 0)
    return is_last, result


@triton.jit(do_not_specialize=["num_rows"])
def _skinny_linear(
    x, weight, bias, out, given_squares, eps, next_norm, scaled, squares, parts, arrived, num_rows, num_inputs,
    num_outputs, span, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr, AHEAD: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr, SCALES: tl.constexpr, TILES: tl.constexpr, PADDED_TILES: tl.constexpr,
):  # fmt: skip
    tile, split, m = tl.program_id(0), tl.program_id(1), tl.arange(0, ROWS)
    first = split * span
    last = tl.minimum(first + span, num_inputs)
    weight += weight_rows(tile, num_outputs, OUTPUTS, GATED)[:, None].to(tl.int64) * num_inputs
    x += m[:, None] * num_inputs
    prefetch(weight + tl.minimum(first + tl.arange(0, AHEAD // 64) * 64, last - 1)[None, :])
    begin()
    row_scales = tl.full((1, ROWS), 1.0, tl.float32)
    if TILES > 0:
        row_scales = row_scales_of(given_squares, num_inputs, eps, TILES, PADDED_TILES, ROWS)
    result = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for start in tl.range(first, last, STEP, num_stages=STAGES):
        columns = (start + tl.arange(0, STEP))[None, :]
        block = tl.load(weight + columns, mask=columns < last, other=0.0)
        given = tl.load(x + columns, mask=(m < num_rows)[:, None] & (columns < last), other=0.0)
        result = tl.dot(block, tl.trans(given), result, input_precision="ieee")
    result *= row_scales
    is_whole = SPLITS == 1
    if SPLITS > 1:
        own = parts + tile * (SPLITS * OUTPUTS * ROWS)
        is_whole, result = sum_of_splits(result, own, arrived + tile, split, SPLITS, OUTPUTS, ROWS)
    if is_whole:
        finish_tile(
            result, bias, out, next_norm, scaled, squares, tile, num_rows, num_outputs, ROWS, OUTPUTS, GATED, GELU,
            HAS_BIAS, ADDS, SCALES,
        )  # fmt: skip


class SkinnyWorkspace:
    """Memory for the results of programs that share a tile. All products share one, because only one product runs at a
    time."""

    def __init__(self, most_programs: int, most_rows: int, device: torch.device) -> None:
        """most_programs: largest number of programs of a product whose inputs are split."""
        self.parts = torch.empty(most_programs * TILE_OUTPUTS * most_rows, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(most_programs, dtype=torch.int32, device=device)
        """Number of programs of each tile that have ended; 0 between launches."""


class OwnKernel(Protocol):
    """Weight matrix (O, I) that is not a tensor and has a kernel of its own in place of `_skinny_linear`."""

    def __len__(self) -> int: ...

    def tiling(self, padded_rows: int, programs: int) -> tuple[int, int]:
        """Return the inputs of a step and the steps in flight, as `_tiling` does. programs: number of programs of the
        launch."""

    def tile_outputs(self, x: torch.Tensor) -> int:
        """Return the number of outputs of a program, like `TILE_OUTPUTS`, in a product with such rows that is not
        gated."""

    def arranged(self, x: torch.Tensor) -> torch.Tensor:
        """Return rows (M, I) with their inputs in the order that the weight needs."""

    def launch(self, grid: tuple[int, int], x: torch.Tensor, others: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Launch the kernel. others: arguments of `_skinny_linear` after the weight. options: compile-time arguments,
        by name."""


@dataclass(frozen=True, slots=True)
class ScaledRows:
    """Rows within an RMS norm: multiplied by its weights, but not yet divided by their own rms."""

    scaled: torch.Tensor
    """Rows multiplied by the norm's weights, (M, E)."""
    squares: torch.Tensor
    """Sums of squares of the rows themselves, tile by tile, (T, padded rows) float32."""


def _tiling(padded_rows: int, programs: int, processors: int) -> tuple[int, int]:
    """Choose the number of inputs of a step, and of steps in flight.

    If there are more programs than processors, but no more than twice as many, most processors would compute one and
    then wait for those with a second. So each processor computes two at once.
    """
    step, of_one, of_two = _TILINGS[padded_rows]
    return step, of_two if processors < programs <= 2 * processors else of_one


def num_tiles(num_outputs: int, gated: bool) -> int:
    """Return the number of programs of a product whose inputs are not split."""
    return -(-num_outputs // (TILE_OUTPUTS // 2 if gated else TILE_OUTPUTS))


def skinny_linear(
    x: torch.Tensor | ScaledRows,
    weight: torch.Tensor | OwnKernel,
    bias: torch.Tensor | None = None,
    *,
    padded_rows: int,
    splits: int,
    workspace: SkinnyWorkspace,
    eps: float = 0.0,
    gated: bool = False,
    gelu: bool = False,
) -> torch.Tensor:
    """Compute x (M, I) times weight (O, I) transposed, plus bias (O,), summed in float32: (M, O).

    x: if scaled, the rest of the norm is done here, with its `eps`. padded_rows: 16, 32, 64 or 128, at least M, the
    same for all products of M rows. splits: number of parts into which the inputs are split. gated: the weight is (2 O,
    I), gate rows then up rows; the result is silu(gate) * up, or with `gelu` gelu(gate) * up.
    """
    rows, squares = (x.scaled, x.squares) if isinstance(x, ScaledRows) else (x, None)
    outputs = len(weight) // 2 if gated else len(weight)
    out = torch.empty((len(rows), outputs), dtype=rows.dtype, device=rows.device)
    _launch(rows, weight, bias, out, padded_rows, splits, workspace, squares=squares, eps=eps, gated=gated, gelu=gelu)
    return out


def add_skinny_linear(
    target: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | OwnKernel,
    bias: torch.Tensor | None = None,
    *,
    padded_rows: int,
    splits: int,
    workspace: SkinnyWorkspace,
    next_norm: torch.Tensor | None = None,
) -> ScaledRows | None:
    """Add x (M, I) times weight (E, I) transposed, plus bias (E,), to `target` (M, E) in place, rounded once.

    next_norm: weights (E,) of a norm that follows, whose first half is then returned.
    """
    if next_norm is None:
        _launch(x, weight, bias, target, padded_rows, splits, workspace, adds=True)
        return None
    tile = TILE_OUTPUTS if isinstance(weight, torch.Tensor) else weight.tile_outputs(x)
    squares = torch.empty((triton.cdiv(len(weight), tile), padded_rows), dtype=torch.float32, device=x.device)
    result = ScaledRows(torch.empty_like(target), squares)
    _launch(x, weight, bias, target, padded_rows, splits, workspace, adds=True, next_norm=next_norm, result=result)
    return result


def _launch(
    x: torch.Tensor, weight: torch.Tensor | OwnKernel, bias: torch.Tensor | None, out: torch.Tensor, padded_rows: int,
    splits: int, workspace: SkinnyWorkspace, *, squares: torch.Tensor | None = None, eps: float = 0.0,
    gated: bool = False, gelu: bool = False, adds: bool = False, next_norm: torch.Tensor | None = None,
    result: ScaledRows | None = None,
) -> None:  # fmt: skip
    rows, inputs = x.shape
    grid = num_tiles(out.shape[1], gated), splits
    if isinstance(weight, torch.Tensor):
        step, stages = _tiling(padded_rows, grid[0] * grid[1], num_processors(x.device))
    else:
        x, (step, stages) = weight.arranged(x), weight.tiling(padded_rows, grid[0] * grid[1])
    span = triton.cdiv(triton.cdiv(inputs, step), splits) * step
    tiles = 0 if squares is None else len(squares)
    scaled, new_squares = (x, workspace.parts) if result is None else (result.scaled, result.squares)
    others = (
        x if bias is None else bias, out, workspace.parts if squares is None else squares, eps,
        x if next_norm is None else next_norm, scaled, new_squares, workspace.parts, workspace.arrived, rows, inputs,
        out.shape[1], span,
    )  # fmt: skip
    options: dict[str, Any] = {
        "ROWS": padded_rows, "OUTPUTS": TILE_OUTPUTS, "STEP": step, "AHEAD": _AHEAD, "SPLITS": splits,
        "STAGES": stages, "GATED": gated, "GELU": gelu, "HAS_BIAS": bias is not None, "ADDS": adds,
        "SCALES": result is not None, "TILES": tiles, "PADDED_TILES": triton.next_power_of_2(max(1, tiles)),
    }  # fmt: skip
    if isinstance(weight, torch.Tensor):
        _skinny_linear[grid](x, weight, *others, **options, num_warps=4, **LAUNCH)
    else:
        weight.launch(grid, x, others, options)
