"""What the GEMM ops' contracts and reference bodies share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Call
from . import _scales


def require_column_major(call: Call, argument: str) -> None:
    """A ``(k, n)`` view of contiguous ``[n, k]`` storage, as ``weight.T`` gives."""
    call.require_rank(argument, 2)
    call.require_contiguous(argument, getattr(call, argument).t(), "column-major: the .T view of a contiguous tensor")


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
