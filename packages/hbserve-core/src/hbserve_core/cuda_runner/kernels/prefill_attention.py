"""Prefill attention of chunks of several new tokens to paged context: keys and values are stored, then comes flash
attention (Dao 2023).

`store_kv` norms and rotates keys, and writes keys and values to their blocks; decode_attention.py writes a decode's new
token itself. On Hopper, `prefill_attention` calls hopper_attention.py for most models. The kernel that it calls for all
others reads the context in two parts.

A chunk's earlier context is read from the pool, block by block; its own keys and values, which lie one after another in
the step's rows, are read in whole tiles through a tensor descriptor (on Hopper, by the copy engine, TMA). One program
takes a tile of new tokens of one sequence and key head. The G query heads of a key head share the program, so that each
key is read once for all of them: row r of a tile is new token r // G and query head r % G.

Shapes: T rows of the step, N query heads, K key heads, G = N / K, D head_dim.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from hbserve_core.cuda_runner.kernels.attention_parts import (
    LOG2_E,
    Scores,
    as_given,
    as_stored,
    attend,
    attend_paged,
    load_rotated,
    nothing_seen,
)
from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin
from hbserve_core.cuda_runner.kernels.hopper_attention import hopper_prefill_attention, suits_hopper

_PARTS = {128: 8, 511: 2}
"""Number of programs that share a tile, by the largest number of rows of a step. Few rows have too few tiles for all
multiprocessors, so the time of one program counts."""
_FEWEST_ROWS = 16
"""Fewest rows of a program: tensor cores multiply at least this many at a time."""
_STORED_ROWS = 4, 16
"""Number of rows of a program of `store_kv`: for few rows, and for more than 512."""


@triton.jit(do_not_specialize=["num_rows"])
def _store_kv(
    qkv, positions, slots, cos_sin, norm_weight, pool, eps, num_rows, block_stride, layer_offset, key_inverse,
    value_inverse, N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, HAS_NORM: tl.constexpr, NARROW: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # What only the host writes is read before the previous kernel has ended.
    slot = tl.load(slots + rows, mask=rows < num_rows, other=-2)
    position = tl.load(positions + rows, mask=rows < num_rows, other=0).to(tl.int64)[:, None]
    begin()
    used, padding = (slot >= 0)[:, None], (slot == -1)[:, None]
    d = tl.arange(0, PADDED_D)[None, :]
    given = qkv + rows.to(tl.int64)[:, None] * ((N + 2 * K) * D) + (N + head) * D
    # The row's place in the pool: block, then layer, key or value, token in the block, head.
    place = (slot // BLOCK_SIZE).to(tl.int64) * block_stride + layer_offset + (slot % BLOCK_SIZE) * (K * D)
    target = pool + place[:, None]
    inside = used & (d < D)
    if head < K:
        weights = norm_weight + (N + head) * D + tl.zeros((ROWS, 1), tl.int32)
        key = load_rotated(given, used, weights, cos_sin + position * D, eps, D, PADDED_D, HAS_NORM)
        key = as_stored(key, key_inverse, NARROW)
        tl.store(target + head * D + d, key, mask=inside)
        if IN_PLACE:
            # Two warps may share a head, and each of them reads what the other writes.
            tl.debug_barrier()
            tl.store(given + d, key.to(qkv.dtype.element_ty), mask=(used | padding) & (d < D))
    else:
        value = as_stored(tl.load(given + d, mask=inside, other=0.0), value_inverse, NARROW)
        tl.store(target + BLOCK_SIZE * K * D + (head - K) * D + d, value, mask=inside)
        if IN_PLACE:
            written = (used | padding) if NARROW else padding
            tl.store(given + d, value.to(qkv.dtype.element_ty), mask=written & (d < D))


def store_kv(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos_sin: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None,
    pool: torch.Tensor,
    layer: int,
    *,
    scores: Scores | None = None,
) -> None:
    """Norm and rotate keys, and write them and values into the pool; if `prefill_attention` reads a chunk's own keys
    and values from the step's rows, also in place. If the pool holds 8-bit floats, they are also divided by their
    scales and rounded.

    qkv: (T, (N + 2 K) * D). positions: (T,) int32. slots: (T,) int32, block * block_size + place in the block; -1 for
    padding, whose keys and values become 0, so that tiles of `prefill_attention` may reach into it; -2 for decodes,
    which are left alone. cos_sin: (max_model_len, D) float32, cosines then sines. norm: weights (N + K, D) and eps, or
    None. pool: (num_blocks, num_layers, 2, block_size, K, D). scores: only its key and value scales are used.
    """
    _, _, _, block_size, num_kv_heads, head_dim = pool.shape
    rows = qkv.shape[0]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    per_program = _STORED_ROWS[rows > 512]
    weight, eps = norm or (cos_sin, 0.0)
    key_scale, value_scale = (scores.key_scale, scores.value_scale) if scores else (1.0, 1.0)
    _store_kv[(triton.cdiv(rows, per_program), 2 * num_kv_heads)](
        qkv, positions, slots, cos_sin, weight, pool, eps, rows, pool.stride(0), layer * pool.stride(1), 1 / key_scale,
        1 / value_scale, N=num_heads, K=num_kv_heads, D=head_dim, PADDED_D=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size, ROWS=per_program, HAS_NORM=norm is not None, NARROW=pool.dtype.itemsize == 1,
        IN_PLACE=not suits_hopper(qkv, pool, scores), num_warps=4, **LAUNCH,
    )  # fmt: skip


@triton.jit
def _attend_new(
    state, query, rows_of_step, first_row, key_column, value_column, first, last, new, scale,
    TILE: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Attend to the step's own tokens [first, last) of a sequence. Row r sees the tokens up to `new[r]`, only the last
    WINDOW of them if there is a window, or all if not MASKED.

    Tiles may reach into the next head, where numbers are multiplied by zeros of the query, and into the next sequence
    or padding. What is there is not visible, and may be anything. Such values are set to 0, because 0 times a NaN is
    NaN.
    """
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        key = rows_of_step.load([first_row + start, key_column])
        value = rows_of_step.load([first_row + start, value_column])
        tokens = start + tl.arange(0, TILE)
        if MASKED:
            value = tl.where((tokens < last)[:, None], value, 0.0).to(value.dtype)
        visible = tokens[None, :] <= new[:, None]
        if WINDOW > 0:
            visible &= tokens[None, :] > new[:, None] - WINDOW
        state = attend(state, query, key, value, visible, scale, MASKED, WINDOW > 0, CAP)
    return state


@triton.jit
def _seen_by_all(before, first_new, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Compute for a tile of new tokens the first position in the pool that any of its rows sees, and the number of new
    tokens, in whole tiles, that all rows see or, with a window, that none sees."""
    first, whole = 0, first_new // TILE * TILE
    if WINDOW > 0:
        first = tl.maximum(before + first_new + 1 - WINDOW, 0)
        whole = tl.maximum(first_new + 1 - WINDOW, 0) // TILE * TILE
    return first, whole


@triton.jit(do_not_specialize=["tile_stride", "sequence_stride"])
def _prefill(
    qkv, rows_of_step, out, pool, cos_sin, norm_weight, eps, tables, width, tiles, tile_stride, sequences,
    sequence_stride, scale, block_stride, layer_offset, value_scale,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, HAS_NORM: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = N // K
    head, part = tl.program_id(1), tl.program_id(2)
    # What only the host writes is read before the previous kernel has ended.
    found = tl.load(tiles + tl.program_id(0))
    first_new = tl.load(tiles + tile_stride + tl.program_id(0)) + part * (ROWS // G)
    sequence = tl.maximum(found, 0)
    first_row, num_new = tl.load(sequences + sequence), tl.load(sequences + sequence_stride + sequence)
    before = tl.load(sequences + 2 * sequence_stride + sequence) - num_new
    r, d = tl.arange(0, ROWS), tl.arange(0, PADDED_D)
    new = first_new + r // G
    shown = ((r < ROWS // G * G) & (new < num_new))[:, None]
    # Rows that are not shown see what the last token sees, so that nothing divides by zero.
    new = tl.minimum(new, num_new - 1)
    row, heads = (first_row + new).to(tl.int64)[:, None], (head * G + r % G)[:, None]
    given, angles = qkv + row * ((N + 2 * K) * D) + heads * D, cos_sin + (before + new).to(tl.int64)[:, None] * D
    begin()
    if (found < 0) | (first_new >= num_new):
        return
    query = load_rotated(given, shown, norm_weight + heads * D, angles, eps, D, PADDED_D, HAS_NORM)
    keys, table = pool + layer_offset + head * D, tables + sequence.to(tl.int64) * tl.load(width)
    first, whole = _seen_by_all(before, first_new, TILE, WINDOW)
    oldest = (before + new + 1 - WINDOW)[:, None]
    state = attend_paged(nothing_seen(ROWS, PADDED_D), query, keys, table, first, before, oldest, block_stride, scale,
                         K, D, PADDED_D, BLOCK_SIZE, TILE, STAGES, WINDOW > 0, CAP)  # fmt: skip
    last = tl.minimum(first_new + ROWS // G, num_new)
    key, value = (N + head) * D, (N + K + head) * D
    if WINDOW == 0:
        state = _attend_new(state, query, rows_of_step, first_row, key, value, 0, whole, new, scale,
                            TILE, STAGES, False, 0, CAP)  # fmt: skip
    state = _attend_new(state, query, rows_of_step, first_row, key, value, whole, last, new, scale,
                        TILE, STAGES, True, WINDOW, CAP)  # fmt: skip
    result = (as_given(state[2], value_scale, NARROW) / state[1][:, None]).to(out.dtype.element_ty)
    tl.store(out + row * (N * D) + heads * D + d[None, :], result, mask=shown & (d < D)[None, :])


def _rows_per_tile(dtype: torch.dtype, head_dim: int) -> int:
    """Return the number of rows of one program: new tokens times the query heads of a key head."""
    return 128 if dtype.itemsize == 2 and head_dim <= 128 else 64


def _parts_of_tile(num_rows: int, rows: int, group: int) -> tuple[int, int]:
    """Choose the number of rows of one program, and of programs for each tile, in a step of `num_rows` rows."""
    parts = next((parts for most, parts in _PARTS.items() if num_rows <= most), 1)
    parts = min(parts, rows // _FEWEST_ROWS)
    # Together, the programs must take all new tokens of a tile.
    return (rows // parts, parts) if rows // parts // group * parts == rows // group else (rows, 1)


def new_tokens_per_tile(dtype: torch.dtype, heads: tuple[int, int, int]) -> int:
    """Return the number of new tokens of one sequence that one program takes. dtype: dtype of queries. heads: N, K and
    D."""
    num_heads, num_kv_heads, head_dim = heads
    return max(1, _rows_per_tile(dtype, head_dim) // (num_heads // num_kv_heads))


def prefill_attention(
    qkv: torch.Tensor,
    out: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    cos_sin: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None,
    tables: torch.Tensor,
    width: torch.Tensor,
    tiles: torch.Tensor,
    sequences: torch.Tensor,
    *,
    scores: Scores | None = None,
) -> None:
    """Attend from the new tokens of several sequences to their contexts, new tokens included, which `store_kv` wrote.

    qkv: (T, (N + 2 K) * D), queries not yet rotated. out: (T, N * D), the result. cos_sin, norm, pool: see `store_kv`.
    tables: (sequences * width,) int32. width: one int32 on the device. tiles: (2, programs) int32, sequence (-1: none,
    at the end) and first new token. sequences: (3, sequences) int32, first row in the step, new tokens, context.
    scores: None means that scores are divided by sqrt(D).
    """
    kernel = hopper_prefill_attention if suits_hopper(qkv, pool, scores) else triton_prefill_attention
    kernel(qkv, out, pool, layer, cos_sin, norm, tables, width, tiles, sequences, scores)


def triton_prefill_attention(
    qkv: torch.Tensor, out: torch.Tensor, pool: torch.Tensor, layer: int, cos_sin: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None, tables: torch.Tensor, width: torch.Tensor, tiles: torch.Tensor,
    sequences: torch.Tensor, scores: Scores | None = None,
) -> None:  # fmt: skip
    """Do what `prefill_attention` does, in all cases in which `store_kv` has also written keys in place."""
    _, _, _, block_size, num_kv_heads, head_dim = pool.shape
    num_heads = out.shape[1] // head_dim
    rows, parts = _parts_of_tile(len(qkv), _rows_per_tile(qkv.dtype, head_dim), num_heads // num_kv_heads)
    assert num_heads // num_kv_heads <= rows
    tile = 64 if qkv.dtype.itemsize == 2 and head_dim <= 128 else 32
    padded = max(16, triton.next_power_of_2(head_dim))
    weight, eps = norm or (cos_sin, 0.0)
    scale, window, cap, key_scale, value_scale = scores or Scores(head_dim**-0.5)
    # With at most 128 registers a thread, two programs share a processor: one's softmax hides in the other's products.
    options: dict[str, Any] = {"num_warps": 8, "maxnreg": 128} if rows == 128 else {"num_warps": 4}
    _prefill[(tiles.shape[1], num_kv_heads, parts)](
        qkv, TensorDescriptor.from_tensor(qkv, [tile, padded]), out, pool, cos_sin, weight, eps, tables, width, tiles,
        tiles.stride(0), sequences, sequences.stride(0), scale * key_scale * LOG2_E, pool.stride(0),
        layer * pool.stride(1), value_scale, N=num_heads, K=num_kv_heads, D=head_dim, PADDED_D=padded,
        BLOCK_SIZE=block_size, ROWS=rows, TILE=tile, STAGES=2, HAS_NORM=norm is not None, WINDOW=window,
        CAP=cap * LOG2_E, NARROW=pool.dtype.itemsize == 1, **options, **LAUNCH,
    )  # fmt: skip
