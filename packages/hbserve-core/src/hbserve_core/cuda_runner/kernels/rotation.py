"""Heads as attention wants them: normed, if the model does that, and rotated by their positions.

Shapes: R heads, one per row, D head_dim, padded to a power of two with zeros.
"""

import triton
import triton.language as tl


@triton.jit
def load_halves(heads, used, D: tl.constexpr, PADDED_D: tl.constexpr):
    """(R, PADDED_D) of the numbers at pointers `heads` (R, 1), and the same with their halves exchanged. used: (R, 1);
    of other rows nothing is read, they become 0."""
    d = tl.arange(0, PADDED_D)[None, :]
    partner = tl.where(d < D // 2, d + D // 2, d - D // 2)
    inside = used & (d < D)
    return tl.load(heads + d, mask=inside, other=0.0), tl.load(heads + partner, mask=inside, other=0.0)


@triton.jit
def load_angles(angles, used, D: tl.constexpr, PADDED_D: tl.constexpr):
    """Cosines and sines (R, PADDED_D) from pointers (R, 1) to D / 2 cosines, which D / 2 sines follow."""
    d = tl.arange(0, PADDED_D)[None, :]
    inside = used & (d < D)
    cos = tl.load(angles + d % (D // 2), mask=inside, other=0.0)
    sin = tl.load(angles + D // 2 + d % (D // 2), mask=inside, other=0.0)
    return cos, tl.where(d < D // 2, -sin, sin)


@triton.jit
def rotated(halves, weights, angles, eps, D: tl.constexpr, HAS_NORM: tl.constexpr):
    """(R, PADDED_D) of the heads' dtype. halves: see `load_halves`. weights: the same of the norm's weights.
    angles: see `load_angles`."""
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
    """(R, PADDED_D) of the heads' dtype.

    heads, weights, angles: pointers (R, 1) to the first number of each head, of its norm's weights, and of its
    position's cosines and sines. used: (R, 1); of other rows nothing is read, they become 0.
    """
    halves = load_halves(heads, used, D, PADDED_D)
    norm = halves
    if HAS_NORM:
        norm = load_halves(weights, used, D, PADDED_D)
    return rotated(halves, norm, load_angles(angles, used, D, PADDED_D), eps, D, HAS_NORM)
