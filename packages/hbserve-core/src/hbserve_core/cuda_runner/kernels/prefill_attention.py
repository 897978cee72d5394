"""Chunks of several new tokens over paged context: flash attention (Dao 2023) in two parts.

A chunk's earlier context is read from the pool, block by block; its own keys and values, which lie one after the other
in the step's rows, come in whole tiles through a tensor descriptor (on Hopper, the copy engine: TMA). One program takes
a tile of new tokens of one sequence and key head. The G query heads of a key head share the program, so each key is
read once for all of them: row r of a tile is new token r // G and query head r % G.
Shapes: T rows of the step, N query heads, K key heads, G = N / K, D head_dim.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin
from hbserve_core.cuda_runner.kernels.rotation import load_rotated

_LOG2_E = 1.4426950408889634


@triton.jit
def nothing_seen(ROWS: tl.constexpr, PADDED_D: tl.constexpr):
    """The state of so many rows before `attend`."""
    lowest = tl.full((ROWS,), float("-inf"), tl.float32)
    return lowest, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, PADDED_D), tl.float32)


@triton.jit
def attend(state, query, key, value, visible, scale, MASKED: tl.constexpr):
    """One more tile of context for each row of `query` (R, D).

    state: highest score so far (R,), sum of the weights relative to it (R,), weighted values (R, D). key, value:
    (C, D). visible: (R, C) or broadcast to it; each row has seen something already, or sees something now.
    """
    highest, total, weighted = state
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_highest[:, None])
    faded = tl.exp2(highest - new_highest)
    weighted = weighted * faded[:, None]
    weighted = tl.dot(weights.to(value.dtype), value, weighted, input_precision="ieee")
    return new_highest, total * faded + tl.sum(weights, 1), weighted


@triton.jit
def paged(table, positions, inside, block_stride, D: tl.constexpr, PADDED_D: tl.constexpr, TOKEN: tl.constexpr,
          BLOCK_SIZE: tl.constexpr):  # fmt: skip
    """Places (C, PADDED_D) of these positions' keys of head 0 in a sequence's blocks, and which of them to read."""
    d = tl.arange(0, PADDED_D)[None, :]
    block = tl.load(table + positions // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    place = (block * block_stride + (positions % BLOCK_SIZE) * TOKEN)[:, None] + d
    return place, inside[:, None] & (d < D)


@triton.jit
def attend_paged(
    state, query, keys, table, first, last, block_stride, scale,
    K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Positions [first, last) of a sequence, all visible, from the pool. keys: of its layer and this head, block 0."""
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        positions = start + tl.arange(0, TILE)
        inside = positions < last
        place, read = paged(table, positions, inside, block_stride, D, PADDED_D, K * D, BLOCK_SIZE)
        key = tl.load(keys + place, mask=read, other=0.0)
        value = tl.load(keys + BLOCK_SIZE * K * D + place, mask=read, other=0.0)
        state = attend(state, query, key, value, inside[None, :], scale, True)
    return state


@triton.jit
def _attend_new(
    state, query, rows_of_step, first_row, key_column, value_column, first, last, new, scale,
    TILE: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The step's own tokens [first, last) of a sequence; row r sees those up to `new[r]`, or without a mask all.

    Tiles may reach into the next head, where numbers meet zeros of the query, and into the next sequence or padding.
    What is there is not visible, and may be anything: as a value it becomes 0, because 0 times a NaN is one.
    """
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        key = rows_of_step.load([first_row + start, key_column])
        value = rows_of_step.load([first_row + start, value_column])
        tokens = start + tl.arange(0, TILE)
        if MASKED:
            value = tl.where((tokens < last)[:, None], value, 0.0).to(value.dtype)
        visible = tokens[None, :] <= new[:, None]
        state = attend(state, query, key, value, visible, scale, MASKED)
    return state


@triton.jit(do_not_specialize=["tile_stride", "sequence_stride"])
def _prefill(
    qkv, rows_of_step, out, pool, cos_sin, norm_weight, eps, tables, width, tiles, tile_stride, sequences,
    sequence_stride, scale, block_stride, layer_offset,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    begin()
    sequence = tl.load(tiles + tl.program_id(0))
    if sequence < 0:
        return
    head = tl.program_id(1)
    first_new = tl.load(tiles + tile_stride + tl.program_id(0))
    first_row = tl.load(sequences + sequence)
    num_new = tl.load(sequences + sequence_stride + sequence)
    before = tl.load(sequences + 2 * sequence_stride + sequence) - num_new
    G: tl.constexpr = N // K
    r, d = tl.arange(0, ROWS), tl.arange(0, PADDED_D)
    new = first_new + r // G
    shown = ((r < ROWS // G * G) & (new < num_new))[:, None]
    # Rows that are not shown see what the last token sees, so that nothing divides by zero.
    new = tl.minimum(new, num_new - 1)
    row, heads = (first_row + new).to(tl.int64)[:, None], (head * G + r % G)[:, None]
    given, angles = qkv + row * ((N + 2 * K) * D) + heads * D, cos_sin + (before + new).to(tl.int64)[:, None] * D
    query = load_rotated(given, shown, norm_weight + heads * D, angles, eps, D, PADDED_D, HAS_NORM)
    state = nothing_seen(ROWS, PADDED_D)
    keys, table = pool + layer_offset + head * D, tables + sequence.to(tl.int64) * tl.load(width)
    state = attend_paged(
        state, query, keys, table, 0, before, block_stride, scale, K, D, PADDED_D, BLOCK_SIZE, TILE, STAGES
    )
    # New tokens [0, whole) are seen by every row.
    whole, last = first_new // TILE * TILE, tl.minimum(first_new + ROWS // G, num_new)
    key, value = (N + head) * D, (N + K + head) * D
    state = _attend_new(state, query, rows_of_step, first_row, key, value, 0, whole, new, scale, TILE, STAGES, False)
    state = _attend_new(state, query, rows_of_step, first_row, key, value, whole, last, new, scale, TILE, STAGES, True)
    _, total, weighted = state
    result = (weighted / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row * (N * D) + heads * D + d[None, :], result, mask=shown & (d < D)[None, :])


def rows_per_tile(pool: torch.Tensor) -> int:
    """Rows of one program: new tokens times the query heads of a key head."""
    return 128 if pool.dtype.itemsize == 2 and pool.shape[-1] <= 128 else 64


def new_tokens_per_tile(pool: torch.Tensor, num_heads: int) -> int:
    """New tokens of one sequence that one program takes."""
    return max(1, rows_per_tile(pool) // (num_heads // pool.shape[4]))


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
) -> None:
    """Attend from the new tokens of several sequences to their contexts, new tokens included, which `store_kv` wrote.

    qkv: (T, (N + 2 K) * D), keys rotated, queries not yet. out: (T, N * D), written. cos_sin, norm, pool: see
    `store_kv`. tables: (sequences * width,) int32. width: one int32 on the device. tiles: (2, programs) int32, sequence
    (-1: none) and first new token. sequences: (3, sequences) int32, first row in the step, new tokens, context.
    """
    _, _, _, block_size, num_kv_heads, head_dim = pool.shape
    num_heads = out.shape[1] // head_dim
    rows = rows_per_tile(pool)
    assert num_heads // num_kv_heads <= rows
    narrow = pool.dtype.itemsize == 2 and head_dim <= 128
    tile = 64 if narrow else 32
    padded = max(16, triton.next_power_of_2(head_dim))
    weight, eps = norm or (cos_sin, 0.0)
    # With at most 128 registers a thread, two programs share a processor: one's softmax hides in the other's products.
    options: dict[str, Any] = {"num_warps": 8, "maxnreg": 128} if rows == 128 else {"num_warps": 4}
    _prefill[(tiles.shape[1], num_kv_heads)](
        qkv, TensorDescriptor.from_tensor(qkv, [tile, padded]), out, pool, cos_sin, weight, eps, tables, width, tiles,
        tiles.stride(0), sequences, sequences.stride(0), head_dim**-0.5 * _LOG2_E, pool.stride(0),
        layer * pool.stride(1), num_heads, num_kv_heads, head_dim, padded, block_size, rows, tile,
        2, norm is not None, **options, **LAUNCH,
    )  # fmt: skip
