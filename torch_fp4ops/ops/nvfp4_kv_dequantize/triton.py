"""nvfp4_kv_dequantize in Triton: any GPU from compute capability 8.0, ROCm included."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import scale_layouts
from ...formats import NVFP4
from .._triton_dequantize import dequantize_rows
from .._triton_launch import why_not
from . import nvfp4_kv_dequantize


@nvfp4_kv_dequantize.backend("triton", unsupported=why_not, replayable=True)
def nvfp4_kv_dequantize_triton(
    fp4_data: Tensor,
    block_scales: Tensor,
    global_scale: Tensor,
    output_dtype: torch.dtype = torch.bfloat16,
    *,
    backend: str = "auto",
) -> Tensor:
    out = fp4_data.new_empty((*fp4_data.shape[:-1], fp4_data.shape[-1] * 2), dtype=output_dtype)
    dequantize_rows(fp4_data, block_scales.contiguous(), NVFP4, scale_layouts.LINEAR, global_scale, True, out)
    return out
