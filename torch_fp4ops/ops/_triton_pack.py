"""Leaves of the Triton kernels: octets times a multiplier, as words of E2M1 and E4M3 codes (see ``_triton_prims``)."""

# mypy: disable-error-code="assignment, var-annotated"
# Kernels rebind names to other types, which Triton's compiler unrolls.

import triton
import triton.language as tl

from . import _triton_prims as p

# What the packers subtract from each byte: the exponents of the powers of two that rounding added. In E2M1's pairs
# -2^22 and 2^22 add up to 405 + 16 * 149 = 229 mod 512.
_E2M1_OFFSET: tl.constexpr = tl.constexpr((2 * 229 * 0x01010101) % 2**32)
_E4M3_OFFSET: tl.constexpr = tl.constexpr((8 * 141 * 0x01010101) % 2**32)

# The signs of words' halves to where a word of E2M1 codes has its signs.
_SIGNS_OF_PAIRS: tl.constexpr = tl.constexpr(
    """{ .reg .b32 front, back, even, odd;
    prmt.b32 front, $2, $3, 0x7351; prmt.b32 back, $4, $5, 0x7351;
    prmt.b32 even, front, back, 0x5410; prmt.b32 odd, front, back, 0x7632;
    shr.u32 even, even, 4; lop3.b32 odd, odd, even, 0x80808080, 0xE4;
    lop3.b32 $0, odd, $1, 0x88888888, 0xE4; }"""
)
# The same for two words of E4M3 codes' first or last four.
_SIGNS_OF_TWO_PAIRS: tl.constexpr = tl.constexpr(
    "{ .reg .b32 signs; prmt.b32 signs, $2, $3, 0x7531; lop3.b32 $0, signs, $1, 0x80808080, 0xE4; }"
)


@triton.jit
def _select(word, other, MASK: tl.constexpr):
    """The bits of ``other`` under the mask, else those of ``word``."""
    return word ^ ((word ^ other) & MASK)


@triton.jit
def e2m1(lo, hi, multiplier, pairs=None):
    """A word of E2M1 codes for each octet, ``[N, O]``: its values times the multiplier; the signs are their own.

    ``pairs`` are words ``[N, 4 * O]`` whose halves have these signs, if there are such.

    |y|, clamped to 6 (NaN too), plus 2^22 times its binade e >= 1 has |y| / (e / 2) rounded in its low bits and
    log2(e) in its exponent; the code is the former plus twice the latter. Adding ``pair >> 22`` does that for two
    codes a nibble apart at once. Of the two sums one is negative, because only then can the exponents' sum not
    wrap: all else that is in ``pair`` above bit 22 is then the same constant for every input.
    """
    m = tl.expand_dims(multiplier, 1)
    a0 = p.max_number(p.from_bits(p.bits(lo * m) | 0x80000000), -6.0)
    a1 = p.min_number(tl.abs(hi * m), 6.0)
    e0 = tl.maximum(p.from_bits(p.bits(a0) & 0x7F800000), 1.0)
    e1 = tl.maximum(p.from_bits(p.bits(a1) & 0x7F800000), 1.0)
    pair = p.bits(tl.fma(e0, -4194304.0, a0)) + (p.bits(tl.fma(e1, 4194304.0, a1)) << 4)
    b0, b1, b2, b3 = p.quarters(pair + (pair >> 22))
    # What is left of b1 above its byte reaches bit 31 only, where a sign goes; of b2 and b3 nothing is left.
    word = (b0 & 0x7FFFFF) + (b1 << 8) + (b2 << 16) + (b3 << 24) - _E2M1_OFFSET
    if pairs is None or p.INTERPRETED or p.cuda_capability() == 0:
        return _select(word, _signs_of_eight(lo, hi), 0x88888888)
    else:
        w0, w1, w2, w3 = p.quarters(pairs)
        operands = [word, w0, w1, w2, w3]
        return tl.inline_asm_elementwise(_SIGNS_OF_PAIRS, "=r,r,r,r,r,r", operands, tl.uint32, True, 1)


@triton.jit
def _push(s, x, BITS: tl.constexpr):
    return (s << BITS) | (x >> (32 - BITS))  # one funnel shift


@triton.jit
def _signs_of_eight(lo, hi):
    """The signs of each octet on top of each nibble, the first value lowest; other bits are junk."""
    l0, l1, l2, l3 = p.quarters(p.bits(lo))
    h0, h1, h2, h3 = p.quarters(p.bits(hi))
    s = _push(_push(h3, h3, 4), l3, 4)
    s = _push(_push(s, h2, 4), l2, 4)
    s = _push(_push(s, h1, 4), l1, 4)
    return _push(_push(s, h0, 4), l0, 4)


@triton.jit
def _signs_of_four(x0, x1, x2, x3):
    """The signs on top of each byte."""
    return _push(_push(_push(_push(x3, x3, 8), x2, 8), x1, 8), x0, 8)


@triton.jit
def e4m3(lo, hi, multiplier, pairs=None):
    """Two words of E4M3 bytes for each octet, ``[N, 2 * O]``: times the multiplier; NaN where the multiplier is NaN.

    As :func:`e2m1`, as are ``pairs``: |y| plus 2^20 times its binade e >= 2^-6 counts steps of e / 8.
    """
    m = tl.expand_dims(multiplier, 1)
    a0 = p.min_number(tl.abs(lo * m), 448.0)
    a1 = p.min_number(tl.abs(hi * m), 448.0)
    z0 = p.e4m3_sum(a0, tl.maximum(p.from_bits(p.bits(a0) & 0x7F800000), 0.015625))
    z1 = p.e4m3_sum(a1, tl.maximum(p.from_bits(p.bits(a1) & 0x7F800000), 0.015625))
    pair = ((z0 + (z0 >> 20)) & 0x7FFFFF) + ((z1 + (z1 >> 20)) << 8)
    p0, p1, p2, p3 = p.quarters(pair)
    front = p0 + (p1 << 16) - _E4M3_OFFSET
    back = p2 + (p3 << 16) - _E4M3_OFFSET
    if pairs is None or p.INTERPRETED or p.cuda_capability() == 0:
        l0, l1, l2, l3 = p.quarters(p.bits(lo))
        h0, h1, h2, h3 = p.quarters(p.bits(hi))
        front = _select(front, _signs_of_four(l0, h0, l1, h1), 0x80808080)
        back = _select(back, _signs_of_four(l2, h2, l3, h3), 0x80808080)
    else:
        w0, w1, w2, w3 = p.quarters(pairs)
        front = tl.inline_asm_elementwise(_SIGNS_OF_TWO_PAIRS, "=r,r,r,r", [front, w0, w1], tl.uint32, True, 1)
        back = tl.inline_asm_elementwise(_SIGNS_OF_TWO_PAIRS, "=r,r,r,r", [back, w2, w3], tl.uint32, True, 1)
    words = tl.reshape(tl.join(front, back), (lo.shape[0], lo.shape[1] // 2))
    return tl.where(m != m, 0x7F7F7F7F, words).to(tl.uint32)
