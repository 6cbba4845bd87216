"""mxfp8_quantize in Triton: any GPU from compute capability 8.0, ROCm included."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import scale_layouts
from ...formats import MXFP8
from .. import _scales
from .._triton_launch import why_not
from .._triton_quantize import quantize_rows
from . import mxfp8_quantize


@mxfp8_quantize.backend("triton", unsupported=why_not, replayable=True)
def mxfp8_quantize_triton(
    input: Tensor,
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    *,
    sf_swizzle_layout: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    layout = _scales.mxfp8_layout(is_sf_swizzled_layout, sf_swizzle_layout)
    *leading, k = input.shape
    k = scale_layouts.round_up(k, alignment)
    elements = input.new_empty((*leading, k), dtype=torch.float8_e4m3fn)
    scale_rows, scale_cols = scale_layouts.scale_shape(math.prod(leading), k // MXFP8.block_size, layout)
    scales = input.new_empty((scale_rows * scale_cols,), dtype=torch.uint8)
    quantize_rows(input, MXFP8, layout, None, False, elements.view(torch.uint8), scales, k_padded=k)
    return elements, scales
