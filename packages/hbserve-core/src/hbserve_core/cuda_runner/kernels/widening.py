"""Widening of narrow numbers to 16 bits in registers, exactly and by few instructions.

A product of few rows must take no longer than reading its weights' bytes, so a processor has to widen some 20 of them,
or 40 numbers of 4 bits, in each cycle, beside everything else. Conversion instructions are too few for that, and bytes
would have to be moved to where the tensor cores expect 16 bits. So words of 16 bits are read, which are in the right
places and hold two 8-bit floats or four numbers of 4 bits (see model/narrow_weight.py). Each number is moved to its
bits, two words at a time:
    8-bit floats   sign and the rest are put where bfloat16 has them, which is a number 2^120 times too small, and
                   multiplied by that: subnormal ones come out right as well (`widened_8`, in attention_parts.py)
    4 bits         in the lowest bits of a number whose last place counts as 1 (128, or 1024 of float16), from which
                   that and the zero are then subtracted
Plain conversions are used for float32, and in Triton's interpreter, which does not know a device's instructions.
"""

import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.dependent_launch import DEPENDENT

_4_BITS = """{
    .reg .b32 a, b, c, d;
    shr.u32 b, $4, 4;
    shr.u32 c, $4, 8;
    shr.u32 d, $4, 12;
    lop3.b32 a, $4, 0x000f000f, MAGIC, 0xea;
    lop3.b32 b, b, 0x000f000f, MAGIC, 0xea;
    lop3.b32 c, c, 0x000f000f, MAGIC, 0xea;
    lop3.b32 d, d, 0x000f000f, MAGIC, 0xea;
    sub.TYPE $0, a, $5;
    sub.TYPE $1, b, $5;
    sub.TYPE $2, c, $5;
    sub.TYPE $3, d, $5;
    }"""
_4_TO_BF16 = tl.constexpr(_4_BITS.replace("MAGIC", "0x43004300").replace("TYPE", "bf16x2"))
_4_TO_F16 = tl.constexpr(_4_BITS.replace("MAGIC", "0x64006400").replace("TYPE", "f16x2"))


@triton.jit
def offset_4(dtype: tl.constexpr):
    """Return by how much numbers of 4 bits are too large where `parts_of_4` puts them."""
    return 128 if dtype == tl.bfloat16 else 1024


@triton.jit
def parts_of_4(words, taken, dtype: tl.constexpr):
    """Widen words int16 of four numbers of 4 bits each to `dtype`, bfloat16 or float16, from the lowest on. taken: what
    to subtract, in the shape of words: a zero plus `offset_4`."""
    if dtype == tl.bfloat16:
        first, second, third, last = tl.inline_asm_elementwise(
            _4_TO_BF16, "=r,=r,=r,=r,r,r", [words, taken], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2
        )
    else:
        first, second, third, last = tl.inline_asm_elementwise(
            _4_TO_F16, "=r,=r,=r,=r,r,r", [words, taken], dtype=(tl.float16,) * 4, is_pure=True, pack=2
        )
    return first, second, third, last


@triton.jit
def widened_4(words, zeros, dtype: tl.constexpr):
    """Widen words (O, I) int16 of four numbers of 4 bits each, less zeros (O,), to `dtype`: from the lowest on."""
    if DEPENDENT and (dtype == tl.bfloat16 or dtype == tl.float16):
        taken = (zeros.to(tl.float32) + offset_4(dtype)).to(dtype)
        first, second, third, last = parts_of_4(words, tl.broadcast_to(taken[:, None], words.shape), dtype)
    else:
        zero = zeros.to(tl.int16)[:, None]
        first = ((words & 15) - zero).to(dtype)
        second = (((words >> 4) & 15) - zero).to(dtype)
        third = (((words >> 8) & 15) - zero).to(dtype)
        last = (((words >> 12) & 15) - zero).to(dtype)
    return first, second, third, last


@triton.jit
def widened_4_of_bytes(both, zeros, dtype: tl.constexpr):
    """Widen bytes (O, I) of two numbers of 4 bits each, less zeros (O,), to `dtype`: the low ones and the high ones."""
    zero = zeros.to(tl.int16)[:, None]
    return ((both & 15).to(tl.int16) - zero).to(dtype), ((both >> 4).to(tl.int16) - zero).to(dtype)
