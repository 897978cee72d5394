"""Heads as attention wants them: normed, if the model does that, and rotated by their positions.

Shapes: R heads, one per row, D head_dim, padded to a power of two with zeros.
"""

import triton
import triton.language as tl


@triton.jit
def load_rotated(heads, used, weights, angles, eps, D: tl.constexpr, PADDED_D: tl.constexpr, HAS_NORM: tl.constexpr):
    """(R, PADDED_D) of the heads' dtype.

    heads, weights, angles: pointers (R, 1) to the first number of each head, of its norm's weights, and of its
    position's D / 2 cosines, which D / 2 sines follow. used: (R, 1); of other rows nothing is read, they become 0.
    """
    d = tl.arange(0, PADDED_D)[None, :]
    HALF: tl.constexpr = D // 2
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    inside = used & (d < D)
    own, other = tl.load(heads + d, mask=inside, other=0.0), tl.load(heads + partner, mask=inside, other=0.0)
    a, b = own.to(tl.float32), other.to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(a * a, 1) / D + eps)[:, None]
        # Rounded where the plain torch version rounds.
        a = (a * scale).to(own.dtype).to(tl.float32) * tl.load(weights + d, mask=inside, other=0.0).to(tl.float32)
        b = (b * scale).to(own.dtype).to(tl.float32) * tl.load(weights + partner, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(angles + d % HALF, mask=inside, other=0.0)
    sin = tl.load(angles + HALF + d % HALF, mask=inside, other=0.0)
    return (a * cos + tl.where(d < HALF, -b, b) * sin).to(own.dtype)
