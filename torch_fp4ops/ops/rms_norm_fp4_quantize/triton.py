"""rms_norm_fp4_quantize in Triton: any GPU from compute capability 8.0, ROCm included."""

from __future__ import annotations

from torch import Tensor

from ...contracts import Call
from .._triton_launch import why_not
from .._triton_quantize import fp4_outputs
from .._triton_rms_norm import LONGEST_ROW, rms_norm_quantize_rows
from . import rms_norm_fp4_quantize


def _unsupported(call: Call) -> str | None:
    if call.input.shape[-1] > LONGEST_ROW:
        return f"a row has {call.input.shape[-1]} values; a program holds up to {LONGEST_ROW}"
    return why_not(call)


@rms_norm_fp4_quantize.backend("triton", unsupported=_unsupported, replayable=True)
def rms_norm_fp4_quantize_triton(
    input: Tensor,
    weight: Tensor | None,
    global_scale: Tensor | None = None,
    eps: float = 1e-6,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    is_global_scale_inversed: bool = False,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    flags = (sf_vec_size, sf_use_ue8m0, is_sf_swizzled_layout, is_sf_8x4_layout)
    fmt, layout, codes, scales = fp4_outputs(input, input.shape[-1], *flags)
    rms_norm_quantize_rows(input, weight, eps, fmt, layout, global_scale, is_global_scale_inversed, codes, scales)
    return codes, scales
