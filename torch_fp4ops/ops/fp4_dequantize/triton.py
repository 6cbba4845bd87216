"""fp4_dequantize in Triton: any GPU from compute capability 8.0, ROCm included."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import scale_layouts
from ...formats import fp4_format
from .._triton_dequantize import dequantize_rows
from .._triton_launch import why_not
from . import fp4_dequantize


@fp4_dequantize.backend("triton", unsupported=why_not, replayable=True)
def fp4_dequantize_triton(
    input: Tensor,
    scale: Tensor,
    global_scale: Tensor | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    is_global_scale_inversed: bool = False,
    *,
    out_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    fmt = fp4_format(sf_vec_size, sf_use_ue8m0)
    assert fmt is not None
    layout = scale_layouts.layout_from_flags(is_sf_swizzled_layout, is_sf_8x4_layout)
    out = input.new_empty((*input.shape[:-1], input.shape[-1] * 2), dtype=out_dtype)
    dequantize_rows(input, scale, fmt, layout, global_scale, is_global_scale_inversed, out)
    return out
