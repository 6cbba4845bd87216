"""How the Triton backends of the GEMMs multiply: in one kernel, or by decoding first and calling torch's product.

A kernel that decodes while it multiplies reads the fewest bytes, which is what counts where rows are few. With many
rows each weight is decoded again for every tile of rows; there, before compute capability 10.0, it is faster to decode
both sides to 16 bits once and leave the product to cuBLAS, with an fp32 result that alpha multiplies and that is
rounded once. On compute capability 9.0 an NVFP4 weight is brought into the layout "hopper" instead, which moves less
than half the bytes, for the kernel of ``_hopper_gemm``, which multiplies by alpha before it rounds.

The decoding is exact: E2M1 times E4M3 has 6 significant bits and E2M1 or E4M3 times a power of two at most 4. Only
MXFP8 blocks whose scale is below 2^-124 lose bits that bfloat16 has no place for.
"""

from __future__ import annotations

import contextlib
import threading

import torch
import triton.language as tl
from torch import Tensor

from .. import replay
from ..formats import FORMATS, NVFP4
from ..hopper_layout import hopper_size
from ._hopper_launch import product as hopper_product
from ._hopper_launch import unavailable as hopper_unavailable
from ._triton_dequantize import decoded
from ._triton_gemm_launch import Operand, architecture, matmul, multiplied_as
from ._triton_hopper_pack import pack_hopper
from ._triton_launch import INTERPRETED

__all__ = ["product"]

_DECODE_FIRST_ROWS = 128
"""Above so many rows; NVIDIA H200: 256 x 4096 x 4096 NVFP4 takes 54 us in one kernel and 16 us in cuBLAS alone."""

_ALLOW_SUMS_IN_16_BITS = {
    torch.bfloat16: ["allow_bf16_reduced_precision_reduction"],
    torch.float16: ["allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation"],
}
_CHANGING_SETTINGS = threading.Lock()

_TORCH_DTYPES = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16}


def product(a: Operand, b: Operand, out: Tensor, alpha: Tensor | None = None) -> None:
    """``out = (a @ b.T) * alpha``, accumulated in fp32 and rounded once; b is ``[n, K]``."""
    dtype = _TORCH_DTYPES.get(multiplied_as(a, b))
    if dtype is None or not a.k or not _decodes_first(out):
        matmul(a, b, out, alpha)
        return
    if _packs_first(b, out):
        weight, scale = _packed(b)
        hopper_product(a, weight, scale, FORMATS[b.format], out, alpha)
        return
    a_decoded, b_decoded = decoded(a, dtype), decoded(b, dtype).t()
    if alpha is None and out.dtype == dtype:
        _multiply(a_decoded, b_decoded, out)
        return
    sums = torch.mm(a_decoded, b_decoded, out_dtype=torch.float32)
    if alpha is None:
        out.copy_(sums)
    else:
        torch.mul(sums, alpha.reshape(-1, 1), out=out)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b`` of 16 bits; a step of its own in a replay, which has to change settings again, too."""
    trace = replay.tracing()
    with trace.pause() if trace is not None else contextlib.nullcontext():
        _multiply_in_fp32(a, b, out)
    if trace is not None:
        trace.launched(_multiply_in_fp32, (a, b, out), addresses=False)


def _multiply_in_fp32(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``torch.mm`` without sums in 16 bits, which torch allows cuBLAS by default and which are rounded more than once.

    The settings are the process's. What other threads multiply meanwhile is more exact than they asked for.
    """
    settings = torch.backends.cuda.matmul
    with _CHANGING_SETTINGS:
        # Where K may not be split there are no parts whose sums could be rounded.
        allowed = [
            name
            for name in _ALLOW_SUMS_IN_16_BITS[a.dtype]
            if getattr(settings, name) and getattr(settings, f"{name}_split_k", True)
        ]
        try:
            for name in allowed:
                setattr(settings, name, False)
            torch.mm(a, b, out=out)
        finally:
            for name in allowed:
                setattr(settings, name, True)


def _decodes_first(out: Tensor) -> bool:
    if INTERPRETED or out.device.type != "cuda" or torch.version.hip is not None:
        return False
    return out.shape[0] > _DECODE_FIRST_ROWS and out.numel() > 0 and architecture(out.device) in ("sm80", "sm90")


def _packs_first(b: Operand, out: Tensor) -> bool:
    # Of an MX weight the layout does not hold every scale.
    return b.format == NVFP4.name and out.shape[1] % 128 == 0 and hopper_unavailable(out.device) is None


def _packed(b: Operand) -> tuple[Tensor, Tensor]:
    n, k = hopper_size(b.elements.shape[0], b.k)
    weight = torch.empty(n, k // 2, dtype=torch.uint8, device=b.elements.device)
    scale = torch.empty(n, k // NVFP4.block_size, dtype=torch.uint8, device=b.elements.device)
    assert b.scales is not None
    pack_hopper(b.elements, b.scales, NVFP4, b.layout, weight, scale)
    return weight, scale
