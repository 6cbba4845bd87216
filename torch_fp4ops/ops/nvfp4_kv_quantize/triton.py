"""nvfp4_kv_quantize in Triton: any GPU from compute capability 8.0, ROCm included."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import scale_layouts
from ...formats import NVFP4
from .._triton_launch import why_not
from .._triton_quantize import quantize_rows
from . import nvfp4_kv_quantize


@nvfp4_kv_quantize.backend("triton", unsupported=why_not, replayable=True)
def nvfp4_kv_quantize_triton(input: Tensor, global_scale: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    *leading, k = input.shape
    codes = input.new_empty((*leading, k // 2), dtype=torch.uint8)
    scales = input.new_empty((*leading, k // NVFP4.block_size), dtype=torch.uint8)
    quantize_rows(input, NVFP4, scale_layouts.LINEAR, global_scale, True, codes, scales)
    return codes, scales
