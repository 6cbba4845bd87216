"""mm_bf16_fp4 in Triton: any GPU from compute capability 8.0, ROCm included."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ... import scale_layouts
from ...contracts import Call
from ...formats import MXFP4, NVFP4
from .._matmul import reads_plain
from .._triton_gemm_launch import PLAIN, Operand
from .._triton_gemm_offline import MatmulCase, matmul_cases
from .._triton_launch import why_not
from .._triton_product import product
from . import mm_bf16_fp4


def _unsupported(call: Call) -> str | None:
    return reads_plain(call) or why_not(call)


@mm_bf16_fp4.backend("triton", unsupported=_unsupported, replayable=True)
def mm_bf16_fp4_triton(
    a: Tensor,
    b: Tensor,
    b_descale: Tensor,
    alpha: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    block_size: int = 16,
    b_layout: str = "plain",
    backend: str = "auto",
) -> Tensor:
    out = a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype or a.dtype)
    fmt = NVFP4 if block_size == NVFP4.block_size else MXFP4
    product(Operand(a), Operand.of(fmt, b, b_descale, scale_layouts.SWIZZLED_128X4), out, alpha)
    return out


def offline_cases() -> Iterator[MatmulCase]:
    operands = [(PLAIN, fmt, dtype) for fmt in ("nvfp4", "mxfp4") for dtype in (torch.bfloat16, torch.float16)]
    return matmul_cases(operands, scale_layouts.SWIZZLED_128X4)
