"""One new token of each sequence: its key and value go into the pool, then it attends to its paged context.

The work is cut into pieces of similar length on the host: a sequence of long context is several pieces, so that a few
long sequences, or a single one, fill the card. A program takes one piece and one key head: the G query heads that share
it are the rows of one product, padded to what tensor cores take. The program of a sequence's last piece holds the new
token's key and value in registers and stores them; nobody reads them from the pool in this step. Of a sequence of
several pieces, the program that ends last joins what all have found (flash decoding, Dao et al. 2023).
Shapes: R rows, one sequence each, N query heads, K key heads, G = N / K, D head_dim, P pieces.
"""

import torch
import triton
import triton.language as tl

from hbserve_core.decode_pieces import TILE
from hbserve_core.kernels.dependent_launch import LAUNCH, begin
from hbserve_core.kernels.prefill_attention import attend_paged, nothing_seen
from hbserve_core.kernels.rotation import load_rotated

_LOG2_E = 1.4426950408889634
_AT_ONCE = tl.constexpr(16)
"""Parts of a row that are joined at once."""


@triton.jit
def _new_token(
    qkv_row, query, cos_sin, position, norm_weight, eps, head, keys, place, scale,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PACK: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Store the new key and value; the state of queries that have seen this token only."""
    d = tl.arange(0, PADDED_D)[None, :]
    key_head = (N + head) * D + tl.zeros((1, 1), tl.int32)
    used = tl.full((1, 1), 1, tl.int1)
    angles = cos_sin + position * D + tl.zeros((1, 1), tl.int32)
    key = load_rotated(qkv_row + key_head, used, norm_weight + key_head, angles, eps, D, PADDED_D, HAS_NORM)
    value = tl.load(qkv_row + (N + K + head) * D + d, mask=d < D, other=0.0)
    tl.store(keys + place + d, key, mask=d < D)
    tl.store(keys + BLOCK_SIZE * K * D + place + d, value, mask=d < D)
    score = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * scale
    return score, tl.full((PACK,), 1.0, tl.float32), tl.broadcast_to(value.to(tl.float32), (PACK, PADDED_D))


@triton.jit
def _join(
    parts, logs, out_row, first_piece, num_parts, head,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Weigh what the pieces of one row and key head have found by their sums of exponentials."""
    G: tl.constexpr = N // K
    d = tl.arange(0, PADDED_D)
    for g in tl.static_range(G):
        highest = float("-inf")
        total, weighted = 0.0, tl.zeros((PADDED_D,), tl.float32)
        for start in range(0, num_parts, AT_ONCE):
            part = start + tl.arange(0, AT_ONCE)
            place = (first_piece + part).to(tl.int64) * N + head * G + g
            # Past the first-level cache, which knows nothing of what other processors have written.
            log = tl.load(logs + place, mask=part < num_parts, other=float("-inf"), cache_modifier=".cg")
            mask = (part < num_parts)[:, None] & (d < D)[None, :]
            found = tl.load(parts + place[:, None] * D + d[None, :], mask=mask, other=0.0, cache_modifier=".cg")
            new_highest = tl.maximum(highest, tl.max(log, 0))
            weights, faded = tl.exp2(log - new_highest), tl.exp2(highest - new_highest)
            total = total * faded + tl.sum(weights, 0)
            weighted = weighted * faded + tl.sum(found * weights[:, None], 0)
            highest = new_highest
        tl.store(out_row + (head * G + g) * D + d, (weighted / total).to(out_row.dtype.element_ty), mask=d < D)


@triton.jit
def _leave(
    state, parts, logs, arrived, out_row, piece, part, num_parts, head,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Leave what one of several pieces has found; the last program of the row and head to come joins them."""
    highest, total, weighted = state
    packed, d = tl.arange(0, PACK), tl.arange(0, PADDED_D)
    used = (packed < N // K)[:, None]
    here = piece.to(tl.int64) * N + (head * (N // K) + packed)[:, None]
    tl.store(parts + here * D + d[None, :], weighted / total[:, None], mask=used & (d < D)[None, :])
    tl.store(logs + here, (highest + tl.log2(total))[:, None], mask=used)
    # All of this program's stores come before its arrival.
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
        tl.debug_barrier()
        _join(parts, logs, out_row, piece - part, num_parts, head, N, K, D, PADDED_D, _AT_ONCE)
        tl.store(arrived, 0)


@triton.jit(do_not_specialize=["piece_stride"])
def _decode(
    qkv, out, parts, logs, arrived, pool, cos_sin, norm_weight, eps, tables, width, contexts, pieces, piece_stride,
    scale, block_stride, layer_offset,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, PACK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    begin()
    head, piece = tl.program_id(0), tl.program_id(1)
    row = tl.load(pieces + piece)
    if row < 0:
        return
    part, num_parts = tl.load(pieces + piece_stride + piece), tl.load(pieces + 2 * piece_stride + piece)
    # The new token's position. The piece takes positions [first, last) from the pool.
    position = tl.load(contexts + row) - 1
    span = tl.load(pieces + 3 * piece_stride + piece)
    first, last = part * span, tl.minimum(part * span + span, position)
    packed, d = tl.arange(0, PACK), tl.arange(0, PADDED_D)[None, :]
    heads, used = (head * (N // K) + packed)[:, None], (packed < N // K)[:, None]
    qkv_row, out_row = qkv + row.to(tl.int64) * ((N + 2 * K) * D), out + row.to(tl.int64) * (N * D)
    angles = cos_sin + position * D + tl.zeros((PACK, 1), tl.int32)
    query = load_rotated(qkv_row + heads * D, used, norm_weight + heads * D, angles, eps, D, PADDED_D, HAS_NORM)
    keys, table = pool + layer_offset + head * D, tables + row.to(tl.int64) * tl.load(width)
    if part == num_parts - 1:
        block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
        place = block * block_stride + (position % BLOCK_SIZE) * (K * D)
        state = _new_token(
            qkv_row, query, cos_sin, position, norm_weight, eps, head, keys, place, scale,
            N, K, D, PADDED_D, BLOCK_SIZE, PACK, HAS_NORM,
        )  # fmt: skip
    else:
        state = nothing_seen(PACK, PADDED_D)
    state = attend_paged(
        state, query, keys, table, first, last, block_stride, scale, K, D, PADDED_D, BLOCK_SIZE, STEP, STAGES
    )
    if num_parts == 1:
        result = (state[2] / state[1][:, None]).to(out.dtype.element_ty)
        tl.store(out_row + heads * D + d, result, mask=used & (d < D))
    else:
        counter = arrived + row * K + head
        _leave(state, parts, logs, counter, out_row, piece, part, num_parts, head, N, K, D, PADDED_D, PACK)


class DecodeWorkspace:
    """Where pieces leave what they have found. One for all layers: only one of them runs at a time."""

    def __init__(self, rows: int, num_pieces: int, heads: tuple[int, int, int], device: torch.device) -> None:
        """For steps of at most so many rows and pieces. heads: N, K and D."""
        num_heads, num_kv_heads, head_dim = heads
        self.parts = torch.empty((num_pieces, num_heads, head_dim), dtype=torch.float32, device=device)
        self.logs = torch.empty((num_pieces, num_heads), dtype=torch.float32, device=device)
        self.arrived = torch.zeros((rows, num_kv_heads), dtype=torch.int32, device=device)
        """Programs of each row and key head that have ended; 0 between launches."""


def decode_attention(
    qkv: torch.Tensor,
    out: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    cos_sin: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None,
    tables: torch.Tensor,
    width: torch.Tensor,
    contexts: torch.Tensor,
    pieces: torch.Tensor,
    workspace: DecodeWorkspace,
) -> None:
    """Store the new tokens of the rows that `pieces` name, and attend from them to their contexts.

    qkv: (>=R, (N + 2 K) * D), neither normed nor rotated. out: (>=R, N * D), written. cos_sin, norm, pool: see
    `store_kv`. tables: (R * width,) int32, block numbers. width: one int32, on the device. contexts: (R,) int32, new
    tokens included. pieces: (4, P) int32, see `DecodePieces.cut`; those of row -1 are none.
    """
    _, _, _, block_size, num_kv_heads, head_dim = pool.shape
    num_heads = out.shape[1] // head_dim
    padded = max(16, triton.next_power_of_2(head_dim))
    pack = max(16, triton.next_power_of_2(num_heads // num_kv_heads))
    # Float32 tiles are twice as large, and wide heads too: fewer of them fit into the shared memory.
    narrow = pool.dtype.itemsize == 2 and padded <= 128
    weight, eps = norm or (cos_sin, 0.0)
    _decode[(num_kv_heads, pieces.shape[1])](
        qkv, out, workspace.parts, workspace.logs, workspace.arrived, pool, cos_sin, weight, eps, tables, width,
        contexts, pieces, pieces.stride(0), head_dim**-0.5 * _LOG2_E, pool.stride(0), layer * pool.stride(1),
        num_heads, num_kv_heads, head_dim, padded, pack, block_size, TILE if narrow else TILE // 2,
        3 if narrow else 2, norm is not None, num_warps=4, **LAUNCH,
    )  # fmt: skip
