"""The Triton kernel that quantises rows of values in blocks: NVFP4, MXFP4 and MXFP8, in every scale layout.

The values are those of x, or ``silu(gate) * up`` where a row of x has both halves.

A thread holds a whole block (or 1 / SPLIT of one), so amax, scale and packing stay in registers. A program holds R
rows by C blocks at a time. In the 128x4 layout the R rows lie 32 apart, because the scales of such rows are
neighbours in memory. Programs cover the padded shape of the scales; the padding is written by whoever owns it.
"""

# mypy: disable-error-code="assignment, var-annotated"
# Kernels grow tuples and rebind names to other types, which Triton's compiler unrolls.

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import scale_layouts
from ..formats import FORMATS, MXFP4, NVFP4, BlockFormat, fp4_format
from . import _triton_activations as a
from . import _triton_pack as pack
from . import _triton_prims as p
from . import _triton_tiles as t
from ._triton_launch import (
    INTERPRETED,
    LAYOUT_CODES,
    AotCase,
    Tiling,
    cut_anew,
    global_scale_form,
    launch,
    rows_of_units,
)

__all__ = ["fp4_outputs", "quantize_kernel", "quantize_rows"]

_SIZES = ["rows", "row_units", "blocks", "out_blocks", "padded_rows", "padded_cols", "col_tiles"]


@triton.jit(do_not_specialize=_SIZES)
def quantize_kernel(
    x_ptr,
    global_scale_ptr,
    payload_ptr,
    scales_ptr,
    rows,
    row_units,  # 16-byte units from one row of x to the next
    blocks,  # of a row of x, or of half of it
    out_blocks,  # of a row of the payload: more than x has where K is padded
    padded_rows,
    padded_cols,
    col_tiles,
    FORMAT: tl.constexpr,
    LAYOUT: tl.constexpr,
    GLOBAL: tl.constexpr,
    INVERSED: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    ITERS: tl.constexpr,
    AHEAD: tl.constexpr,
    EVEN: tl.constexpr,  # nothing is ragged or padded, so no mask is needed
):
    BLOCK: tl.constexpr = 16 if FORMAT == "nvfp4" else 32
    WORDS: tl.constexpr = BLOCK // SPLIT // (4 if FORMAT == "mxfp8" else 8)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    UNITS: tl.constexpr = BLOCK * DTYPE.primitive_bitwidth // 128 // SPLIT
    PAIRS: tl.constexpr = DTYPE.primitive_bitwidth == 16 and not GATED
    STEP: tl.constexpr = t.row_step(LAYOUT, R)
    p.wait_for_previous()
    pid = tl.program_id(0)
    first, col, part = t.position(pid, col_tiles, 0, LAYOUT, R, C, SPLIT, ITERS)
    if not EVEN and t.first_row(pid, col_tiles, LAYOUT, R, ITERS) >= rows:  # nothing but padding
        scale_place = t.scale_offset(first, col, padded_cols, LAYOUT)
        for i in tl.static_range(ITERS):
            offset = t.scale_offset_ahead(scale_place, first, col, padded_cols, i, LAYOUT, R)
            zero = tl.zeros_like(col).to(tl.uint8)
            inside = (first + i * STEP < padded_rows) & (col < padded_cols) & (part == 0)
            tl.store(scales_ptr + offset, zero, mask=inside)
        return
    # A step differs from the one before by as much for all threads, which is less work than finding each anew.
    units = t.unit_pointers(x_ptr, first.to(tl.int64) * row_units + (col * SPLIT + part) * UNITS)
    words_in = row_units.to(tl.int64) * (4 * STEP)
    up = blocks * (SPLIT * UNITS * 4)
    loaded = ()
    loaded_ups = ()
    for i in tl.static_range(min(AHEAD, ITERS)):
        there = None if EVEN else (first + i * STEP < rows) & (col < blocks)
        loaded += (t.load_units(units + i * words_in, there, UNITS),)
        if GATED:
            loaded_ups += (t.load_units(units + (i * words_in + up), there, UNITS),)
    encode = tl.full((1,), 1.0, tl.float32)
    decode = encode
    if GLOBAL == 1:
        encode, decode = p.encode_decode(tl.load(global_scale_ptr + tl.arange(0, 1)), INVERSED)
    # After the loads, which nothing is to hold up where a program has one step.
    place = (first.to(tl.int64) * out_blocks + col) * SPLIT + part
    places = t.word_pointers(payload_ptr, place, WORDS)
    words_out = out_blocks.to(tl.int64) * (STEP * SPLIT * WORDS)
    scale_place = t.scale_offset(first, col, padded_cols, LAYOUT)
    # While a step's values are packed, the scales of the next one are made: each alone would wait for itself.
    octets = ()
    scales = ()
    for i in tl.static_range(ITERS + 1):
        if i > 0 and i - 1 + AHEAD < ITERS:  # before the step's stores, past which the compiler moves no load
            start = (i - 1 + AHEAD) * words_in
            there = None if EVEN else (first + (i - 1 + AHEAD) * STEP < rows) & (col < blocks)
            loaded += (t.load_units(units + start, there, UNITS),)
            if GATED:
                loaded_ups += (t.load_units(units + (start + up), there, UNITS),)
        if i < ITERS:
            if GLOBAL == 2:
                row = first + i * STEP
                there = (row < rows) & (col < blocks)
                encode, decode = p.encode_decode(tl.load(global_scale_ptr + row, mask=there, other=1.0), INVERSED)
            lo, hi = p.to_octets(loaded[i], DTYPE, tl.expand_dims(6.0 * decode, 1))
            if GATED:
                up_lo, up_hi = p.to_octets(loaded_ups[i], DTYPE, None)
                lo, hi = a.silu_and_mul(lo, up_lo), a.silu_and_mul(hi, up_hi)
            if PAIRS:
                amax = p.block_amax_of_pairs(loaded[i], lo, hi, DTYPE, SPLIT)
            else:
                amax = p.block_amax(lo, hi, SPLIT)
            if FORMAT == "nvfp4":
                scales += (p.nvfp4_scale(amax, encode, decode),)
            elif FORMAT == "mxfp4":
                scales += (p.mxfp4_scale(amax),)
            else:
                scales += (p.mxfp8_scale(amax),)
            octets += ((lo, hi),)
        if i > 0:
            row = first + (i - 1) * STEP
            there = None if EVEN else (row < rows) & (col < blocks)
            lo, hi = octets[i - 1]
            byte, multiplier = scales[i - 1]
            pairs = loaded[i - 1] if PAIRS else None
            if FORMAT == "mxfp8":
                words = pack.e4m3(lo, hi, multiplier, pairs)
                if not EVEN:
                    words = tl.where(tl.expand_dims(there, 1), words, 0)
            else:
                words = pack.e2m1(lo, hi, multiplier, pairs)
            t.store_words(places + (i - 1) * words_out, words, None if EVEN else (row < rows) & (col < out_blocks))
            offset = t.scale_offset_ahead(scale_place, first, col, padded_cols, i - 1, LAYOUT, R)
            if EVEN:
                inside = part == 0
            else:
                byte = tl.where(there, byte, 0)
                inside = (row < padded_rows) & (col < padded_cols) & (part == 0)
            tl.store(scales_ptr + offset, byte.to(tl.uint8), mask=inside)


class _Cut(NamedTuple):
    """For calls of at least so many elements."""

    least: int
    steps: int
    ahead: int
    split: int
    """Threads a block: with 32 values each, the accesses of a warp lie far apart."""


# Measured on an NVIDIA H200. Few elements take one step a program, so that more programs share the latency.
_CUTS = {
    "nvfp4": (_Cut(1 << 27, 4, 3, 1), _Cut(1 << 24, 2, 2, 1), _Cut(0, 1, 1, 1)),
    "mxfp4": (_Cut(1 << 24, 4, 2, 2), _Cut(0, 1, 1, 2)),
    "mxfp4 linear": (_Cut(1 << 24, 4, 2, 1), _Cut(0, 1, 1, 2)),
    "mxfp8": (_Cut(1 << 24, 2, 2, 2), _Cut(0, 1, 1, 2)),
}
# Twice the loads, and more arithmetic.
_CUTS_OF_GATED = {
    "nvfp4": (_Cut(1 << 24, 4, 3, 1), _Cut(1 << 22, 4, 2, 2), _Cut(0, 1, 1, 2)),
    "mxfp4": (_Cut(1 << 24, 4, 3, 2), _Cut(1 << 22, 4, 2, 2), _Cut(0, 1, 1, 2)),
}
_THREADS = 128


def tiling(fmt: BlockFormat, layout: str, rows: int, blocks: int, gated: bool = False) -> Tiling:
    """How a call is cut up."""
    if INTERPRETED:  # few programs, as each takes long
        return Tiling(64, 16, ITERS=2, SPLIT=fmt.block_size // 16, AHEAD=2)
    return _tiling_on_gpu(fmt, layout, rows, blocks, gated)


def _tiling_on_gpu(fmt: BlockFormat, layout: str, rows: int, blocks: int, gated: bool = False) -> Tiling:
    cuts = (_CUTS_OF_GATED if gated else _CUTS)[fmt.name]
    if layout == scale_layouts.LINEAR and not gated:
        cuts = _CUTS.get(f"{fmt.name} {layout}", cuts)
    cut = next(cut for cut in cuts if rows * blocks * fmt.block_size >= cut.least)
    threads = _THREADS // cut.split
    if layout != scale_layouts.LINEAR and blocks <= 16:
        columns = 8 if blocks <= 8 else 16
        return Tiling(threads // columns, columns, cut.steps, cut.split, cut.ahead)
    if layout == scale_layouts.LINEAR or (layout == scale_layouts.SWIZZLED_128X4 and rows < 128):
        tile = Tiling(1, threads, SPLIT=cut.split)  # of rows so few, those 32 apart are mostly padding
    else:
        tile = Tiling(4, threads // 4, SPLIT=cut.split)
    return tile._replace(ITERS=cut.steps, AHEAD=cut.ahead) if rows >= 128 else tile


def shipped_tilings(fmt: BlockFormat, layout: str, gated: bool = False) -> list[Tiling]:
    """Whatever :func:`tiling` returns."""
    shapes = itertools.product((1, *(1 << i for i in range(10, 24))), (8, 16, 1 << 8))
    return list(dict.fromkeys(_tiling_on_gpu(fmt, layout, rows, blocks, gated) for rows, blocks in shapes))


def fp4_outputs(
    x: Tensor, k: int, sf_vec_size: int, sf_use_ue8m0: bool, is_sf_swizzled_layout: bool, is_sf_8x4_layout: bool
) -> tuple[BlockFormat, str, Tensor, Tensor]:
    """Format, scale layout, and uninitialised codes and scales for rows of K values that x stands for."""
    fmt = fp4_format(sf_vec_size, sf_use_ue8m0)
    assert fmt is not None
    layout = scale_layouts.layout_from_flags(is_sf_swizzled_layout, is_sf_8x4_layout)
    leading = x.shape[:-1]
    codes = x.new_empty((*leading, k // 2), dtype=torch.uint8)
    shape = scale_layouts.scale_shape(math.prod(leading), k // fmt.block_size, layout)
    return fmt, layout, codes, x.new_empty(shape, dtype=torch.uint8)


def quantize_rows(
    x: Tensor,
    fmt: BlockFormat,
    layout: str,
    global_scale: Tensor | None,
    inversed: bool,
    payload: Tensor,
    scales: Tensor,
    k_padded: int | None = None,
    gated: bool = False,
    tile: Tiling | None = None,
) -> None:
    """Quantise ``x``, flattened to rows, into ``payload`` and ``scales``, every byte of which is written.

    ``gated``: the rows are ``[gate, up]``, and what is quantised is ``silu(gate) * up``.
    """
    if not scales.numel() and not payload.numel():
        return
    if x.dtype == torch.float8_e4m3fn:
        x = x.view(torch.uint8)  # Triton knows no E4M3 on compute capability 8.0
    x, row_units = rows_of_units(x)
    rows, k = x.shape
    k = k // 2 if gated else k
    blocks = k // fmt.block_size
    out_blocks = (k_padded or k) // fmt.block_size
    same_cols = out_blocks == blocks
    global_scale, form = global_scale_form(global_scale)
    if layout == scale_layouts.LINEAR and form != 2 and same_cols and not gated and x.is_contiguous():
        rows, blocks = cut_anew(rows, blocks, (tile or tiling(fmt, layout, rows, blocks)).C)
        row_units = blocks * fmt.block_size * x.element_size() // 16
        out_blocks = blocks
    padded_rows, padded_cols = scale_layouts.scale_shape(rows, out_blocks, layout)
    if tile is None:
        tile = tiling(fmt, layout, rows, out_blocks, gated)
    even = form != 2 and same_cols and (rows, blocks) == (padded_rows, padded_cols)
    even = even and rows % (tile.R * tile.ITERS) == 0 and blocks % tile.C == 0
    col_tiles = triton.cdiv(padded_cols, tile.C)
    launch(
        quantize_kernel,
        (triton.cdiv(padded_rows, tile.R * tile.ITERS) * col_tiles,),
        tile.threads,
        x.device,
        x,
        global_scale,
        payload,
        scales,
        rows,
        row_units,
        blocks,
        out_blocks,
        padded_rows,
        padded_cols,
        col_tiles,
        FORMAT=fmt.name,
        LAYOUT=LAYOUT_CODES[layout],
        GLOBAL=form,
        INVERSED=inversed,
        GATED=gated,
        SPLIT=tile.SPLIT,
        R=tile.R,
        C=tile.C,
        ITERS=tile.ITERS,
        AHEAD=tile.AHEAD,
        EVEN=even,
    )


_LARGE = 1 << 12  # rows of 256 blocks that take several steps a program


def aot_cases() -> Iterator[AotCase]:
    """Every format in every layout, ragged and even; the dtypes and forms of global scale for NVFP4; few rows, many."""
    swizzled = scale_layouts.SWIZZLED_128X4
    for fmt in FORMATS.values():
        form = 1 if fmt.has_global_scale else 0
        for even in (False, True):
            for layout in scale_layouts.LAYOUTS:
                yield _aot_case(fmt, layout, "bf16", form, False, _LARGE, even)
            yield _aot_case(fmt, swizzled, "bf16", form, False, 1, even)
            yield _aot_case(fmt, swizzled, "fp32", form, False, _LARGE, even)
    for even in (False, True):
        yield _aot_case(NVFP4, swizzled, "bf16", 1, False, 1 << 15, even)
    yield _aot_case(NVFP4, swizzled, "bf16", 1, False, 1 << 10, True)
    for blocks in (8, 16):
        yield _aot_case(NVFP4, swizzled, "bf16", 1, False, 1 << 20, True, blocks)
    for dtype, form, inversed in (("fp16", 2, False), ("u8", 1, True), ("bf16", 1, True)):
        yield _aot_case(NVFP4, swizzled, dtype, form, inversed, _LARGE, False)
    for fmt, layout, dtype, rows, even in (
        (NVFP4, swizzled, "bf16", _LARGE, True),
        (NVFP4, swizzled, "bf16", _LARGE, False),
        (NVFP4, swizzled, "bf16", 1 << 11, True),
        (NVFP4, swizzled, "bf16", 1, False),
        (NVFP4, swizzled, "fp32", _LARGE, False),
        (NVFP4, scale_layouts.LINEAR, "fp16", _LARGE, True),
        (MXFP4, swizzled, "bf16", _LARGE, True),
        (MXFP4, swizzled, "fp32", _LARGE, True),
    ):
        yield _aot_case(fmt, layout, dtype, 1 if fmt.has_global_scale else 0, False, rows, even, gated=True)


def _aot_case(
    fmt: BlockFormat,
    layout: str,
    dtype: str,
    form: int,
    inversed: bool,
    rows: int,
    even: bool,
    blocks: int = 256,
    gated: bool = False,
) -> AotCase:
    tile = _tiling_on_gpu(fmt, layout, rows, blocks, gated)
    signature = {"x_ptr": f"*{dtype}", "payload_ptr": "*u8", "scales_ptr": "*u8", **dict.fromkeys(_SIZES, "i32")}
    constants = {"FORMAT": fmt.name, "LAYOUT": LAYOUT_CODES[layout], "GLOBAL": form, "INVERSED": inversed}
    constants["GATED"] = gated
    if form:
        signature["global_scale_ptr"] = "*fp32"
    else:
        constants["global_scale_ptr"] = None
    shape = f"{tile.R}x{tile.C}x{tile.ITERS}s{tile.SPLIT}{f'a{tile.AHEAD}' if tile.AHEAD > 1 else ''}{'-even' * even}"
    name = f"quantize-{'silu-' * gated}{fmt.name}-{layout}-{dtype}-gs{form}{'i' * inversed}-{shape}"
    constants |= {**tile._asdict(), "EVEN": even}
    return AotCase(name, quantize_kernel, signature, constants, tile.threads)
