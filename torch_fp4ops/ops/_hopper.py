"""What the Gluon backends of the GEMMs share: which calls they take, and rows of codes as 16-bit values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Call
from ..formats import BlockFormat
from ._hopper_launch import product, unavailable
from ._matmul import HOPPER
from ._triton_dequantize import dequantize_rows

__all__ = ["decoded", "product", "why_not"]


def why_not(call: Call) -> str | None:
    if call.b_layout != HOPPER:
        return f"the kernels read weights of b_layout='hopper', not {call.b_layout!r}; see prepare_fp4_weight"
    return unavailable(call.device)


def decoded(a: Tensor, scales: Tensor, fmt: BlockFormat, layout: str) -> Tensor:
    """Quantised rows as bfloat16, which holds every product of a code and its scale (see ``_triton_product``)."""
    out = torch.empty(a.shape[0], a.shape[1] * fmt.elements_per_byte, dtype=torch.bfloat16, device=a.device)
    dequantize_rows(a, scales, fmt, layout, None, False, out)
    return out
