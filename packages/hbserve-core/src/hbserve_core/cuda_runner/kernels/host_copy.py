"""Small copies between pinned host memory and the device, by a kernel.

A step is surrounded by two of them. A copy engine takes some 7 us for each, most of it to begin and to be waited for; a
kernel that reads or writes the host's memory itself takes 3. It begins when the one before has ended, and lets none
begin before it has: see `begin_step` in dependent_launch.py.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 1024
_MOST = 1 << 18
"""Numbers; more than these a copy engine moves faster."""


@triton.jit(do_not_specialize=["count"])
def _host_copy(source, target, count, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + places, tl.load(source + places, mask=places < count), mask=places < count)


def host_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Queue a copy of as many numbers of `source` as `target` (C,) has. One is on the device, the other one pinned."""
    count = len(target)
    if count > _MOST:
        target.copy_(source[:count], non_blocking=True)
    elif count:
        _host_copy[(triton.cdiv(count, _BLOCK),)](source, target, count, _BLOCK, num_warps=4)
