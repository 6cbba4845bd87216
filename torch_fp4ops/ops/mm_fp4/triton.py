"""mm_fp4 in Triton: any GPU from compute capability 8.0, ROCm included. Before 10.0 codes are decoded to bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ... import scale_layouts
from ...contracts import Call
from ...formats import MXFP4, NVFP4
from .._matmul import reads_plain
from .._triton_gemm_launch import Operand
from .._triton_gemm_offline import MatmulCase, matmul_cases
from .._triton_launch import why_not
from .._triton_product import product
from . import a_layout, mm_fp4


def _unsupported(call: Call) -> str | None:
    return reads_plain(call) or why_not(call)


@mm_fp4.backend("triton", unsupported=_unsupported, replayable=True)
def mm_fp4_triton(
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    block_size: int = 16,
    use_8x4_sf_layout: bool = False,
    use_nvfp4: bool = True,
    b_layout: str = "plain",
    backend: str = "auto",
) -> Tensor:
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)
    fmt = NVFP4 if use_nvfp4 else MXFP4
    b_scales = b_descale if b_descale.dim() == 1 else b_descale.T
    left = Operand.of(fmt, a, a_descale, a_layout(use_8x4_sf_layout))
    product(left, Operand.of(fmt, b.T, b_scales, scale_layouts.SWIZZLED_128X4), out, alpha)
    return out


def offline_cases() -> Iterator[MatmulCase]:
    operands = [(fmt, fmt, torch.bfloat16) for fmt in ("nvfp4", "mxfp4")]
    return matmul_cases(operands, scale_layouts.SWIZZLED_128X4)
