"""Kernels that start before the previous one has ended: programmatic dependent launch, on Hopper and later.

A step is a chain of kernels of a few microseconds each, and starting one costs about as much. With a dependent launch
the next kernel's programs start while the last ones of this kernel still run. Each of our kernels calls `begin` before
it touches memory that an earlier kernel writes; what never changes, such as weights, may be read before that. See
griddepcontrol in NVIDIA's PTX ISA.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, which does not know a device's instructions."""


def _is_supported() -> bool:
    if INTERPRETED.value or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability()[0] >= 9


DEPENDENT = tl.constexpr(_is_supported())
LAUNCH: dict[str, Any] = {"launch_pdl": True} if DEPENDENT.value else {}
"""Launch options for a kernel that calls `begin`."""


@triton.jit
def begin():
    """Let the next kernel start, and wait until the previous one has written everything."""
    if DEPENDENT:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()


@triton.jit
def begin_step():
    """Begin the first kernel of a step: no other kernel of the step starts before all its input has been written.

    So any kernel of the step may read, before `begin`, what only the host writes.
    """
    if DEPENDENT:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Request that the cache lines at `pointers`, a tensor of any shape, be brought into the L2 cache."""
    if DEPENDENT:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


def num_processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a CUDA device. A CPU, on which Triton's interpreter runs, counts as a
    small device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
