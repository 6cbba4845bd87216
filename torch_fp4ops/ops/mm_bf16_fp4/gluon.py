"""mm_bf16_fp4 in Gluon: compute capability 9.0, weights of b_layout "hopper"."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Call
from ...formats import MXFP4, NVFP4
from .._hopper import product, why_not
from .._triton_gemm_launch import Operand
from . import mm_bf16_fp4


def _unsupported(call: Call) -> str | None:
    reason = why_not(call)
    if reason is None and call.a.dtype == torch.float16 and call.block_size != NVFP4.block_size:
        return "the kernels multiply float16 and NVFP4 only: MXFP4 reaches beyond float16's range"
    return reason


@mm_bf16_fp4.backend("gluon", unsupported=_unsupported, replayable=True)
def mm_bf16_fp4_gluon(
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
    product(Operand(a), b, b_descale, fmt, out, alpha)
    return out
