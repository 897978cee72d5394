"""RMS normalisation of rows.

Shapes: T rows, E hidden_size.
"""

import torch
import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin


@triton.jit
def _rms_norm(x, weight, out, eps, SIZE: tl.constexpr, PADDED: tl.constexpr):
    begin()
    row = tl.program_id(0).to(tl.int64) * SIZE
    columns = tl.arange(0, PADDED)
    inside = columns < SIZE
    given = tl.load(x + row + columns, mask=inside, other=0.0)
    exact = given.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, 0) / SIZE + eps)
    normed = (exact * scale).to(given.dtype).to(tl.float32)
    result = normed * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + columns, result.to(given.dtype), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """(T, E) of rows (T, E); weight: (E,)."""
    rows, size = x.shape
    out = torch.empty_like(x)
    padded = triton.next_power_of_2(size)
    _rms_norm[(rows,)](x, weight, out, eps, size, padded, num_warps=4 if padded <= 2048 else 8, **LAUNCH)
    return out
