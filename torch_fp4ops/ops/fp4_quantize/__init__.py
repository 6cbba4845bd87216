"""fp4_quantize: values to NVFP4 or MXFP4."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import scale_layouts
from ...block_quantization import quantize_mx, quantize_nvfp4
from ...contracts import Call, Out
from ...formats import MXFP4, fp4_format
from ...registry import op
from ...selection import Preference
from .. import _scales


def _contract(call: Call) -> tuple[Out, Out]:
    fmt = _scales.require_fp4_format(call)
    x = call.input
    call.require_dtype("input", (*_scales.FLOATS, torch.float8_e4m3fn) if fmt.has_global_scale else _scales.FLOATS)
    call.require(x.dim() >= 2, "input", x.shape, "two dimensions or more")
    return _scales.fp4_outputs(call, fmt, x.shape[:-1], x.shape[-1])


_PREFERENCES = (
    Preference(
        "triton",
        "cuda",
        "NVIDIA H200: 159 us for bf16 32768 x 8192 to NVFP4 128x4, the copy rate; the reference takes 10.4 ms",
    ),
)


@op(preferences=_PREFERENCES, contract=_contract, check_values=_scales.require_positive_global_scale)
def fp4_quantize(
    input: Tensor,
    global_scale: Tensor | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    is_global_scale_inversed: bool = False,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Quantise to NVFP4 (``sf_vec_size=16``) or MXFP4 (``sf_vec_size=32, sf_use_ue8m0=True``) along the last dimension.

    NVFP4, with ``gs`` the global scale, ``amax`` the largest magnitude of a block of 16, all in fp32::

        SF   = e4m3(gs * (amax * fp32(1/6)))
        code = e2m1(x * min(1 / (SF * (1/gs)), FLT_MAX))            # round to nearest, ties to even

    MXFP4, blocks of 32: ``SF = 2^ceil(log2(amax * fp32(1/6)))``, ``code = e2m1(x / SF)``.

    Args:
        input: ``[..., K]``, two dimensions or more, K a multiple of ``sf_vec_size``; bfloat16, float16 or float32,
            any strides. NVFP4 also takes float8_e4m3fn, whose values stand for ``x8 * (6/gs)`` rounded to
            float16 (a tensor that was quantised by ``amax/448``).
        global_scale: NVFP4: float32, one element or one for each of the ``prod(...)`` rows; the *encode* scale,
            ``448 * 6 / amax(tensor)`` to use the whole range. MXFP4: None.
        sf_vec_size: block size, 16 or 32.
        sf_use_ue8m0: UE8M0 block scales (MXFP4) instead of E4M3 (NVFP4).
        is_sf_swizzled_layout: scales in the 128x4 layout (8x4 with ``is_sf_8x4_layout``) instead of linear.
        is_global_scale_inversed: ``global_scale`` is the *decode* scale, ``amax(tensor) / 2688``.
        backend: ``"auto"`` or a backend's name.

    Returns:
        ``(codes, scales)``, uint8. Codes ``[..., K/2]``, even k in the low nibble. Scales of the flattened rows
        M, 2-D: linear ``[M, K/sf_vec_size]``, else padded to ``[round_up(M, 128 or 8),
        round_up(K/sf_vec_size, 4)]`` with every padding byte zero.

    A NaN in a block makes its scale NaN, so the whole block decodes to NaN. Infinities saturate: SF to its
    largest value, codes to +-6. Where SF rounds to zero the block's codes are zeros of x's signs.

    Raises:
        ValueError: a wrong dtype, rank, K, flag combination or global scale; on the CPU also a global scale
            that is not finite and above zero.

    Source: FlashInfer ``fp4_quantize`` with correctly rounded arithmetic; it differs from FlashInfer's default
    where ``rcp.approx`` is off by the last bit (about 1e-4 of the codes at worst), in NaN blocks (FlashInfer drops
    NaN), and where SF underflows (FlashInfer gives +-6 there).
    """
    fmt = fp4_format(sf_vec_size, sf_use_ue8m0)
    assert fmt is not None
    rows = input.flatten(0, -2)
    if fmt is MXFP4:
        packed, scales = quantize_mx(rows, fmt)
    else:
        assert global_scale is not None
        encode, decode = _scales.encode_decode(global_scale, is_global_scale_inversed)
        if input.dtype == torch.float8_e4m3fn:
            # The sign of a NaN would be the hardware's choice.
            rows = torch.copysign((rows.float() * (6.0 * decode)).half(), rows.float())
        packed, scales = quantize_nvfp4(rows, encode, decode)
    layout = scale_layouts.layout_from_flags(is_sf_swizzled_layout, is_sf_8x4_layout)
    return packed.reshape(*input.shape[:-1], packed.shape[-1]), scale_layouts.swizzle(scales, layout)
