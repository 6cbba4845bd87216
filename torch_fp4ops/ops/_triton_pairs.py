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


@tl.core.builtin
def _compiles_for_cuda(_semantic=None):
    """Whether the target that is compiled for, which need not be this machine's GPU, is NVIDIA's."""
    return tl.constexpr(getattr(_semantic.builder.options, "backend_name", "") == "cuda")


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
    elif _compiles_for_cuda():
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
def e4m3_pair(words, i: tl.constexpr, NAN: tl.constexpr = True):
    """Bytes i and i + 2 of words: the values over 2^120 in bfloat16, subnormals included, or NaN.

    Without NAN, 0x7F is 480, which saves half of the work.
    """
    if i == 0:
        sign, code = (words << 8) & 0x80008000, (words << 4) & 0x07F007F0
    else:
        sign, code = words & 0x80008000, (words >> 4) & 0x07F007F0
    pair = sign | code
    if NAN:
        # 0x7F, and only that, carries into bit 11: it becomes an exponent of ones, with a mantissa: NaN.
        nan = (code + 0x00100010) & 0x08000800
        pair = pair | ((nan << 4) - (nan >> 4))
    return pair


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
