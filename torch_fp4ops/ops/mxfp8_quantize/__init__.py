"""mxfp8_quantize: values to MXFP8."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import scale_layouts
from ...block_quantization import quantize_mx
from ...contracts import Call, Out
from ...formats import MXFP8
from ...registry import op
from ...selection import Preference
from .. import _scales


def _contract(call: Call) -> tuple[Out, Out]:
    layout = _scales.require_mxfp8_layout(call)
    x = call.input
    call.require_dtype("input", _scales.FLOATS)
    call.require(x.dim() >= 2, "input", x.shape, "two dimensions or more")
    _scales.require_blocks(call, "input", x.shape[-1], MXFP8)
    whole = call.alignment > 0 and call.alignment % MXFP8.block_size == 0
    call.require(whole, "alignment", call.alignment, "a positive multiple of 32")
    rows, k = math.prod(x.shape[:-1]), scale_layouts.round_up(x.shape[-1], call.alignment)
    scale_rows, scale_cols = scale_layouts.scale_shape(rows, k // MXFP8.block_size, layout)
    return Out((*x.shape[:-1], k), torch.float8_e4m3fn), Out((scale_rows * scale_cols,), torch.uint8)


_PREFERENCES = (
    Preference(
        "triton",
        "cuda",
        "NVIDIA H200: 190 us for bf16 32768 x 8192, the copy rate",
    ),
)


@op(preferences=_PREFERENCES, contract=_contract)
def mxfp8_quantize(
    input: Tensor,
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    *,
    sf_swizzle_layout: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Quantise to MXFP8 along the last dimension: E4M3 elements, one UE8M0 scale for each block of 32.

    With ``amax`` the largest magnitude of a block, in fp32: ``SF = 2^ceil(log2(amax * fp32(1/448)))``,
    ``element = e4m3(x / SF)``, round to nearest, ties to even, saturating.

    Args:
        input: ``[..., K]``, two dimensions or more, K a multiple of 32; bfloat16, float16 or float32, any strides.
        is_sf_swizzled_layout: scales in the 128x4 layout instead of linear.
        alignment: a multiple of 32 to which K is padded with zeros.
        sf_swizzle_layout: 0 (128x4), 1 (8x4) or 2 (linear), FlashInfer's ``SfLayout``; wins over
            ``is_sf_swizzled_layout``.
        backend: ``"auto"`` or a backend's name.

    Returns:
        ``(elements, scales)``: float8_e4m3fn ``[..., round_up(K, alignment)]``, and the flat uint8 scales of the
        flattened rows in their layout, every padding byte zero.

    A NaN in a block makes its scale NaN (255), so the whole block decodes to NaN; an infinity gives the scale
    254 (2^127) and the element +-448, which decode to infinity.

    Raises:
        ValueError: a wrong dtype, rank, K, alignment or layout.

    Source: FlashInfer ``mxfp8_quantize``, which drops NaN instead; what follows ``alignment`` there is keyword-only.
    OCP Microscaling Formats (MX) specification 1.0.
    """
    layout = _scales.mxfp8_layout(is_sf_swizzled_layout, sf_swizzle_layout)
    k = input.shape[-1]
    rows = F.pad(input.flatten(0, -2), (0, scale_layouts.round_up(k, alignment) - k))
    elements, scales = quantize_mx(rows, MXFP8)
    return elements.reshape(*input.shape[:-1], elements.shape[-1]), scale_layouts.swizzle(scales, layout).flatten()
