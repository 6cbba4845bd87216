"""fp4_dequantize: NVFP4 or MXFP4 back to values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import scale_layouts
from ...block_quantization import dequantize_blocks
from ...contracts import Call, Out
from ...formats import fp4_format
from ...registry import op
from ...selection import Preference
from .. import _scales


def _contract(call: Call) -> Out:
    fmt = _scales.require_fp4_format(call)
    layout = _scales.require_layout(call)
    x = call.input
    call.require_dtype("input", (torch.uint8,))
    call.require(x.dim() >= 2, "input", x.shape, "two dimensions or more")
    rows, k = math.prod(x.shape[:-1]), x.shape[-1] * 2
    _scales.require_blocks(call, "input", k, fmt)
    _scales.require_scales(call, "scale", rows, k // fmt.block_size, layout)
    _scales.require_global_scale(call, fmt, rows)
    _scales.require_out_dtype(call)
    return Out((*x.shape[:-1], k), call.out_dtype)


def _check_values(call: Call) -> None:
    if call.global_scale is not None:
        call.require_positive("global_scale")


_PREFERENCES = (
    Preference(
        "triton",
        "cuda",
        "NVIDIA H200: 172 us for NVFP4 32768 x 8192 to bf16, 94% of the copy rate",
    ),
)


_BYTES = _scales.byte_arguments(
    ("input",), ("scale",), lambda given: fp4_format(given["sf_vec_size"], given["sf_use_ue8m0"])
)


@op(preferences=_PREFERENCES, contract=_contract, check_values=_check_values, byte_arguments=_BYTES)
def fp4_dequantize(
    input: Tensor,
    scale: Tensor,
    global_scale: Tensor | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    is_global_scale_inversed: bool = False,
    *,
    out_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Dequantise what :func:`fp4_quantize` gives, with the same arguments: ``(code * SF) * (1/gs)``.

    Args:
        input: packed codes, uint8 ``[..., K/2]``, even k in the low nibble; any strides.
        scale: uint8 block scales of the flattened rows M, contiguous, in the layout that the flags name: its padded
            2-D shape or the same bytes flat. Padding bytes are not read.
        global_scale: NVFP4: the global scale that quantised, float32, one element or one for each row. MXFP4: None.
        sf_vec_size, sf_use_ue8m0: 16, False for NVFP4; 32, True for MXFP4.
        is_sf_swizzled_layout, is_sf_8x4_layout: layout of ``scale``.
        is_global_scale_inversed: ``global_scale`` is the *decode* scale.
        out_dtype: float32, bfloat16 or float16; rounded once, from fp32.
        backend: ``"auto"`` or a backend's name.

    Returns:
        Values ``[..., K]`` of ``out_dtype``. Blocks with a NaN scale are NaN.

    Raises:
        ValueError: a wrong dtype, rank, K, flag combination, scale size or global scale.

    Source: FlashInfer ``e2m1_and_ufp8sf_scale_to_float``. Its global scale is the decode scale, the reciprocal of what
    this op takes unless ``is_global_scale_inversed`` is True, and its ``ufp8_type`` of 0 or 1 is ``sf_use_ue8m0`` True
    or False here.
    """
    fmt = fp4_format(sf_vec_size, sf_use_ue8m0)
    assert fmt is not None
    rows = input.flatten(0, -2)
    m, blocks = rows.shape[0], rows.shape[1] * 2 // fmt.block_size
    layout = scale_layouts.layout_from_flags(is_sf_swizzled_layout, is_sf_8x4_layout)
    linear = scale_layouts.unswizzle(scale, m, blocks, layout)
    decode = None
    if global_scale is not None:
        _, decode = _scales.encode_decode(global_scale, is_global_scale_inversed)
    values = dequantize_blocks(rows, linear, fmt, decode)
    return values.to(out_dtype).reshape(*input.shape[:-1], values.shape[-1])
