"""Mixture of experts with narrow weights for a few rows (see narrow_few_rows.py): two launches after the router.

    logits ─ gate_up: each program finds its expert ─ down: each warp has one of a row's experts, and their sum is added

With a few rows nearly all their experts are different, so pairs are not sorted: each has programs of its own. Every
program finds the expert of its pair anew, which costs less than a launch.
Shapes: T rows, E hidden_size, X experts, K of them for each row, P = T * K pairs, F intermediate_size of an expert.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin
from hbserve_core.cuda_runner.kernels.experts import Routing
from hbserve_core.cuda_runner.kernels.few_rows_linear import ScaledRows
from hbserve_core.cuda_runner.kernels.narrow_few_rows import (
    HALF,
    ROWS,
    RUN,
    along,
    finish,
    first_runs,
    places,
    product,
    residual,
    row_scales,
    row_squares,
    rows_of,
    sums_layout,
    words_layout,
)
from hbserve_core.cuda_runner.kernels.narrow_linear import NarrowMatrix

_MOST_ROWS = {8: 1, 4: 2}
"""Largest number of rows, by bits. With more rows it is faster to sort pairs first."""
_FEWEST_EXPERTS, _MOST_EXPERTS = 4, 16
"""Bounds of the number of experts of a row, each of which takes a warp."""
_OUTPUTS = 16
"""Number of outputs of a program."""


@gluon.jit
def _expert_at(logits, rank, X: gl.constexpr, PADDED_X: gl.constexpr):
    """Find the expert at place `rank` of a row, ordered by logits and, if these are equal, by number."""
    layout: gl.constexpr = gl.BlockedLayout([1, PADDED_X // 4], [8, 4], [gl.num_warps(), 1], [1, 0])
    x = gl.arange(0, PADDED_X, gl.SliceLayout(1, layout))
    y = gl.arange(0, PADDED_X, gl.SliceLayout(0, layout))
    own = gl.expand_dims(gl.load(logits + x, mask=x < X, other=float("-inf")).to(gl.float32), 1)
    others = gl.expand_dims(gl.load(logits + y, mask=y < X, other=float("-inf")).to(gl.float32), 0)
    is_before = (others > own) | ((others == own) & (gl.expand_dims(y, 0) < gl.expand_dims(x, 1)))
    found = gl.sum(gl.where(gl.sum(is_before.to(gl.int32), 1) == rank, x, 0), 0)
    # If a row's logits are NaN, any expert will do, because its share is NaN too.
    return gl.minimum(found, X - 1)


@gluon.jit
def _few_gate_up(
    x, words, scales, logits, slots, out, chosen, given_squares, eps, num_outputs, first, INPUTS: gl.constexpr,
    OUTPUTS: gl.constexpr, RUNS: gl.constexpr, AHEAD: gl.constexpr, X: gl.constexpr, PADDED_X: gl.constexpr,
    OWN: gl.constexpr, K: gl.constexpr, TILES: gl.constexpr, PADDED_TILES: gl.constexpr,
    STRIDE: gl.constexpr, BITS: gl.constexpr, ONE_GROUP: gl.constexpr,
):  # fmt: skip
    W: gl.constexpr = gl.num_warps()
    sums: gl.constexpr = sums_layout(W)
    of_words: gl.constexpr = words_layout(W, OUTPUTS, BITS)
    of_x: gl.constexpr = gl.DotOperandLayout(1, sums, 8)
    ALL_RUNS: gl.constexpr = INPUTS // RUN
    OF_WARP: gl.constexpr = (ALL_RUNS + W - 1) // W
    tile, pair = gl.program_id(0), gl.program_id(1)
    row, total = pair // K, OWN * 2 * num_outputs
    first_run, first_of_x = along(0, W, of_words) * OF_WARP, along(0, W, of_x) * OF_WARP
    begin()
    expert = gl.where(gl.load(slots + row) == -1, -1, _expert_at(logits + row * X, pair % K, X, PADDED_X))
    if tile == 0:
        gl.store(chosen + pair, expert)
    expert -= first
    if (expert < 0) | (expert >= OWN):
        return
    rows = rows_of(tile, num_outputs, OUTPUTS, True, of_words) + expert * (2 * num_outputs)
    words, scales = places(words, scales, rows, first_run, total, INPUTS, BITS, ONE_GROUP, of_words)
    x += row * INPUTS + first_of_x * RUN + along(1, HALF, of_x)
    there = gl.minimum(ALL_RUNS - first_run, OF_WARP)
    first_loaded = first_runs(words, scales, there, total, RUNS, BITS, ONE_GROUP)
    if TILES > 0:
        given = row_squares(given_squares + row, 1, TILES, PADDED_TILES, STRIDE)
    result = product(
        first_loaded, words, scales, x, there, gl.minimum(ALL_RUNS - first_of_x, OF_WARP), along(2, ROWS, of_x) == 0,
        total, OUTPUTS, OF_WARP, RUNS, AHEAD, BITS, ONE_GROUP,
    )  # fmt: skip
    whole = gl.sum(result, 0)
    if TILES > 0:
        whole *= row_scales(given, gl.SliceLayout(0, sums), INPUTS, eps)
    finish(
        whole, whole, out, out + pair * num_outputs, out, out, out, tile, 1, num_outputs, OUTPUTS // 2, STRIDE, True,
        False, False, False, False,
    )  # fmt: skip


@gluon.jit
def _shares(logits, experts, is_one, X: gl.constexpr, PADDED_X: gl.constexpr, RENORMALISES: gl.constexpr):
    """Compute the shares of a row's experts (W, 1, 1)."""
    own = gl.load(logits + gl.maximum(experts, 0), mask=is_one, other=float("-inf")).to(gl.float32)
    largest = gl.max(gl.max(gl.max(own, 2), 1), 0)
    powers = gl.exp(own - largest)
    if RENORMALISES:
        total = gl.sum(gl.sum(gl.sum(powers, 2), 1), 0)
    else:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        x = gl.arange(0, PADDED_X, layout)
        given = gl.load(logits + x, mask=x < X, other=float("-inf")).to(gl.float32)
        total = gl.sum(gl.exp(given - largest), 0)
    return powers / total


@gluon.jit
def _few_down(
    inner, words, scales, logits, chosen, out, next_norm, scaled, squares, num_outputs, first, INPUTS: gl.constexpr,
    OUTPUTS: gl.constexpr, RUNS: gl.constexpr, AHEAD: gl.constexpr, X: gl.constexpr, PADDED_X: gl.constexpr,
    OWN: gl.constexpr, K: gl.constexpr, RENORMALISES: gl.constexpr, ADDS: gl.constexpr, SCALES: gl.constexpr,
    STRIDE: gl.constexpr, BITS: gl.constexpr, ONE_GROUP: gl.constexpr,
):  # fmt: skip
    W: gl.constexpr = gl.num_warps()
    sums: gl.constexpr = sums_layout(W)
    of_words: gl.constexpr = words_layout(W, OUTPUTS, BITS)
    of_x: gl.constexpr = gl.DotOperandLayout(1, sums, 8)
    ALL_RUNS: gl.constexpr = INPUTS // RUN
    tile, row = gl.program_id(0), gl.program_id(1)
    k, k_of_x, k_of_sums = along(0, W, of_words), along(0, W, of_x), along(0, W, sums)
    begin()
    # Each warp has one of the row's experts.
    chosen += row * K
    expert = gl.load(chosen + k, mask=k < K, other=-1) - first
    expert_of_x = gl.load(chosen + k_of_x, mask=k_of_x < K, other=-1) - first
    expert_of_sums = gl.load(chosen + k_of_sums, mask=k_of_sums < K, other=-1)
    rows = rows_of(tile, num_outputs, OUTPUTS, False, of_words) + gl.maximum(expert, 0) * num_outputs
    total = OWN * num_outputs
    words, scales = places(words, scales, rows, 0, total, INPUTS, BITS, ONE_GROUP, of_words)
    x = inner + (row * K + k_of_x) * INPUTS + along(1, HALF, of_x)
    there = gl.where((expert >= 0) & (expert < OWN), ALL_RUNS, 0)
    there_of_x = gl.where((expert_of_x >= 0) & (expert_of_x < OWN), ALL_RUNS, 0)
    first_loaded = first_runs(words, scales, there, total, RUNS, BITS, ONE_GROUP)
    before = residual(out + row * num_outputs, tile, 1, num_outputs, OUTPUTS, gl.SliceLayout(0, sums), ADDS)
    result = product(
        first_loaded, words, scales, x, there, there_of_x, along(2, ROWS, of_x) == 0, total, OUTPUTS, ALL_RUNS, RUNS,
        AHEAD, BITS, ONE_GROUP,
    )  # fmt: skip
    result *= _shares(logits + row * X, expert_of_sums, k_of_sums < K, X, PADDED_X, RENORMALISES)
    finish(
        gl.sum(result, 0), before, out, out + row * num_outputs, next_norm, scaled + row * num_outputs, squares + row,
        tile, 1, num_outputs, OUTPUTS, STRIDE, False, False, False, ADDS, SCALES,
    )  # fmt: skip


def suits_few_experts(rows: torch.Tensor, gate_up: NarrowMatrix, down: NarrowMatrix, per_row: int) -> bool:
    """Return whether `few_expert_mlps` can take rows (T, E) and such weights, and is faster than `expert_parts`."""
    if len(rows) > _MOST_ROWS[gate_up.bits] or not _FEWEST_EXPERTS <= per_row <= _MOST_EXPERTS:
        return False
    return gate_up.suits_few(rows) and down.suits_few(rows)


def few_expert_mlps(
    x: torch.Tensor | ScaledRows, logits: torch.Tensor, slots: torch.Tensor, gate_up: NarrowMatrix,
    down: NarrowMatrix, count: int, routing: Routing, *, eps: float, add_to: torch.Tensor | None = None,
    next_norm: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ScaledRows | None]:  # fmt: skip
    """Compute `combined` of `expert_parts`, but with x and eps as in `skinny_linear`. count: number of experts, whose
    matrices are stacked. next_norm: weights (E,) of a norm that follows, of which the first half is returned too."""
    rows, squares = (x.scaled, x.squares) if isinstance(x, ScaledRows) else (x, None)
    (num_rows, size), inner, k = rows.shape, down.shape[1], routing.per_row
    out = torch.empty_like(rows) if add_to is None else add_to
    chosen = torch.empty(num_rows * k, dtype=torch.int32, device=rows.device)
    inside = torch.empty((num_rows * k, inner), dtype=rows.dtype, device=rows.device)
    tiles = 0 if squares is None else len(squares)
    shared = {
        "OUTPUTS": _OUTPUTS, "AHEAD": 2, "X": routing.num_experts, "OWN": count, "K": k,
        "PADDED_X": triton.next_power_of_2(routing.num_experts), **LAUNCH,
    }  # fmt: skip
    _few_gate_up[(triton.cdiv(inner, _OUTPUTS // 2), num_rows * k)](
        rows, gate_up.words, gate_up.scales, logits, slots, inside, chosen, rows if squares is None else squares, eps,
        inner, routing.first, INPUTS=size, RUNS=2, TILES=tiles, PADDED_TILES=triton.next_power_of_2(max(1, tiles)),
        STRIDE=1 if squares is None else squares.shape[1], BITS=gate_up.bits, ONE_GROUP=len(gate_up.scales) == 1,
        num_warps=8, **shared,
    )  # fmt: skip
    result = None
    if next_norm is not None:
        new_squares = torch.empty((triton.cdiv(size, _OUTPUTS), 16), dtype=torch.float32, device=rows.device)
        result = ScaledRows(torch.empty_like(out), new_squares)
    _few_down[(triton.cdiv(size, _OUTPUTS), num_rows)](
        inside, down.words, down.scales, logits, chosen, out, out if next_norm is None else next_norm,
        out if result is None else result.scaled, logits if result is None else result.squares, size, routing.first,
        INPUTS=inner, RUNS=min(3, inner // RUN.value), RENORMALISES=routing.renormalises, ADDS=add_to is not None,
        SCALES=result is not None, STRIDE=16, BITS=down.bits, ONE_GROUP=len(down.scales) == 1,
        num_warps=triton.next_power_of_2(k), **shared,
    )  # fmt: skip
    return out, result
