"""Product of many rows on Hopper that computes gates and ups and writes silu(gate) * up.

A program computes one tile after the other, and consists of several groups of warps: a loader, which lets the copy
engine (TMA) bring rows and weights into shared memory, and two consumers of 64 rows each. While one consumer activates
its results, tensor cores compute the products of the other.
Shapes: M rows, I inputs, F outputs, each of a gate and an up.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin, num_processors
from hbserve_core.cuda_runner.kernels.hopper import (
    IS_HOPPER,
    PAGES,
    activated,
    arrive,
    barriers,
    copy_in,
    copy_out,
    meet,
)

_ROWS = gl.constexpr(64)
"""Number of rows of a consumer."""
_OUTPUTS = gl.constexpr(128)
_STEP = gl.constexpr(64)
"""Number of inputs of a step."""
_STAGES = gl.constexpr(4)
_GROUP = gl.constexpr(16)
"""Number of tiles of rows that are computed for one tile of weights after the other, so that caches hold them."""
_FEWEST_TILES = 2
"""Fewest tiles for each processor. With fewer, the tiles of the last round cost more than the saved pass over
memory."""
_REGISTERS = 240, 24
"""Number of registers of a consumer's thread, and of a loader's."""


@gluon.jit
def _place(index, row_tiles, column_tiles):
    """Compute the place (m, n) of a tile."""
    first = index // (_GROUP * column_tiles) * _GROUP
    height = gl.minimum(row_tiles - first, _GROUP)
    within = index % (_GROUP * column_tiles)
    return first + within % height, within // height


@gluon.jit
def _load(rows, weights, num_outputs, sizes, given, blocks, ready, free):
    row_tiles, column_tiles, steps = sizes
    used = 0
    for index in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        m, n = _place(index, row_tiles, column_tiles)
        for k in range(steps):
            stage = used % _STAGES
            mbarrier.wait(free.index(stage), (used // _STAGES & 1) ^ 1)
            arrived = ready.index(stage)
            mbarrier.expect(arrived, 2 * (_ROWS + _OUTPUTS) * _STEP * 2)
            for half in gl.static_range(2):
                place = [half * num_outputs + n * _OUTPUTS, k * _STEP]
                copy_in(weights, place, arrived, blocks.index(stage * 2 + half))
                copy_in(rows, [(m * 2 + half) * _ROWS, k * _STEP], arrived, given.index(stage * 2 + half))
            used += 1


@gluon.jit
def _consume(which: gl.constexpr, out, sizes, given, blocks, results, ready, free, GELU: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _OUTPUTS, 16])
    row_tiles, column_tiles, steps = sizes
    used = 0
    for index in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        m, n = _place(index, row_tiles, column_tiles)
        gate = gl.zeros([_ROWS, _OUTPUTS], gl.float32, layout)
        up = gl.zeros([_ROWS, _OUTPUTS], gl.float32, layout)
        for k in range(steps):
            stage = used % _STAGES
            mbarrier.wait(ready.index(stage), used // _STAGES & 1)
            rows = given.index(stage * 2 + which)
            gate = warpgroup_mma(rows, blocks.index(stage * 2).permute((1, 0)), gate, is_async=True)
            up = warpgroup_mma(rows, blocks.index(stage * 2 + 1).permute((1, 0)), up, is_async=True)
            # The products of the previous step have ended.
            gate, up = warpgroup_mma_wait(2, deps=[gate, up])
            if k > 0:
                arrive(free.index((used - 1) % _STAGES))
            used += 1
        gate, up = warpgroup_mma_wait(0, deps=[gate, up])
        arrive(free.index((used - 1) % _STAGES))
        result = activated(gate, GELU) * up
        # Wait until the previous tile has left this memory.
        tma.store_wait(0)
        meet()
        results.index(which).store(result.to(out.dtype))
        fence_async_shared()
        meet()
        copy_out(out, [(m * 2 + which) * _ROWS, n * _OUTPUTS], results.index(which))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_outputs", "row_tiles", "column_tiles", "steps"])
def _hopper_gated(
    rows, weights, out, num_outputs, row_tiles, column_tiles, steps, GELU: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    begin()
    given = gl.allocate_shared_memory(out.dtype, [_STAGES * 2, _ROWS, _STEP], rows.layout)
    blocks = gl.allocate_shared_memory(out.dtype, [_STAGES * 2, _OUTPUTS, _STEP], weights.layout)
    results = gl.allocate_shared_memory(out.dtype, [2, _ROWS, _OUTPUTS], out.layout)
    ready, free = barriers(_STAGES, 1), barriers(_STAGES, 2)
    fence_async_shared()
    meet()
    sizes = row_tiles, column_tiles, steps
    gl.warp_specialize(
        [
            (_consume, (0, out, sizes, given, blocks, results, ready, free, GELU)),
            (_consume, (1, out, sizes, given, blocks, results, ready, free, GELU)),
            (_load, (rows, weights, num_outputs, sizes, given, blocks, ready, free)),
        ],
        [4, 1], [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


def suits_hopper_gated(rows: torch.Tensor, weight: object, bias: torch.Tensor | None) -> bool:
    """Return whether `hopper_gated` can take these, and is faster than a product of cuBLAS followed by `gate_mul`."""
    if not IS_HOPPER or bias is not None or rows.dtype.itemsize != 2:
        return False
    if not isinstance(weight, torch.Tensor) or weight.dtype != rows.dtype:
        return False
    tiles = triton.cdiv(len(rows), 2 * _ROWS.value) * triton.cdiv(len(weight) // 2, _OUTPUTS.value)
    are_aligned = all(size % 8 == 0 for size in (rows.shape[1], len(weight) // 2)) and weight.data_ptr() % 16 == 0
    return are_aligned and tiles >= _FEWEST_TILES * num_processors(rows.device)


def hopper_gated(x: torch.Tensor, weight: torch.Tensor, gelu: bool = False) -> torch.Tensor:
    """Compute silu(gate) * up, or gelu(gate) * up, (M, F), of x (M, I) times weight (2 F, I) transposed, gates then
    ups."""
    rows, inputs = x.shape
    outputs = len(weight) // 2
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    row_tiles, column_tiles = triton.cdiv(rows, 2 * _ROWS.value), triton.cdiv(outputs, _OUTPUTS.value)
    _hopper_gated[(min(num_processors(x.device), row_tiles * column_tiles),)](
        TensorDescriptor.from_tensor(x, [_ROWS.value, _STEP.value], PAGES),
        TensorDescriptor.from_tensor(weight, [_OUTPUTS.value, _STEP.value], PAGES),
        TensorDescriptor.from_tensor(out, [_ROWS.value, _OUTPUTS.value], PAGES),
        outputs, row_tiles, column_tiles, triton.cdiv(inputs, _STEP.value), GELU=gelu,
        CONSUMER_REGISTERS=_REGISTERS[0], LOADER_REGISTERS=_REGISTERS[1], num_warps=4, **LAUNCH,
    )  # fmt: skip
    return out
