"""mm_fp4 in Gluon: compute capability 9.0, weights of b_layout "hopper"."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import MXFP4, NVFP4
from .._hopper import product, why_not
from .._triton_gemm_launch import Operand
from . import a_layout, mm_fp4


@mm_fp4.backend("gluon", unsupported=why_not, replayable=True)
def mm_fp4_gluon(
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
    fmt = NVFP4 if use_nvfp4 else MXFP4
    weight = b.T
    out = a.new_empty((a.shape[0], weight.shape[0]), dtype=out_dtype)
    rows = Operand.of(fmt, a, a_descale, a_layout(use_8x4_sf_layout))
    product(rows, weight, b_descale.t(), fmt, out, alpha)
    return out
