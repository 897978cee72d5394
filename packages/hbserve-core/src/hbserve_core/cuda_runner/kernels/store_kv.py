"""The way of a step's new keys and values into their blocks. Keys are normed and rotated on it, also in place.

Decodes need none of this: `decode_attention` writes its one new token itself.
Shapes: T rows of one step, N query heads, K key heads, D head_dim.
"""

import torch
import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin
from hbserve_core.cuda_runner.kernels.rotation import load_rotated


@triton.jit(do_not_specialize=["num_rows"])
def _store_kv(
    qkv, positions, slots, cos_sin, norm_weight, pool, eps, num_rows, block_stride, layer_offset,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    begin()
    head = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + rows, mask=rows < num_rows, other=-2)
    used, padding = (slot >= 0)[:, None], (slot == -1)[:, None]
    d = tl.arange(0, PADDED_D)[None, :]
    given = qkv + rows.to(tl.int64)[:, None] * ((N + 2 * K) * D) + (N + head) * D
    # Of the row's place in the pool: block, then layer, key or value, token in the block, head.
    place = (slot // BLOCK_SIZE).to(tl.int64) * block_stride + layer_offset + (slot % BLOCK_SIZE) * (K * D)
    target = pool + place[:, None]
    inside = used & (d < D)
    if head < K:
        position = tl.load(positions + rows, mask=rows < num_rows, other=0).to(tl.int64)[:, None]
        weights = norm_weight + (N + head) * D + tl.zeros((ROWS, 1), tl.int32)
        key = load_rotated(given, used, weights, cos_sin + position * D, eps, D, PADDED_D, HAS_NORM)
        tl.store(target + head * D + d, key, mask=inside)
        tl.store(given + d, key, mask=(used | padding) & (d < D))
    else:
        value = tl.load(given + d, mask=inside, other=0.0)
        tl.store(target + BLOCK_SIZE * K * D + (head - K) * D + d, value, mask=inside)
        tl.store(given + d, value, mask=padding & (d < D))


def store_kv(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos_sin: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None,
    pool: torch.Tensor,
    layer: int,
) -> None:
    """Norm and rotate keys in place, and write keys and values into the pool.

    qkv: (T, (N + 2 K) * D). positions: (T,) int32. slots: (T,) int32, block * block_size + place in the block; -1 for
    padding, whose keys and values become 0, so that tiles of `prefill_attention` may reach into it; -2 for decodes,
    which are left alone. cos_sin: (max_model_len, D) float32, cosines then sines. norm: weights (N + K, D) and eps, or
    None. pool: (num_blocks, num_layers, 2, block_size, K, D).
    """
    _, _, _, block_size, num_kv_heads, head_dim = pool.shape
    rows = qkv.shape[0]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    per_program = 4 if rows <= 512 else 16
    weight, eps = norm or (cos_sin, 0.0)
    _store_kv[(triton.cdiv(rows, per_program), 2 * num_kv_heads)](
        qkv, positions, slots, cos_sin, weight, pool, eps, rows, pool.stride(0), layer * pool.stride(1), num_heads,
        num_kv_heads, head_dim, triton.next_power_of_2(head_dim), block_size, per_program, norm is not None,
        num_warps=4, **LAUNCH,
    )  # fmt: skip
