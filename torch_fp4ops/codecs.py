"""Bit-exact encoders and decoders of E2M1, E4M3 and UE8M0 in plain torch, on any device.

NaN and infinity:

* E4M3: infinity saturates to +-448, NaN becomes 0x7F whatever its sign.
* UE8M0: infinity saturates to 254 (2^127), NaN becomes 255.
* E2M1 has neither. Infinity saturates to +-6. NaN becomes magnitude 6 with the sign of the NaN, as PTX's
  ``cvt.satfinite`` gives; alone that would be a plausible number, so every quantiser here also makes the
  block's *scale* NaN, and the block decodes to NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "NATIVE_DTYPES",
    "as_bytes",
    "decode_e2m1",
    "decode_e4m3",
    "decode_ue8m0",
    "encode_e2m1",
    "encode_e4m3",
    "encode_ue8m0",
    "is_native",
    "pack_e2m1",
    "unpack_e2m1",
]

E4M3_MAX = 448.0

NATIVE_DTYPES = {"e2m1": torch.float4_e2m1fn_x2, "e4m3": torch.float8_e4m3fn, "ue8m0": torch.float8_e8m0fnu}
"""torch's own dtype of an element's or a scale's code."""
_NATIVE_BYTE_DTYPES = tuple(NATIVE_DTYPES.values())


def is_native(x: object) -> bool:
    """Whether something is a tensor of torch's float4_e2m1fn_x2, float8_e4m3fn or float8_e8m0fnu."""
    return isinstance(x, Tensor) and x.dtype in _NATIVE_BYTE_DTYPES


def as_bytes(x: Tensor) -> Tensor:
    """View a tensor of those dtypes as uint8; others as they are."""
    return x.view(torch.uint8) if is_native(x) else x


def encode_e2m1(x: Tensor, sign_of: Tensor | None = None) -> Tensor:
    """Round to the nearest E2M1 code, ties to the even code, saturating at +-6, the sign of zero kept.

    Args:
        x: floating-point values of any shape; rounded from their fp32 value.
        sign_of: floating-point values of the same shape that the codes take their signs from; x itself by default.

    Returns:
        uint8 codes 0 to 15 of the same shape (bit 3 is the sign). NaN: see the module's docstring.

    Source: OCP MX specification 1.0, section 5.3.3; rounding as PTX ``cvt.rn.satfinite.e2m1x2.f32``.
    """
    x = x.float()
    a = x.abs()
    # Counted down from 7, as no comparison is true of NaN; "<" where a tie's even code is the one above it. There is no
    # table: a GPU would have to be given it, which synchronises.
    code = torch.full_like(a, 7, dtype=torch.uint8)
    for at_most in (0.25, 1.25, 2.5, 5.0):
        code -= (a <= at_most).to(torch.uint8)
    for below in (0.75, 1.75, 3.5):
        code -= (a < below).to(torch.uint8)
    return code | (torch.signbit(x if sign_of is None else sign_of).to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor) -> Tensor:
    """fp32 values of uint8 E2M1 codes 0 to 15 (0x8 is minus zero)."""
    magnitude = (codes & 7).to(torch.int32)
    # Bits 2:1 are the exponent and bit 0 is the mantissa, but for the codes 0 and 1.
    normal = ((magnitude << 22) + (126 << 23)).view(torch.float32)
    value = torch.where(magnitude < 2, 0.5 * magnitude.float(), normal)
    return torch.where(codes < 8, value, -value)


def pack_e2m1(codes: Tensor) -> Tensor:
    """Pack codes ``[..., K]`` into bytes ``[..., K/2]``: even k in the low nibble, odd k in the high one."""
    pairs = codes.unflatten(-1, (codes.shape[-1] // 2, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_e2m1`: bytes ``[..., K/2]`` to codes ``[..., K]``."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def encode_e4m3(x: Tensor) -> Tensor:
    """Round to the nearest E4M3 (ties to even), saturating at +-448; returns uint8 bytes.

    Source: PTX ``cvt.rn.satfinite.e4m3x2.f32``.
    """
    x = x.float()
    # The cast alone turns large values into NaN on some torch releases.
    rounded = x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(x.isnan(), 0x7F, rounded)


def decode_e4m3(codes: Tensor) -> Tensor:
    """fp32 values of E4M3 bytes (uint8 or float8_e4m3fn)."""
    return as_bytes(codes).view(torch.float8_e4m3fn).float()


def encode_ue8m0(x: Tensor, rounding: str = "up") -> Tensor:
    """Exponent byte of a non-negative value: ``2^(byte - 127)``; the sign is dropped.

    Args:
        x: floating-point values of any shape; encoded from their fp32 value.
        rounding: ``"up"``, the smallest power of two that is not below x (FlashInfer, PTX
            ``cvt.rp.satfinite.ue8m0x2.f32``), or ``"down"``, the largest that is not above it.

    Returns:
        uint8 bytes. Zero and everything below 2^-127 become byte 0, infinity 254, NaN 255.
    """
    if rounding not in ("up", "down"):
        raise ValueError(f"encode_ue8m0: rounding is {rounding!r}, allowed are 'up' and 'down'")
    bits = x.float().abs().view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    if rounding == "up":
        # Below 2^-126 the fp32 value is subnormal and 2^-127 is the mantissa 0x400000.
        above = torch.where(exponent == 0, mantissa > 0x400000, mantissa > 0)
        exponent = exponent + above.to(torch.int32)
    byte = exponent.clamp(max=254)
    return torch.where(x.isnan(), 255, byte).to(torch.uint8)


def decode_ue8m0(codes: Tensor) -> Tensor:
    """fp32 values of UE8M0 bytes (uint8 or float8_e8m0fnu); 255 is NaN."""
    byte = as_bytes(codes).to(torch.int32)
    # 2^-127 is subnormal in fp32, so byte 0 is no plain exponent.
    bits = torch.where(byte == 0, 0x400000, byte << 23)
    return torch.where(byte == 255, float("nan"), bits.view(torch.float32))
