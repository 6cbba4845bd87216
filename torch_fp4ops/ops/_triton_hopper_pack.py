"""The Triton kernel that brings a weight into the layout "hopper" (see ``hopper_layout``), byte for byte.

A *cell* is 16 columns of two rows, 8 apart: of FP4 the 4 words that one thread of the GEMM reads in a step along K. A
program makes whole pieces of 128 rows by 64 columns, which are consecutive in the result; it reads whole 32-byte
sectors and writes words in order. What moves between threads is left to Triton's layout conversions.

Nothing here looks at data on the host: a block that can't be stored becomes NaN and is reported through ``wrong``.
"""

# mypy: disable-error-code="assignment, misc, var-annotated"
# Kernels grow tuples and rebind names to other types, which Triton's compiler unrolls.

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import scale_layouts
from ..formats import FORMATS, NVFP4, BlockFormat
from ..hopper_layout import FP4_BITS, FP8_BITS, HOPPER_SCALE_RANGES, hopper_size, moves
from . import _triton_prims as p
from . import _triton_tiles as t
from ._triton_launch import INTERPRETED, LAYOUT_CODES, AotCase, launch, rows_of_units

__all__ = ["hopper_pack_kernel", "pack_hopper"]

_SIZES = ["rows", "row_units", "groups", "padded_cols", "piece_groups"]
_THREADS = 128


def _word_moves(bits_of_k3: Sequence[tuple[int, ...]]) -> tuple[tuple[int, int], ...]:
    """Shifts and masks for words whose byte 2 * k0 + k3 has a code in its low bits."""
    places = {
        16 * k0 + 8 * k3 + len(bits) - 1 - bit: place ^ 16 * k0
        for k3, bits in enumerate(bits_of_k3)
        for k0 in (0, 1)
        for bit, place in enumerate(bits)
    }
    return tuple((shift, mask % 2**32) for shift, mask in moves(places, 32))


def _fp4_moves(odd: int, n3: int) -> tuple[tuple[int, int], ...]:
    """Within a word; a bit that is to go to the other word of the pair waits where that one's bit will be."""
    other = {_EVEN_BIT + 32: _ODD_BIT, _ODD_BIT: _EVEN_BIT + 32}
    bits = [tuple(other.get(place, place) - 32 * odd for place in FP4_BITS[odd, n3, k3]) for k3 in (0, 1)]
    return _word_moves(bits)


# The bit of an odd word that codes of the even one have, and the other way round.
(_EVEN_BIT,) = (place - 32 for (odd, _, _), bits in FP4_BITS.items() for place in bits if place >= 32 and not odd)
(_ODD_BIT,) = (place for (odd, _, _), bits in FP4_BITS.items() for place in bits if place < 32 and odd)
_FP4_MOVES = tuple(tuple(_fp4_moves(odd, n3) for n3 in (0, 1)) for odd in (0, 1))
_FP8_MOVES = _word_moves(FP8_BITS)


@triton.constexpr_function
def _moves(odd, n3, fp8):
    return _FP8_MOVES if fp8 else _FP4_MOVES[odd][n3]


@triton.constexpr_function
def _count(odd, n3, fp8):
    return len(_moves(odd, n3, fp8))


@triton.constexpr_function
def _shift(odd, n3, fp8, i):
    return _moves(odd, n3, fp8)[i][0]


@triton.constexpr_function
def _mask(odd, n3, fp8, i):
    return _moves(odd, n3, fp8)[i][1]


@triton.jit
def _placed(word, ODD: tl.constexpr, N3: tl.constexpr, FP8: tl.constexpr):
    """The bits of a word of codes, one in each byte, in their places."""
    out = tl.zeros_like(word)
    for i in tl.static_range(_count(ODD, N3, FP8)):
        if _shift(ODD, N3, FP8, i) >= 0:
            out |= (word << _shift(ODD, N3, FP8, i)) & _mask(ODD, N3, FP8, i)
        else:
            out |= (word >> -_shift(ODD, N3, FP8, i)) & _mask(ODD, N3, FP8, i)
    return out


@triton.constexpr_function
def _distance():
    return _EVEN_BIT - _ODD_BIT


@triton.constexpr_function
def _exchanged():
    return 0x10001 << _EVEN_BIT


@triton.jit
def _exchange(words):
    """Even and odd words with each other's bits."""
    even, odd = tl.split(tl.reshape(words, (words.shape[0] // 2, 2)))
    differ = ((even << _distance()) ^ odd) & _exchanged()
    return tl.reshape(tl.join(even ^ (differ >> _distance()), odd ^ differ), (words.shape[0],))


@triton.jit
def _by_t_fp4(front, back):
    """Codes of 8 and 8 columns, for each t a word with one of (k0, k3) in each byte."""
    even0 = (front & 0x000F000F) | ((back & 0x000F000F) << 8)
    odd0 = ((front >> 8) & 0x000F000F) | (back & 0x0F000F00)
    even1 = ((front >> 4) & 0x000F000F) | ((back << 4) & 0x0F000F00)
    odd1 = ((front >> 12) & 0x000F000F) | ((back >> 4) & 0x0F000F00)
    return (
        (even0 & 0xFFFF) | (even1 << 16),
        (odd0 & 0xFFFF) | (odd1 << 16),
        (even0 >> 16) | (even1 & 0xFFFF0000),
        (odd0 >> 16) | (odd1 & 0xFFFF0000),
    )


@triton.jit
def _by_t_fp8(front, back):
    """The same of 4 and 4 columns: two words."""
    spread = ((front & 0xFF) | ((back & 0xFF) << 8)) | (((front & 0xFF00) << 8) | ((back & 0xFF00) << 16))
    front = front >> 16
    back = back >> 16
    return spread, (front & 0xFF) | ((back & 0xFF) << 8) | ((front & 0xFF00) << 8) | ((back & 0xFF00) << 16)


@triton.jit
def _four(w0, w1, w2, w3):
    """Four ``[N]`` as ``[N, 4]``."""
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (w0.shape[0], 4))


@triton.jit
def _quarters(x):
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _any_of_two(flags):
    """Whether a flag or that of the cell beside it, which has the other half of an MX block, is set."""
    pairs = tl.reshape(flags.to(tl.int32), (flags.shape[0] // 2, 2))
    both = tl.max(pairs, 1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(both, (flags.shape[0] // 2, 2)), (flags.shape[0],)) != 0


@triton.jit
def _nvfp4_block(step):
    """Which bits of the codes stay, which of them are turned, and the scale as it is stored."""
    magnitude = step & 0x7F
    kept = tl.where(magnitude == 0, 0x88888888, 0xFFFFFFFF).to(tl.uint32)
    turned = tl.where(step > 0x7F, 0x88888888, 0).to(tl.uint32)
    # As fp32 a subnormal is normalised; E4M3's exponent and mantissa are then the bits above 20.
    bits = (p.bits(p.decode_e4m3(magnitude)) >> 20).to(tl.int32)
    out = tl.maximum(bits - 8 * (127 - 22), 8)
    return kept, turned, tl.where(magnitude == 0x7F, 0xFF, out)


@triton.jit
def _mx_block(step, found, nan_element, SIGNS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Which bits of the codes stay, the scale as it is stored, and whether the block can't be.

    ``found`` has the bits of all magnitudes of a cell.
    """
    zero = ~_any_of_two(found != 0)
    stored = zero | ((step >= LOW) & (step <= HIGH))
    wrong = ~(stored & ~_any_of_two(nan_element)) & (step != 0xFF)
    nan = wrong | (step == 0xFF)
    kept = tl.where(nan, SIGNS, 0xFFFFFFFF).to(tl.uint32)
    step = tl.where(step > HIGH, 127, step)  # a block of zeros
    return kept, tl.where(nan, HIGH + 1, step), wrong


@triton.jit(do_not_specialize=_SIZES)
def hopper_pack_kernel(
    codes_ptr,
    scales_ptr,
    weight_ptr,
    out_scales_ptr,
    wrong_ptr,
    rows,
    row_units,  # 16 columns each, from one row of the codes to the next
    groups,  # of 16 columns
    padded_cols,
    piece_groups,
    FORMAT: tl.constexpr,
    LAYOUT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PIECES: tl.constexpr,
):
    FP8: tl.constexpr = FORMAT == "mxfp8"
    WORDS: tl.constexpr = 4 if FP8 else 2  # of 16 columns
    SIGNS: tl.constexpr = 0x80808080 if FP8 else 0x88888888
    MAGNITUDES: tl.constexpr = 0x7F7F7F7F if FP8 else 0x77777777
    N: tl.constexpr = PIECES * 256
    p.wait_for_previous()
    pid = tl.program_id(0).to(tl.uint32)  # unsigned, so that powers of two divide by shifts
    tile = (pid // piece_groups.to(tl.uint32)).to(tl.int32)
    first = (pid % piece_groups.to(tl.uint32)).to(tl.int32) * PIECES  # 64 columns each
    cell = tl.arange(0, N)
    i = cell % 4
    group = (first + cell // 256) * 4 + i
    top = tile * 128 + cell // 32 % 8 * 16 + cell // 4 % 8
    column = group if FORMAT == "nvfp4" else group // 2

    source = codes_ptr.to(tl.pointer_type(tl.uint32))
    data = ()
    steps = ()
    for n3 in tl.static_range(2):
        row = top + 8 * n3
        there = (row < rows) & (group < groups)
        place = (row.to(tl.int64) * row_units + group)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        data += (tl.load(source + place, mask=there[:, None], other=0),)
        step = tl.load(scales_ptr + t.scale_offset(row, column, padded_cols, LAYOUT), mask=there, other=0)
        steps += (step.to(tl.uint32),)

    words = ()
    stored = tl.zeros((N,), tl.uint32)
    for n3 in tl.static_range(2):
        if FP8:
            w0, w1, w2, w3 = _quarters(data[n3])
            found = (w0 | w1 | w2 | w3) & MAGNITUDES
            nan_element = (
                ((w0 & MAGNITUDES) + 0x01010101)
                | ((w1 & MAGNITUDES) + 0x01010101)
                | ((w2 & MAGNITUDES) + 0x01010101)
                | ((w3 & MAGNITUDES) + 0x01010101)
            ) & SIGNS
            kept, step, wrong = _mx_block(steps[n3], found, nan_element != 0, SIGNS, LOW, HIGH)
            first_two = _by_t_fp8(w0 & kept, w2 & kept)
            last_two = _by_t_fp8(w1 & kept, w3 & kept)
            by_t = first_two + last_two
        else:
            front, back = tl.split(data[n3])
            if FORMAT == "nvfp4":
                kept, turned, step = _nvfp4_block(steps[n3])
                front = (front & kept) ^ turned
                back = (back & kept) ^ turned
            else:
                found = (front | back) & MAGNITUDES
                kept, step, wrong = _mx_block(steps[n3], found, found != found, SIGNS, LOW, HIGH)
                front &= kept
                back &= kept
            by_t = _by_t_fp4(front, back)
        if FORMAT != "nvfp4":
            tl.store(wrong_ptr + tl.zeros_like(cell), 1, mask=wrong)
        placed = ()
        for j in tl.static_range(4):
            even = _placed(by_t[j], 0, n3, FP8)
            placed += (even if FP8 else tl.where(i % 2 == 0, even, _placed(by_t[j], 1, n3, FP8)),)
        words += (placed,)
        stored |= step.to(tl.uint32) << (16 * n3)

    start = tile.to(tl.int64) * (piece_groups * PIECES) + first
    target = weight_ptr.to(tl.pointer_type(tl.uint32))
    if FP8:
        # (piece, sub), (w, g), i // 2, i % 2, t, n3
        parts = tl.reshape(tl.join(_four(*words[0]), _four(*words[1])), (PIECES * 2, 32, 2, 2, 4, 2))
        flat = tl.reshape(tl.permute(parts, (0, 2, 1, 4, 3, 5)), (N * 8,))
        tl.store(target + start * 2048 + tl.arange(0, N * 8), flat)
    else:
        a, b = words
        parts = tl.reshape(_four(a[0] | b[0], a[1] | b[1], a[2] | b[2], a[3] | b[3]), (N // 4, 4, 4))
        flat = _exchange(tl.reshape(tl.permute(parts, (0, 2, 1)), (N * 4,)))  # i, t to t, i
        tl.store(target + start * 1024 + tl.arange(0, N * 4), flat)
    steps_of = out_scales_ptr.to(tl.pointer_type(tl.uint32))
    if FORMAT == "nvfp4":
        pairs = tl.reshape(stored << (8 * (i % 2)).to(tl.uint32), (N // 2, 2))
        tl.store(steps_of + start * 128 + tl.arange(0, N // 2), tl.sum(pairs, 1))
    else:
        one = tl.where(i % 2 == 0, stored << (4 * i).to(tl.uint32), 0)
        tl.store(steps_of + start * 64 + tl.arange(0, N // 4), tl.sum(tl.reshape(one, (N // 4, 4)), 1))


_PIECES = 4 if INTERPRETED else 2
"""Pieces a program, a divisor of 4, as K is padded to 256. In the interpreter few programs, as each takes long."""


def pack_hopper(
    codes: Tensor,
    scales: Tensor,
    fmt: BlockFormat,
    layout: str,
    weight: Tensor,
    scale: Tensor,
    wrong: Tensor | None = None,
) -> None:
    """``weight, scale = pack_hopper_weight(codes, linear scales, fmt)``, but without a look at the data.

    Args:
        codes: ``[n, k / elements per byte]``, any 1-byte dtype and strides; k a multiple of the block size.
        scales: uint8, contiguous, as ``layout`` has the block scales of ``[n, k / block size]``.
        weight, scale: uint8, contiguous, of the shapes that ``pack_hopper_weight`` returns; every byte is written.
        wrong: int32 of one element, set to 1 if there is a block that can't be stored (MX formats only). Such a block
            is written as NaN.
    """
    n, k = codes.shape[0], codes.shape[1] * fmt.elements_per_byte
    if not n or not k:
        weight.zero_()
        scale.zero_()
        return
    units, row_units = rows_of_units(codes.view(torch.uint8), 16 // fmt.elements_per_byte)
    padded_n, padded_k = hopper_size(n, k)
    low, high = HOPPER_SCALE_RANGES.get(fmt.name, (0, 0))
    if wrong is None:
        wrong = torch.zeros(1, dtype=torch.int32, device=codes.device) if fmt is not NVFP4 else None
    launch(
        hopper_pack_kernel,
        (padded_n // 128 * (padded_k // 64 // _PIECES),),
        _THREADS,
        codes.device,
        units,
        scales,
        weight,
        scale,
        wrong,
        n,
        row_units,
        k // 16,
        scale_layouts.scale_shape(n, k // fmt.block_size, layout)[1],
        padded_k // 64 // _PIECES,
        FORMAT=fmt.name,
        LAYOUT=LAYOUT_CODES[layout],
        LOW=low,
        HIGH=high,
        PIECES=_PIECES,
    )


def aot_cases() -> Iterator[AotCase]:
    """Every format from 128x4 scales, and NVFP4 from linear ones."""
    for fmt, layout in (
        *((fmt, scale_layouts.SWIZZLED_128X4) for fmt in FORMATS.values()),
        (NVFP4, scale_layouts.LINEAR),
    ):
        low, high = HOPPER_SCALE_RANGES.get(fmt.name, (0, 0))
        signature = dict.fromkeys(("codes_ptr", "scales_ptr", "weight_ptr", "out_scales_ptr"), "*u8")
        signature |= dict.fromkeys(_SIZES, "i32")
        constants = {"FORMAT": fmt.name, "LAYOUT": LAYOUT_CODES[layout], "LOW": low, "HIGH": high, "PIECES": _PIECES}
        if fmt is NVFP4:
            constants["wrong_ptr"] = None
        else:
            signature["wrong_ptr"] = "*i32"
        yield AotCase(f"hopper-pack-{fmt.name}-{layout}", hopper_pack_kernel, signature, constants, _THREADS)
