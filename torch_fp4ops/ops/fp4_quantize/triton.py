"""fp4_quantize in Triton: any GPU from compute capability 8.0, ROCm included."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import scale_layouts
from ...formats import fp4_format
from .._triton_launch import why_not
from .._triton_quantize import quantize_rows
from . import fp4_quantize


@fp4_quantize.backend("triton", unsupported=why_not)
def fp4_quantize_triton(
    input: Tensor,
    global_scale: Tensor | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    is_global_scale_inversed: bool = False,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    fmt = fp4_format(sf_vec_size, sf_use_ue8m0)
    assert fmt is not None
    layout = scale_layouts.layout_from_flags(is_sf_swizzled_layout, is_sf_8x4_layout)
    *leading, k = input.shape
    codes = input.new_empty((*leading, k // 2), dtype=torch.uint8)
    shape = scale_layouts.scale_shape(math.prod(leading), k // fmt.block_size, layout)
    scales = input.new_empty(shape, dtype=torch.uint8)
    quantize_rows(input, fmt, layout, global_scale, is_global_scale_inversed, codes, scales)
    return codes, scales
