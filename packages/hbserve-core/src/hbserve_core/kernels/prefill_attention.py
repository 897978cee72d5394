"""Chunks of several new tokens over paged context: flash attention that reads keys and values from the pool.

One program per tile of new tokens of one sequence and key head. The G query heads of a key head share the program, so
each key is read once for all of them: row r of a tile is new token r // G and query head r % G.
Shapes: T rows of the step, N query heads, K key heads, G = N / K, D head_dim.
"""

import torch
import triton
import triton.language as tl

_LOG2_E = 1.4426950408889634


@triton.jit
def _tile(
    state, query, keys, values, table, start, seen, block_stride, scale, MASKED: tl.constexpr,
    TOKEN: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One more TILE of context. Row r sees the first `seen[r]` positions; unmasked tiles are seen whole by all."""
    highest, total, weighted = state
    positions = start + tl.arange(0, TILE)
    last = tl.max(seen, 0)
    block = tl.load(table + positions // BLOCK_SIZE, mask=positions < last, other=0).to(tl.int64)
    place = (block * block_stride + (positions % BLOCK_SIZE) * TOKEN)[:, None] + tl.arange(0, PADDED_D)[None, :]
    read = (positions < last)[:, None] & (tl.arange(0, PADDED_D) < D)[None, :]
    key = tl.load(keys + place, mask=read, other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(positions[None, :] < seen[:, None], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_highest[:, None])
    faded = tl.exp2(highest - new_highest)
    value = tl.load(values + place, mask=read, other=0.0)
    weighted = weighted * faded[:, None]
    weighted = tl.dot(weights.to(value.dtype), value, weighted, input_precision="ieee")
    return new_highest, total * faded + tl.sum(weights, 1), weighted


@triton.jit
def _prefill(
    qkv, out, pool, tables, width, tiles, tile_stride, sequences, sequence_stride, scale, block_stride, layer_offset,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # tiles: sequence and first new token of each. sequences: first row, new tokens and context of each.
    sequence = tl.load(tiles + tl.program_id(0))
    if sequence < 0:
        return
    head = tl.program_id(1)
    begin = tl.load(tiles + tile_stride + tl.program_id(0))
    num_new = tl.load(sequences + sequence_stride + sequence)
    before = tl.load(sequences + 2 * sequence_stride + sequence) - num_new
    G: tl.constexpr = N // K
    r, d = tl.arange(0, ROWS), tl.arange(0, PADDED_D)
    new = begin + r // G
    shown = (r < ROWS // G * G) & (new < num_new)
    row = (tl.load(sequences + sequence) + new).to(tl.int64)
    heads = head * G + r % G
    mask = shown[:, None] & (d < D)[None, :]
    query = tl.load(qkv + (row * ((N + 2 * K) * D) + heads * D)[:, None] + d[None, :], mask=mask, other=0.0)
    # Rows that are not shown see the first position, so that nothing divides by zero.
    seen = tl.where(shown, before + new + 1, 1)
    keys = pool + layer_offset + head * D
    values = keys + BLOCK_SIZE * K * D
    table = tables + sequence.to(tl.int64) * tl.load(width)
    lowest = tl.full((ROWS,), float("-inf"), tl.float32)
    state = (lowest, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, PADDED_D), tl.float32))
    # Positions [0, whole) are seen by every shown row.
    whole = (before + begin) // TILE * TILE
    for start in tl.range(0, whole, TILE, num_stages=STAGES):
        state = _tile(
            state, query, keys, values, table, start, seen, block_stride, scale, False,
            K * D, D, PADDED_D, BLOCK_SIZE, TILE,
        )  # fmt: skip
    for start in tl.range(whole, tl.max(seen, 0), TILE, num_stages=STAGES):
        state = _tile(
            state, query, keys, values, table, start, seen, block_stride, scale, True,
            K * D, D, PADDED_D, BLOCK_SIZE, TILE,
        )  # fmt: skip
    _, total, weighted = state
    result = (weighted / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (row * (N * D) + heads * D)[:, None] + d[None, :], result, mask=mask)


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
    tables: torch.Tensor,
    width: torch.Tensor,
    tiles: torch.Tensor,
    sequences: torch.Tensor,
) -> None:
    """Attend from the new tokens of several sequences to their contexts, which the pool holds, new tokens included.

    qkv: (T, (N + 2 K) * D), rotated. out: (T, N * D), written. pool: (num_blocks, num_layers, 2, block_size, K, D).
    tables: (sequences * width,) int32. width: one int32 on the device. tiles: (2, programs) int32, sequence (-1: none)
    and first new token. sequences: (3, sequences) int32, first row in the step, new tokens, context.
    """
    _, _, _, block_size, num_kv_heads, head_dim = pool.shape
    num_heads = out.shape[1] // head_dim
    rows = rows_per_tile(pool)
    assert num_heads // num_kv_heads <= rows
    narrow = pool.dtype.itemsize == 2 and head_dim <= 128
    _prefill[(tiles.shape[1], num_kv_heads)](
        qkv, out, pool, tables, width, tiles, tiles.stride(0), sequences, sequences.stride(0), head_dim**-0.5 * _LOG2_E,
        pool.stride(0), layer * pool.stride(1), num_heads, num_kv_heads, head_dim,
        max(16, triton.next_power_of_2(head_dim)), block_size, rows, 64 if narrow else 32, 3 if narrow else 2,
        num_warps=8 if rows == 128 else 4,
    )  # fmt: skip
