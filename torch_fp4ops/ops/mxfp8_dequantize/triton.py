"""mxfp8_dequantize in Triton: any GPU from compute capability 8.0, ROCm included."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import MXFP8
from .. import _scales
from .._triton_dequantize import dequantize_rows
from .._triton_launch import why_not
from . import mxfp8_dequantize


@mxfp8_dequantize.backend("triton", unsupported=why_not, replayable=True)
def mxfp8_dequantize_triton(
    input: Tensor,
    scale_tensor: Tensor,
    is_sf_swizzled_layout: bool = True,
    sf_swizzle_layout: int | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    layout = _scales.mxfp8_layout(is_sf_swizzled_layout, sf_swizzle_layout)
    out = input.new_empty(input.shape, dtype=out_dtype)
    dequantize_rows(input, scale_tensor, MXFP8, layout, None, False, out)
    return out
