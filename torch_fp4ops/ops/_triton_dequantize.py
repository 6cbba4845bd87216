"""The Triton kernel that turns NVFP4, MXFP4 and MXFP8 rows back into values, from every scale layout.

A thread makes the values that fill one 16-byte store, so a block is spread over several threads. Programs cover the
matrix as those of ``_triton_quantize`` do.
"""

# mypy: disable-error-code="assignment, var-annotated"
# Kernels grow tuples and rebind names to other types, which Triton's compiler unrolls.

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import scale_layouts
from ..formats import FORMATS, NVFP4, BlockFormat
from . import _triton_prims as p
from . import _triton_tiles as t
from ._triton_gemm_launch import Operand
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

__all__ = ["decoded", "dequantize_kernel", "dequantize_rows"]

_SIZES = ["rows", "row_units", "blocks", "padded_cols", "col_tiles"]


@triton.jit
def _unit(
    pid, col_tiles, i, rows, blocks, row_units, ORDER: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    SPLIT: tl.constexpr, ITERS: tl.constexpr,
):  # fmt: skip
    """As :func:`position`, and whether there is such a part of a block and where its payload lies."""
    row, col, part = t.position(pid, col_tiles, i, ORDER, R, C, SPLIT, ITERS)
    there = (row < rows) & (col < blocks)
    return row, col, part, there, row.to(tl.int64) * row_units + (col * SPLIT + part)


@triton.jit(do_not_specialize=_SIZES)
def dequantize_kernel(
    payload_ptr,
    scales_ptr,
    global_scale_ptr,
    out_ptr,
    rows,
    row_units,  # what a thread loads, from one row of the payload to the next
    blocks,
    padded_cols,
    col_tiles,
    FORMAT: tl.constexpr,
    LAYOUT: tl.constexpr,
    GLOBAL: tl.constexpr,
    INVERSED: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    ITERS: tl.constexpr,
    IN_FRONT: tl.constexpr,  # of a product that waits for it: as short as can be from the wait to the end
):
    BLOCK: tl.constexpr = 16 if FORMAT == "nvfp4" else 32
    E: tl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
    SPLIT: tl.constexpr = BLOCK // E
    BYTES: tl.constexpr = E if FORMAT == "mxfp8" else E // 2  # of payload for a thread
    ORDER: tl.constexpr = t.LINEAR if IN_FRONT else LAYOUT  # with few rows, those that share a word are not there
    pid = tl.program_id(0)
    if IN_FRONT:
        p.let_next_start()
        for i in tl.static_range(ITERS):
            row, col, _, there, place = _unit(pid, col_tiles, i, rows, blocks, row_units, ORDER, R, C, SPLIT, ITERS)
            p.prefetch(payload_ptr + place * BYTES, there)
            p.prefetch(scales_ptr + t.scale_offset(row, col, padded_cols, LAYOUT), there)
    p.wait_for_previous()
    # All loads come before the first store, past which the compiler moves none.
    payloads = ()
    steps = ()
    for i in tl.static_range(ITERS):
        row, col, _, there, place = _unit(pid, col_tiles, i, rows, blocks, row_units, ORDER, R, C, SPLIT, ITERS)
        payloads += (t.load_narrow(payload_ptr, place, there, BYTES),)
        steps += (tl.load(scales_ptr + t.scale_offset(row, col, padded_cols, LAYOUT), mask=there, other=0),)
    decode = tl.full((1,), 1.0, tl.float32)
    if GLOBAL == 1:
        _, decode = p.encode_decode(tl.load(global_scale_ptr + tl.arange(0, 1)), INVERSED)

    for i in tl.static_range(ITERS):
        row, col, part, there, _ = _unit(pid, col_tiles, i, rows, blocks, row_units, ORDER, R, C, SPLIT, ITERS)
        if FORMAT == "mxfp8":
            values = p.decode_e4m3_word(payloads[i])
        else:
            values = p.decode_e2m1_word(payloads[i], E)
        byte = steps[i].to(tl.uint32)
        if FORMAT == "nvfp4":
            step = p.decode_e4m3(byte)
        else:
            step = p.decode_ue8m0(byte)
        values = values * tl.expand_dims(step, 1)
        if GLOBAL == 2:
            _, decode = p.encode_decode(tl.load(global_scale_ptr + row, mask=there, other=1.0), INVERSED)
        if GLOBAL != 0:
            values = values * tl.expand_dims(decode, 1)
        start = ((row.to(tl.int64) * blocks + col) * SPLIT + part) * E
        values = p.round_to(values, out_ptr.dtype.element_ty)
        tl.store(out_ptr + start[:, None] + tl.arange(0, E)[None, :], values, mask=there[:, None])


def tiling(layout: str, rows: int, blocks: int, split: int) -> Tiling:
    if INTERPRETED:  # few programs, as each takes long
        return Tiling(128, 16, SPLIT=split)
    return _tiling_on_gpu(layout, rows, blocks, split)


def _tiling_on_gpu(layout: str, rows: int, blocks: int, split: int) -> Tiling:
    if layout == scale_layouts.LINEAR:
        tile = Tiling(1, 256 // split, SPLIT=split)
    else:
        tile = Tiling(4, 64 // split, SPLIT=split)
    return tile._replace(ITERS=4 if rows * blocks * split >= 1 << 20 else 1)


_THREADS_AT_ONCE = 1 << 18
"""What the largest GPUs hold: only if all are there can a kernel let the next one start."""


def _tiling_in_front(rows: int, blocks: int, split: int) -> Tiling | None:
    """For a matrix that is decoded in front of a product; None where it is large."""
    if rows * blocks * split > _THREADS_AT_ONCE:
        return None
    R = min(triton.next_power_of_2(rows), 8 // split)
    return Tiling(R, 256 // (R * split), SPLIT=split)


def shipped_tilings(layout: str, split: int) -> list[Tiling]:
    """Whatever :func:`tiling` returns."""
    return list(dict.fromkeys(_tiling_on_gpu(layout, 1 << i, 1 << 8, split) for i in range(20)))


def decoded(operand: Operand, dtype: torch.dtype) -> Tensor:
    """A side of a product as it is, or decoded without its global scale: 16 bits hold each code times its scale.

    Whatever is launched next has to wait for this, as products do.
    """
    if operand.scales is None:
        return operand.elements
    fmt, rows = FORMATS[operand.format], operand.elements.shape[0]
    out = torch.empty(rows, operand.k, dtype=dtype, device=operand.elements.device)
    tile = _tiling_in_front(rows, operand.k // fmt.block_size, fmt.block_size * dtype.itemsize // 16)
    in_front = tile is not None
    dequantize_rows(operand.elements, operand.scales, fmt, operand.layout, None, False, out, tile, in_front)
    return out


def dequantize_rows(
    payload: Tensor,
    scales: Tensor,
    fmt: BlockFormat,
    layout: str,
    global_scale: Tensor | None,
    inversed: bool,
    out: Tensor,
    tile: Tiling | None = None,
    in_front: bool = False,
) -> None:
    """Dequantise ``payload``, flattened to rows, with contiguous ``scales`` in their layout, into ``out``.

    ``in_front``: the next kernel is a product that waits for this one.
    """
    if not out.numel():
        return
    elements = 16 // out.element_size()
    split = fmt.block_size // elements
    if payload.dtype != torch.uint8:
        payload = payload.view(torch.uint8)  # Triton knows no E4M3 on compute capability 8.0
    payload, row_units = rows_of_units(payload, elements // fmt.elements_per_byte)
    rows = payload.shape[0]
    blocks = out.shape[-1] // fmt.block_size
    global_scale, form = global_scale_form(global_scale)
    if layout == scale_layouts.LINEAR and form != 2 and payload.is_contiguous():
        rows, blocks = cut_anew(rows, blocks, (tile or tiling(layout, rows, blocks, split)).C)
        row_units = blocks * split
    if tile is None:
        tile = tiling(layout, rows, blocks, split)
    col_tiles = triton.cdiv(blocks, tile.C)
    padded_rows, padded_cols = scale_layouts.scale_shape(rows, blocks, layout)
    launch(
        dequantize_kernel,
        (triton.cdiv(rows if in_front else padded_rows, tile.R * tile.ITERS) * col_tiles,),
        tile.threads,
        out.device,
        payload,
        scales,
        global_scale,
        out,
        rows,
        row_units,
        blocks,
        padded_cols,
        col_tiles,
        FORMAT=fmt.name,
        LAYOUT=LAYOUT_CODES[layout],
        GLOBAL=form,
        INVERSED=inversed,
        R=tile.R,
        C=tile.C,
        ITERS=tile.ITERS,
        IN_FRONT=in_front,
    )


def aot_cases() -> Iterator[AotCase]:
    """Every format to bf16 and fp32, the layouts and forms of global scale for NVFP4, and in front of a product."""
    for fmt in FORMATS.values():
        form = 1 if fmt.has_global_scale else 0
        for dtype in ("bf16", "fp32"):
            yield _aot_case(fmt, scale_layouts.SWIZZLED_128X4, dtype, form, False, 1 << 16)
    for layout, dtype, form, rows in (
        (scale_layouts.LINEAR, "bf16", 1, 1 << 16),
        (scale_layouts.SWIZZLED_8X4, "fp16", 2, 1 << 16),
        (scale_layouts.LINEAR, "bf16", 1, 1),
    ):
        yield _aot_case(NVFP4, layout, dtype, form, True, rows)
    for rows in (1, 64):
        for fmt in FORMATS.values():
            yield _aot_case(fmt, scale_layouts.SWIZZLED_128X4, "bf16", 0, False, rows, in_front=True)
    yield _aot_case(NVFP4, scale_layouts.SWIZZLED_8X4, "bf16", 0, False, 64, in_front=True)


def _aot_case(
    fmt: BlockFormat, layout: str, dtype: str, form: int, inversed: bool, rows: int, in_front: bool = False
) -> AotCase:
    sizes = rows, 1 << 8, fmt.block_size // (4 if dtype == "fp32" else 8)
    tile = (_tiling_in_front(*sizes) if in_front else None) or tiling(layout, *sizes)
    signature = {"payload_ptr": "*u8", "scales_ptr": "*u8", "out_ptr": f"*{dtype}", **dict.fromkeys(_SIZES, "i32")}
    constants = {"FORMAT": fmt.name, "LAYOUT": LAYOUT_CODES[layout], "GLOBAL": form, "INVERSED": inversed}
    constants |= {"R": tile.R, "C": tile.C, "ITERS": tile.ITERS, "IN_FRONT": in_front}
    if form:
        signature["global_scale_ptr"] = "*fp32"
    else:
        constants["global_scale_ptr"] = None
    form_name = "front" if in_front else f"gs{form}{'i' * inversed}"
    name = f"dequantize-{fmt.name}-{layout}-{dtype}-{form_name}-{tile.R}x{tile.C}x{tile.ITERS}"
    return AotCase(name, dequantize_kernel, signature, constants, tile.threads)
