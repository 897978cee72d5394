"""Decode attention: the key and value of each sequence's one new token go into the pool, then it attends to its paged
context.

The host cuts the work into pieces of similar length: a long context is several pieces, so that a few long sequences, or
even a single one, fill the GPU. A program takes one piece and one key head: the G query heads that share the key head
are the rows of one product, padded to what tensor cores take. The program of a sequence's last piece holds the new
token's key and value in registers and stores them; nothing reads them from the pool in this step. If a sequence has
several pieces, the program that ends last combines the results of all (flash decoding, Dao et al. 2023).
Shapes: R rows, one sequence each, N query heads, K key heads, G = N / K, D head_dim, P pieces.
"""

import torch
import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.attention_parts import (
    LOG2_E,
    Scores,
    as_stored,
    attend,
    attend_paged,
    capped,
    in_halves,
    in_one,
    load_angles,
    load_halves,
    nothing_seen,
    paged,
    rotated,
)
from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin, num_processors

_FEW_PROGRAMS = 3.5
"""Number of programs per multiprocessor, with those of unused pieces, up to which they are too few to hide the latency
of each one's reads. One row for each, and the pieces that SplitKV wants beside so few."""
_JOINED_AT_ONCE = 4096
"""Number of elements of several parts that are combined at once."""


@triton.jit
def _piece(pieces, stride, WINDOW: tl.constexpr):
    """Load a piece: row, part, number of parts, first and last position in the pool, position of the new token.

    With a window, the parts share its positions equally; some may have none.
    """
    row, part, num_parts = tl.load(pieces), tl.load(pieces + stride), tl.load(pieces + 2 * stride)
    first, last, position = tl.load(pieces + 3 * stride), tl.load(pieces + 4 * stride), tl.load(pieces + 5 * stride)
    # Only the row of an unused piece is written. The rest is whatever an earlier step has left there.
    none = row < 0
    if WINDOW > 0:
        oldest = tl.maximum(position + 1 - WINDOW, 0)
        share = tl.cdiv(position - oldest, tl.where(none, 1, num_parts))
        first = oldest + part * share
        last = tl.minimum(first + share, position)
    return row, part, num_parts, tl.where(none, 0, first), tl.where(none, 0, last), tl.where(none, 0, position)


@triton.jit
def _norms(norm_weight, heads, used, key_head, D: tl.constexpr, PADDED_D: tl.constexpr, HAS_NORM: tl.constexpr):
    """Load the weights of the norms of the queries and of the key, if there are any; see `load_halves`."""
    query, key = (0.0, 0.0), (0.0, 0.0)
    if HAS_NORM:
        query = load_halves(norm_weight + heads * D, used, D, PADDED_D)
        key = load_halves(norm_weight + key_head * D, tl.full((1, 1), 1, tl.int1), D, PADDED_D)
    return query, key


@triton.jit
def _first_tile(
    keys, table, first, last, block_stride, D: tl.constexpr, PADDED_D: tl.constexpr, K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Load keys and values (STEP, PADDED_D) of the piece's first tokens, and return which of them exist (1, STEP)."""
    positions = first + tl.arange(0, STEP)
    inside = positions < last
    place, read = paged(table, positions, inside, block_stride, D, PADDED_D, K * D, BLOCK_SIZE)
    tile = tl.load(keys + place, mask=read, other=0.0)
    return tile, tl.load(keys + BLOCK_SIZE * K * D + place, mask=read, other=0.0), inside[None, :]


@triton.jit
def _words(keys, block_stride, NARROW: tl.constexpr):
    """Return the pointer by which keys are read, and the distance between blocks. 8-bit floats are read as words of
    two."""
    words, stride = keys, block_stride
    if NARROW:
        words, stride = keys.to(tl.pointer_type(tl.int16), bitcast=True), block_stride // 2
    return words, stride


@triton.jit
def _in_float16(query, scale):
    """Divide queries by a power of two, so that float16 can hold them, and multiply the scale by it. Two 8-bit floats
    become float16 by one instruction, bfloat16 by several."""
    power = (tl.max(tl.abs(query.to(tl.float32))).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.maximum(power, 1e-30, propagate_nan=tl.PropagateNan.ALL)
    return (query.to(tl.float32) / power).to(tl.float16), scale * power


@triton.jit
def _by_halves(state, query, scale, PACK: tl.constexpr, PADDED_D: tl.constexpr, NARROW: tl.constexpr):
    """Convert state and queries to the form that `attend` takes with words of 8-bit floats; also returns the scale of
    scores."""
    if NARROW:
        if query.dtype == tl.bfloat16:
            query, scale = _in_float16(query, scale)
        query = in_halves(query, PACK, PADDED_D)
        state = (state[0], state[1], in_halves(state[2], PACK, PADDED_D))
    return state, query, scale


@triton.jit
def _whole(state, value_scale, PACK: tl.constexpr, PADDED_D: tl.constexpr, NARROW: tl.constexpr):
    """Convert the state back to the form without words, and multiply it by the scale of values."""
    if NARROW:
        state = (state[0], state[1], in_one(state[2][0], state[2][1], PACK, PADDED_D) * value_scale)
    return state


@triton.jit
def _store_new_token(
    key, value, keys, table, position, block_stride, D: tl.constexpr, K: tl.constexpr, PADDED_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, PADDED_D)[None, :]
    block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
    place = block * block_stride + (position % BLOCK_SIZE) * (K * D)
    tl.store(keys + place + d, key, mask=d < D)
    tl.store(keys + BLOCK_SIZE * K * D + place + d, value, mask=d < D)


@triton.jit
def _seen_itself(query, key, value, scale, PACK: tl.constexpr, PADDED_D: tl.constexpr, CAP: tl.constexpr):
    """Compute the state of queries that have only seen their own token. key, value: (1, PADDED_D)."""
    score = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * scale
    if CAP > 0.0:
        score = capped(score, CAP)
    return score, tl.full((PACK,), 1.0, tl.float32), tl.broadcast_to(value.to(tl.float32), (PACK, PADDED_D))


@triton.jit
def _join(
    parts, logs, out_row, first_piece, num_parts, head,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, PADDED_G: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Combine the results of one row's and key head's pieces, weighted by their sums of exponentials."""
    G: tl.constexpr = N // K
    d, g = tl.arange(0, PADDED_D), tl.arange(0, PADDED_G)
    highest = tl.full((PADDED_G,), float("-inf"), tl.float32)
    total, weighted = tl.zeros((PADDED_G,), tl.float32), tl.zeros((PADDED_G, PADDED_D), tl.float32)
    for start in range(0, num_parts, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)
        place = (first_piece + part).to(tl.int64)[:, None] * N + head * G + tl.minimum(g, G - 1)[None, :]
        inside = (part < num_parts)[:, None]
        # The load bypasses the first-level cache, which does not see what other processors have written.
        log = tl.load(logs + place, mask=inside, other=float("-inf"), cache_modifier=".cg")
        mask = inside[:, :, None] & (d < D)[None, None, :]
        found = tl.load(parts + place[:, :, None] * D + d[None, None, :], mask=mask, other=0.0, cache_modifier=".cg")
        new_highest = tl.maximum(highest, tl.max(log, 0))
        weights, faded = tl.exp2(log - new_highest[None, :]), tl.exp2(highest - new_highest)
        total = total * faded + tl.sum(weights, 0)
        weighted = weighted * faded[:, None] + tl.sum(found * weights[:, :, None], 0)
        highest = new_highest
    result = (weighted / total[:, None]).to(out_row.dtype.element_ty)
    tl.store(out_row + (head * G + g)[:, None] * D + d[None, :], result, mask=(g < G)[:, None] & (d < D)[None, :])


@triton.jit
def _leave(
    state, parts, logs, arrived, out_row, piece, part, num_parts, head,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, PACK: tl.constexpr,
    PADDED_G: tl.constexpr, AT_ONCE: tl.constexpr, MAY_BE_BLIND: tl.constexpr,
):  # fmt: skip
    """Write the result of a row's only piece, or store that of one of several pieces. The last program of the row and
    head to finish combines these."""
    highest, total, weighted = state
    packed, d = tl.arange(0, PACK), tl.arange(0, PADDED_D)
    used, heads = (packed < N // K)[:, None], (head * (N // K) + packed)[:, None]
    if num_parts == 1:
        tl.store(out_row + heads * D + d[None, :], weighted / total[:, None], mask=used & (d < D)[None, :])
        return
    if MAY_BE_BLIND:
        # A piece that has seen nothing has no weight: its highest score is below all others.
        total = tl.where(total > 0.0, total, 1.0)
    here = piece.to(tl.int64) * N + heads
    tl.store(parts + here * D + d[None, :], weighted / total[:, None], mask=used & (d < D)[None, :])
    tl.store(logs + here, (highest + tl.log2(total))[:, None], mask=used)
    # All of this program's stores come before its arrival.
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
        tl.debug_barrier()
        _join(parts, logs, out_row, piece - part, num_parts, head, N, K, D, PADDED_D, PADDED_G, AT_ONCE)
        tl.store(arrived, 0)


@triton.jit(do_not_specialize=["piece_stride"])
def _decode(
    qkv, out, parts, logs, arrived, pool, cos_sin, norm_weight, eps, tables, width, pieces, piece_stride, scale,
    block_stride, layer_offset, key_inverse, value_inverse, value_scale, N: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, PACK: tl.constexpr, PADDED_G: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, HAS_NORM: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    head, piece = tl.program_id(0), tl.program_id(1)
    # What the host has written, and blocks of earlier steps, can be read before the previous kernel has ended.
    row, part, num_parts, first, last, position = _piece(pieces + piece, piece_stride, WINDOW)
    keys, table = pool + layer_offset + head * D, tables + row.to(tl.int64) * tl.load(width)
    WORD: tl.constexpr = 2 if NARROW else 1
    words, stride = _words(keys, block_stride, NARROW)
    tile = _first_tile(words, table, first, last, stride, D // WORD, PADDED_D // WORD, K, BLOCK_SIZE, STEP)
    packed, d, zero = tl.arange(0, PACK), tl.arange(0, PADDED_D)[None, :], tl.zeros((1, 1), tl.int32)
    heads, used, key_head = (head * (N // K) + packed)[:, None], (packed < N // K)[:, None], N + head + zero
    angles = load_angles(cos_sin + position * D + zero, zero == 0, D, PADDED_D)
    norms = _norms(norm_weight, heads, used, key_head, D, PADDED_D, HAS_NORM)
    begin()
    if row < 0:
        return
    qkv_row, out_row = qkv + row.to(tl.int64) * ((N + 2 * K) * D), out + row.to(tl.int64) * (N * D)
    # All loads come before the first result is needed.
    query_halves = load_halves(qkv_row + heads * D, used, D, PADDED_D)
    key_halves = load_halves(qkv_row + key_head * D, zero == 0, D, PADDED_D)
    value = tl.load(qkv_row + (N + K + head) * D + d, mask=d < D, other=0.0)
    query = rotated(query_halves, norms[0], angles, eps, D, HAS_NORM)
    if part == num_parts - 1:
        key = as_stored(rotated(key_halves, norms[1], angles, eps, D, HAS_NORM), key_inverse, NARROW)
        new_value = as_stored(value, value_inverse, NARROW)
        _store_new_token(key, new_value, keys, table, position, block_stride, D, K, PADDED_D, BLOCK_SIZE)
        state = _seen_itself(query, key, new_value, scale, PACK, PADDED_D, CAP)
    else:
        state = nothing_seen(PACK, PADDED_D)
    state, query, scale = _by_halves(state, query, scale, PACK, PADDED_D, NARROW)
    state = attend(state, query, tile[0], tile[1], tile[2], scale, True, WINDOW > 0, CAP)
    state = attend_paged(state, query, words, table, first + STEP, last, 0, stride, scale,
                         K, D // WORD, PADDED_D // WORD, BLOCK_SIZE, STEP, STAGES, False, CAP)  # fmt: skip
    _leave(_whole(state, value_scale, PACK, PADDED_D, NARROW), parts, logs, arrived + row * K + head,
           out_row, piece, part, num_parts, head, N, K, D, PADDED_D, PACK, PADDED_G, AT_ONCE, WINDOW > 0)  # fmt: skip


class DecodeWorkspace:
    """Memory for the results of pieces. All layers share one, because only one layer runs at a time."""

    def __init__(self, rows: int, num_pieces: int, heads: tuple[int, int, int], device: torch.device) -> None:
        """Allocate memory for steps of at most this many rows and pieces. heads: N, K and D."""
        num_heads, num_kv_heads, head_dim = heads
        self.parts = torch.empty((num_pieces, num_heads, head_dim), dtype=torch.float32, device=device)
        self.logs = torch.empty((num_pieces, num_heads), dtype=torch.float32, device=device)
        self.arrived = torch.zeros((rows, num_kv_heads), dtype=torch.int32, device=device)
        """Number of finished programs for each row and key head; 0 between launches."""
        self.few_programs = _FEW_PROGRAMS * num_processors(device)


def _tiling(itemsize: int, padded_head_dim: int, is_few: bool, narrow: bool) -> tuple[int, int, int]:
    """Choose the number of tokens read at once, of stages of the pipeline that reads them, and of warps of each
    program.

    A place in the pool is known after its block's number has been read, which takes half of the stages. If there are
    few programs, each must have many reads in flight; if there are many, others read while one computes. With 8-bit
    floats (narrow) there is more to compute for each byte.
    """
    if itemsize > 2 or padded_head_dim > 128:
        return 32, 2, 4
    return 64, 5 if is_few or narrow else 2, 2


def decode_attention(
    qkv: torch.Tensor,
    out: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    cos_sin: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None,
    tables: torch.Tensor,
    width: torch.Tensor,
    pieces: torch.Tensor,
    workspace: DecodeWorkspace,
    *,
    scores: Scores | None = None,
) -> None:
    """Store the new tokens of the rows that `pieces` name, and attend from them to their contexts.

    qkv: (>=R, (N + 2 K) * D), neither normed nor rotated. out: (>=R, N * D), the result. cos_sin, norm, pool: see
    `store_kv`. tables: (R * width,) int32, block numbers. width: one int32, on the device. pieces: (6, P) int32, see
    `SplitKV.cut`; pieces of row -1 are unused. No kernel of the same step may write any of these, or the pool's earlier
    tokens. scores: None means that scores are divided by sqrt(D).
    """
    _, _, _, block_size, num_kv_heads, head_dim = pool.shape
    num_heads = out.shape[1] // head_dim
    narrow = pool.dtype.itemsize == 1
    padded = max(32 if narrow else 16, triton.next_power_of_2(head_dim))  # tensor cores take 16; narrow ones are halved
    group = triton.next_power_of_2(num_heads // num_kv_heads)
    weight, eps = norm or (cos_sin, 0.0)
    scale, window, cap, key_scale, value_scale = scores or Scores(head_dim**-0.5)
    is_few = num_kv_heads * pieces.shape[1] <= workspace.few_programs
    step, stages, num_warps = _tiling(qkv.dtype.itemsize, padded, is_few, narrow)
    _decode[(num_kv_heads, pieces.shape[1])](
        qkv, out, workspace.parts, workspace.logs, workspace.arrived, pool, cos_sin, weight, eps, tables, width,
        pieces, pieces.stride(0), scale * key_scale * LOG2_E, pool.stride(0), layer * pool.stride(1), 1 / key_scale,
        1 / value_scale, value_scale,
        N=num_heads, K=num_kv_heads, D=head_dim, PADDED_D=padded, PACK=max(16, group), PADDED_G=group,
        AT_ONCE=max(2, _JOINED_AT_ONCE // (group * padded)), BLOCK_SIZE=block_size, STEP=step, STAGES=stages,
        HAS_NORM=norm is not None, WINDOW=window, CAP=cap * LOG2_E, NARROW=narrow,
        num_warps=num_warps, **LAUNCH,
    )  # fmt: skip
