"""Products of very few rows with a weight matrix: what one stream's decode step consists of.

Such a product is as fast as its weights can be read, and a step is a chain of them, so what surrounds a product is done
inside it: the norm before it, and the residual addition or silu(gate) * up after it.
Shapes: M rows (1, 2 or 4), I inputs, O outputs.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _dot(
    x, weight, norm, rows, start, squares, accumulated, M: tl.constexpr, INPUTS: tl.constexpr, STEP: tl.constexpr,
    HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Add x[:, start : start + STEP] times the same columns of the weight rows; sums the squares of x on the way."""
    columns = start + tl.arange(0, STEP)
    inside = columns < INPUTS
    block = tl.load(weight + rows[:, None].to(tl.int64) * INPUTS + columns[None, :], mask=inside[None, :], other=0.0)
    given = tl.load(x + tl.arange(0, M)[:, None] * INPUTS + columns[None, :], mask=inside[None, :], other=0.0).to(
        tl.float32
    )
    if HAS_NORM:
        squares += tl.sum(given * given, 1)
        given *= tl.load(norm + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return squares, accumulated + tl.sum(given[:, None, :] * block.to(tl.float32)[None, :, :], 2)


@triton.jit
def _small_linear(
    x, weight, bias, norm, out, eps, M: tl.constexpr, INPUTS: tl.constexpr, COUNT: tl.constexpr,
    STEP: tl.constexpr, OUTPUTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, ADDS: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.minimum(outputs, COUNT - 1)
    squares = tl.zeros((M,), tl.float32)
    result = tl.zeros((M, OUTPUTS), tl.float32)
    for start in tl.static_range(0, INPUTS, STEP):
        squares, result = _dot(x, weight, norm, rows, start, squares, result, M, INPUTS, STEP, HAS_NORM)
    if GATED:
        ignored = tl.zeros((M,), tl.float32)
        up = tl.zeros((M, OUTPUTS), tl.float32)
        for start in tl.static_range(0, INPUTS, STEP):
            ignored, up = _dot(x, weight, norm, rows + COUNT, start, ignored, up, M, INPUTS, STEP, HAS_NORM)
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
    step = min(1024, triton.next_power_of_2(size))
    # About 32 KiB of weights for each program: all of them are on their way before the first one is used.
    per_program = max(1, min(32, 16384 // triton.next_power_of_2(size) // (2 if gated else 1)))
    norm_weight, eps = norm or (x, 0.0)
    _small_linear[(triton.cdiv(outputs, per_program),)](
        x, weight, weight if bias is None else bias, norm_weight, out, eps, rows, size, outputs, step, per_program,
        bias is not None, norm is not None, add_to is not None, gated, num_warps=4,
    )  # fmt: skip
    return out
