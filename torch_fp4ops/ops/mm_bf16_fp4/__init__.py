"""mm_bf16_fp4: 16-bit activations x FP4 weights (W4A16)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import scale_layouts
from ...block_quantization import dequantize_blocks
from ...contracts import Call, Out
from ...formats import MXFP4, BlockFormat, fp4_format
from ...registry import op
from ...selection import Preference
from .. import _matmul, _preferences, _scales


def _format(block_size: int) -> BlockFormat | None:
    return fp4_format(block_size, block_size == MXFP4.block_size)


def _contract(call: Call) -> Out:
    fmt = _format(call.block_size)
    call.require(fmt is not None, "block_size", call.block_size, "16 (NVFP4) or 32 (MXFP4)")
    assert fmt is not None
    call.require_dtype("a", (torch.bfloat16, torch.float16))
    call.require_dtype("b", (torch.uint8,))
    call.require_rank("a", 2)
    call.require_rank("b", 2)
    (m, k), n = call.a.shape, call.b.shape[0]
    _scales.require_blocks(call, "a", k, fmt)
    _matmul.require_b_layout(call, n, k, fmt)
    stored_k = _matmul.stored_k(call.b_layout, k)
    allowed = f"(n, {stored_k} / 2): {_matmul.k_of_a(call.b_layout, 'K of a, packed')}"
    call.require(call.b.shape[1] * 2 == stored_k, "b", call.b.shape, allowed)
    call.require_contiguous("b")
    _scales.require_scales(call, "b_descale", n, stored_k // fmt.block_size, scale_layouts.SWIZZLED_128X4)
    _matmul.require_alpha(call, m)
    if call.out_dtype is not None:
        _scales.require_out_dtype(call)
    return Out((m, n), call.out_dtype or call.a.dtype)


_PREFERENCES = (
    _preferences.FLASHINFER,
    _preferences.gluon(2.51, 1.12),
    Preference(
        "triton",
        "cuda",
        "reads plain weights; NVIDIA H200: 0.9 times as fast as bf16 in cuBLAS up to 64 rows, 0.8 times above, where "
        "weights are packed for Gluon's kernel or decoded for cuBLAS; the reference multiplies in fp32",
    ),
)


_BYTES = _scales.byte_arguments(("b",), ("b_descale",), lambda given: _format(given["block_size"]))


@op(preferences=_PREFERENCES, contract=_contract, byte_arguments=_BYTES)
def mm_bf16_fp4(
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
    """``(a @ dequantize(b).T) * alpha``: 16-bit activations, NVFP4 (``block_size=16``) or MXFP4 (32) weights.

    Products are exact and accumulated in fp32; ``alpha`` multiplies the fp32 sum, which is rounded once.

    Args:
        a: bfloat16 or float16 ``(m, k)``; any strides. ``m`` may be 0, ``k`` a multiple of ``block_size``.
        b: uint8 ``(n, k/2)``, packed along k, contiguous.
        b_descale: uint8 block scales of b, 128x4 swizzled: contiguous, padded 2-D as :func:`fp4_quantize` gives
            them, or flat. E4M3 for NVFP4, UE8M0 for MXFP4.
        alpha: float32, one element or one for each row of a: ``1 / global_scale`` of the weights for NVFP4.
        out_dtype: bfloat16, float16 or float32; None is the dtype of a.
        block_size: 16 for NVFP4, 32 for MXFP4.
        b_layout: ``"plain"``, or as for :func:`mm_fp4`.
        backend: ``"auto"`` or a backend's name.

    Returns:
        ``(m, n)`` of ``out_dtype``.

    Raises:
        ValueError: a wrong dtype, shape, stride, K, block size, scale size or alpha.

    Source: FlashInfer ``mm_bf16_fp4`` with weights as its backend ``cute-dsl-native`` takes them, unprepared, and
    with ``b_layout``.
    """
    fmt = _format(block_size)
    assert fmt is not None
    b, scales = _matmul.plain_weight(b, b_descale, a.shape[1], fmt, b_layout)
    return _matmul.matmul(a.float(), dequantize_blocks(b, scales, fmt), alpha, out_dtype or a.dtype)
