"""mm_mxfp8 in Triton: any GPU from compute capability 8.0, ROCm included. Before 10.0 elements become bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ... import scale_layouts
from ...contracts import Call
from ...formats import MXFP8
from .._matmul import reads_plain
from .._triton_gemm_launch import Operand
from .._triton_gemm_offline import MatmulCase, matmul_cases
from .._triton_launch import why_not
from .._triton_product import product
from ..mm_fp4 import a_layout
from . import mm_mxfp8


def _unsupported(call: Call) -> str | None:
    return reads_plain(call) or why_not(call)


@mm_mxfp8.backend("triton", unsupported=_unsupported, replayable=True)
def mm_mxfp8_triton(
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    use_8x4_sf_layout: bool = False,
    b_layout: str = "plain",
    backend: str = "auto",
) -> Tensor:
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)
    left = Operand.of(MXFP8, a, a_descale, a_layout(use_8x4_sf_layout))
    product(left, Operand.of(MXFP8, b.T, b_descale, scale_layouts.SWIZZLED_128X4), out)
    return out


def offline_cases() -> Iterator[MatmulCase]:
    return matmul_cases([("mxfp8", "mxfp8", torch.bfloat16)], scale_layouts.SWIZZLED_128X4)
