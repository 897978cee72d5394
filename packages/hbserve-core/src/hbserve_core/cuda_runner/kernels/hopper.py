"""Parts of kernels for Hopper that decide themselves which warps do what, written in Gluon, the language below Triton.

They are only for compute capability 9.0 (wgmma). Triton's interpreter does not know Gluon, so on a CPU tests compile
them but do not run them. Elsewhere, kernels in plain Triton compute the same.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from hbserve_core.cuda_runner.kernels.attention_parts import LOG2_E
from hbserve_core.cuda_runner.kernels.dependent_launch import INTERPRETED

_RENAMED = gl.constexpr(hasattr(gl, "barrier"))
"""Whether Triton has the names of 3.9, which differ from those of 3.6."""
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
"""Function that lets the copy engine bring a tile to shared memory and then signal a barrier: descriptor, place,
barrier, memory."""
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
"""Function that lets the copy engine write a tile: descriptor, place, memory."""

PAGES, BOXES = gl.NVMMASharedLayout(128, 16), gl.NVMMASharedLayout(128, 16, rank=3)
"""Layouts of shared memory for tiles of 16-bit numbers with two and with three dimensions, as tensor cores read them.
They are made once, because making one would take microseconds of each launch."""

_NEGATIVE_LOG2_E = gl.constexpr(-LOG2_E)


def _is_hopper() -> bool:
    if INTERPRETED.value or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability()[0] == 9


IS_HOPPER = _is_hopper()


@gluon.jit
def meet():
    """Wait for the other warps of this group."""
    if _RENAMED:
        gl.barrier()
    else:
        gl.thread_barrier()


@gluon.jit
def viewed(memory, shape: gl.constexpr):
    """View the same shared memory as tiles of another shape, of two dimensions each."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    if _RENAMED:
        tiles = memory.reinterpret(memory.dtype, shape, layout)
    else:
        tiles = memory._reinterpret(memory.dtype, shape, layout)
    return tiles


@gluon.jit
def barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    """Make NUMBER barriers, each of which waits for COUNT arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(made.index(i), count=COUNT)
    return made


@gluon.jit
def arrive(barrier):
    """Arrive once at a barrier, when all warps of this group have come here."""
    meet()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def activated(gate, GELU: gl.constexpr):
    """Compute silu(gate), or gelu(gate), like `activated` in pointwise.py."""
    slope = gate
    if GELU:
        slope = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
    return gate / (1.0 + gl.exp2(slope * _NEGATIVE_LOG2_E))
