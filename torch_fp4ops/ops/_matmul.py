"""What the GEMM ops' contracts and reference bodies share."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import scale_layouts
from ..contracts import Call
from ..formats import BlockFormat
from ..weight_layouts import (
    GEMM_LAYOUTS,
    hopper_size,
    unpack_hopper_weight,
    unshuffle_matrix_a,
    unshuffle_matrix_sf_a,
)
from . import _scales

PLAIN, TRTLLM, HOPPER = GEMM_LAYOUTS


def require_column_major(call: Call, argument: str) -> None:
    """A ``(k, n)`` view of contiguous ``[n, k]`` storage, as ``weight.T`` gives."""
    call.require_rank(argument, 2)
    call.require_contiguous(argument, getattr(call, argument).t(), "column-major: the .T view of a contiguous tensor")


def require_b_layout(call: Call, n: int, k: int, fmt: BlockFormat) -> None:
    """A known layout, and the sizes that its weights ``[n, k]``, padded, come in."""
    call.require(call.b_layout in GEMM_LAYOUTS, "b_layout", call.b_layout, " or ".join(map(repr, GEMM_LAYOUTS)))
    if call.b_layout == PLAIN:
        return
    whole = "n a multiple of 128 and whole groups of 4 scales a row, as prepare_fp4_weight pads them"
    call.require(n % 128 == 0, "b", f"of n = {n} with b_layout={call.b_layout!r}", whole)
    if call.b_layout == TRTLLM:
        blocks = k // fmt.block_size
        call.require(blocks % 4 == 0, "b", f"of {blocks} scales a row with b_layout='trtllm'", whole)


def reads_plain(call: Call) -> str | None:
    """Why a backend that reads plain weights only can't take the call."""
    return None if call.b_layout == PLAIN else f"the kernels read plain weights, not b_layout={call.b_layout!r}"


def stored_k(b_layout: str, k: int) -> int:
    """K of a weight in a layout, for activations of ``k``."""
    return hopper_size(0, k)[1] if b_layout == HOPPER else k


def k_of_a(b_layout: str, what: str) -> str:
    """For messages: what the K of b must be."""
    return what + ", rounded up to 256" if b_layout == HOPPER else what


def plain_weight(weight: Tensor, scales: Tensor, k: int, fmt: BlockFormat, b_layout: str) -> tuple[Tensor, Tensor]:
    """A weight ``[n, packed k]`` with its rows in order, and its scales ``[n, k / block size]``, linear.

    ``scales`` are as ``b_layout`` has them, a row for each row of the weight, or flat.
    """
    n, blocks = weight.shape[0], k // fmt.block_size
    if b_layout == HOPPER:
        stored = weight.view(torch.uint8)
        columns = stored_k(b_layout, k) // fmt.block_size
        codes, steps = unpack_hopper_weight(stored, scales.reshape(n, columns), fmt)
        codes, steps = codes[:, : k // fmt.elements_per_byte], steps[:, :blocks]
        return codes.contiguous().view(weight.dtype), steps
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
