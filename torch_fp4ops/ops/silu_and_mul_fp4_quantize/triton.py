"""silu_and_mul_fp4_quantize in Triton: any GPU from compute capability 8.0, ROCm included."""

from __future__ import annotations

from torch import Tensor

from .._triton_launch import why_not
from .._triton_quantize import fp4_outputs, quantize_rows
from . import silu_and_mul_fp4_quantize


@silu_and_mul_fp4_quantize.backend("triton", unsupported=why_not, replayable=True)
def silu_and_mul_fp4_quantize_triton(
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
    flags = (sf_vec_size, sf_use_ue8m0, is_sf_swizzled_layout, is_sf_8x4_layout)
    fmt, layout, codes, scales = fp4_outputs(input, input.shape[-1] // 2, *flags)
    quantize_rows(input, fmt, layout, global_scale, is_global_scale_inversed, codes, scales, gated=True)
    return codes, scales
