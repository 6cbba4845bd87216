"""What the GEMM ops' contracts and reference bodies share."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import scale_layouts
from ..contracts import Call
from ..weight_layouts import GEMM_LAYOUTS, unshuffle_matrix_a, unshuffle_matrix_sf_a
from . import _scales

PLAIN, TRTLLM = GEMM_LAYOUTS


def require_column_major(call: Call, argument: str) -> None:
    """A ``(k, n)`` view of contiguous ``[n, k]`` storage, as ``weight.T`` gives."""
    call.require_rank(argument, 2)
    call.require_contiguous(argument, getattr(call, argument).t(), "column-major: the .T view of a contiguous tensor")


def require_b_layout(call: Call, n: int, blocks: int) -> None:
    """A known layout, and the sizes that a shuffled weight comes in."""
    call.require(call.b_layout in GEMM_LAYOUTS, "b_layout", call.b_layout, " or ".join(map(repr, GEMM_LAYOUTS)))
    if call.b_layout == TRTLLM:
        whole = "n a multiple of 128 and whole groups of 4 scales a row, as prepare_fp4_weight pads them"
        call.require(n % 128 == 0, "b", f"of n = {n} with b_layout='trtllm'", whole)
        call.require(blocks % 4 == 0, "b", f"of {blocks} scales a row with b_layout='trtllm'", whole)


def plain_weight(weight: Tensor, b_descale: Tensor, blocks: int, b_layout: str) -> tuple[Tensor, Tensor]:
    """A weight ``[n, packed k]`` with its rows in order, and its scales ``[n, blocks]``, linear."""
    n = weight.shape[0]
    scales = b_descale if b_descale.dim() == 1 else b_descale.T
    if b_layout == TRTLLM:
        return unshuffle_matrix_a(weight), unshuffle_matrix_sf_a(scales, n, blocks)
    return weight, scale_layouts.unswizzle(scales, n, blocks, scale_layouts.SWIZZLED_128X4)


def require_alpha(call: Call, rows: int) -> None:
    if call.alpha is not None:
        _scales.require_scalar_or_rows(call, "alpha", rows)


def matmul(a: Tensor, b: Tensor, alpha: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """``(a @ b.T) * alpha`` of fp32 ``[m, k]`` and ``[n, k]``, accumulated in fp32 and rounded once.

    Every operand is exact in bf16 or fp16, so TF32 arithmetic, where the user allows it, loses nothing.
    """
    out = a @ b.T
    if alpha is not None:
        out = out * _scales.per_row(alpha)
    return out.to(out_dtype)
