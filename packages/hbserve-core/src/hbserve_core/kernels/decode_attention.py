"""One new token of each sequence over its paged context.

One program per sequence, key head and split: the G query heads that share a key head are the rows of one product,
padded to what tensor cores take. Only where sequences times key heads cannot fill the card is the context split among
programs; a second kernel then joins their parts. The number of splits follows from that of the rows alone, so a graph
keeps it.
Shapes: R rows, one sequence each, N query heads, K key heads, G = N / K, D head_dim, S splits.
"""

import torch
import triton
import triton.language as tl

_LOG2_E = 1.4426950408889634
_MOST_SPLITS = 32


@triton.jit
def _tile(
    state, query, keys, values, table, start, last, block_stride, scale,
    TOKEN: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One more TILE of context: `state` is the running maximum, sum, and weighted values of each query row."""
    highest, total, weighted = state
    positions = start + tl.arange(0, TILE)
    inside = positions < last
    block = tl.load(table + positions // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    place = (block * block_stride + (positions % BLOCK_SIZE) * TOKEN)[:, None] + tl.arange(0, PADDED_D)[None, :]
    read = inside[:, None] & (tl.arange(0, PADDED_D) < D)[None, :]
    key = tl.load(keys + place, mask=read, other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where(inside[None, :], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_highest[:, None])
    faded = tl.exp2(highest - new_highest)
    value = tl.load(values + place, mask=read, other=0.0)
    weighted = weighted * faded[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return new_highest, total * faded + tl.sum(weights, 1), weighted


@triton.jit
def _decode(
    qkv, out, parts, logs, pool, tables, width, contexts, num_rows, scale, block_stride, layer_offset,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, PACK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if row >= tl.load(num_rows):
        return
    context = tl.load(contexts + row)
    G: tl.constexpr = N // K
    # The split takes positions [first, last).
    per_split = tl.cdiv(tl.cdiv(context, TILE), SPLITS) * TILE
    first = split * per_split
    last = tl.minimum(first + per_split, context)
    packed, d = tl.arange(0, PACK), tl.arange(0, PADDED_D)
    shown = (packed < G)[:, None] & (d < D)[None, :]
    heads = head * G + packed
    query = tl.load(qkv + row.to(tl.int64) * ((N + 2 * K) * D) + heads[:, None] * D + d[None, :], mask=shown, other=0.0)
    keys = pool + layer_offset + head * D
    lowest = tl.full((PACK,), float("-inf"), tl.float32)
    state = (lowest, tl.zeros((PACK,), tl.float32), tl.zeros((PACK, PADDED_D), tl.float32))
    table = tables + row.to(tl.int64) * tl.load(width)
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        state = _tile(
            state, query, keys, keys + BLOCK_SIZE * K * D, table, start, last, block_stride, scale,
            K * D, D, PADDED_D, BLOCK_SIZE, TILE,
        )  # fmt: skip
    highest, total, weighted = state
    place = (row.to(tl.int64) * N + heads) * SPLITS + split
    result = weighted / tl.maximum(total, 1e-30)[:, None]
    if SPLITS == 1:
        tl.store(out + place[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=shown)
    else:
        tl.store(parts + place[:, None] * D + d[None, :], result, mask=shown)
        tl.store(logs + place, highest + tl.log2(tl.maximum(total, 1e-30)), mask=packed < G)


@triton.jit
def _join(parts, logs, out, num_rows, D: tl.constexpr, PADDED_D: tl.constexpr, SPLITS: tl.constexpr):
    """Weighs the splits of one row and head by their sums of exponentials."""
    if tl.program_id(0) >= tl.load(num_rows):
        return
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    splits, d = tl.arange(0, SPLITS), tl.arange(0, PADDED_D)
    log = tl.load(logs + row * SPLITS + splits)
    weights = tl.exp2(log - tl.max(log, 0))
    inside = (d < D)[None, :]
    part = tl.load(parts + (row * SPLITS + splits)[:, None] * D + d[None, :], mask=inside, other=0.0)
    result = tl.sum(part * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + row * D + d, result.to(out.dtype.element_ty), mask=d < D)


def num_splits(rows: int, num_kv_heads: int, num_processors: int) -> int:
    """A power of two: enough programs for two on every processor, as far as splitting the context can give them."""
    wanted = 2 * num_processors // (rows * num_kv_heads)
    return min(_MOST_SPLITS, 1 << max(0, wanted.bit_length() - 1))


def decode_attention(
    qkv: torch.Tensor,
    out: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    tables: torch.Tensor,
    width: torch.Tensor,
    contexts: torch.Tensor,
    num_rows: torch.Tensor,
    splits: int,
) -> None:
    """Attend from the first rows of `qkv` to their contexts, which the pool holds, the new token included.

    qkv: (>=R, (N + 2 K) * D), rotated. out: (>=R, N * D), written. pool: (num_blocks, num_layers, 2, block_size, K, D).
    tables: (R * width,) int32, block numbers. width, num_rows: one int32 each, on the device. contexts: (R,) int32.
    Programs are started for every row of `contexts`; those from `num_rows` on end at once.
    """
    rows = len(contexts)
    _, _, _, block_size, num_kv_heads, head_dim = pool.shape
    num_heads = out.shape[1] // head_dim
    padded = triton.next_power_of_2(head_dim)
    pack = max(16, triton.next_power_of_2(num_heads // num_kv_heads))
    parts = logs = out
    if splits > 1:
        parts = torch.empty((rows, num_heads, splits, head_dim), dtype=torch.float32, device=out.device)
        logs = torch.empty((rows, num_heads, splits), dtype=torch.float32, device=out.device)
    # Float32 tiles are twice as large, and wide heads too: fewer of them fit into the shared memory.
    narrow = pool.dtype.itemsize == 2 and padded <= 128
    _decode[(num_kv_heads, rows, splits)](
        qkv, out, parts, logs, pool, tables, width, contexts, num_rows, head_dim**-0.5 * _LOG2_E, pool.stride(0),
        layer * pool.stride(1), num_heads, num_kv_heads, head_dim, padded, pack, block_size,
        64 if narrow else 32, splits, 3 if narrow else 2, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _join[(rows, num_heads)](parts, logs, out, num_rows, head_dim, padded, splits, num_warps=4)
