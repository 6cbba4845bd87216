"""Contract pieces that several ops share: block scales, global scales, alpha, and their reference forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import scale_layouts
from ..codecs import NATIVE_DTYPES
from ..contracts import Call, Out
from ..formats import BlockFormat, fp4_format
from ..registry import NativeDtypes

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def byte_arguments(
    codes: Sequence[str], scales: Sequence[str], format_of: Callable[[Mapping[str, Any]], BlockFormat | None]
) -> dict[str, NativeDtypes]:
    """An op's arguments of packed FP4 codes and of block scales, by the format that a call's arguments mean.

    Where they mean none scales may have either dtype: what is wrong then is for the contract to say.
    """

    def of_codes(given: Mapping[str, Any]) -> tuple[torch.dtype, ...]:
        return (NATIVE_DTYPES["e2m1"],)

    def of_scales(given: Mapping[str, Any]) -> tuple[torch.dtype, ...]:
        fmt = format_of(given)
        return tuple(NATIVE_DTYPES[code] for code in ((fmt.scale,) if fmt else ("e4m3", "ue8m0")))

    return dict.fromkeys(codes, of_codes) | dict.fromkeys(scales, of_scales)


def require_fp4_format(call: Call) -> BlockFormat:
    """The format that ``sf_vec_size`` and ``sf_use_ue8m0`` name."""
    fmt = fp4_format(call.sf_vec_size, call.sf_use_ue8m0)
    given = f"{call.sf_vec_size} with sf_use_ue8m0={call.sf_use_ue8m0}"
    call.require(fmt is not None, "sf_vec_size", given, "16 with False (NVFP4) or 32 with True (MXFP4)")
    assert fmt is not None
    return fmt


def require_layout(call: Call) -> str:
    """The scale layout that the two flags name."""
    consistent = call.is_sf_swizzled_layout or not call.is_sf_8x4_layout
    call.require(consistent, "is_sf_swizzled_layout", call.is_sf_swizzled_layout, "True where is_sf_8x4_layout is")
    return scale_layouts.layout_from_flags(call.is_sf_swizzled_layout, call.is_sf_8x4_layout)


def require_blocks(call: Call, argument: str, k: int, fmt: BlockFormat) -> None:
    """K must be whole blocks."""
    whole = k % fmt.block_size == 0
    call.require(whole, argument, f"of K = {k}", f"K a multiple of {fmt.block_size} ({fmt.name})")


def require_global_scale(call: Call, fmt: BlockFormat, rows: int) -> None:
    """None exactly for formats without one; else fp32, one element or one for each of the rows."""
    if not fmt.has_global_scale:
        given = "given"
        call.require(call.global_scale is None, "global_scale", given, f"None: {fmt.name} has no global scale")
        return
    call.require(call.global_scale is not None, "global_scale", "None", f"a float32 tensor ({fmt.name})")
    require_scalar_or_rows(call, "global_scale", rows)


def require_scalar_or_rows(call: Call, argument: str, rows: int) -> None:
    """fp32, one element or one for each of the rows, of any shape with that many elements."""
    call.require_dtype(argument, (torch.float32,))
    t = getattr(call, argument)
    count = t.numel()
    if not (type(count) is int and count == 1):
        call.require(count == rows, argument, t.shape, f"one element or one for each of the {rows} rows")


def require_scales(call: Call, argument: str, rows: int, cols: int, layout: str) -> None:
    """Contiguous uint8 block scales of the layout: its 2-D padded shape, or the same bytes flat."""
    call.require_dtype(argument, (torch.uint8,))
    t = getattr(call, argument)
    padded_rows, padded_cols = scale_layouts.scale_shape(rows, cols, layout)
    where = f" ({layout} scales of {rows} rows and {cols} blocks a row)"
    if t.dim() == 1:
        call.require_shape(argument, (padded_rows * padded_cols,), where)
    else:
        call.require_shape(argument, (padded_rows, padded_cols), where)
    call.require_contiguous(argument)


def fp4_outputs(call: Call, fmt: BlockFormat, leading: Sequence[int], k: int) -> tuple[Out, Out]:
    """Codes and scales of the values ``[*leading, K]`` that ``input`` stands for, by fp4_quantize's other arguments."""
    layout = require_layout(call)
    rows = math.prod(leading)
    require_blocks(call, "input", k, fmt)
    require_global_scale(call, fmt, rows)
    scales = scale_layouts.scale_shape(rows, k // fmt.block_size, layout)
    return Out((*leading, k // 2), torch.uint8), Out(scales, torch.uint8)


def require_positive_global_scale(call: Call) -> None:
    """Reads data: only for a check of values, on the CPU."""
    if call.global_scale is not None:
        call.require_positive("global_scale")


def per_row(scale: Tensor) -> Tensor:
    """A global scale of one element or one a row, so that it broadcasts against ``[rows, K]``."""
    return scale.reshape(-1, 1)


def encode_decode(global_scale: Tensor, inversed: bool) -> tuple[Tensor, Tensor]:
    """Encode and decode forms of a global scale, each ``[1 or rows, 1]``."""
    given = per_row(global_scale)
    return (1.0 / given, given) if inversed else (given, 1.0 / given)


def require_out_dtype(call: Call, argument: str = "out_dtype") -> None:
    """bf16, fp16 or fp32."""
    given = getattr(call, argument)
    if given not in FLOATS:
        call.require(False, argument, given, " or ".join(map(str, FLOATS)))


SF_LAYOUTS = (scale_layouts.SWIZZLED_128X4, scale_layouts.SWIZZLED_8X4, scale_layouts.LINEAR)
"""Scale layouts by the number that FlashInfer's ``SfLayout`` gives them."""


def mxfp8_layout(is_sf_swizzled_layout: bool, sf_swizzle_layout: int | None) -> str:
    """The scale layout of the MXFP8 quantisers' two arguments; the number wins."""
    if sf_swizzle_layout is not None:
        return SF_LAYOUTS[sf_swizzle_layout]
    return scale_layouts.layout_from_flags(is_sf_swizzled_layout, False)


def require_mxfp8_layout(call: Call) -> str:
    given = call.sf_swizzle_layout
    known = given is None or 0 <= given < len(SF_LAYOUTS)
    call.require(known, "sf_swizzle_layout", given, "None, 0 (128x4), 1 (8x4) or 2 (linear)")
    return mxfp8_layout(call.is_sf_swizzled_layout, given)


def require_transposed_scales(call: Call, argument: str, rows: int, cols: int) -> None:
    """128x4 scales of a transposed weight: flat, or the ``.T`` view of their padded 2-D shape."""
    t = getattr(call, argument)
    if t.dim() == 1:
        require_scales(call, argument, rows, cols, scale_layouts.SWIZZLED_128X4)
        return
    call.require_dtype(argument, (torch.uint8,))
    padded_rows, padded_cols = scale_layouts.scale_shape(rows, cols, scale_layouts.SWIZZLED_128X4)
    call.require_shape(argument, (padded_cols, padded_rows), f" (128x4 scales of {rows} rows, transposed)")
    call.require_contiguous(argument, t.t(), "column-major: the .T view of a contiguous tensor")
