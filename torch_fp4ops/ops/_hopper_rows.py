"""Rows of x that come quantised, decoded in the Hopper products of few rows themselves, in Gluon.

A kernel before the product would take 1 to 2 us, where a small weight takes 5 or 6. Each program decodes all rows: for
few that is less work than it saves, and done while weights arrive. In ``_hopper_at_once`` that is once, all rows or,
with MXFP8, by each warp what it multiplies; for the rings of ``_hopper_strips`` four warps read codes and scales some
stages ahead, and write bfloat16 where TMA does if x has 16 bits.

Values of NVFP4, which are 2^-7 of what they stand for, and of MXFP4 are exact, those of MXFP8 the fp32 product with the
scale, rounded once.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ._gluon import warp_group_barrier
from ._hopper_decode import SIXTEEN
from ._hopper_schedule import wait_for_previous

__all__ = ["decode_pairs", "decode_rows", "load_rows", "rows_decoder", "scale_place"]


@gluon.constexpr_function
def _fp4_asm(fmt):
    """The 16 codes of words $16 and $17 times the scale in byte $18, to $0-$15.

    The bits of a magnitude, in bfloat16's bits 8 to 6, lack 2^126. With NVFP4's scale that is one factor, but for 2^7.
    """
    factors = ["s"] if fmt == "nvfp4" else ["m", "s"]
    if fmt == "nvfp4":
        scale = "cvt.u16.u32 b, $18; cvt.rn.f16x2.e4m3x2 s, b; mov.b32 {b, l}, s; cvt.f32.f16 f, b;"
        scale += " mul.rn.f32 f, f, 0f7B000000; cvt.rn.bf16x2.f32 s, f, f;"
    else:
        # 2^-127 is a subnormal, and 255 is NaN.
        scale = "shl.b32 s, $18, 7; max.u32 s, s, 0x40; setp.eq.u32 q, $18, 255; selp.b32 s, 0x7FC0, s, q;"
        scale += " prmt.b32 s, s, s, 0x1010; mov.b32 m, 0x7E807E80;"
    lines = ["{ .reg .b32 p, t, e, s, m; .reg .b16 b, l; .reg .f32 f; .reg .pred q;", scale]
    for word in (0, 1):
        lines.append(f"shl.b32 e, ${16 + word}, 4;")  # codes of even number, in the upper half of each byte
        for byte in range(4):
            out = 8 * word + 2 * byte
            lines.append(f"prmt.b32 p, e, ${16 + word}, 0x{4 + byte}0{byte}0;")
            lines.append("shr.u32 t, p, 6; and.b32 t, t, 0x01C001C0; lop3.b32 p, p, 0x80008000, t, 0xEA;")
            lines += [f"mul.rn.bf16x2 p, p, {factor};" for factor in factors]
            lines.append(f"mov.b32 {{${out}, ${out + 1}}}, p;")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _fp8_asm():
    """The 16 codes of words $16 to $19 times the scale in byte $20, to $0-$15."""
    lines = ["{ .reg .b32 p, h; .reg .b16 l, u; .reg .f32 f, g, s; .reg .pred q;"]
    lines.append("shl.b32 p, $20, 23; max.u32 p, p, 0x400000;")
    lines.append("setp.eq.u32 q, $20, 255; selp.b32 p, 0x7FC00000, p, q; mov.b32 s, p;")
    for word in range(4):
        for half in (0, 1):
            out = 4 * word + 2 * half
            lines.append(f"mov.b32 {{l, u}}, ${16 + word}; cvt.rn.f16x2.e4m3x2 h, {'u' if half else 'l'};")
            lines.append("mov.b32 {l, u}, h; cvt.f32.f16 f, l; cvt.f32.f16 g, u;")
            lines.append("mul.rn.f32 f, f, s; mul.rn.f32 g, g, s;")
            lines.append(f"cvt.rn.bf16x2.f32 p, g, f; mov.b32 {{${out}, ${out + 1}}}, p;")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _pair_asm():
    """The two codes of $2 times $3, two bfloat16 of one value, to $0 and $1."""
    return """{ .reg .b32 p; .reg .b16 l, u; .reg .f32 f, g;
        cvt.rn.f16x2.e4m3x2 p, $2; mov.b32 {l, u}, p; cvt.f32.f16 f, l; cvt.f32.f16 g, u;
        cvt.rn.bf16x2.f32 p, g, f; mul.rn.bf16x2 p, p, $3; mov.b32 {$0, $1}, p; }"""


@gluon.jit
def decode_pairs(codes, words, RIGHT: gl.constexpr):
    """MXFP8 codes by twos, int16 ``[warps, 32, rows]``, to bfloat16 ``[warps, 64, rows]`` of layout ``RIGHT``.

    ``words``, ``[warps, rows]``, have the scales of the 64 in their lower two bytes.
    """
    W: gl.constexpr = codes.shape[0]
    ROWS: gl.constexpr = codes.shape[2]
    codes = codes.reshape([W, 2, 16, ROWS])
    L: gl.constexpr = gl.SliceLayout(2, codes.type.layout)
    block = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    words = gl.expand_dims(gl.convert_layout(words, gl.SliceLayout(1, L), assert_trivial=True), 1)
    byte = (words >> (block * 8)) & 0xFF
    # A power of two, twice: 0 is a subnormal, and 255 NaN.
    scales = gl.where(byte == 255, 0x7FC07FC0, gl.maximum(byte << 7, 0x40) * 0x10001)
    scales, codes = gl.broadcast(gl.expand_dims(scales, 2), codes)
    low, high = gl.inline_asm_elementwise(
        _pair_asm(), "=h,=h,h,r", [codes, scales], (gl.bfloat16,) * 2, is_pure=True, pack=1
    )
    values = gl.join(low, high).permute((0, 1, 2, 4, 3)).reshape([W, 64, ROWS])
    return gl.convert_layout(values, RIGHT, assert_trivial=True)


@gluon.constexpr_function
def _by_row(steps, rows, last, warps):
    """``[steps, rows, 64 / last[0], *last]`` by some warps, each thread with all of ``last``."""
    each = steps * rows // (8 * warps)  # units of 16 elements of a row that a thread has: 1, 2 or 4
    beside = 4 // each
    per_thread, per_warp = [1, 1, each * last[0], *last[1:]], [32 // (rows * beside), rows, beside]
    rank = len(per_thread)
    return gl.BlockedLayout(
        per_thread, per_warp + [1] * (rank - 3), [warps] + [1] * (rank - 1), list(range(rank - 1, -1, -1))
    )


@gluon.jit
def load_rows(
    x, x_scales, x_units, x_cols, M, K_STEPS, k, first, C: gl.constexpr, AROUND: gl.constexpr = 0
):  # fmt: skip
    """Codes ``[KS, ROWS, 4, words]`` and words of four scales ``[KS, ROWS]``, from step k and row ``first`` on.

    Zeros beyond x. Steps from ``AROUND`` on, if that is given, are those from 0 on.
    """
    WORDS: gl.constexpr = C.UNIT_WORDS
    L: gl.constexpr = _by_row(C.KS, C.ROWS, [1, WORDS], C.ROW_WARPS)
    U: gl.constexpr = gl.SliceLayout(3, L)
    R: gl.constexpr = gl.SliceLayout(2, U)
    step = (k + gl.arange(0, C.KS, gl.SliceLayout(1, R)))[:, None]
    if AROUND > 0:
        step = gl.where(step < AROUND, step, step - AROUND)
    row = (first + gl.arange(0, C.ROWS, gl.SliceLayout(0, R)))[None, :]
    unit = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, U)))[None, None, :]
    word = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))[None, None, None, :]
    there, start = gl.broadcast((step < K_STEPS) & (row < M), row * (x_units * 4) + step * (4 * WORDS))
    place = gl.expand_dims(gl.expand_dims(start, 2) + unit * WORDS, 3) + word
    codes = gl.load(x + place, mask=gl.expand_dims(gl.expand_dims(there, 2), 3), other=0)
    return codes, gl.load(x_scales + scale_place(row, step, x_cols, C), mask=there, other=0)


@gluon.jit
def scale_place(row, step, x_cols, C: gl.constexpr):
    """Where the word is that has a row's scales of a step."""
    fours = step * C.ROW_SCALES // 4
    if C.X_LAYOUT == 1:
        place = row * 4 + fours * 128
    else:
        place = (row >> 3) * (x_cols * 2) + ((row & 7) + fours * 8)
    return place


@gluon.jit
def decode_rows(rows, C: gl.constexpr):
    """What :func:`load_rows` gives, as bfloat16 ``[KS, ROWS, 64]``."""
    codes = rows[0]
    U: gl.constexpr = gl.SliceLayout(3, codes.type.layout)
    step = gl.arange(0, C.KS, gl.SliceLayout(1, gl.SliceLayout(2, U)))[:, None, None]
    unit = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, U)))[None, None, :]
    # A word holds the scales of a step of NVFP4, or of two of MX.
    first = step * C.ROW_SCALES % 4
    byte = (gl.expand_dims(rows[1], 2) >> ((first + unit * C.ROW_SCALES // 4) * 8)) & 0xFF
    if C.FMT == "mxfp8":
        c02, c13 = gl.split(codes.reshape([C.KS, C.ROWS, 4, 2, 2]))
        c0, c2 = gl.split(c02)
        c1, c3 = gl.split(c13)
        byte = gl.convert_layout(byte, c0.type.layout, assert_trivial=True)
        v = gl.inline_asm_elementwise(
            _fp8_asm(), SIXTEEN + ",r,r,r,r,r", [c0, c1, c2, c3, byte], (gl.bfloat16,) * 16, is_pure=True, pack=1
        )
    else:
        c0, c1 = gl.split(codes)
        v = gl.inline_asm_elementwise(
            _fp4_asm(C.FMT), SIXTEEN + ",r,r,r", [c0, c1, byte], (gl.bfloat16,) * 16, is_pure=True, pack=1
        )
    for i in gl.static_range(4):  # each time one more bit of an element's number, the highest first
        v = _joined(v, 8 >> i)
    L: gl.constexpr = _by_row(C.KS, C.ROWS, [16], C.ROW_WARPS)
    return gl.convert_layout(v[0].reshape([C.KS, C.ROWS, 64]), L, assert_trivial=True)


@gluon.jit
def _joined(v, HALF: gl.constexpr):
    out = ()
    for i in gl.static_range(HALF):
        out = out + (gl.join(v[i], v[i + HALF]),)  # type: ignore[assignment]  # noqa: RUF005
    return out


@gluon.jit
def rows_decoder(s, x, x_scales, x_units, x_cols, M, K_STEPS, STEPS, C: gl.constexpr):
    """Fill each stage's rows of x; ``s`` as in ``_hopper_strips``."""
    KS: gl.constexpr = C.KS
    AHEAD: gl.constexpr = C.ROWS_AHEAD
    wait_for_previous()
    held = ()
    for i in gl.static_range(AHEAD):
        rows = load_rows(x, x_scales, x_units, x_cols, M, K_STEPS, i * KS, 0, C)
        held = held + (rows,)  # type: ignore[assignment]  # noqa: RUF005
    stages = STEPS // KS
    for first in range(0, stages, AHEAD):
        later = ()
        for i in gl.static_range(AHEAD):
            stage = first + i
            rows = load_rows(x, x_scales, x_units, x_cols, M, K_STEPS, (stage + AHEAD) * KS, 0, C)
            later = later + (rows,)  # type: ignore[assignment]  # noqa: RUF005
            if stage < stages:
                st = stage % C.STAGES
                mbarrier.wait(s[4].index(st), (stage // C.STAGES & 1) ^ 1)
                s[0].index(st).store(decode_rows(held[i], C))
                warp_group_barrier()
                mbarrier.arrive(s[3].index(st))
        held = later
