"""mm_mxfp8: MXFP8 x MXFP8 matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import scale_layouts
from ...block_quantization import dequantize_blocks
from ...contracts import Call, Out
from ...formats import MXFP8
from ...registry import op
from ...selection import Preference
from .. import _matmul, _preferences, _scales
from ..mm_fp4 import a_layout


def _contract(call: Call) -> Out:
    call.require_dtype("a", (torch.float8_e4m3fn,))
    call.require_dtype("b", (torch.float8_e4m3fn,))
    call.require_rank("a", 2)
    _matmul.require_column_major(call, "b")
    (m, k), n = call.a.shape, call.b.shape[1]
    _matmul.require_b_layout(call, n, k, MXFP8)
    stored_k = _matmul.stored_k(call.b_layout, k)
    allowed = f"({stored_k}, n): {_matmul.k_of_a(call.b_layout, 'K of a')}"
    call.require(call.b.shape[0] == stored_k, "b", call.b.shape, allowed)
    _scales.require_blocks(call, "a", k, MXFP8)
    # Two dimensions would mean linear scales to FlashInfer, which its kernels can't read.
    call.require_rank("a_descale", 1)
    call.require_rank("b_descale", 1)
    _scales.require_scales(call, "a_descale", m, k // MXFP8.block_size, a_layout(call.use_8x4_sf_layout))
    _scales.require_scales(call, "b_descale", n, stored_k // MXFP8.block_size, scale_layouts.SWIZZLED_128X4)
    _scales.require_out_dtype(call)
    return Out((m, n), call.out_dtype)


_PREFERENCES = (
    _preferences.FLASHINFER,
    _preferences.TRTLLM,
    _preferences.gluon(1.71, 0.99),
    Preference(
        "triton",
        "cuda",
        "reads plain weights; NVIDIA H200: 0.6 times as fast as bf16 in cuBLAS, in one kernel up to 128 rows; above, "
        "both sides are decoded for cuBLAS; the reference multiplies in fp32",
    ),
)


_BYTES = _scales.byte_arguments((), ("a_descale", "b_descale"), lambda given: MXFP8)


@op(preferences=_PREFERENCES, contract=_contract, byte_arguments=_BYTES)
def mm_mxfp8(
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
    """``dequantize(a) @ dequantize(b)`` of MXFP8, accumulated in fp32 and rounded once.

    Args:
        a: float8_e4m3fn ``(m, k)``; any strides. ``m`` may be 0, ``k`` a multiple of 32.
        b: float8_e4m3fn ``(k, n)``, column-major: the ``.T`` view of weights ``(n, k)``.
        a_descale: flat uint8 UE8M0 scales of a, 128x4 swizzled (8x4 with ``use_8x4_sf_layout``), as
            :func:`mxfp8_quantize` gives them.
        b_descale: flat uint8 UE8M0 scales of the ``(n, k)`` weights, 128x4 swizzled.
        out_dtype: bfloat16, float16 or float32.
        use_8x4_sf_layout: ``a_descale`` is 8x4 swizzled.
        b_layout: ``"plain"``, or ``"trtllm"``: b and b_descale are shuffled as trtllm-gen's kernels read them, by
            ``shuffle_matrix_a`` and ``shuffle_matrix_sf_a``; or ``"hopper"``: what ``pack_hopper_weight`` gives takes
            the place of the quantised weight and of its scales, k rounded up to 256 and n to 128 in b only. Use
            :func:`torch_fp4ops.prepare_fp4_weight`. A backend that can't read the layout refuses the call.
        backend: ``"auto"`` or a backend's name.

    Returns:
        ``(m, n)`` of ``out_dtype``.

    Raises:
        ValueError: a wrong dtype, shape, stride, K or scale size.

    Source: FlashInfer ``mm_mxfp8`` without ``out``, and with ``b_layout``, which there follows from ``backend``;
    what follows ``out`` there is keyword-only.
    """
    k = a.shape[1]
    a_scales = scale_layouts.unswizzle(a_descale, a.shape[0], k // MXFP8.block_size, a_layout(use_8x4_sf_layout))
    weight, b_scales = _matmul.plain_weight(b.T, b_descale, k, MXFP8, b_layout)
    a_values = dequantize_blocks(a, a_scales, MXFP8)
    return _matmul.matmul(a_values, dequantize_blocks(weight, b_scales, MXFP8), None, out_dtype)
