"""Query and key norms, rotation, and the way of new keys and values into their blocks, in one pass.

Shapes: T rows of one step, N query heads, K key heads, H = N + 2 K, D head_dim.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _rope_and_store(
    qkv, positions, slots, cos_sin, norm_weight, pool, eps, num_rows, block_stride, layer_offset,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + rows, mask=rows < num_rows, other=-1)
    used = (slot >= 0)[:, None]
    half = tl.arange(0, HALF)[None, :]
    inside = used & (half < D // 2)
    first = qkv + rows.to(tl.int64)[:, None] * ((N + 2 * K) * D) + head * D + half
    low, high = tl.load(first, mask=inside, other=0.0), tl.load(first + D // 2, mask=inside, other=0.0)
    # Of the row's place in the pool: block, then layer, key or value, token in the block, head.
    key_head = tl.where(head < N + K, head - N, head - N - K)
    place = (slot // BLOCK_SIZE).to(tl.int64) * block_stride + layer_offset + (slot % BLOCK_SIZE) * (K * D)
    target = pool + place[:, None] + key_head * D + half
    if head >= N + K:
        target += BLOCK_SIZE * K * D
    if head < N + K:
        a, b = low.to(tl.float32), high.to(tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
            weights = norm_weight + head * D + half
            a = (a * scale).to(low.dtype).to(tl.float32) * tl.load(weights, mask=half < D // 2).to(tl.float32)
            b = (b * scale).to(low.dtype).to(tl.float32) * tl.load(weights + D // 2, mask=half < D // 2).to(tl.float32)
        angle = cos_sin + tl.load(positions + rows, mask=rows < num_rows, other=0).to(tl.int64)[:, None] * D + half
        cos, sin = tl.load(angle, mask=inside, other=0.0), tl.load(angle + D // 2, mask=inside, other=0.0)
        low, high = (a * cos - b * sin).to(low.dtype), (b * cos + a * sin).to(low.dtype)
        tl.store(first, low, mask=inside)
        tl.store(first + D // 2, high, mask=inside)
    if head >= N:
        tl.store(target, low, mask=inside)
        tl.store(target + D // 2, high, mask=inside)


def rope_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos_sin: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None,
    pool: torch.Tensor,
    layer: int,
) -> None:
    """Norm and rotate queries and keys in place, and write keys and values into the pool.

    qkv: (T, H * D). positions: (T,) int32. slots: (T,) int32, block * block_size + place in the block; rows where it is
    negative are padding. cos_sin: (max_model_len, D) float32, cosines then sines. norm: weights (N + K, D) and eps, or
    None. pool: (num_blocks, num_layers, 2, block_size, K, D).
    """
    _, _, _, block_size, num_kv_heads, head_dim = pool.shape
    rows = qkv.shape[0]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    per_program = 1 if rows <= 64 else 4 if rows <= 512 else 16
    grid = (triton.cdiv(rows, per_program), num_heads + 2 * num_kv_heads)
    weight, eps = norm or (cos_sin, 0.0)
    _rope_and_store[grid](
        qkv, positions, slots, cos_sin, weight, pool, eps, rows, pool.stride(0), layer * pool.stride(1),
        num_heads, num_kv_heads, head_dim, triton.next_power_of_2(head_dim // 2), block_size,
        per_program, norm is not None, num_warps=1 if per_program == 1 else 4,
    )  # fmt: skip
