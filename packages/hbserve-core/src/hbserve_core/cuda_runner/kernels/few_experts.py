"""Mixture of experts for a few rows: two launches after the router, where experts.py has five.

    logits ─ gate_up: each program finds its expert ─ down: each program has all of a row's experts, and adds them up

With a few rows nearly all their experts are different, so pairs are not sorted: each has programs of its own. Every
program finds the expert of its pair anew, which costs less than a launch. Products are computed as in `small_linear`,
without tensor cores. narrow_few_experts.py does the same with narrow weights.
Shapes: T rows, E hidden_size, X experts, K of them for each row, P = T * K pairs, F intermediate_size of an expert.
"""

import torch
import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin
from hbserve_core.cuda_runner.kernels.experts import Routing
from hbserve_core.cuda_runner.kernels.few_rows_linear import ScaledRows
from hbserve_core.cuda_runner.kernels.pointwise import activated

_MOST_ROWS = 2
"""Largest number of rows. With more rows it is faster to sort pairs first."""
_MOST_EXPERTS = 16
"""Largest number of experts of a row, all of which one program has."""
_GATES, _OUTPUTS = 8, 4
"""Number of gates of a program of gate_up, which has as many ups, and of outputs of a program of down."""
_GATE_BYTES, _OUTPUT_BYTES = 4096, 8192
"""Bytes that a program has at once of a weight row of gate_up, and of all experts' rows of one output of down."""


@triton.jit
def _expert_at(logits, rank, X: tl.constexpr, PADDED_X: tl.constexpr):
    """Find the expert at place `rank` of a row, ordered by logits and, if these are equal, by number."""
    x = tl.arange(0, PADDED_X)
    given = tl.load(logits + x, mask=x < X, other=float("-inf")).to(tl.float32)
    own = tl.reshape(given, (PADDED_X, 1))
    others = tl.reshape(given, (1, PADDED_X))
    is_before = (others > own) | ((others == own) & (x[None, :] < x[:, None]))
    found = tl.sum(tl.where(tl.sum(is_before.to(tl.int32), 1) == rank, x, 0), 0)
    # If a row's logits are NaN, any expert will do, because its share is NaN too.
    return tl.minimum(found, X - 1)


@triton.jit
def _few_gate_up(
    x, weight, logits, slots, out, chosen, squares, eps, num_outputs, first, INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr, STEP: tl.constexpr, X: tl.constexpr, PADDED_X: tl.constexpr, OWN: tl.constexpr,
    K: tl.constexpr, TILES: tl.constexpr, PADDED_TILES: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    begin()
    tile, pair = tl.program_id(0), tl.program_id(1)
    row = pair // K
    expert = _expert_at(logits + row * X, pair % K, X, PADDED_X)
    expert = tl.where(tl.load(slots + row) == -1, -1, expert)
    if tile == 0:
        tl.store(chosen + pair, expert)
    expert -= first
    if (expert < 0) | (expert >= OWN):
        return
    outputs = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    clamped = tl.minimum(outputs, num_outputs - 1).to(tl.int64)
    gates = weight + (expert.to(tl.int64) * (2 * num_outputs) + clamped)[:, None] * INPUTS
    ups = gates + num_outputs.to(tl.int64) * INPUTS
    gate = tl.zeros((OUTPUTS,), tl.float32)
    up = tl.zeros((OUTPUTS,), tl.float32)
    for start in tl.static_range(0, INPUTS, STEP):
        columns = start + tl.arange(0, STEP)
        inside = columns < INPUTS
        block = tl.load(gates + columns[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        up_block = tl.load(ups + columns[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        given = tl.load(x + row * INPUTS + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        gate += tl.sum(given * block.to(tl.float32), 1)
        up += tl.sum(given * up_block.to(tl.float32), 1)
    if TILES > 0:
        t = tl.arange(0, PADDED_TILES)
        found = tl.load(squares + t * STRIDE + row, mask=t < TILES, other=0.0)
        scale = tl.rsqrt(tl.sum(found, 0) / INPUTS + eps)
        gate *= scale
        up *= scale
    result = (activated(gate, False) * up).to(out.dtype.element_ty)
    tl.store(out + pair * num_outputs + outputs, result, mask=outputs < num_outputs)


@triton.jit
def _shares(logits, experts, is_one, X: tl.constexpr, PADDED_X: tl.constexpr, RENORMALISES: tl.constexpr):
    """Compute the shares of a row's experts (padded K,)."""
    own = tl.load(logits + tl.maximum(experts, 0), mask=is_one, other=float("-inf")).to(tl.float32)
    largest = tl.max(own, 0)
    powers = tl.exp(own - largest)
    if RENORMALISES:
        total = tl.sum(powers, 0)
    else:
        x = tl.arange(0, PADDED_X)
        given = tl.load(logits + x, mask=x < X, other=float("-inf")).to(tl.float32)
        total = tl.sum(tl.exp(given - largest), 0)
    return powers / total


@triton.jit
def _few_down(
    inner, weight, logits, chosen, out, num_outputs, first, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    STEP: tl.constexpr, X: tl.constexpr, PADDED_X: tl.constexpr, OWN: tl.constexpr, K: tl.constexpr,
    PADDED_K: tl.constexpr, RENORMALISES: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    begin()
    tile, row, k = tl.program_id(0), tl.program_id(1), tl.arange(0, PADDED_K)
    experts = tl.load(chosen + row * K + k, mask=k < K, other=-1)
    expert = experts - first
    is_own = (expert >= 0) & (expert < OWN)
    outputs = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    clamped = tl.minimum(outputs, num_outputs - 1)
    rows = tl.where(is_own, expert, 0).to(tl.int64)[None, :] * num_outputs + clamped[:, None]
    weight += rows[:, :, None] * INPUTS
    inner += (row * K + k)[:, None] * INPUTS
    found = tl.zeros((OUTPUTS, PADDED_K), tl.float32)
    for start in tl.static_range(0, INPUTS, STEP):
        columns = start + tl.arange(0, STEP)
        inside = is_own[:, None] & (columns < INPUTS)[None, :]
        block = tl.load(
            weight + columns[None, None, :], mask=inside[None, :, :], other=0.0, eviction_policy="evict_first"
        )  # fmt: skip
        given = tl.load(inner + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        found += tl.sum(block.to(tl.float32) * given[None, :, :], 2)
    shares = _shares(logits + row * X, experts, k < K, X, PADDED_X, RENORMALISES)
    result = tl.sum(found * shares[None, :], 1)
    place, inside = out + row * num_outputs + outputs, outputs < num_outputs
    if ADDS:
        result += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)


def suits_few_experts(rows: torch.Tensor, per_row: int) -> bool:
    """Return whether `few_expert_mlps` can take rows (T, E), and is faster than `expert_parts`."""
    return len(rows) <= _MOST_ROWS and per_row <= _MOST_EXPERTS


def few_expert_mlps(
    x: torch.Tensor | ScaledRows, logits: torch.Tensor, slots: torch.Tensor, gate_up: torch.Tensor,
    down: torch.Tensor, routing: Routing, *, eps: float, add_to: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Compute `combined` of `expert_parts`, but with x and eps as in `skinny_linear`."""
    rows, squares = (x.scaled, x.squares) if isinstance(x, ScaledRows) else (x, None)
    (num_rows, size), inner, k = rows.shape, down.shape[2], routing.per_row
    out = torch.empty_like(rows) if add_to is None else add_to
    chosen = torch.empty(num_rows * k, dtype=torch.int32, device=rows.device)
    inside = torch.empty((num_rows * k, inner), dtype=rows.dtype, device=rows.device)
    tiles, padded_k, itemsize = 0 if squares is None else len(squares), triton.next_power_of_2(k), rows.dtype.itemsize
    shared = {
        "X": routing.num_experts, "OWN": len(gate_up), "K": k,
        "PADDED_X": triton.next_power_of_2(routing.num_experts), "num_warps": 4, **LAUNCH,
    }  # fmt: skip
    _few_gate_up[(triton.cdiv(inner, _GATES), num_rows * k)](
        rows, gate_up, logits, slots, inside, chosen, logits if squares is None else squares, eps, inner,
        routing.first, INPUTS=size, OUTPUTS=_GATES, STEP=min(_GATE_BYTES // itemsize, triton.next_power_of_2(size)),
        TILES=tiles, PADDED_TILES=triton.next_power_of_2(max(1, tiles)),
        STRIDE=1 if squares is None else squares.shape[1], **shared,
    )  # fmt: skip
    _few_down[(triton.cdiv(size, _OUTPUTS), num_rows)](
        inside, down, logits, chosen, out, size, routing.first, INPUTS=inner, OUTPUTS=_OUTPUTS,
        STEP=min(_OUTPUT_BYTES // itemsize // padded_k, triton.next_power_of_2(inner)), PADDED_K=padded_k,
        RENORMALISES=routing.renormalises, ADDS=add_to is not None, **shared,
    )  # fmt: skip
    return out
