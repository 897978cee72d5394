"""Mixture of experts: each row goes to a few of many MLPs, and their results are summed by weight.

    logits ─route▶ experts and weights of each row ─assign▶ rows by expert, in tiles ─gate_up▶ ─down▶ ─combine▶ rows

A pair is a row and one of the experts that it goes to. `assign` puts the pairs of an expert next to each other, and
begins a new tile for each expert, so that a program reads only one expert's weights and all rows of a tile share them.
In a step of decodes, each program finds one expert's pairs by looking through all pairs, which takes less time than
waiting for a program that sorts them. For more pairs, many programs count and place them. The order of an expert's
pairs then differs from run to run, but no result depends on it.

Everything is queued without waiting for the device: a launch has as many programs as there can be tiles, and programs
without a tile end at once. Pairs of experts on other ranks, and of padding, are in no tile.

Shapes: T rows, E hidden_size, X experts, K of them for each row, P = T * K pairs, F intermediate_size of an expert.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin, num_processors
from hbserve_core.cuda_runner.kernels.few_rows_linear import ScaledRows
from hbserve_core.cuda_runner.kernels.pointwise import activated

_SMALL_TILE, _LARGE_TILE = 16, 128
_MANY_PAIRS = 128
"""Average number of pairs of an expert from which tiles are large. With fewer pairs, too many rows of tiles would be
empty."""
_FEWEST_AT_ONCE, _MOST_AT_ONCE = 512, 4096
"""Bounds of the number of pairs that one program looks through."""
_CHUNK = 512
"""Number of pairs of a program if there are more than that."""


@triton.jit
def _route(
    logits, slots, experts, weights, X: tl.constexpr, PADDED_X: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr,
    RENORMALISES: tl.constexpr,
):  # fmt: skip
    begin()
    row, x, k = tl.program_id(0), tl.arange(0, PADDED_X), tl.arange(0, PADDED_K)
    given = tl.load(logits + row.to(tl.int64) * X + x, mask=x < X, other=float("-inf")).to(tl.float32)
    shares = tl.exp(given - tl.max(given, 0))
    total = tl.sum(shares, 0)
    chosen, found = tl.zeros((PADDED_K,), tl.int32), tl.zeros((PADDED_K,), tl.float32)
    for each in tl.static_range(K):
        share, place = tl.max(shares, 0, return_indices=True, return_indices_tie_break_left=True)
        # If a row's logits are NaN, any expert will do, because the weight below is NaN too.
        place = tl.minimum(tl.maximum(place, 0), X - 1)
        chosen, found = tl.where(k == each, place, chosen), tl.where(k == each, share, found)
        shares = tl.where(x == place, -1.0, shares)
    found = found / (tl.sum(found, 0) if RENORMALISES else total) + (total - total)
    is_padding = tl.load(slots + row) == -1
    tl.store(weights + row * K + k, found, mask=k < K)
    tl.store(experts + row * K + k, tl.where(is_padding, -1, chosen), mask=k < K)


@triton.jit
def _own_experts(experts, pair, num_pairs, first, X: tl.constexpr):
    """Load the expert of some pairs, by its place among this rank's experts, and whether it is one of them."""
    expert = tl.load(experts + pair, mask=pair < num_pairs, other=-1)
    expert = tl.where(expert >= 0, expert - first, -1)
    return expert, (expert >= 0) & (expert < X)


@triton.jit(do_not_specialize=["num_pairs", "first"])
def _assign(
    experts, ends, pairs, num_pairs, first, X: tl.constexpr, PADDED_X: tl.constexpr, ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    # Assigns pairs to tiles. Each program has one expert.
    begin()
    own, pair, x = tl.program_id(0), tl.arange(0, PAIRS), tl.arange(0, PADDED_X)
    expert, is_own = _own_experts(experts, pair, num_pairs, first, X)
    tiles = tl.cdiv(tl.histogram(tl.where(is_own, expert, 0), PADDED_X, mask=is_own), ROWS)
    if own == 0:
        tl.store(ends + x, tl.cumsum(tiles, 0), mask=x < X)
    is_here = (expert == own) & is_own
    places = pairs + tl.sum(tl.where(x < own, tiles, 0), 0) * ROWS
    tl.store(places + tl.cumsum(is_here.to(tl.int32), 0) - 1, pair, mask=is_here)
    count = tl.sum(is_here.to(tl.int32), 0)
    rest = count + tl.arange(0, ROWS)
    tl.store(places + rest, tl.full((ROWS,), -1, tl.int32), mask=rest < tl.cdiv(count, ROWS) * ROWS)


@triton.jit(do_not_specialize=["num_pairs", "first"])
def _count_many(experts, places, num_pairs, first, X: tl.constexpr, CHUNK: tl.constexpr):
    # Counts pairs, as the first of three launches that do the same as `_assign` with many programs. places: (X,), first
    # zeros, then counts, then where each expert's next pair goes.
    begin()
    pair = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    expert, is_own = _own_experts(experts, pair, num_pairs, first, X)
    tl.atomic_add(places + expert, 1, mask=is_own)


@triton.jit
def _make_many_tiles(places, ends, X: tl.constexpr, PADDED_X: tl.constexpr, ROWS: tl.constexpr):
    begin()
    x = tl.arange(0, PADDED_X)
    # The load bypasses the first-level cache, which does not see atomic additions.
    tiles = tl.cdiv(tl.load(places + x, mask=x < X, other=0, cache_modifier=".cg"), ROWS)
    end = tl.cumsum(tiles, 0)
    tl.store(ends + x, end, mask=x < X)
    tl.store(places + x, (end - tiles) * ROWS, mask=x < X)


@triton.jit(do_not_specialize=["num_pairs", "first"])
def _put_many(experts, places, pairs, num_pairs, first, X: tl.constexpr, CHUNK: tl.constexpr):
    begin()
    pair = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    expert, is_own = _own_experts(experts, pair, num_pairs, first, X)
    place = tl.atomic_add(places + expert, 1, mask=is_own)
    tl.store(pairs + place, pair, mask=is_own)


@triton.jit
def expert_of(ends, tile, X: tl.constexpr, PADDED_X: tl.constexpr):
    """Find the expert whose pairs are in a tile; X if there are none."""
    x = tl.arange(0, PADDED_X)
    end = tl.load(ends + x, mask=x < X, other=2**31 - 1)
    return tl.minimum(tl.sum((end <= tile).to(tl.int32), 0), X)


@triton.jit
def _expert_gate_up(
    rows, weight, pairs, ends, out, num_inputs, num_outputs, X: tl.constexpr, PADDED_X: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    begin()
    expert = expert_of(ends, tl.program_id(1), X, PADDED_X)
    if expert >= X:
        return
    pair = tl.load(pairs + tl.program_id(1) * ROWS + tl.arange(0, ROWS))
    used, outputs = pair >= 0, tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    clamped = tl.minimum(outputs, num_outputs - 1).to(tl.int64)
    gates = weight + (expert.to(tl.int64) * (2 * num_outputs) + clamped)[:, None] * num_inputs
    ups = gates + num_outputs * num_inputs
    rows += (tl.maximum(pair, 0) // K).to(tl.int64)[:, None] * num_inputs
    gate = tl.zeros((OUTPUTS, ROWS), tl.float32)
    up = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for start in tl.range(0, num_inputs, STEP, num_stages=STAGES):
        columns = (start + tl.arange(0, STEP))[None, :]
        inside = columns < num_inputs
        given = tl.trans(tl.load(rows + columns, mask=used[:, None] & inside, other=0.0))
        gate = tl.dot(tl.load(gates + columns, mask=inside, other=0.0), given, gate, input_precision="ieee")
        up = tl.dot(tl.load(ups + columns, mask=inside, other=0.0), given, up, input_precision="ieee")
    result = (activated(gate, False) * up).to(out.dtype.element_ty)
    place = pair.to(tl.int64)[None, :] * num_outputs + outputs[:, None]
    tl.store(out + place, result, mask=used[None, :] & (outputs < num_outputs)[:, None])


@triton.jit
def _expert_down(
    rows, weight, pairs, ends, shares, out, num_inputs, num_outputs, X: tl.constexpr, PADDED_X: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    begin()
    expert = expert_of(ends, tl.program_id(1), X, PADDED_X)
    if expert >= X:
        return
    pair = tl.load(pairs + tl.program_id(1) * ROWS + tl.arange(0, ROWS))
    used, outputs = pair >= 0, tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    clamped = tl.minimum(outputs, num_outputs - 1).to(tl.int64)
    weights = weight + (expert.to(tl.int64) * num_outputs + clamped)[:, None] * num_inputs
    rows += tl.maximum(pair, 0).to(tl.int64)[:, None] * num_inputs
    result = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for start in tl.range(0, num_inputs, STEP, num_stages=STAGES):
        columns = (start + tl.arange(0, STEP))[None, :]
        inside = columns < num_inputs
        given = tl.load(rows + columns, mask=used[:, None] & inside, other=0.0)
        block = tl.load(weights + columns, mask=inside, other=0.0)
        result = tl.dot(block, tl.trans(given), result, input_precision="ieee")
    result *= tl.load(shares + pair, mask=used, other=0.0)[None, :]
    place = pair.to(tl.int64)[None, :] * num_outputs + outputs[:, None]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=used[None, :] & (outputs < num_outputs)[:, None])


@triton.jit
def with_parts(total, parts, experts, row, columns, first, SIZE: tl.constexpr, X: tl.constexpr, K: tl.constexpr):
    """Add the experts' results for some columns of a row (see `ExpertParts`) to `total`, which is float32."""
    for each in tl.static_range(K):
        expert = tl.load(experts + row * K + each)
        own_size = tl.where((expert >= first) & (expert < first + X), SIZE, 0)
        part = tl.load(parts + (row * K + each) * SIZE + columns, mask=columns < own_size, other=0.0)
        total += part.to(tl.float32)
    return total


@triton.jit(do_not_specialize=["first"])
def _combine(
    parts, experts, out, first, SIZE: tl.constexpr, X: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
):  # fmt: skip
    begin()
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    if ADDS:
        total += tl.load(out + row * SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    total = with_parts(total, parts, experts, row, columns, first, SIZE, X, K)
    tl.store(out + row * SIZE + columns, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Routing:
    """Parameters of a model's experts besides their weights."""

    num_experts: int
    """Number of experts of all ranks."""
    per_row: int
    renormalises: bool
    """Whether the weights of a row's experts are scaled to add up to 1."""
    first: int = 0
    """Number of the first expert of this rank."""


@dataclass(frozen=True, slots=True)
class ExpertTiles:
    """Pairs sorted by expert, tile by tile."""

    pairs: torch.Tensor
    ends: torch.Tensor
    shares: torch.Tensor
    count: int
    rows: int
    """Number of rows of each tile."""
    per_row: int
    """Number of experts of each row."""


@dataclass(frozen=True, slots=True)
class ExpertParts:
    """Results of each row's experts, which are still to be added up."""

    rows: torch.Tensor
    """Results (M * K, E), each times its share; undefined for experts of other ranks."""
    experts: torch.Tensor
    """Experts of each row, (M, K) int32."""
    first: int
    count: int
    """Number of experts of this rank, from `first` on."""


class OwnExperts(Protocol):
    """Matrices (X, O, I) of experts that are not a tensor and have kernels of their own."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def __len__(self) -> int: ...

    def form_of_rows(self, rows: torch.Tensor, per_row: int) -> Any:
        """Return the form (see eight_bit_rows.py) in which rows (T, E) with `per_row` experts each are multiplied, or
        None if they are multiplied as they are."""

    def gate_up(self, rows: torch.Tensor, formed: Any, out: torch.Tensor, tiles: ExpertTiles) -> None:
        """Compute the inputs of `down` from rows (T, E), and write them to `out` (P, F). formed: the rows in that form,
        if they are already there."""

    def down(self, rows: torch.Tensor, out: torch.Tensor, tiles: ExpertTiles) -> None:
        """Compute the experts' results from rows (P, F), and write them to `out` (P, E), each times its share."""

    def suits_few(self, rows: torch.Tensor, down: Any, per_row: int) -> bool:
        """Return whether `few_mlps` can take rows (T, E) with `per_row` experts each and such a `down`, and is
        faster."""

    def few_mlps(
        self, x: torch.Tensor | ScaledRows, logits: torch.Tensor, slots: torch.Tensor, down: Any, routing: Routing, *,
        eps: float, add_to: torch.Tensor | None, next_norm: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ScaledRows | None]:  # fmt: skip
        """Compute `combined` of `expert_parts`, but with x and eps as in `skinny_linear`. next_norm: weights (E,) of a
        norm that follows, of which the first half is returned too."""


def num_tiles(num_pairs: int, num_experts: int, rows: int) -> int:
    """Return the largest number of tiles of `rows` rows that pairs can need, however they are distributed among
    experts."""
    return num_pairs // rows + min(num_pairs, num_experts)


def rows_of_tile(num_pairs: int, num_experts: int) -> int:
    """Choose the number of rows of a tile: a few more than an expert has on average, so that most experts have one
    tile."""
    most = _LARGE_TILE if num_pairs >= _MANY_PAIRS * num_experts else 64
    return min(most, max(_SMALL_TILE, 1 << (2 * num_pairs // num_experts - 1).bit_length()))


def _assigned(experts: torch.Tensor, shares: torch.Tensor, first: int, count: int) -> ExpertTiles:
    """Assign the pairs of this rank's experts, which are `count` from `first` on, to tiles. experts: (T, K) int32, -1
    for padding. shares: (T, K) float32, the shares of each row's experts in its result."""
    num_pairs, padded, device = experts.numel(), triton.next_power_of_2(count), experts.device
    rows = rows_of_tile(num_pairs, count)
    tiles = num_tiles(num_pairs, count, rows)
    if num_pairs <= _MOST_AT_ONCE:
        ends = torch.empty(count, dtype=torch.int32, device=device)
        pairs = torch.empty(tiles * rows, dtype=torch.int32, device=device)
        at_once = max(_FEWEST_AT_ONCE, triton.next_power_of_2(num_pairs))
        _assign[(count,)](
            experts, ends, pairs, num_pairs, first, count, padded, rows, at_once, num_warps=8, **LAUNCH
        )  # fmt: skip
    else:
        places, ends = torch.zeros((2, padded), dtype=torch.int32, device=device)
        pairs = torch.full((tiles * rows,), -1, dtype=torch.int32, device=device)
        grid = (triton.cdiv(num_pairs, _CHUNK),)
        _count_many[grid](experts, places, num_pairs, first, count, _CHUNK, num_warps=4, **LAUNCH)
        _make_many_tiles[(1,)](places, ends, count, padded, rows, num_warps=1, **LAUNCH)
        _put_many[grid](experts, places, pairs, num_pairs, first, count, _CHUNK, num_warps=4, **LAUNCH)
    return ExpertTiles(pairs, ends, shares, tiles, rows, experts.shape[1])


def combined(parts: ExpertParts, add_to: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Add up the parts of each row, (T, E). That is the result of this rank's experts; the sum over ranks is the
    model's.

    add_to: (T, E), to which the sum is added in place, and which is returned. dtype: dtype of the result without
    `add_to`.
    """
    (num_rows, k), size = parts.experts.shape, parts.rows.shape[-1]
    out = torch.empty((num_rows, size), dtype=dtype, device=parts.rows.device) if add_to is None else add_to
    block = min(1024, triton.next_power_of_2(size))
    _combine[(num_rows, triton.cdiv(size, block))](
        parts.rows, parts.experts, out, parts.first, size, parts.count, k, block, add_to is not None, num_warps=4,
        **LAUNCH,
    )  # fmt: skip
    return out


def expert_parts(
    rows: torch.Tensor,
    logits: torch.Tensor,
    slots: torch.Tensor,
    gate_up: torch.Tensor | OwnExperts,
    down: torch.Tensor | OwnExperts,
    routing: Routing,
    *,
    formed: Any = None,
) -> ExpertParts:
    """Compute the parts that add up to the experts' result for each of rows (T, E).

    logits: (T, all experts), from the router. slots: (T,) int32, -1 for padding, see `store_kv`. gate_up: (X, 2 F, E),
    gates then ups. down: (X, E, F). formed: the rows in 8 bits, if `gate_up` asks for such a form.
    """
    num_rows, k = len(rows), routing.per_row
    experts = torch.empty((num_rows, k), dtype=torch.int32, device=rows.device)
    shares = torch.empty((num_rows, k), dtype=torch.float32, device=rows.device)
    _route[(num_rows,)](
        logits, slots, experts, shares, routing.num_experts, triton.next_power_of_2(routing.num_experts), k,
        triton.next_power_of_2(k), routing.renormalises, num_warps=1, **LAUNCH,
    )  # fmt: skip
    tiles = _assigned(experts, shares, routing.first, len(gate_up))
    parts = _products(rows, formed, gate_up, down, tiles)
    return ExpertParts(parts, experts, routing.first, len(gate_up))


def _products(
    rows: torch.Tensor, formed: Any, gate_up: torch.Tensor | OwnExperts,
    down: torch.Tensor | OwnExperts, tiles: ExpertTiles,
) -> torch.Tensor:  # fmt: skip
    """Compute the result (P, E) of each pair, times its share, in float32 if there are few. Pairs that are in no tile
    are not written."""
    count, inner, size = len(gate_up), gate_up.shape[1] // 2, rows.shape[1]
    inside = torch.empty((tiles.shares.numel(), inner), dtype=rows.dtype, device=rows.device)
    # Rows in 8 bits lose more than a part's last bits.
    is_exact = isinstance(gate_up, torch.Tensor) or gate_up.form_of_rows(rows, tiles.per_row) is None
    kept = torch.float32 if tiles.rows < 64 and is_exact else rows.dtype
    parts = torch.empty((tiles.shares.numel(), size), dtype=kept, device=rows.device)
    is_large = tiles.rows == _LARGE_TILE
    tiling = {
        "X": count, "PADDED_X": triton.next_power_of_2(count), "ROWS": tiles.rows,
        "STEP": 64 if rows.dtype.itemsize == 2 else 32, "STAGES": 3 if is_large else 4,
        "num_warps": 8 if is_large else 4,
    }  # fmt: skip
    fewest = 2 * num_processors(rows.device)
    for_gates, for_sums = (32 if tiles.count * triton.cdiv(each, 64) < fewest else 64 for each in (inner, size))
    for_sums = 128 if is_large else for_sums
    if isinstance(gate_up, torch.Tensor):
        # With small tiles, long steps load the weights faster if there are enough programs.
        is_long = tiles.rows == _SMALL_TILE and for_gates == 64
        steps = {"STEP": 2 * tiling["STEP"], "STAGES": 3} if is_long else {}
        _expert_gate_up[(triton.cdiv(inner, for_gates), tiles.count)](
            rows, gate_up, tiles.pairs, tiles.ends, inside, size, inner, K=tiles.per_row, OUTPUTS=for_gates,
            **(tiling | steps), **LAUNCH,
        )  # fmt: skip
    else:
        gate_up.gate_up(rows, formed, inside, tiles)
    if isinstance(down, torch.Tensor):
        _expert_down[(triton.cdiv(size, for_sums), tiles.count)](
            inside, down, tiles.pairs, tiles.ends, tiles.shares, parts, inner, size, OUTPUTS=for_sums, **tiling,
            **LAUNCH,
        )  # fmt: skip
    else:
        down.down(inside, parts, tiles)
    return parts
