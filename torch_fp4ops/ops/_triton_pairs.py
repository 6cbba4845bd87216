"""Leaves of the Triton kernels: pairs of 16-bit values in 32-bit words, which whole words' operations decode and scale.

Triton's interpreter has no bfloat16: there the values of a pair are fp32.
"""

# mypy: disable-error-code="assignment, var-annotated"
# Kernels rebind names to other types, which Triton's compiler unrolls.

import triton
import triton.language as tl

from . import _triton_prims as p

_MULTIPLY_F16: tl.constexpr = tl.constexpr("mul.f16x2 $0, $1, $2;")
# Compute capability 8.0 has no packed product of bfloat16, but a product and sum: with -0, the product.
_MULTIPLY_BF16: tl.constexpr = tl.constexpr(
    "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }"
)

# Operations on bits take twice the cycles of others on NVIDIA's GPUs, and a product of integers is none, so shifts are
# products (the assembler's choice for shl) and masks are few. Codes 0 and 2: the product has the magnitude and the sign
# where they belong, and a mask the rest away. Codes 1 and 3: their signs are cut out at once; the last operation takes
# the magnitude from one word and all else, which is the sign, from the other.
_E2M1_TO_BF16: tl.constexpr = tl.constexpr(
    """{ .reg .b32 upper, odd, code, sign;
    shr.u32 upper, $4, 6; and.b32 odd, $4, 0x80808080;
    and.b32 code, $4, 0x000F000F; mul.lo.u32 code, code, 0x1040; and.b32 $0, code, 0x81C081C0;
    shl.b32 code, $4, 2; shl.b32 sign, odd, 8; lop3.b32 $1, code, sign, 0x01C001C0, 0xE4;
    and.b32 code, upper, 0x003C003C; mul.lo.u32 code, code, 0x410; and.b32 $2, code, 0x81C081C0;
    lop3.b32 $3, upper, odd, 0x01C001C0, 0xE4; }"""
)


@triton.jit
def halves(pair, DTYPE: tl.constexpr):
    """The low and the high values of words; DTYPE fp32 means bfloat16's bits."""
    if DTYPE == tl.float32 or (p.INTERPRETED and DTYPE == tl.bfloat16):
        return p.from_bits(pair << 16), p.from_bits(pair & 0xFFFF0000)
    else:
        lo = (pair & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
        return lo, (pair >> 16).to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def join_halves(lo, hi, DTYPE: tl.constexpr):
    """Inverse of :func:`halves`."""
    if p.INTERPRETED and DTYPE == tl.bfloat16:
        return pack_halves(lo, hi, DTYPE)
    else:
        word = lo.to(tl.uint16, bitcast=True).to(tl.uint32)
        return word | (hi.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def pack_halves(lo, hi, DTYPE: tl.constexpr):
    """Words of fp32 values that bfloat16 holds exactly, or of values rounded to float16."""
    if DTYPE == tl.float16:
        lo = lo.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        return lo | (hi.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        return (p.bits(lo) >> 16) | (p.bits(hi) & 0xFFFF0000)


@triton.jit
def wide_product(a, b):
    """Of 32 bits without a sign, or of any b >= 0, in 64."""
    if not p.INTERPRETED and p.cuda_capability() > 0 and b.dtype == tl.int32:
        # One instruction; b widened ahead of a loop, of which the compiler forgets what it was, makes it three.
        return tl.inline_asm_elementwise("mul.wide.u32 $0, $1, $2;", "=l,r,r", [a, b], tl.int64, True, 1)
    else:
        return a.to(tl.int64) * b


@triton.jit
def low_halves(a, b):
    """Words of the low halves of two."""
    if not p.INTERPRETED and p.cuda_capability() > 0:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [a, b], tl.uint32, True, 1)
    else:
        return (a & 0xFFFF) | (b << 16)


@triton.jit
def high_halves(a, b):
    """Words of the high halves of two."""
    if not p.INTERPRETED and p.cuda_capability() > 0:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [a, b], tl.uint32, True, 1)
    else:
        return (a >> 16) | (b & 0xFFFF0000)


@triton.jit
def _products(a, b, DTYPE: tl.constexpr):
    a_lo, a_hi = halves(a, DTYPE)
    b_lo, b_hi = halves(b, DTYPE)
    return a_lo * b_lo, a_hi * b_hi


@triton.jit
def multiply_halves(a, b, DTYPE: tl.constexpr):
    """Low and high values of the products of words' halves, float16 or bfloat16, which must be exact."""
    if p.INTERPRETED:
        return _products(a, b, DTYPE)
    elif p.cuda_capability() > 0:
        # Left to itself the compiler also pairs values of different words, and then has to take them apart again.
        if DTYPE == tl.float16:
            return halves(tl.inline_asm_elementwise(_MULTIPLY_F16, "=r,r,r", [a, b], tl.uint32, True, 1), DTYPE)
        else:
            return halves(tl.inline_asm_elementwise(_MULTIPLY_BF16, "=r,r,r", [a, b], tl.uint32, True, 1), DTYPE)
    elif DTYPE == tl.float16:
        return _products(a, b, DTYPE)
    else:
        # GPUs without products of bfloat16 would round those of fp32, which takes long.
        lo, hi = _products(a, b, tl.float32)
        return halves(pack_halves(lo, hi, DTYPE), DTYPE)


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
def e2m1_pairs(words, DTYPE: tl.constexpr):
    """All four of :func:`e2m1_pair`."""
    if DTYPE == tl.bfloat16 and not p.INTERPRETED and p.cuda_capability() > 0:
        return tl.inline_asm_elementwise(_E2M1_TO_BF16, "=&r,=&r,=&r,=&r,r", [words], (tl.uint32,) * 4, True, 1)
    else:
        return (
            e2m1_pair(words, 0, DTYPE),
            e2m1_pair(words, 1, DTYPE),
            e2m1_pair(words, 2, DTYPE),
            e2m1_pair(words, 3, DTYPE),
        )


@triton.jit
def e4m3_pair(words, i: tl.constexpr, DTYPE: tl.constexpr = tl.bfloat16, NAN: tl.constexpr = True):
    """Bytes i and i + 2 of words: the values over 2^120 in bfloat16, over 2^8 in float16, subnormals included, or NaN.

    Without NAN, 0x7F is 480, which saves half of the work.
    """
    HALF: tl.constexpr = DTYPE == tl.float16
    SHIFT: tl.constexpr = 7 if HALF else 4
    CODES: tl.constexpr = 0x3F803F80 if HALF else 0x07F007F0
    if i == 0:
        sign, code = (words << 8) & 0x80008000, (words << SHIFT) & CODES
    else:
        sign, code = words & 0x80008000, (words >> (8 - SHIFT)) & CODES
    pair = sign | code
    if NAN:
        # 0x7F, and only that, carries into the bit above: it gets an exponent of ones, and has a mantissa: NaN.
        if HALF:
            pair |= (code + 0x00800080) & 0x40004000
        else:
            pair += ((code + 0x00100010) & 0x08000800) * 15
    return pair


@triton.jit
def ue8m0_pair(words):
    """Bytes 0 and 2 of words, all else of which is 0, in bfloat16; 255 is NaN, 2^-127 is subnormal."""
    # Bytes 0 and 255 have the topmost bit of the mantissa set.
    neither = (words + 0x00010001) & 0x00FE00FE
    return (words << 7) | (((0x01000100 - neither) >> 2) & 0x00400040)


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
