"""mm_fp4: FP4 x FP4 matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import scale_layouts
from ...block_quantization import dequantize_blocks
from ...contracts import Call, Out
from ...formats import MXFP4, NVFP4
from ...registry import op
from ...selection import Preference
from .. import _matmul, _preferences, _scales


def _contract(call: Call) -> Out:
    fmt = NVFP4 if call.use_nvfp4 else MXFP4
    given = f"{call.block_size} with use_nvfp4={call.use_nvfp4}"
    call.require(call.block_size == fmt.block_size, "block_size", given, "16 for NVFP4, 32 for MXFP4")
    call.require_dtype("a", (torch.uint8,))
    call.require_dtype("b", (torch.uint8,))
    call.require_rank("a", 2)
    _matmul.require_column_major(call, "b")
    (m, k), n = call.a.shape, call.b.shape[1]
    _matmul.require_b_layout(call, n, 2 * k, fmt)
    stored_k = _matmul.stored_k(call.b_layout, 2 * k)
    allowed = f"({stored_k // 2}, n): {_matmul.k_of_a(call.b_layout, 'the packed K of a')}"
    call.require(call.b.shape[0] * 2 == stored_k, "b", call.b.shape, allowed)
    _scales.require_blocks(call, "a", k * 2, fmt)
    _scales.require_scales(call, "a_descale", m, 2 * k // fmt.block_size, a_layout(call.use_8x4_sf_layout))
    _scales.require_transposed_scales(call, "b_descale", n, stored_k // fmt.block_size)
    _matmul.require_alpha(call, m)
    _scales.require_out_dtype(call)
    return Out((m, n), call.out_dtype)


def a_layout(use_8x4_sf_layout: bool) -> str:
    return scale_layouts.SWIZZLED_8X4 if use_8x4_sf_layout else scale_layouts.SWIZZLED_128X4


_PREFERENCES = (
    _preferences.FLASHINFER,
    _preferences.TRTLLM,
    _preferences.gluon(2.32, 1.06),
    Preference(
        "triton",
        "cuda",
        "reads plain weights; NVIDIA H200: 0.7 times as fast as bf16 in cuBLAS, in one kernel up to 128 rows; above, "
        "activations are decoded and weights packed for Gluon's kernel; the reference multiplies in fp32",
    ),
)


_BYTES = _scales.byte_arguments(
    ("a", "b"), ("a_descale", "b_descale"), lambda given: NVFP4 if given["use_nvfp4"] else MXFP4
)


@op(preferences=_PREFERENCES, contract=_contract, byte_arguments=_BYTES)
def mm_fp4(
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
    """``dequantize(a) @ dequantize(b) * alpha`` of NVFP4 (``block_size=16``) or MXFP4 (32, ``use_nvfp4=False``).

    Products are exact and accumulated in fp32; ``alpha`` multiplies the fp32 sum, which is rounded once.

    Args:
        a: uint8 ``(m, k/2)``, packed along k; any strides. ``m`` may be 0, ``k`` a multiple of the block size.
        b: uint8 ``(k/2, n)``, column-major: the ``.T`` view of packed weights ``(n, k/2)``.
        a_descale: uint8 block scales of a, 128x4 swizzled (8x4 with ``use_8x4_sf_layout``): contiguous, padded
            2-D as :func:`fp4_quantize` gives them, or flat.
        b_descale: uint8 block scales of b, 128x4 swizzled: the ``.T`` view of the padded 2-D tensor, or flat.
        alpha: float32, one element or one for each row of a: ``1 / (global_scale_a * global_scale_b)`` for NVFP4.
        out_dtype: bfloat16, float16 or float32.
        block_size, use_nvfp4: 16, True for NVFP4; 32, False for MXFP4.
        use_8x4_sf_layout: ``a_descale`` is 8x4 swizzled.
        b_layout: ``"plain"``, or ``"trtllm"``: b and b_descale are shuffled as trtllm-gen's kernels read them, by
            ``shuffle_matrix_a`` and ``shuffle_matrix_sf_a``; or ``"hopper"``: what ``pack_hopper_weight`` gives takes
            the place of the packed weight and of its scales, k rounded up to 256 and n to 128 in b only. Use
            :func:`torch_fp4ops.prepare_fp4_weight`. A backend that can't read the layout refuses the call.
        backend: ``"auto"`` or a backend's name.

    Returns:
        ``(m, n)`` of ``out_dtype``.

    Raises:
        ValueError: a wrong dtype, shape, stride, K, block size, scale size or alpha.

    Source: FlashInfer ``mm_fp4`` without ``out`` and ``enable_pdl``, and with ``b_layout``, which there follows from
    ``backend``; what follows ``out`` there is keyword-only.
    """
    fmt = NVFP4 if use_nvfp4 else MXFP4
    k = a.shape[1] * 2
    a_scales = scale_layouts.unswizzle(a_descale, a.shape[0], k // fmt.block_size, a_layout(use_8x4_sf_layout))
    weight, b_scales = _matmul.plain_weight(b.T, b_descale.t(), k, fmt, b_layout)
    a_values = dequantize_blocks(a, a_scales, fmt)
    return _matmul.matmul(a_values, dequantize_blocks(weight, b_scales, fmt), alpha, out_dtype)
