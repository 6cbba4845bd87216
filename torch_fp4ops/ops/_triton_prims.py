"""Leaves of the Triton kernels: blocks of values in registers, their scales, rounding and packing.

All arithmetic is that of ``block_quantization``, bit for bit. There are no FP4 or FP8 casts: rounding adds a power
of two whose last bit is the grid's step, so the hardware's own round-to-nearest-even does the work, and the code is
read from the sum's bits. That runs alike on every GPU and in Triton's interpreter, and it avoids the round trip of a
scale through E4M3, which some releases of ptxas compile wrongly.

*Octets* are a pair ``(lo, hi)`` of fp32 tensors ``[N, 4 * O]``: the even and the odd ones of 8 * O consecutive values,
for each of N threads. Every thread holds whole octets, so packing needs no exchange between threads. All octets of a
thread are in one tensor because Triton's passes take more than the square of a kernel's operations.

Tensors of bits are uint32.
"""

# mypy: disable-error-code="assignment, var-annotated"
# Kernels grow tuples and rebind names to other types, which Triton's compiler unrolls.

import triton
import triton.language as tl

# The interpreter's minimum and maximum propagate NaN, it truncates to bfloat16 and reads bfloat16's subnormals wrongly.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)

_FLT_MAX: tl.constexpr = tl.constexpr(3.4028234663852886e38)
_ONE_SIXTH: tl.constexpr = tl.constexpr(0.16666667163372040)  # 1/6 and 1/448 rounded to fp32
_ONE_448TH: tl.constexpr = tl.constexpr(0.0022321429569274187)

_LARGER_OF_BF16: tl.constexpr = tl.constexpr("max.NaN.xorsign.abs.bf16x2 $0, $1, $2;")
_LARGER_OF_F16: tl.constexpr = tl.constexpr("max.NaN.xorsign.abs.f16x2 $0, $1, $2;")


@tl.core.builtin
def cuda_capability(_semantic=None):
    """Ten times the compute capability of what is compiled for, which need not be this machine's GPU; 0 on ROCm."""
    options = _semantic.builder.options
    return tl.constexpr(int(options.arch[2:]) if options.backend_name == "cuda" else 0)


@tl.core.builtin
def _is_cuda(_semantic=None):
    return tl.constexpr(_semantic.builder.options.backend_name == "cuda")


def griddepcontrol(action, capability):
    """Assembly: a comment for GPUs before compute capability 9.0, given as 90."""
    return f"griddepcontrol.{action}; // $0" if capability >= 90 else f"// griddepcontrol.{action}; $0"


@tl.core.builtin
def _for_this_gpu(action, _semantic=None):
    return tl.constexpr(griddepcontrol(action.value, int(_semantic.builder.options.arch[2:])))


@triton.jit
def wait_for_previous():
    """What a kernel begins with, before it touches memory: ``launch`` has it start while the one before it ends.

    Returns when that has ended and all it wrote can be read. From then on the next kernel may start likewise.
    """
    if not INTERPRETED:
        if _is_cuda():
            wait: tl.constexpr = _for_this_gpu("wait")
            tl.inline_asm_elementwise(wait, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
            let_next_start()


@triton.jit
def let_next_start():
    """Before the wait, too: the next kernel waits for this one, which waits for those before."""
    if not INTERPRETED:
        if _is_cuda():
            start: tl.constexpr = _for_this_gpu("launch_dependents")
            tl.inline_asm_elementwise(start, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch(pointers, mask):
    """Have the L2 cache fetch what lies there, also before the wait: a store by another kernel goes to that cache."""
    if not INTERPRETED:
        if _is_cuda():
            tl.inline_asm_elementwise(
                "{ .reg .pred there; setp.ne.b32 there, $2, 0; @there prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
                "=r,l,r",
                [pointers, mask.to(tl.int32)],
                tl.int32,
                is_pure=False,
                pack=1,
            )


# Bits


@triton.jit
def bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def from_bits(b):
    return b.to(tl.float32, bitcast=True)


@triton.jit
def min_number(a, b):
    """The smaller one; b where a is NaN."""
    if INTERPRETED:
        return tl.where(a < b, a, b)
    else:
        return tl.minimum(a, b)


@triton.jit
def max_number(a, b):
    """The larger one; b where a is NaN."""
    if INTERPRETED:
        return tl.where(a > b, a, b)
    else:
        return tl.maximum(a, b)


@triton.jit
def max_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _even_odd(x):
    """``[N, 2P]`` to its even and odd columns, ``[N, P]`` each."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def front_back(x, P: tl.constexpr):
    """``[N, 2PG]`` to the first and the last P of every 2P columns, ``[N, PG]`` each."""
    N: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    front, back = tl.split(tl.permute(tl.reshape(x, (N, HALF // P, 2, P)), (0, 1, 3, 2)))
    return tl.reshape(front, (N, HALF)), tl.reshape(back, (N, HALF))


@triton.jit
def concat(parts, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """``[N, P]`` each, one after another: 1, 2, 4 or 8 of them."""
    N: tl.constexpr = parts[FIRST].shape[0]
    P: tl.constexpr = parts[FIRST].shape[1]
    if COUNT == 1:
        return parts[FIRST]
    elif COUNT == 4:
        even, odd = tl.join(parts[FIRST], parts[FIRST + 2]), tl.join(parts[FIRST + 1], parts[FIRST + 3])
        return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 1)), (N, 4 * P))
    else:
        HALF: tl.constexpr = COUNT // 2
        both = tl.join(concat(parts, FIRST, HALF), concat(parts, FIRST + HALF, HALF))
        return tl.reshape(tl.permute(both, (0, 2, 1)), (N, COUNT * P))


@triton.jit
def quarters(x):
    """``[N, 4P]`` to every fourth column, ``[N, P]`` each."""
    N: tl.constexpr = x.shape[0]
    even, odd = tl.split(tl.reshape(x, (N, x.shape[1] // 4, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def columns(x):
    """``[N, 1]``, ``[N, 2]`` or ``[N, 4]`` to its columns."""
    N: tl.constexpr = x.shape[0]
    if x.shape[1] == 1:
        return (tl.reshape(x, (N,)),)
    elif x.shape[1] == 2:
        return tl.split(x)
    else:
        x0, x1, x2, x3 = quarters(x)
        return tl.reshape(x0, (N,)), tl.reshape(x1, (N,)), tl.reshape(x2, (N,)), tl.reshape(x3, (N,))


# Octets


@triton.jit
def decode_e4m3(b):
    """fp32 values of E4M3 bytes held in uint32; 0x7F and 0xFF are NaN."""
    # As fp32 bits the 7 low bits lie 2^-120 below their value, subnormals included.
    magnitude = from_bits((b & 0x7F) << 20) * 1.3292279957849159e36
    magnitude = tl.where((b & 0x7F) == 0x7F, float("nan"), magnitude)
    return from_bits(bits(magnitude) | ((b & 0x80) << 24))


@triton.jit
def decode_ue8m0(b):
    """fp32 values of UE8M0 bytes held in uint32; 255 is NaN, 2^-127 is subnormal."""
    value = from_bits(tl.where(b == 0, 0x400000, b << 23).to(tl.uint32))
    return tl.where(b == 0xFF, float("nan"), value)


@triton.jit
def _fp16_words(w):
    lo = (w & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    hi = (w >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return lo.to(tl.float32), hi.to(tl.float32)


@triton.jit
def _bf16_words(w):
    return from_bits(w << 16), from_bits(w & 0xFFFF0000)


@triton.jit
def _e4m3_value(b, factor):
    """A value times the factor, rounded to float16. The sign is put back last: a NaN's is lost in arithmetic."""
    magnitude = bits((decode_e4m3(b & 0x7F) * factor).to(tl.float16).to(tl.float32)) & 0x7FFFFFFF
    return from_bits(magnitude | ((b & 0x80) << 24))


@triton.jit
def _e4m3_words(w, factor):
    """Values in ``[N, W]`` words, times the factor and rounded to float16."""
    v0 = _e4m3_value(w & 0xFF, factor)
    v1 = _e4m3_value((w >> 8) & 0xFF, factor)
    v2 = _e4m3_value((w >> 16) & 0xFF, factor)
    v3 = _e4m3_value(w >> 24, factor)
    N: tl.constexpr = w.shape[0]
    HALF: tl.constexpr = 2 * w.shape[1]
    return tl.reshape(tl.join(v0, v2), (N, HALF)), tl.reshape(tl.join(v1, v3), (N, HALF))


@triton.jit
def to_octets(words, DTYPE: tl.constexpr, factor):
    """The values of DTYPE in words. ``factor`` ``[N, 1]`` is for E4M3 only."""
    if DTYPE == tl.float32:
        return _even_odd(from_bits(words))
    elif DTYPE == tl.bfloat16:
        return _bf16_words(words)
    elif DTYPE == tl.float16:
        return _fp16_words(words)
    else:
        return _e4m3_words(words, factor)


@triton.jit
def block_amax(lo, hi, SPLIT: tl.constexpr):
    """Largest magnitude of each block, ``[N]``; NaN if there is one. SPLIT neighbouring threads share a block."""
    most = max_or_nan(tl.abs(lo), tl.abs(hi))
    for _ in tl.static_range(_halvings(lo.shape[1])):
        even, odd = _even_odd(most)
        most = max_or_nan(even, odd)
    even, odd = tl.split(most)
    return _amax_of_all(max_or_nan(even, odd), SPLIT)


@triton.jit
def block_amax_of_pairs(words, lo, hi, DTYPE: tl.constexpr, SPLIT: tl.constexpr):
    """:func:`block_amax` of octets that hold what 16-bit values of DTYPE in words do."""
    if INTERPRETED or cuda_capability() < 86:
        return block_amax(lo, hi, SPLIT)
    else:
        for _ in tl.static_range(_halvings(words.shape[1])):
            even, odd = _even_odd(words)
            words = _larger_halves(even, odd, DTYPE)
        even, odd = tl.split(words)
        word = _larger_halves(even, odd, DTYPE)
        if DTYPE == tl.bfloat16:
            low, high = _bf16_words(word)
        else:
            low, high = _fp16_words(word)
        return _amax_of_all(max_or_nan(tl.abs(low), tl.abs(high)), SPLIT)


@triton.constexpr_function
def _halvings(columns):
    """How often a power of two is halved to get two."""
    return columns.bit_length() - 2


@triton.jit
def _larger_halves(a, b, DTYPE: tl.constexpr):
    """The larger magnitudes of words' halves, NaN if there is one; their signs are of no use."""
    if DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(_LARGER_OF_BF16, "=r,r,r", [a, b], tl.uint32, True, 1)
    else:
        return tl.inline_asm_elementwise(_LARGER_OF_F16, "=r,r,r", [a, b], tl.uint32, True, 1)


@triton.jit
def _amax_of_all(amax, SPLIT: tl.constexpr):
    """The largest of SPLIT neighbouring threads, for each of them."""
    if SPLIT > 1:
        N: tl.constexpr = amax.shape[0]
        # The bits of non-negative floats are ordered as integers, NaN above all.
        shared = tl.max(tl.reshape(bits(amax), (N // SPLIT, SPLIT)), 1, keep_dims=True)
        amax = from_bits(tl.reshape(tl.broadcast_to(shared, (N // SPLIT, SPLIT)), (N,)))
    return amax


# Scales


@triton.jit
def e4m3_sum(a, e):
    """Bits of ``a`` in [0, 448] plus 2^20 times its binade ``e``: the low bits count a's steps on E4M3's grid."""
    return bits(tl.fma(e, 1048576.0, a))


@triton.jit
def encode_decode(scale, INVERSED: tl.constexpr):
    """A global scale and its reciprocal, the encode form first."""
    if INVERSED:
        return tl.div_rn(1.0, scale), scale
    else:
        return scale, tl.div_rn(1.0, scale)


@triton.jit
def nvfp4_scale(amax, encode, decode):
    """E4M3 scale bytes (uint32) of blocks, and what their values are multiplied by; NaN for NaN."""
    v = encode * (amax * _ONE_SIXTH)
    a = min_number(v, 448.0)
    e = tl.maximum(from_bits(bits(a) & 0x7F800000), 0.015625)  # below 2^-6 the steps stay the same
    z = e4m3_sum(a, e)
    step = tl.where(v != v, v, tl.fma(e, -1048576.0, from_bits(z)))
    byte = tl.where(v != v, 0x7F, z + (z >> 20) - 8 * 141)
    multiplier = tl.div_rn(1.0, step * decode)
    multiplier = tl.where(multiplier > _FLT_MAX, _FLT_MAX, multiplier)
    return byte.to(tl.uint32), tl.where(step == 0.0, 0.0, multiplier)


@triton.jit
def _ue8m0_scale(v):
    """UE8M0 bytes (uint32) of v >= 0 rounded up to a power of two, and the power's reciprocal; NaN for NaN."""
    b = bits(v)
    # 2^-127, byte 0, is subnormal in fp32.
    byte = tl.minimum((b + tl.where(b < 0x800000, 0x3FFFFF, 0x7FFFFF).to(tl.uint32)) >> 23, 254)
    byte = tl.where(v != v, 255, byte).to(tl.uint32)
    reciprocal = from_bits(tl.where(byte == 254, 0x400000, (254 - byte) << 23).to(tl.uint32))
    return byte, tl.where(v != v, v, reciprocal)


@triton.jit
def mxfp4_scale(amax):
    return _ue8m0_scale(amax * _ONE_SIXTH)


@triton.jit
def mxfp8_scale(amax):
    return _ue8m0_scale(amax * _ONE_448TH)


# Decoding


@triton.jit
def decode_e2m1_word(word, E: tl.constexpr):
    """fp32 values ``[N, E]`` of the E codes in ``[N, 1]`` words."""
    shift = (28 - 4 * tl.arange(0, E)).to(tl.uint32)
    code = (word << shift[None, :]).to(tl.int32, bitcast=True)
    # Sign and code on top, shifted down arithmetically: as fp32 bits, 2^-126 below the value, subnormals included.
    return ((code >> 6) & ~0x7E3FFFFF).to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def decode_e4m3_word(words):
    """fp32 values ``[N, 4W]`` of the E4M3 bytes in ``[N, W]`` words."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    shift = (24 - 8 * tl.arange(0, 4)).to(tl.uint32)
    code = tl.reshape(words[:, :, None] << shift[None, None, :], (N, 4 * W)).to(tl.int32, bitcast=True)
    value = ((code >> 4) & ~0x780FFFFF).to(tl.float32, bitcast=True) * 1.3292279957849159e36  # 2^120
    return tl.where((code & 0x7F000000) == 0x7F000000, float("nan"), value)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    if INTERPRETED and DTYPE == tl.bfloat16:
        b = bits(x)
        rounded = tl.where(x != x, (b >> 16) | 0x40, (b + 0x7FFF + ((b >> 16) & 1)) >> 16)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)
