"""What the fused quantisers compute before they quantise, in arithmetic that every backend can reproduce bit for bit.

Only fp32 operations that round correctly, in a stated order: no library ``exp`` or ``rsqrt``, which differ from one
device to the next by a last bit, and no sum whose order is the device's choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fma", "rms_norm", "silu_and_mul"]

MINUS_LOG2_E = -1.4426950216293335  # fp32
GATE_LIMIT = 86.0  # exp(86) and its reciprocal are normal in fp32
# 2^f for |f| <= 1/2, the constant first: minimax of the relative error, 2^-22.5 once rounded to fp32.
EXP2 = (
    1.0,
    0.6931469440460205,
    0.24022120237350464,
    0.05550713092088699,
    0.009675540961325169,
    0.0013276472454890609,
)
_TO_INTEGER = 1.5 * 2.0**23  # a small value plus this has its nearest integer in the low bits


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up`` in fp32 of ``x = [gate, up]`` along the last dimension.

    With ``g = max(gate, -86)``, ``e = 2^n * p(f)`` is ``exp(-min(g, 86))``: ``n`` is the nearest integer of
    ``t = -log2(e) * min(g, 86)``, ``f = t - n``, both by FMA, and ``p`` a polynomial evaluated by FMAs (Horner). Then::

        (g * (1 / (1 + e))) * up

    The silu's relative error is at most ``2^-21 + |gate| * 2^-26``, but a gate below -86 counts as -86, whose silu is
    -4e-36. A NaN in either half gives a positive NaN.

    Args:
        x: ``[..., 2K]``, floating point.

    Returns:
        fp32 ``[..., K]``.
    """
    gate, up = x.float().chunk(2, dim=-1)
    g = gate.clamp(min=-GATE_LIMIT)
    limited = g.clamp(max=GATE_LIMIT)
    n = fma(limited, MINUS_LOG2_E, _TO_INTEGER) - _TO_INTEGER
    f = fma(limited, MINUS_LOG2_E, -n)
    power = torch.full_like(f, EXP2[-1])
    for coefficient in reversed(EXP2[:-1]):
        power = fma(power, f, coefficient)
    exponent = n.nan_to_num().to(torch.int32) << 23
    e = (power.view(torch.int32) + exponent).view(torch.float32)
    return _positive_nan(g * (1.0 / (1.0 + e)) * up)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` along the last dimension, in fp32: ``(x * (1 / sqrt(...))) * weight``.

    The squares of 16 consecutive values are added as ``(s0 + s1) + (s2 + s3)``, where FMAs add up ``sj`` of the
    values 2j, 2j + 1, 8 + 2j and 9 + 2j, in this order. These sums are added exactly, so in any order: as integers in
    units of ``2^(E - 38)``, rounded towards zero, where E is the exponent of the largest of them, -88 at least. An
    infinity or NaN among them is the sum. Division, addition of ``eps``, square root and reciprocal round once each.
    The result's relative error is at most 2^-21 where the mean square, or ``eps``, is above 2^-100.

    Args:
        x: ``[..., K]``, floating point, K a multiple of 16.
        weight: ``[K]``, or None for ones.
        eps: rounded to fp32.

    Returns:
        fp32 ``[..., K]``. A NaN in a row makes the whole row NaN, an infinity its own place NaN and the others zero;
        every NaN is positive.
    """
    x = x.float()
    k = x.shape[-1]
    if k == 0:
        return x
    values = x.unflatten(-1, (k // 16, 2, 4, 2))
    sums = torch.zeros_like(values[..., 0, :, 0])
    for octet in (0, 1):
        for parity in (0, 1):
            value = values[..., octet, :, parity]
            sums = fma(value, value, sums)
    s = (sums[..., 0] + sums[..., 1]) + (sums[..., 2] + sums[..., 3])

    largest = s.amax(-1, keepdim=True)
    exponent = (largest.view(torch.int32) >> 23).clamp(min=127 - 88)
    to_units = ((127 + 38 + 127 - exponent) << 23).view(torch.float32)
    unit = ((exponent - 38) << 23).view(torch.float32)
    finite = largest.isfinite()
    exact = torch.where(finite, s * to_units, 0.0).to(torch.int64).sum(-1, keepdim=True)
    total = torch.where(finite, exact.float() * unit, largest)
    # Tensors, as torch divides by a Python number on a GPU by multiplying with its reciprocal.
    mean = total / torch.full_like(total, k)
    y = x * (1.0 / (mean + eps).sqrt())
    return _positive_nan(y if weight is None else y * weight.float())


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """``a * b + c`` of fp32 values, rounded once.

    The product is exact in float64. The sum is rounded to odd there, so that rounding it again to fp32 gives what
    rounding once would have given.
    """
    product = a.double() * b
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    inexact = (error < 0) | (error > 0)  # neither for infinities and NaN
    too_far = inexact & ((error < 0) != (total < 0))
    bits = (total.view(torch.int64) - too_far.long()) | inexact.long()
    return bits.view(torch.float64).float()


def _positive_nan(x: Tensor) -> Tensor:
    """The sign of a NaN that arithmetic gives is the hardware's choice, and codes have signs."""
    return torch.where(x.isnan(), torch.nan, x)
