"""Block-scaled weights of the layout "hopper" to 16 bits, in registers: the left operand of a Hopper matrix product.

A thread's part of a 64 x 64 tile is what ``mma`` and ``wgmma`` want of it: for each of the four steps of 16 along K
two rows, eight apart, of four elements. Its codes are 16 (FP4) or 32 (FP8) bytes in a row, placed so that a shift or
rotation and a mask bring two of them into the fields of a pair of 16-bit numbers; a multiplication by the scale then
also corrects the exponent, subnormals included. Nothing moves between threads; ``torch_fp4ops.hopper_layout`` has the
places of bits.

For two words of FP4 codes that is 8 masks, 7 shifts and rotations, one instruction more, and 8 multiplications. Four
are shifts to the left, which the pipe of multiplications can take: the other one, with two cycles an instruction, is
what decoding waits for.

Every product of a code and a scale is exact. ``FACTORS`` is what the decoded value is too small by.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

__all__ = ["FACTORS", "SIXTEEN", "decode", "decode_strip", "fetch", "scale_words", "warp_bases"]

FACTORS = {"nvfp4": 2.0**7, "mxfp4": 1.0, "mxfp8": 1.0}

SIXTEEN: gl.constexpr = gl.constexpr(",".join(["=&h"] * 16))
"""Results of inline PTX: that many 16-bit values."""


@gluon.constexpr_function
def scale_words(fmt):
    """32-bit words of scales for one row pair of a 64 x 64 tile."""
    return 2 if fmt == "nvfp4" else 1


@gluon.constexpr_function
def _scales_asm(fmt, half):
    """A word of four scale bytes to two words of two 16-bit scales: of bytes 0 and 2, and of bytes 1 and 3.

    NVFP4: 5 bits of exponent and 3 of mantissa, for bfloat16 below three ones, so that a code's 2^-126 is made good.
    MX: a power of two, moved by what a code's place in bfloat16 lacks: 126 (E2M1) or 120 (E4M3).
    """
    if fmt == "nvfp4":
        left, right, mask, ones = (7, 1, "0x7F807F80", 0) if half else (4, 4, "0x0FF00FF0", "0x70007000")
        # In lop3, for ptxas would make it two instructions: 0xEA is (a & b) | c.
        return f"""{{ .reg .b32 e, o, c;
        mov.b32 c, {ones};
        shl.b32 e, $2, {left}; shr.u32 o, $2, {right};
        lop3.b32 $0, e, {mask}, c, 0xEA;
        lop3.b32 $1, o, {mask}, c, 0xEA; }}"""
    move = "0x3F003F00" if fmt == "mxfp4" else "0x3C003C00"
    return f"""
        and.b32 $0, $2, 0x00FF00FF;
        shr.u32 $1, $2, 8;
        and.b32 $1, $1, 0x00FF00FF;
        mad.lo.u32 $0, $0, 128, {move};
        mad.lo.u32 $1, $1, 128, {move};"""


@gluon.constexpr_function
def _pair_asm(word, left, half):
    """To p: two codes of a word, shifted to the left or rotated to the right, as magnitudes and signs of a pair.

    bfloat16 has a magnitude at bits 8-6, and float16 three higher.
    """
    turn = f"shl.b32 p, {word}, {left};" if left > 0 else f"shf.r.wrap.b32 p, {word}, {word}, {-left};"
    lines = [turn, "and.b32 p, p, 0x81C081C0;"] if left else [f"and.b32 p, {word}, 0x81C081C0;"]
    return lines + ["and.b32 t, p, 0x01C001C0; mad.lo.u32 p, t, 7, p;"] * half


@gluon.constexpr_function
def _fp4_asm(half):
    """The codes of words $16 and $17 to four pairs along K of each ($0-$7, $8-$15).

    $18 and $19 have the scales of the two rows in their halves.
    """
    kind = "f16x2" if half else "bf16x2"
    lines = ["{ .reg .b32 p, t, c, s0, s1, z0, z1; .reg .b16 l, h;"]
    lines.append("mov.b32 {l, h}, $18; mov.b32 s0, {l, l}; mov.b32 s1, {h, h};")
    lines.append("mov.b32 {l, h}, $19; mov.b32 z0, {l, l}; mov.b32 z1, {h, h};")
    # The places that three pairs of each leave; in lop3, 0xE4 takes bits of a or b as c has ones or zeros.
    lines.append("shl.b32 t, $17, 2; lop3.b32 c, $16, t, 0x0C180C18, 0xE4;")
    for out, word, left, scale in (
        (0, "$16", 0, "s0"), (2, "$16", -6, "s0"), (4, "$16", 6, "s1"), (6, "c", -4, "s1"),
        (8, "$17", 0, "z0"), (10, "$17", -6, "z0"), (12, "$17", 6, "z1"), (14, "c", 2, "z1"),
    ):  # fmt: skip
        lines += _pair_asm(word, left, half)
        lines.append(f"mul.rn.{kind} p, p, {scale}; mov.b32 {{${out}, ${out + 1}}}, p;")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _fp8_asm(row):
    """The four codes of word $4 to two bfloat16 pairs along K ($0-$3); $5 has the scales of both rows."""
    own = "h, h" if row else "l, l"
    return f"""{{ .reg .b32 p, t, s; .reg .b16 l, h;
        mov.b32 {{l, h}}, $5; mov.b32 s, {{{own}}};
        and.b32 p, $4, 0x87F087F0; mul.rn.bf16x2 p, p, s; mov.b32 {{$0, $1}}, p;
        shl.b32 p, $4, 4; and.b32 p, p, 0x80F080F0;
        shr.u32 t, $4, 4; and.b32 t, t, 0x07000700; or.b32 p, p, t;
        mul.rn.bf16x2 p, p, s; mov.b32 {{$2, $3}}, p; }}"""


@gluon.jit
def fetch(codes, scales, FMT: gl.constexpr):
    """Each thread's words of a 64 x 64 tile in shared memory, of codes and of scales, to registers. For four warps.

    ``codes``: int32 [8 or 16, 64] of 256 bytes a row; ``scales``: int32 [1, 64 or 32].
    """
    W: gl.constexpr = scale_words(FMT)
    SCALES: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1]] if W == 2 else [], [[0, 0], [0, 0], [0, W], [0, 2 * W], [0, 4 * W]], [[0, 8 * W], [0, 16 * W]], [],
        [1, 32 * W])  # fmt: skip
    words = scales.load(SCALES).reshape([32, W])
    if FMT == "mxfp8":
        # Eight words a thread, four at a time, so that a warp reads 512 bytes in a row.
        EIGHT: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [0, 16], [0, 32], [1, 0]], [[2, 0], [4, 0]], [], [16, 64]
        )
        c = codes.load(EIGHT).reshape([2, 32, 4, 2, 2]).permute((1, 2, 0, 3, 4)).reshape([32, 4, 4, 2])
    else:
        FOUR: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
        c = codes.load(FOUR).reshape([32, 4, 4])
    return c, words


@gluon.jit
def decode(c, words, OPERAND: gl.constexpr, FMT: gl.constexpr, HALF: gl.constexpr):
    """What ``fetch`` returned to a 64 x 64 tensor of layout ``OPERAND``, bfloat16 or (``HALF``) float16."""
    return gl.convert_layout(_decoded(c, words, FMT, HALF).reshape([64, 64]), OPERAND, assert_trivial=True)


@gluon.constexpr_function
def warp_bases(warps, rank):
    """For a linear layout: warps side by side along the first dimension."""
    return [[1 << i] + [0] * (rank - 1) for i in range(warps.bit_length() - 1)]


@gluon.jit
def decode_strip(codes, scales, OPERAND: gl.constexpr, FMT: gl.constexpr, HALF: gl.constexpr):
    """Steps along K of a strip of 16 rows, a warp each, to a tensor [steps, 16, 64] of layout ``OPERAND``.

    ``codes``: int32 [steps, 1 or 2, 1, 128], 512 bytes a step or twice that; ``scales``: int32 [steps, 1, 16 or 8].
    """
    W: gl.constexpr = scale_words(FMT)
    STEPS: gl.constexpr = codes.shape[0]
    WARPS: gl.constexpr = warp_bases(STEPS, 4)
    LANES: gl.constexpr = [[0, 0, 0, 4], [0, 0, 0, 8], [0, 0, 0, 16], [0, 0, 0, 32], [0, 0, 0, 64]]
    SCALES: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1]] if W == 2 else [], [[0, 0, 0], [0, 0, 0], [0, 0, W], [0, 0, 2 * W], [0, 0, 4 * W]],
        warp_bases(STEPS, 3), [], [STEPS, 1, 8 * W])  # fmt: skip
    words = scales.load(SCALES).reshape([8 * STEPS, W])
    if FMT == "mxfp8":
        EIGHT: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 0, 0, 1], [0, 0, 0, 2], [0, 1, 0, 0]], LANES, WARPS, [], [STEPS, 2, 1, 128]
        )
        c = codes.load(EIGHT).reshape([STEPS, 2, 32, 2, 2]).permute((0, 2, 1, 3, 4)).reshape([8 * STEPS, 4, 4, 2])
    else:
        FOUR: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 0, 0, 1], [0, 0, 0, 2]], LANES, WARPS, [], [STEPS, 1, 1, 128]
        )
        c = codes.load(FOUR).reshape([8 * STEPS, 4, 4])
    return gl.convert_layout(_decoded(c, words, FMT, HALF).reshape([STEPS, 16, 64]), OPERAND, assert_trivial=True)


@gluon.jit
def _both(even, odd):
    """Values of even and of odd steps, by step."""
    return gl.join(even, odd).reshape([even.shape[0], even.shape[1], 4])


@gluon.jit
def _decoded(c, words, FMT: gl.constexpr, HALF: gl.constexpr):
    """For W warps: codes [8 W, 4, 4], of MXFP8 [8 W, 4, 4, 2], and scales [8 W, 1 or 2] to [W, 2, 8, 4, 2, 4, 2].

    The first dimension of each is (w, g), with the warp in w; values are by w, row, g, step, half, t, of pair.
    """
    ROWS: gl.constexpr = c.shape[0]
    W: gl.constexpr = ROWS // 8
    THREAD: gl.constexpr = gl.BlockedLayout([1, 1, 4], [8, 4, 1], [W, 1, 1], [2, 1, 0])  # w g | t | step
    even, odd = gl.inline_asm_elementwise(
        _scales_asm(FMT, HALF), "=&r,=&r,r", [words], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    pairs = gl.join(even, odd)
    if scale_words(FMT) == 1:
        pairs = gl.join(pairs, pairs)  # a scale of 32 elements serves two steps
    s = gl.convert_layout(pairs.reshape([ROWS, 1, 4]), THREAD, assert_trivial=True)
    if FMT == "mxfp8":
        BOTH: gl.constexpr = gl.BlockedLayout([1, 1, 4, 2], [8, 4, 1, 1], [W, 1, 1, 1], [3, 2, 1, 0])
        c0, c1 = gl.split(gl.convert_layout(c, BOTH, assert_trivial=True))
        c0 = gl.convert_layout(c0, THREAD, assert_trivial=True)
        c1 = gl.convert_layout(c1, THREAD, assert_trivial=True)
        s, c0 = gl.broadcast(s, c0)
        a00, a01, a10, a11 = gl.inline_asm_elementwise(
            _fp8_asm(0), "=&h,=&h,=&h,=&h,r,r", [c0, s], dtype=(gl.bfloat16,) * 4, is_pure=True, pack=1
        )
        b00, b01, b10, b11 = gl.inline_asm_elementwise(
            _fp8_asm(1), "=&h,=&h,=&h,=&h,r,r", [c1, s], dtype=(gl.bfloat16,) * 4, is_pure=True, pack=1
        )
    else:
        c = gl.convert_layout(c, THREAD, assert_trivial=True)
        s, c = gl.broadcast(s, c)
        c0, c1 = gl.split(c.reshape([ROWS, 4, 2, 2]))
        s0, s1 = gl.split(s.reshape([ROWS, 4, 2, 2]))
        given = [c0, c1, s0, s1]
        OUT: gl.constexpr = SIXTEEN + ",r,r,r,r"
        if HALF:
            v = gl.inline_asm_elementwise(_fp4_asm(True), OUT, given, dtype=(gl.float16,) * 16, is_pure=True, pack=1)
        else:
            v = gl.inline_asm_elementwise(_fp4_asm(False), OUT, given, dtype=(gl.bfloat16,) * 16, is_pure=True, pack=1)
        a00, a01, a10, a11 = _both(v[0], v[8]), _both(v[1], v[9]), _both(v[2], v[10]), _both(v[3], v[11])
        b00, b01, b10, b11 = _both(v[4], v[12]), _both(v[5], v[13]), _both(v[6], v[14]), _both(v[7], v[15])
    # a: the upper row, b: the one eight below; first digit: which half of a step, second: which of a pair
    low = gl.join(gl.join(a00, b00), gl.join(a01, b01))
    high = gl.join(gl.join(a10, b10), gl.join(a11, b11))
    tile = gl.join(low, high).reshape([W, 8, 4, 4, 2, 2, 2])  # w, g, t, step, row, of pair, half
    return tile.permute((0, 4, 1, 3, 6, 2, 5))
