"""mm_mxfp8 in Gluon: compute capability 9.0, weights of b_layout "hopper"."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import MXFP8
from .._hopper import product, why_not
from .._triton_gemm_launch import Operand
from ..mm_fp4 import a_layout
from . import mm_mxfp8


@mm_mxfp8.backend("gluon", unsupported=why_not, replayable=True)
def mm_mxfp8_gluon(
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
    weight = b.T.view(torch.uint8)
    out = a.new_empty((a.shape[0], weight.shape[0]), dtype=out_dtype)
    rows = Operand.of(MXFP8, a, a_descale, a_layout(use_8x4_sf_layout))
    product(rows, weight, b_descale, MXFP8, out, None)
    return out
