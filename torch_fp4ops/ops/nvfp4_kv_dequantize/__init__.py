"""nvfp4_kv_dequantize: NVFP4 keys or values back to 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ...block_quantization import dequantize_blocks
from ...contracts import Call, Out
from ...formats import NVFP4
from ...registry import op
from ...selection import Preference
from .. import _scales


def _contract(call: Call) -> Out:
    x = call.fp4_data
    call.require_dtype("fp4_data", (torch.uint8,))
    call.require(x.dim() >= 2, "fp4_data", x.shape, "two dimensions or more")
    k = x.shape[-1] * 2
    _scales.require_blocks(call, "fp4_data", k, NVFP4)
    call.require_dtype("block_scales", (torch.uint8,))
    call.require_shape("block_scales", (*x.shape[:-1], k // NVFP4.block_size))
    call.require_scalar("global_scale")
    _scales.require_out_dtype(call, "output_dtype")
    return Out((*x.shape[:-1], k), call.output_dtype)


def _check_values(call: Call) -> None:
    call.require_positive("global_scale")


_PREFERENCES = (
    Preference(
        "triton",
        "cuda",
        "the kernel of fp4_dequantize with linear scales: NVIDIA H200: 87 us for 1048576 x 128, 92% of the copy rate",
    ),
)


_BYTES = _scales.byte_arguments(("fp4_data",), ("block_scales",), lambda given: NVFP4)


@op(preferences=_PREFERENCES, contract=_contract, check_values=_check_values, byte_arguments=_BYTES)
def nvfp4_kv_dequantize(
    fp4_data: Tensor,
    block_scales: Tensor,
    global_scale: Tensor,
    output_dtype: torch.dtype = torch.bfloat16,
    *,
    backend: str = "auto",
) -> Tensor:
    """Dequantise what :func:`nvfp4_kv_quantize` gives: ``(code * SF) * global_scale``.

    Args:
        fp4_data: packed codes, uint8 ``[..., K/2]``, two dimensions or more; any strides.
        block_scales: linear E4M3 scales, uint8 ``[..., K/16]``; any strides.
        global_scale: float32, one element, the *decode* scale that quantised.
        output_dtype: bfloat16, float16 or float32; rounded once, from fp32.
        backend: ``"auto"`` or a backend's name.

    Returns:
        Values ``[..., K]`` of ``output_dtype``. Blocks with a NaN scale are NaN.

    Raises:
        ValueError: a wrong dtype, rank, K, scale shape or global scale.

    Source: FlashInfer ``nvfp4_kv_dequantize`` (two dimensions, bfloat16 and float16, SM80 and later).
    """
    return dequantize_blocks(fp4_data, block_scales, NVFP4, global_scale.reshape(())).to(output_dtype)
