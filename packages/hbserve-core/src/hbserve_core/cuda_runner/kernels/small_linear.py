"""Products of one row, or very few, with a weight matrix (GEMV): what one stream's decode step consists of.

Such a product is as fast as its weights can be read, and a step is a chain of them, so what surrounds a product is done
inside it: the norm before it, and the residual addition or silu(gate) * up after it. Each program has all inputs of a
few outputs, and has asked for their weights before the kernel in front of it has ended.
Shapes: M rows (1, 2 or 4), I inputs, O outputs.
"""

import torch
import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin

_STEP_BYTES = 8192
"""Of a weight row, and so of `given`, M times as many numbers: all of both stays in registers."""


@triton.jit
def _rows(weight, rows, start, INPUTS: tl.constexpr, STEP: tl.constexpr):
    """(O, STEP) of the weight rows, from column `start` on."""
    columns = start + tl.arange(0, STEP)
    place = weight + rows[:, None].to(tl.int64) * INPUTS + columns[None, :]
    return tl.load(place, mask=columns < INPUTS, other=0.0, eviction_policy="evict_first")


@triton.jit
def _inputs(x, norm, start, M: tl.constexpr, INPUTS: tl.constexpr, STEP: tl.constexpr, HAS_NORM: tl.constexpr):
    """(M, STEP) of x from column `start` on, times the norm's weights, and the sums of squares (M,) before that."""
    columns = start + tl.arange(0, STEP)
    inside = columns < INPUTS
    given = tl.load(x + tl.arange(0, M)[:, None] * INPUTS + columns[None, :], mask=inside[None, :], other=0.0)
    given = given.to(tl.float32)
    squares = tl.sum(given * given, 1)
    if HAS_NORM:
        given *= tl.load(norm + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return given, squares


@triton.jit
def _product(given, block):
    """(M, O) of (M, STEP) and (O, STEP)."""
    return tl.sum(given[:, None, :] * block.to(tl.float32)[None, :, :], 2)


@triton.jit
def _small_linear(
    x, weight, bias, norm, out, eps, M: tl.constexpr, INPUTS: tl.constexpr, COUNT: tl.constexpr,
    STEP: tl.constexpr, OUTPUTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, ADDS: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.minimum(outputs, COUNT - 1)
    # Weights never change, so they are on their way before the kernel that computes x has ended.
    block = _rows(weight, rows, 0, INPUTS, STEP)
    if GATED:
        up_block = _rows(weight, rows + COUNT, 0, INPUTS, STEP)
    begin()
    given, squares = _inputs(x, norm, 0, M, INPUTS, STEP, HAS_NORM)
    result = _product(given, block)
    if GATED:
        up = _product(given, up_block)
    for start in tl.static_range(STEP, INPUTS, STEP):
        given, more_squares = _inputs(x, norm, start, M, INPUTS, STEP, HAS_NORM)
        squares += more_squares
        result += _product(given, _rows(weight, rows, start, INPUTS, STEP))
        if GATED:
            up += _product(given, _rows(weight, rows + COUNT, start, INPUTS, STEP))
    if HAS_NORM:
        scale = tl.rsqrt(squares / INPUTS + eps)[:, None]
        result *= scale
    if HAS_BIAS:
        result += tl.load(bias + rows).to(tl.float32)[None, :]
    if GATED:
        if HAS_NORM:
            up *= scale
        if HAS_BIAS:
            up += tl.load(bias + COUNT + rows).to(tl.float32)[None, :]
        result = result / (1.0 + tl.exp(-result)) * up
    place = out + tl.arange(0, M)[:, None] * COUNT + outputs[None, :]
    inside = (outputs < COUNT)[None, :]
    if ADDS:
        result += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)


def small_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    add_to: torch.Tensor | None = None,
    gated: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x (M, I) times weight (O, I) transposed, plus bias (O,).

    norm: RMS norm of x first, weights (I,) and eps. add_to: (M, O), to which the result is added in place, and which
    is returned. gated: the weight is (2 O, I), gate rows then up rows; the result is silu(gate) * up. dtype: of the
    result.
    """
    rows, size = x.shape
    outputs = len(weight) // 2 if gated else len(weight)
    out = add_to
    if out is None:
        out = torch.empty((rows, outputs), dtype=dtype or x.dtype, device=x.device)
    step = min(_STEP_BYTES // weight.dtype.itemsize, triton.next_power_of_2(size))
    # Programs of one row that are as small as this are many, so the last wave is short. With two, the input counts.
    per_program = 4 if rows == 1 or step > 2048 else 8
    norm_weight, eps = norm or (x, 0.0)
    _small_linear[(triton.cdiv(outputs, per_program),)](
        x, weight, weight if bias is None else bias, norm_weight, out, eps, rows, size, outputs, step, per_program,
        bias is not None, norm is not None, add_to is not None, gated, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return out
