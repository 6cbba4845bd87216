"""The Triton kernel that normalises rows by their root mean square and quantises them to NVFP4 or MXFP4.

A program holds R whole rows in registers, STEPS times C blocks each, so every value is read once. As in
``_triton_quantize`` a thread holds whole blocks, and in the 128x4 layout the rows of a program lie apart, because the
scales of such rows are neighbours in memory. The row sums are exact, so no tiling changes a byte.
"""

# mypy: disable-error-code="assignment, var-annotated"
# Kernels grow tuples and rebind names to other types, which Triton's compiler unrolls.

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import scale_layouts
from ..formats import MXFP4, NVFP4, BlockFormat
from . import _triton_activations as a
from . import _triton_pack as pack
from . import _triton_prims as p
from . import _triton_tiles as t
from ._triton_launch import INTERPRETED, LAYOUT_CODES, AotCase, global_scale_form, launch, rows_of_units

__all__ = ["LONGEST_ROW", "rms_norm_quantize_kernel", "rms_norm_quantize_rows"]

LONGEST_ROW = 32768
"""Values of a row that a program can hold."""

_SIZES = ["rows", "row_units", "blocks", "padded_rows", "padded_cols"]
_FLOATS = ["k", "eps"]


@triton.jit
def _across(x, R: tl.constexpr, C: tl.constexpr):
    """``[R]`` to ``[R * C]``, each one for the threads of its row."""
    return tl.reshape(tl.broadcast_to(tl.expand_dims(x, 1), (R, C)), (R * C,))


@triton.jit(do_not_specialize=[*_SIZES, *_FLOATS])
def rms_norm_quantize_kernel(
    x_ptr,
    weight_ptr,
    global_scale_ptr,
    payload_ptr,
    scales_ptr,
    rows,
    row_units,  # 16-byte units from one row of x to the next
    blocks,  # of a row
    padded_rows,
    padded_cols,
    k,  # values of a row, fp32
    eps,
    FORMAT: tl.constexpr,
    LAYOUT: tl.constexpr,
    GLOBAL: tl.constexpr,
    INVERSED: tl.constexpr,
    WEIGHT: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    STEPS: tl.constexpr,
    ITERS: tl.constexpr,
):
    BLOCK: tl.constexpr = 16 if FORMAT == "nvfp4" else 32
    UNITS: tl.constexpr = BLOCK * x_ptr.dtype.element_ty.primitive_bitwidth // 128
    p.wait_for_previous()
    pid = tl.program_id(0)
    col = tl.arange(0, R * C) % C
    weights = ()
    if WEIGHT:
        WEIGHT_UNITS: tl.constexpr = BLOCK * weight_ptr.dtype.element_ty.primitive_bitwidth // 128
    if WEIGHT and C < 512:  # more threads have too few registers
        for s in tl.static_range(STEPS):
            weights += (_load_weight(weight_ptr, col + s * C, blocks, WEIGHT_UNITS),)
    one_scale = tl.full((1,), 1.0, tl.float32)
    if GLOBAL == 1:
        one_scale = tl.load(global_scale_ptr + tl.arange(0, 1))
    row = _first_rows(pid, LAYOUT, R, C, ITERS)
    words = _load_row(x_ptr, row, col, rows, row_units, blocks, UNITS, C, STEPS)
    for i in tl.range(ITERS, num_stages=1):
        # Loaded before this step waits for its sum.
        next_row = row + t.row_step(LAYOUT, R)
        rows_ahead = tl.where(i + 1 < ITERS, rows, 0)
        next_words = _load_row(x_ptr, next_row, col, rows_ahead, row_units, blocks, UNITS, C, STEPS)
        octets = ()
        for s in tl.static_range(STEPS):
            octets += (p.to_octets(words[s], x_ptr.dtype.element_ty, None),)
        factor = _reciprocal_rms(octets, col, blocks, k, eps, R, C, STEPS)
        if GLOBAL == 2:
            global_scale = tl.load(global_scale_ptr + row, mask=row < rows, other=1.0)
        else:
            global_scale = one_scale
        encode, decode = p.encode_decode(global_scale, INVERSED)
        for s in tl.static_range(STEPS):
            here = col + s * C
            lo, hi = octets[s]
            lo *= tl.expand_dims(factor, 1)
            hi *= tl.expand_dims(factor, 1)
            if WEIGHT:
                if C < 512:
                    weight = weights[s]
                else:
                    weight = _load_weight(weight_ptr, here, blocks, WEIGHT_UNITS)
                weight_lo, weight_hi = p.to_octets(weight, weight_ptr.dtype.element_ty, None)
                lo *= weight_lo
                hi *= weight_hi
            lo, hi = a.positive_nan(lo), a.positive_nan(hi)
            amax = p.block_amax(lo, hi, 1)
            if FORMAT == "nvfp4":
                byte, multiplier = p.nvfp4_scale(amax, encode, decode)
            else:
                byte, multiplier = p.mxfp4_scale(amax)
            codes = pack.e2m1(lo, hi, multiplier)
            there = (row < rows) & (here < blocks)
            t.store_words(t.word_pointers(payload_ptr, row.to(tl.int64) * blocks + here, BLOCK // 8), codes, there)
            byte = tl.where(there, byte, 0).to(tl.uint8)
            offset = t.scale_offset(row, here, padded_cols, LAYOUT)
            tl.store(scales_ptr + offset, byte, mask=(row < padded_rows) & (here < padded_cols))
        row = next_row
        words = next_words


@triton.jit
def _first_rows(pid, LAYOUT: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ITERS: tl.constexpr):
    """The row of each thread in a program's first step."""
    strip = tl.arange(0, R * C) // C
    step = pid * ITERS
    if LAYOUT == t.SWIZZLED_128X4:
        S: tl.constexpr = 128 // R
        tl.static_assert(S % ITERS == 0, "the steps of a program have neighbouring rows")
        return step // S * 128 + step % S + strip * S
    else:
        return step * R + strip


@triton.jit
def _load_weight(weight_ptr, col, blocks, UNITS: tl.constexpr):
    return t.load_units(t.unit_pointers(weight_ptr, col * UNITS), col < blocks, UNITS)


@triton.jit
def _load_row(x_ptr, row, col, rows, row_units, blocks, UNITS: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr):
    words = ()
    units = t.unit_pointers(x_ptr, row.to(tl.int64) * row_units + col * UNITS)
    for s in tl.static_range(STEPS):
        there = (row < rows) & (col + s * C < blocks)
        words += (t.load_units(units + s * C * UNITS * 4, there, UNITS),)
    return words


@triton.jit
def _reciprocal_rms(octets, col, blocks, k, eps, R: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr):
    """``[R * C]``: of the row of each thread."""
    sums = ()
    most = tl.full((R * C,), 0, tl.int32)
    for s in tl.static_range(STEPS):
        totals = a.sums_of_squares(octets[s][0], octets[s][1])
        for j in tl.static_range(len(totals)):
            total = tl.where(col + s * C < blocks, totals[j], 0.0)
            sums += (total,)
            # Sums are no less than zero, so their bits are ordered as they are, and NaN above all.
            most = tl.maximum(most, total.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    most = tl.max(tl.reshape(most, (R, C)), 1)
    to_units, unit = a.units_of(most)
    to_units = _across(to_units, R, C)
    count = tl.full((R * C,), 0, tl.int64)
    for j in tl.static_range(len(sums)):
        count += (sums[j] * to_units).to(tl.int64)
    count = tl.sum(tl.reshape(count, (R, C)), 1)
    return _across(a.reciprocal_rms(most, count, unit, k, eps), R, C)


class RowTiling(NamedTuple):
    """R rows at a time, each STEPS times C blocks; ITERS times a program."""

    R: int
    C: int
    STEPS: int
    ITERS: int = 1


def tiling(fmt: BlockFormat, rows: int, cols: int) -> RowTiling:
    """``cols`` blocks a row, padding included. Where there are many rows, threads hold 32 values if 512 of them can.

    Few rows are cut finer, so that more threads share the latency; many take several steps a program, so that one
    row is loaded while another is summed.
    """
    if INTERPRETED:  # few programs, as each takes long
        c = triton.next_power_of_2(cols)
        return RowTiling(max(1, min(128, 4096 // c)), c, 1)
    return _tiling_on_gpu(fmt, rows, cols)


def _tiling_on_gpu(fmt: BlockFormat, rows: int, cols: int) -> RowTiling:
    many = rows >= 1024
    blocks_a_thread = 32 // fmt.block_size if many else 1
    c = 8
    while c < 512 and c * (blocks_a_thread if c >= 128 else 1) < cols:
        c *= 2
    steps = triton.cdiv(cols, c)
    return RowTiling(max(1, 128 // c), c, steps, 4 if many and steps * fmt.block_size <= 32 else 1)


def shipped_tilings(fmt: BlockFormat, cols: int) -> list[RowTiling]:
    """Whatever :func:`tiling` returns for rows of so many blocks."""
    return list(dict.fromkeys(_tiling_on_gpu(fmt, rows, cols) for rows in (1, 1 << 20)))


def rms_norm_quantize_rows(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    fmt: BlockFormat,
    layout: str,
    global_scale: Tensor | None,
    inversed: bool,
    payload: Tensor,
    scales: Tensor,
    tile: RowTiling | None = None,
) -> None:
    """Normalise ``x``, flattened to rows, and quantise it; every byte of ``payload`` and ``scales`` is written."""
    if not scales.numel():
        return
    x, row_units = rows_of_units(x)
    if weight is not None:
        weight, _ = rows_of_units(weight.unsqueeze(0))
    rows, k = x.shape
    blocks = k // fmt.block_size
    padded_rows, padded_cols = scale_layouts.scale_shape(rows, blocks, layout)
    if tile is None:
        tile = tiling(fmt, rows, padded_cols)
    global_scale, form = global_scale_form(global_scale)
    launch(
        rms_norm_quantize_kernel,
        (triton.cdiv(padded_rows, tile.R * tile.ITERS),),
        tile.R * tile.C,
        x.device,
        x,
        weight,
        global_scale,
        payload,
        scales,
        rows,
        row_units,
        blocks,
        padded_rows,
        padded_cols,
        float(k),
        eps,
        FORMAT=fmt.name,
        LAYOUT=LAYOUT_CODES[layout],
        GLOBAL=form,
        INVERSED=inversed,
        WEIGHT=weight is not None,
        **tile._asdict(),
    )


def aot_cases() -> Iterator[AotCase]:
    """Formats, layouts, dtypes and forms of global scale; rows short and long, few and many."""
    swizzled, linear = scale_layouts.SWIZZLED_128X4, scale_layouts.LINEAR
    for k in (128, 4096, 16384):
        for rows in (1, 1 << 16):
            yield _aot_case(NVFP4, swizzled, "bf16", "bf16", 1, k, rows)
    for dtype, weight, form, k in (
        ("fp32", "fp16", 2, 8192),
        ("fp16", None, 1, 8192),
        ("fp32", "fp32", 1, LONGEST_ROW),
    ):
        yield _aot_case(NVFP4, swizzled, dtype, weight, form, k, 1 << 16)
    yield _aot_case(NVFP4, linear, "bf16", "fp32", 1, 16384, 1 << 16)
    for dtype, layout, k in (("bf16", swizzled, 8192), ("fp32", scale_layouts.SWIZZLED_8X4, LONGEST_ROW)):
        yield _aot_case(MXFP4, layout, dtype, dtype, 0, k, 1 << 16)


def _aot_case(fmt: BlockFormat, layout: str, dtype: str, weight: str | None, form: int, k: int, rows: int) -> AotCase:
    tile = tiling(fmt, rows, scale_layouts.scale_shape(rows, k // fmt.block_size, layout)[1])
    signature = {"x_ptr": f"*{dtype}", "payload_ptr": "*u8", "scales_ptr": "*u8"}
    signature |= {**dict.fromkeys(_SIZES, "i32"), **dict.fromkeys(_FLOATS, "fp32")}
    constants = {"FORMAT": fmt.name, "LAYOUT": LAYOUT_CODES[layout], "GLOBAL": form, "INVERSED": False}
    constants |= {"WEIGHT": weight is not None, **tile._asdict()}
    for name, kind in (("weight_ptr", weight), ("global_scale_ptr", "fp32" if form else None)):
        if kind:
            signature[name] = f"*{kind}"
        else:
            constants[name] = None
    cut = f"{tile.R}x{tile.C}x{tile.STEPS}x{tile.ITERS}"
    name = f"rms-norm-{fmt.name}-{layout}-{dtype}-{weight}-gs{form}-{cut}"
    return AotCase(name, rms_norm_quantize_kernel, signature, constants, tile.R * tile.C)
