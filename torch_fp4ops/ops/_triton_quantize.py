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

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import scale_layouts
from ..formats import FORMATS, MXFP4, NVFP4, BlockFormat, fp4_format
from . import _triton_activations as a
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
    UNITS: tl.constexpr = BLOCK * x_ptr.dtype.element_ty.primitive_bitwidth // 128 // SPLIT
    pid = tl.program_id(0)
    if not EVEN and t.first_row(pid, col_tiles, LAYOUT, R, ITERS) >= rows:  # nothing but padding
        for i in tl.static_range(ITERS):
            row, col, part = t.position(pid, col_tiles, i, LAYOUT, R, C, SPLIT, ITERS)
            offset = t.scale_offset(row, col, padded_cols, LAYOUT)
            zero = tl.zeros_like(col).to(tl.uint8)
            tl.store(scales_ptr + offset, zero, mask=(row < padded_rows) & (col < padded_cols) & (part == 0))
        return
    loaded = ()
    loaded_ups = ()
    for i in tl.static_range(min(AHEAD, ITERS)):
        row, col, part = t.position(pid, col_tiles, i, LAYOUT, R, C, SPLIT, ITERS)
        there = None if EVEN else (row < rows) & (col < blocks)
        unit = row.to(tl.int64) * row_units + (col * SPLIT + part) * UNITS
        loaded += (t.load_units(x_ptr, unit, there, UNITS),)
        if GATED:
            loaded_ups += (t.load_units(x_ptr, unit + blocks * SPLIT * UNITS, there, UNITS),)
    encode = tl.full((1,), 1.0, tl.float32)
    decode = encode
    if GLOBAL == 1:
        encode, decode = p.encode_decode(tl.load(global_scale_ptr + tl.arange(0, 1)), INVERSED)
    for i in tl.static_range(ITERS):
        if i + AHEAD < ITERS:  # loaded before this step stores, past which the compiler moves no load
            row, col, part = t.position(pid, col_tiles, i + AHEAD, LAYOUT, R, C, SPLIT, ITERS)
            there = None if EVEN else (row < rows) & (col < blocks)
            unit = row.to(tl.int64) * row_units + (col * SPLIT + part) * UNITS
            loaded += (t.load_units(x_ptr, unit, there, UNITS),)
            if GATED:
                loaded_ups += (t.load_units(x_ptr, unit + blocks * SPLIT * UNITS, there, UNITS),)
        row, col, part = t.position(pid, col_tiles, i, LAYOUT, R, C, SPLIT, ITERS)
        there = None if EVEN else (row < rows) & (col < blocks)
        if GLOBAL == 2:
            encode, decode = p.encode_decode(tl.load(global_scale_ptr + row, mask=there, other=1.0), INVERSED)
        lo, hi = p.to_octets(loaded[i], 0, UNITS, x_ptr.dtype.element_ty, tl.expand_dims(6.0 * decode, 1))
        if GATED:
            up_lo, up_hi = p.to_octets(loaded_ups[i], 0, UNITS, x_ptr.dtype.element_ty, None)
            lo, hi = a.silu_and_mul(lo, up_lo), a.silu_and_mul(hi, up_hi)
        amax = p.block_amax(lo, hi, SPLIT)
        if FORMAT == "nvfp4":
            byte, multiplier = p.nvfp4_scale(amax, encode, decode)
        elif FORMAT == "mxfp4":
            byte, multiplier = p.mxfp4_scale(amax)
        else:
            byte, multiplier = p.mxfp8_scale(amax)

        if FORMAT == "mxfp8":
            words = p.pack_e4m3(lo, hi, multiplier)
            if not EVEN:
                words = tl.where(tl.expand_dims(there, 1), words, 0)
        else:
            words = p.pack_e2m1(lo, hi, multiplier)
        place = (row.to(tl.int64) * out_blocks + col) * SPLIT + part
        t.store_words(payload_ptr, place, words, None if EVEN else (row < rows) & (col < out_blocks))
        offset = t.scale_offset(row, col, padded_cols, LAYOUT)
        if EVEN:
            inside = part == 0
        else:
            byte = tl.where(there, byte, 0)
            inside = (row < padded_rows) & (col < padded_cols) & (part == 0)
        tl.store(scales_ptr + offset, byte.to(tl.uint8), mask=inside)


# Steps a program, and how far ahead they are loaded, by the least number of elements of a call. Measured on an NVIDIA
# H200 (benchmarks/quantize_probe.py). NVFP4's blocks leave registers for a second step's loads; what is best where a
# call is two to four waves of programs depends on how full the last one is.
_STEPS = {
    "nvfp4": ((1 << 28, 8, 2), (3 << 24, 4, 2), (1 << 25, 8, 1), (1 << 23, 4, 1), (1 << 22, 2, 1)),
    "mxfp4": ((3 << 24, 4, 1), (1 << 25, 2, 1), (1 << 22, 4, 1)),
    "mxfp8": ((3 << 24, 4, 1), (1 << 25, 2, 1), (1 << 22, 4, 1)),
}
_TILE = 128  # blocks, a thread each


def tiling(fmt: BlockFormat, layout: str, rows: int, blocks: int, gated: bool = False) -> Tiling:
    """How a call is cut up. Few elements take one step a program, so that more programs share the latency."""
    if INTERPRETED:  # few programs, as each takes long
        return Tiling(128, 16)
    return _tiling_on_gpu(fmt, layout, rows, blocks, gated)


def _tiling_on_gpu(fmt: BlockFormat, layout: str, rows: int, blocks: int, gated: bool = False) -> Tiling:
    elements = rows * blocks * fmt.block_size
    if layout != scale_layouts.LINEAR and blocks <= 16:
        columns = 8 if blocks <= 8 else 16
        return Tiling(_TILE // columns, columns, ITERS=4 if elements >= 1 << 22 else 1)
    if layout == scale_layouts.LINEAR or (layout == scale_layouts.SWIZZLED_128X4 and rows < 128):
        tile = Tiling(1, _TILE)  # of rows so few, those 32 apart are mostly padding
    else:
        tile = Tiling(_TILE // 32, 32)
    for least, steps, ahead in _STEPS[fmt.name]:
        if elements >= least and rows >= 128:
            # A gated step has twice the loads and instructions.
            return tile._replace(ITERS=min(steps, 4), AHEAD=1) if gated else tile._replace(ITERS=steps, AHEAD=ahead)
    return tile


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
        AHEAD=_ahead(tile, even, x.element_size()),
        EVEN=even,
    )


def _ahead(tile: Tiling, even: bool, itemsize: int) -> int:
    """Masks or values of other sizes leave no registers for more than one step's loads."""
    return tile.AHEAD if even and itemsize == 2 else 1


# Rows of 256 blocks that take four steps a program. Eight take the compiler long, so only some cases have them.
_LARGE = 1 << 11


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
    for rows in (1 << 10, 1 << 13, 3 << 12, 1 << 16):
        yield _aot_case(NVFP4, swizzled, "bf16", 1, False, rows, True)
    yield _aot_case(NVFP4, swizzled, "bf16", 1, False, 1 << 16, False)
    for blocks in (8, 16):
        yield _aot_case(NVFP4, swizzled, "bf16", 1, False, 1 << 16, True, blocks)
    for dtype, form, inversed in (("fp16", 2, False), ("u8", 1, True), ("bf16", 1, True)):
        yield _aot_case(NVFP4, swizzled, dtype, form, inversed, _LARGE, False)
    for fmt, layout, dtype, rows, even in (
        (NVFP4, swizzled, "bf16", _LARGE, True),
        (NVFP4, swizzled, "bf16", _LARGE, False),
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
    ahead = _ahead(tile, even, 4 if dtype == "fp32" else 2)
    signature = {"x_ptr": f"*{dtype}", "payload_ptr": "*u8", "scales_ptr": "*u8", **dict.fromkeys(_SIZES, "i32")}
    constants = {"FORMAT": fmt.name, "LAYOUT": LAYOUT_CODES[layout], "GLOBAL": form, "INVERSED": inversed}
    constants["GATED"] = gated
    if form:
        signature["global_scale_ptr"] = "*fp32"
    else:
        constants["global_scale_ptr"] = None
    shape = f"{tile.R}x{tile.C}x{tile.ITERS}s{tile.SPLIT}{f'a{ahead}' if ahead > 1 else ''}{'-even' * even}"
    name = f"quantize-{'silu-' * gated}{fmt.name}-{layout}-{dtype}-gs{form}{'i' * inversed}-{shape}"
    constants |= {**tile._asdict(), "AHEAD": ahead, "EVEN": even}
    return AotCase(name, quantize_kernel, signature, constants, tile.threads)
