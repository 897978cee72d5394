"""Residual addition and RMS normalisation in one pass.

Shapes: T rows, E hidden_size.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _add_rms_norm(
    x, residual, weight, out, eps, SIZE: tl.constexpr, PADDED: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * SIZE
    columns = tl.arange(0, PADDED)
    inside = columns < SIZE
    hidden = tl.load(x + row + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        # Rounded before the norm reads it: what the next layer adds to is what this one has normalised.
        added = hidden.to(tl.float32) + tl.load(residual + row + columns, mask=inside, other=0.0).to(tl.float32)
        hidden = added.to(hidden.dtype)
        tl.store(residual + row + columns, hidden, mask=inside)
    exact = hidden.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, 0) / SIZE + eps)
    normed = (exact * scale).to(hidden.dtype).to(tl.float32)
    result = normed * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + columns, result.to(hidden.dtype), mask=inside)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """norm(x + residual) of rows (T, E), which is returned; `residual` becomes x + residual, if there is one."""
    rows, size = x.shape
    out = torch.empty_like(x)
    padded = triton.next_power_of_2(size)
    warps = 4 if padded <= 2048 else 8
    _add_rms_norm[(rows,)](
        x, x if residual is None else residual, weight, out, eps, size, padded, residual is not None, num_warps=warps
    )
    return out
