"""silu(gate) * up.

Shapes: T rows, F intermediate_size.
"""

import torch
import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin


@triton.jit
def _silu_mul(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    begin()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + columns, mask=inside, other=0.0)
    exact = gate.to(tl.float32)
    activated = (exact / (1.0 + tl.exp(-exact))).to(gate.dtype)
    tl.store(out + row * SIZE + columns, activated * up, mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """(T, 2 F), gate then up, to (T, F)."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(size))
    _silu_mul[(rows, triton.cdiv(size, block))](gate_up, out, size, block, num_warps=4, **LAUNCH)
    return out
