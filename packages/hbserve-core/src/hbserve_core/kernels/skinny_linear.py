"""Products of few rows with a weight matrix on tensor cores: a skinny GEMM.

Such a product is as fast as its weights can be read. The weights are the long side of each tile, so the rows cost next
to nothing; where a matrix has too few tiles to keep every processor reading, its inputs are split too (split-K) and
the program of a tile that ends last adds what all have found, always in the same order. The residual addition, or
silu(gate) * up, is done on the way out.
Shapes: M rows, I inputs, O outputs.
"""

import torch
import triton
import triton.language as tl

from hbserve_core.kernels.dependent_launch import LAUNCH, begin, prefetch

TILE_OUTPUTS = 64
TILE_INPUTS = 128
"""Of one step of the loop over the inputs."""
_AHEAD = 256
"""Inputs whose weights each program fetches while the kernel in front still runs."""


@triton.jit
def _finish(
    result, bias, out, tile, num_rows, num_outputs, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """Write a whole tile (OUTPUTS, ROWS) of products."""
    COUNT: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    outputs = tile * COUNT + tl.arange(0, COUNT)
    biased = tl.minimum(outputs, num_outputs - 1)
    if GATED:
        result, up = tl.split(tl.permute(tl.reshape(result, (2, COUNT, ROWS)), (1, 2, 0)))
        if HAS_BIAS:
            up += tl.load(bias + num_outputs + biased).to(tl.float32)[:, None]
    if HAS_BIAS:
        result += tl.load(bias + biased).to(tl.float32)[:, None]
    if GATED:
        result = result / (1.0 + tl.exp(-result)) * up
    m = tl.arange(0, ROWS)[None, :]
    place = out + m * num_outputs + outputs[:, None]
    inside = (outputs < num_outputs)[:, None] & (m < num_rows)
    if ADDS:
        result += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _skinny_linear(
    x, weight, bias, out, parts, arrived, num_rows, num_inputs, num_outputs, span,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr, AHEAD: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    r, m = tl.arange(0, OUTPUTS), tl.arange(0, ROWS)
    if GATED:
        # Half of the tile's weight rows are gates, the other half the ups that belong to them.
        HALF: tl.constexpr = OUTPUTS // 2
        outputs = tl.minimum(tile * HALF + r % HALF, num_outputs - 1) + r // HALF * num_outputs
    else:
        outputs = tl.minimum(tile * OUTPUTS + r, num_outputs - 1)
    first = split * span
    last = tl.minimum(first + span, num_inputs)
    weight += outputs[:, None].to(tl.int64) * num_inputs
    x += m[:, None] * num_inputs
    prefetch(weight + tl.minimum(first + tl.arange(0, AHEAD // 64) * 64, last - 1)[None, :])
    begin()
    result = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for start in tl.range(first, last, STEP, num_stages=STAGES):
        columns = (start + tl.arange(0, STEP))[None, :]
        block = tl.load(weight + columns, mask=columns < last, other=0.0, eviction_policy="evict_first")
        given = tl.load(x + columns, mask=(m < num_rows)[:, None] & (columns < last), other=0.0)
        result = tl.dot(block, tl.trans(given), result, input_precision="ieee")
    if SPLITS == 1:
        _finish(result, bias, out, tile, num_rows, num_outputs, ROWS, OUTPUTS, GATED, HAS_BIAS, ADDS)
    else:
        parts += tile * (SPLITS * OUTPUTS * ROWS)
        place = r[:, None] * ROWS + m[None, :]
        tl.store(parts + split * (OUTPUTS * ROWS) + place, result)
        # All of this program's stores come before its arrival.
        tl.debug_barrier()
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            tl.debug_barrier()
            result = tl.zeros((OUTPUTS, ROWS), tl.float32)
            for part in tl.static_range(SPLITS):
                # Past the first-level cache, which knows nothing of what other processors have written.
                result += tl.load(parts + part * (OUTPUTS * ROWS) + place, cache_modifier=".cg")
            _finish(result, bias, out, tile, num_rows, num_outputs, ROWS, OUTPUTS, GATED, HAS_BIAS, ADDS)
            tl.store(arrived + tile, 0)


class SkinnyWorkspace:
    """Where programs that share a tile leave what they have found. One for all products: one of them runs at a time."""

    def __init__(self, most_programs: int, most_rows: int, device: torch.device) -> None:
        """most_programs: of a product whose inputs are split."""
        self.parts = torch.empty(most_programs * TILE_OUTPUTS * most_rows, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(most_programs, dtype=torch.int32, device=device)
        """Programs of each tile that have ended; 0 between launches."""


def num_tiles(num_outputs: int, gated: bool) -> int:
    """Programs of a product whose inputs are not split."""
    return -(-num_outputs // (TILE_OUTPUTS // 2 if gated else TILE_OUTPUTS))


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    padded_rows: int,
    splits: int,
    workspace: SkinnyWorkspace,
    add_to: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """x (M, I) times weight (O, I) transposed, plus bias (O,), summed in float32.

    padded_rows: a power of two, at least M and 16. splits: of the inputs. add_to: (M, O), to which the result is added
    in place, and which is returned. gated: the weight is (2 O, I), gate rows then up rows; the result is
    silu(gate) * up.
    """
    rows, inputs = x.shape
    outputs = len(weight) // 2 if gated else len(weight)
    out = add_to
    if out is None:
        out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    span = triton.cdiv(triton.cdiv(inputs, TILE_INPUTS), splits) * TILE_INPUTS
    # As many tiles on their way as the shared memory of a Hopper processor holds.
    stages = 6 if padded_rows <= 32 else 5
    _skinny_linear[(num_tiles(outputs, gated), splits)](
        x, weight, weight if bias is None else bias, out, workspace.parts, workspace.arrived, rows, inputs, outputs,
        span, padded_rows, TILE_OUTPUTS, TILE_INPUTS, _AHEAD, splits, stages, gated, bias is not None,
        add_to is not None, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return out
