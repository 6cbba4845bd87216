"""mxfp8_dequantize: MXFP8 back to values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import scale_layouts
from ...block_quantization import dequantize_blocks
from ...contracts import Call, Out
from ...formats import MXFP8
from ...registry import op
from ...selection import Preference
from .. import _scales


def _contract(call: Call) -> Out:
    layout = _scales.require_mxfp8_layout(call)
    x = call.input
    call.require_dtype("input", (torch.float8_e4m3fn,))
    call.require(x.dim() >= 2, "input", x.shape, "two dimensions or more")
    _scales.require_blocks(call, "input", x.shape[-1], MXFP8)
    rows = math.prod(x.shape[:-1])
    _scales.require_scales(call, "scale_tensor", rows, x.shape[-1] // MXFP8.block_size, layout)
    _scales.require_out_dtype(call)
    return Out(x.shape, call.out_dtype)


_PREFERENCES = (
    Preference(
        "triton",
        "cuda",
        "NVIDIA H200: 199 us for 32768 x 8192 to bf16, 95% of the copy rate",
    ),
)


_BYTES = _scales.byte_arguments((), ("scale_tensor",), lambda given: MXFP8)


@op(preferences=_PREFERENCES, contract=_contract, byte_arguments=_BYTES)
def mxfp8_dequantize(
    input: Tensor,
    scale_tensor: Tensor,
    is_sf_swizzled_layout: bool = True,
    sf_swizzle_layout: int | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Dequantise what :func:`mxfp8_quantize` gives: ``element * SF``.

    Args:
        input: float8_e4m3fn ``[..., K]``, two dimensions or more, K a multiple of 32; any strides.
        scale_tensor: uint8 UE8M0 scales of the flattened rows, contiguous: flat, or their padded 2-D shape.
            Padding bytes are not read.
        is_sf_swizzled_layout, sf_swizzle_layout: layout of the scales, as for :func:`mxfp8_quantize`.
        out_dtype: float32, bfloat16 or float16; rounded once, from fp32.
        backend: ``"auto"`` or a backend's name.

    Returns:
        Values ``[..., K]`` of ``out_dtype``. Blocks with a NaN scale (255) are NaN.

    Raises:
        ValueError: a wrong dtype, rank, K, layout or scale size.

    Source: FlashInfer ``mxfp8_dequantize_host``.
    """
    layout = _scales.mxfp8_layout(is_sf_swizzled_layout, sf_swizzle_layout)
    rows = input.flatten(0, -2)
    m, blocks = rows.shape[0], rows.shape[1] // MXFP8.block_size
    linear = scale_layouts.unswizzle(scale_tensor, m, blocks, layout)
    return dequantize_blocks(rows, linear, MXFP8).to(out_dtype).reshape(input.shape)
