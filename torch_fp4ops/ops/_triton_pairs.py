"""Leaves of the Triton kernels: pairs of 16-bit values in 32-bit words, which whole words' operations decode and scale.

Triton's interpreter has no bfloat16: there the values of a pair are fp32.
"""

# mypy: disable-error-code="assignment, var-annotated"
# Kernels rebind names to other types, which Triton's compiler unrolls.

import triton
import triton.language as tl

from . import _triton_prims as p


@triton.jit
def halves(pair, DTYPE: tl.constexpr):
    """The low and the high values of words; DTYPE fp32 means bfloat16's bits."""
    if DTYPE == tl.float32 or (p.INTERPRETED and DTYPE == tl.bfloat16):
        return p.from_bits(pair << 16), p.from_bits(pair & 0xFFFF0000)
    else:
        lo = (pair & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
        return lo, (pair >> 16).to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def pack_halves(lo, hi, DTYPE: tl.constexpr):
    """Words of fp32 values that bfloat16 holds exactly, or of values rounded to float16."""
    if DTYPE == tl.float16:
        lo = lo.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        return lo | (hi.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        return (p.bits(lo) >> 16) | (p.bits(hi) & 0xFFFF0000)


@triton.jit
def e2m1_pair(words, i: tl.constexpr, DTYPE: tl.constexpr):
    """Codes i and i + 4 of words: the values over 2^14 in float16, over 2^126 in bfloat16, subnormals included."""
    SHIFT: tl.constexpr = 9 if DTYPE == tl.float16 else 6
    CODES: tl.constexpr = 0x0E000E00 if DTYPE == tl.float16 else 0x01C001C0
    sign = (words << (12 - 4 * i)) & 0x80008000
    if SHIFT >= 4 * i:
        code = (words << (SHIFT - 4 * i)) & CODES
    else:
        code = (words >> (4 * i - SHIFT)) & CODES
    return sign | code


@triton.jit
def e4m3_pair(words, i: tl.constexpr):
    """Bytes i and i + 2 of words: the values over 2^120 in bfloat16, subnormals included, or NaN."""
    if i == 0:
        sign, code = (words << 8) & 0x80008000, (words << 4) & 0x07F007F0
    else:
        sign, code = words & 0x80008000, (words >> 4) & 0x07F007F0
    # 0x7F, and only that, carries into bit 11: it becomes an exponent of ones, with a mantissa: NaN.
    nan = (code + 0x00100010) & 0x08000800
    return sign | code | ((nan << 4) - (nan >> 4))


@triton.jit
def load_16_bits(pointers, mask):
    """float16 or bfloat16, zeros where the mask is off; the interpreter has fp32 for bfloat16."""
    if p.INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        half = tl.load(pointers.to(tl.pointer_type(tl.uint16), bitcast=True), mask=mask, other=0)
        return p.from_bits(half.to(tl.uint32) << 16)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def front_back_rows(x):
    """``[2R, C]`` to its first and last R rows."""
    return tl.split(tl.permute(tl.reshape(x, (2, x.shape[0] // 2, x.shape[1])), (1, 2, 0)))
