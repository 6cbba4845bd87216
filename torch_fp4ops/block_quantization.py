"""How a block of values becomes codes and a scale, and back: the arithmetic every quantiser here shares.

All of it is fp32 with correctly rounded operations, so that any backend can reproduce it byte for byte. Scales
stay in their linear layout ``[..., K / block_size]``; a NaN in a block makes the block's scale NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codecs import (
    decode_e2m1,
    decode_e4m3,
    decode_ue8m0,
    encode_e2m1,
    encode_e4m3,
    encode_ue8m0,
    pack_e2m1,
    unpack_e2m1,
)
from .formats import NVFP4, BlockFormat

__all__ = ["dequantize_blocks", "quantize_mx", "quantize_nvfp4"]

_FLT_MAX = torch.finfo(torch.float32).max


# 1/6 and 1/448 rounded to fp32, by the largest element.
_RECIPROCAL = {m: float(torch.tensor(1.0) / torch.tensor(m)) for m in (6.0, 448.0)}


def quantize_nvfp4(x: Tensor, encode_scale: Tensor, decode_scale: Tensor) -> tuple[Tensor, Tensor]:
    """NVFP4 codes and E4M3 block scales of ``x``.

    With ``amax`` the largest magnitude of a block of 16::

        scale = e4m3(encode_scale * (amax * fp32(1/6)))
        code  = e2m1(x * min(1 / (scale * decode_scale), FLT_MAX))       (zeros if scale is 0)

    Args:
        x: floating-point ``[..., K]``, K a multiple of 16; computed from its fp32 value.
        encode_scale: fp32, broadcasts against ``[..., 1]``; ``2688 / amax(tensor)`` uses the whole range.
        decode_scale: fp32, the reciprocal of ``encode_scale``.

    Returns:
        ``(packed [..., K/2], scales [..., K/16])``, both uint8.

    Source: FlashInfer ``quantization_utils.cuh::cvt_warp_fp16_to_fp4``, with IEEE division in place of
    ``rcp.approx.ftz`` and, unlike there, zeros where the block scale underflows.
    """
    blocks = x.float().contiguous().unflatten(-1, (x.shape[-1] // NVFP4.block_size, NVFP4.block_size))
    amax = blocks.abs().amax(-1)
    scales = encode_e4m3(encode_scale * (amax * _RECIPROCAL[6.0]))
    step = decode_e4m3(scales)
    multiplier = (1.0 / (step * decode_scale)).clamp(max=_FLT_MAX)
    multiplier = torch.where(step == 0, 0.0, multiplier)
    # The signs are x's own: where the multiplier is NaN the sign of the product is the hardware's choice.
    codes = encode_e2m1(blocks * multiplier.unsqueeze(-1), sign_of=blocks)
    return pack_e2m1(codes.flatten(-2)), scales


def quantize_mx(x: Tensor, fmt: BlockFormat, scale_rule: str = "up") -> tuple[Tensor, Tensor]:
    """MXFP4 or MXFP8 elements and UE8M0 block scales of ``x``.

    Args:
        x: floating-point ``[..., K]``, K a multiple of 32; computed from its fp32 value.
        fmt: ``MXFP4`` or ``MXFP8``.
        scale_rule: ``"up"``: ``2^ceil(log2(amax / element_max))``, which never clips (FlashInfer); ``"floor"``:
            ``2^(floor(log2 amax) - emax)``, which may (the OCP MX specification 1.0, section 6.3).

    Returns:
        ``(elements, scales [..., K/32])``; elements are uint8 ``[..., K/2]`` for MXFP4 and float8_e4m3fn
        ``[..., K]`` for MXFP8.
    """
    if scale_rule not in ("up", "floor"):
        raise ValueError(f"quantize_mx: scale_rule is {scale_rule!r}, allowed are 'up' and 'floor'")
    blocks = x.float().contiguous().unflatten(-1, (x.shape[-1] // fmt.block_size, fmt.block_size))
    amax = blocks.abs().amax(-1)
    if scale_rule == "up":
        scales = encode_ue8m0(amax * _RECIPROCAL[fmt.element_max])
    else:
        exponent = encode_ue8m0(amax, rounding="down").to(torch.int32)
        lowered = (exponent - fmt.element_max_exponent).clamp(min=0)
        scales = torch.where(exponent == 255, exponent, lowered).to(torch.uint8)
    multiplier = (1.0 / decode_ue8m0(scales)).unsqueeze(-1)
    if fmt.element == "e2m1":
        return pack_e2m1(encode_e2m1(blocks * multiplier, sign_of=blocks).flatten(-2)), scales
    return encode_e4m3(blocks * multiplier).view(torch.float8_e4m3fn).flatten(-2), scales


def dequantize_blocks(elements: Tensor, scales: Tensor, fmt: BlockFormat, decode_scale: Tensor | None = None) -> Tensor:
    """fp32 values ``(element * block scale) * decode_scale`` of ``[..., K]`` elements and linear scales.

    ``element * block scale`` is exact in fp32 for every pair of codes short of overflow.
    """
    values = decode_e2m1(unpack_e2m1(elements)) if fmt.element == "e2m1" else decode_e4m3(elements.contiguous())
    steps = decode_e4m3(scales) if fmt.scale == "e4m3" else decode_ue8m0(scales)
    blocks = values.unflatten(-1, (values.shape[-1] // fmt.block_size, fmt.block_size)) * steps.unsqueeze(-1)
    out = blocks.flatten(-2)
    return out if decode_scale is None else out * decode_scale
