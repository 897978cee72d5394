"""Parts common to prefill and decode attention: loading heads, and attending to one tile of context after another.

Heads are normed, if the model does that, and rotated by their positions, as they are read. For each row of queries,
attention keeps a state that does not depend on how the context is divided into tiles (online softmax; flash attention).
A pool of 8-bit floats (NARROW) holds keys and values divided by their scales. Everything that is attended to is in that
form, including the step's own tokens, so a token's result does not depend on whether it finds another token in the
pool. Scores are multiplied by the scale of keys, and results by that of values.
Shapes: R rows, one head each, C tokens of context, D head_dim, padded to a power of two with zeros, K key heads.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.dependent_launch import DEPENDENT

LOG2_E = 1.4426950408889634
"""Factor of the scores by which weights become powers of two, which are faster to compute."""
_LOWEST = tl.constexpr(-1e30)
"""Score below every other one, and above -inf, so that differences from it are numbers."""

# Instructions that turn two 8-bit floats in a 16-bit word into 16-bit numbers: widening.py explains them, and has those
# for 4 bits.
_8_TO_BF16 = tl.constexpr(
    """{
    .reg .b32 a, b, c;
    shl.b32 a, $2, 4;
    and.b32 a, a, 0x07f007f0;
    shl.b32 b, $2, 8;
    lop3.b32 a, b, 0x80008000, a, 0xea;
    shr.u32 b, $2, 4;
    and.b32 b, b, 0x07f007f0;
    lop3.b32 b, $2, 0x80008000, b, 0xea;
    mov.b32 c, 0x7b807b80;
    mul.bf16x2 $0, a, c;
    mul.bf16x2 $1, b, c;
    }"""
)
_8_TO_F16 = tl.constexpr(
    """{
    .reg .b32 a, b;
    .reg .b16 c, d;
    prmt.b32 a, $2, 0, 0x3120;
    mov.b32 {c, d}, a;
    cvt.rn.f16x2.e4m3x2 $0, c;
    cvt.rn.f16x2.e4m3x2 $1, d;
    }"""
)


class Scores(NamedTuple):
    """Parameters by which queries and keys become weights."""

    scale: float
    """Factor of the scores."""
    window: int = 0
    """Number of last positions that a token sees, including its own; 0 means all."""
    cap: float = 0.0
    """Soft cap: a score s becomes cap * tanh(s / cap). 0 means no cap."""
    key_scale: float = 1.0
    """Factor by which keys in a pool of 8-bit floats must be multiplied."""
    value_scale: float = 1.0


# ---- heads -----------------------------------------------------------------------------------------------------------


@triton.jit
def load_halves(heads, used, D: tl.constexpr, PADDED_D: tl.constexpr):
    """Load the numbers (R, PADDED_D) at pointers `heads` (R, 1), and the same with their halves exchanged. used: (R,
    1); other rows are not read and become 0."""
    d = tl.arange(0, PADDED_D)[None, :]
    partner = tl.where(d < D // 2, d + D // 2, d - D // 2)
    inside = used & (d < D)
    return tl.load(heads + d, mask=inside, other=0.0), tl.load(heads + partner, mask=inside, other=0.0)


@triton.jit
def load_angles(angles, used, D: tl.constexpr, PADDED_D: tl.constexpr):
    """Load cosines and sines (R, PADDED_D) from pointers (R, 1) to D / 2 cosines followed by D / 2 sines."""
    d = tl.arange(0, PADDED_D)[None, :]
    inside = used & (d < D)
    cos = tl.load(angles + d % (D // 2), mask=inside, other=0.0)
    sin = tl.load(angles + D // 2 + d % (D // 2), mask=inside, other=0.0)
    return cos, tl.where(d < D // 2, -sin, sin)


@triton.jit
def rotated(halves, weights, angles, eps, D: tl.constexpr, HAS_NORM: tl.constexpr):
    """Norm and rotate heads, (R, PADDED_D) of their dtype. halves: see `load_halves`. weights: the same for the norm's
    weights. angles: see `load_angles`."""
    own, other = halves
    cos, sin = angles
    a, b = own.to(tl.float32), other.to(tl.float32)
    if HAS_NORM:
        weight, other_weight = weights
        scale = tl.rsqrt(tl.sum(a * a, 1) / D + eps)[:, None]
        # Rounded where the plain torch version rounds.
        a = (a * scale).to(own.dtype).to(tl.float32) * weight.to(tl.float32)
        b = (b * scale).to(own.dtype).to(tl.float32) * other_weight.to(tl.float32)
    return (a * cos + b * sin).to(own.dtype)


@triton.jit
def load_rotated(heads, used, weights, angles, eps, D: tl.constexpr, PADDED_D: tl.constexpr, HAS_NORM: tl.constexpr):
    """Load, norm and rotate heads, (R, PADDED_D) of their dtype.

    heads, weights, angles: pointers (R, 1) to the first number of each head, of its norm's weights, and of its
    position's cosines and sines. used: (R, 1); other rows are not read and become 0.
    """
    halves = load_halves(heads, used, D, PADDED_D)
    norm = halves
    if HAS_NORM:
        norm = load_halves(weights, used, D, PADDED_D)
    return rotated(halves, norm, load_angles(angles, used, D, PADDED_D), eps, D, HAS_NORM)


@triton.jit
def as_stored(x, inverse, NARROW: tl.constexpr):
    """Convert x to the form in the pool: if NARROW, 8-bit floats (e4m3) of x times the inverse of a scale, where
    numbers beyond their range become the largest of them and NaN stays NaN; otherwise x itself."""
    if NARROW:
        inside = tl.clamp(x.to(tl.float32) * inverse, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        x = inside.to(tl.float8e4nv)
    return x


@triton.jit
def as_given(weighted, scale, NARROW: tl.constexpr):
    """Undo the scale of values: if NARROW, multiply weighted values by their scale; otherwise return them unchanged."""
    if NARROW:
        weighted = weighted * scale
    return weighted


@triton.jit
def in_halves(x, ROWS: tl.constexpr, D: tl.constexpr):
    """Split numbers into those at even places and those at odd places, (R, D / 2) each."""
    return tl.split(tl.reshape(x, (ROWS, D // 2, 2)))


@triton.jit
def in_one(even, odd, ROWS: tl.constexpr, D: tl.constexpr):
    """Undo `in_halves`: return the numbers (R, D)."""
    return tl.reshape(tl.join(even, odd), (ROWS, D))


@triton.jit
def widened_8(words, dtype: tl.constexpr):
    """Widen words (O, I) int16 of two 8-bit floats each to `dtype`: returns the low ones and the high ones."""
    if DEPENDENT and dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            _8_TO_BF16, "=r,=r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    elif DEPENDENT and dtype == tl.float16:
        low, high = tl.inline_asm_elementwise(
            _8_TO_F16, "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        low = (words & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(dtype)
        high = ((words >> 8) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(dtype)
    return low, high


# ---- context ---------------------------------------------------------------------------------------------------------


@triton.jit
def nothing_seen(ROWS: tl.constexpr, PADDED_D: tl.constexpr):
    """Make the state of ROWS rows before the first `attend`."""
    lowest = tl.full((ROWS,), float("-inf"), tl.float32)
    return lowest, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, PADDED_D), tl.float32)


@triton.jit
def capped(scores, CAP: tl.constexpr):
    """Compute CAP * tanh(scores / CAP)."""
    # The exponential of large scores is inf, and that of small ones 0, so the limits are right.
    return CAP * (1.0 - 2.0 / (tl.exp(scores * (2.0 / CAP)) + 1.0))


@triton.jit
def attend(
    state, query, key, value, visible, scale, MASKED: tl.constexpr, MAY_BE_BLIND: tl.constexpr, CAP: tl.constexpr
):
    """Add one more tile of context to the state of each row of `query` (R, D), and return the new state.

    state: highest score so far (R,), sum of the weights relative to it (R,), weighted values (R, D). key, value: (C,
    D), of the query's dtype or 8-bit floats. visible: (R, C) or broadcast to it; each row has seen something already,
    or sees something now, unless MAY_BE_BLIND. 8-bit floats may come as words of two, int16 (C, D / 2), from which
    operands of tensor cores can be made without moving a byte between threads. Then the query and the weighted values
    are two tensors each, (R, D / 2); see `in_halves`.
    """
    highest, total, weighted = state
    if key.dtype == tl.int16:
        low, high = widened_8(key, query[0].dtype)
        scores = tl.dot(query[0], tl.trans(low), input_precision="ieee")
        scores = tl.dot(query[1], tl.trans(high), scores, input_precision="ieee")
    else:
        scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
    if CAP > 0.0:
        scores = capped(scores * scale, CAP)
        factor = 1.0
    else:
        factor = scale
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1) * factor)
    if MAY_BE_BLIND:
        new_highest = tl.maximum(new_highest, _LOWEST)
    weights = tl.exp2(scores * factor - new_highest[:, None])
    faded = tl.exp2(highest - new_highest)
    if key.dtype == tl.int16:
        low, high = widened_8(value, query[0].dtype)
        given = weights.to(query[0].dtype)
        even = tl.dot(given, low, weighted[0] * faded[:, None], input_precision="ieee")
        weighted = (even, tl.dot(given, high, weighted[1] * faded[:, None], input_precision="ieee"))
    else:
        weighted = weighted * faded[:, None]
        weighted = tl.dot(weights.to(query.dtype), value.to(query.dtype), weighted, input_precision="ieee")
    return new_highest, total * faded + tl.sum(weights, 1), weighted


@triton.jit
def paged(table, positions, inside, block_stride, D: tl.constexpr, PADDED_D: tl.constexpr, TOKEN: tl.constexpr,
          BLOCK_SIZE: tl.constexpr):  # fmt: skip
    """Compute the places (C, PADDED_D) of these positions' keys of head 0 in a sequence's blocks, and which of them to
    read."""
    d = tl.arange(0, PADDED_D)[None, :]
    block = tl.load(table + positions // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    place = (block * block_stride + (positions % BLOCK_SIZE) * TOKEN)[:, None] + d
    return place, inside[:, None] & (d < D)


@triton.jit
def attend_paged(
    state, query, keys, table, first, last, oldest, block_stride, scale,
    K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, BY_ROW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Attend to positions [first, last) of a sequence in the pool. keys: pointer to the keys of its layer and this head
    in block 0. All positions are visible or, if BY_ROW, those from oldest[r] (R, 1) on are visible to row r."""
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        positions = start + tl.arange(0, TILE)
        inside = positions < last
        place, read = paged(table, positions, inside, block_stride, D, PADDED_D, K * D, BLOCK_SIZE)
        key = tl.load(keys + place, mask=read, other=0.0)
        value = tl.load(keys + BLOCK_SIZE * K * D + place, mask=read, other=0.0)
        visible = inside[None, :]
        if BY_ROW:
            visible &= positions[None, :] >= oldest
        state = attend(state, query, key, value, visible, scale, True, BY_ROW, CAP)
    return state
