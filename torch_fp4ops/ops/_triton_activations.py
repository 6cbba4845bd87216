"""Leaves of the Triton kernels: what is computed of the values before they are quantised.

The arithmetic is that of ``_activations``, bit for bit.
"""

# mypy: disable-error-code="assignment, var-annotated"
# Kernels grow tuples and rebind names to other types, which Triton's compiler unrolls.

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import _activations as a
from . import _triton_prims as p

# NVIDIA's arithmetic gives the positive NaN, whatever it was given.
_KEEPS_SIGN_OF_NAN: tl.constexpr = tl.constexpr(p.INTERPRETED.value or torch.version.hip is not None)

_GATE_LIMIT: tl.constexpr = tl.constexpr(a.GATE_LIMIT)
_MINUS_LOG2_E: tl.constexpr = tl.constexpr(a.MINUS_LOG2_E)
_TO_INTEGER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23
_C0: tl.constexpr = tl.constexpr(a.EXP2[0])
_C1: tl.constexpr = tl.constexpr(a.EXP2[1])
_C2: tl.constexpr = tl.constexpr(a.EXP2[2])
_C3: tl.constexpr = tl.constexpr(a.EXP2[3])
_C4: tl.constexpr = tl.constexpr(a.EXP2[4])
_C5: tl.constexpr = tl.constexpr(a.EXP2[5])


@triton.jit
def fma(a, b, c):
    """``a * b + c``, rounded once; the interpreter's own rounds twice."""
    if p.INTERPRETED:
        product = a.to(tl.float64) * b
        total = product + c
        part = total - product
        error = (product - (total - part)) + (c - part)
        inexact = (error < 0) | (error > 0)
        too_far = inexact & ((error < 0) != (total < 0))
        rounded_to_odd = (total.to(tl.int64, bitcast=True) - too_far.to(tl.int64)) | inexact.to(tl.int64)
        return rounded_to_odd.to(tl.float64, bitcast=True).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def _minus_reciprocal(d):
    """``-1 / d``, correctly rounded, for d from -2^126 to -1.

    The steps that a correctly rounded reciprocal takes on NVIDIA, without the branch for what lies outside that range.
    """
    if p.INTERPRETED:
        return tl.div_rn(-1.0, d)
    else:
        r = libdevice.fast_dividef(-1.0, d)
        return tl.fma(r, tl.fma(d, r, 1.0), r)


@triton.jit
def positive_nan(x):
    if _KEEPS_SIGN_OF_NAN:
        return tl.where(x != x, float("nan"), x)
    else:
        return x


@triton.jit
def silu_and_mul(gate, up):
    """``silu(gate) * up``."""
    g = p.max_or_nan(gate, -_GATE_LIMIT)
    limited = p.min_number(g, _GATE_LIMIT)
    shifted = fma(limited, _MINUS_LOG2_E, _TO_INTEGER)  # n in its low bits
    f = fma(limited, _MINUS_LOG2_E, _TO_INTEGER - shifted)
    power = fma(f, _C5, _C4)
    power = fma(power, f, _C3)
    power = fma(power, f, _C2)
    power = fma(power, f, _C1)
    power = fma(power, f, _C0)
    e = p.from_bits(p.bits(power) + (p.bits(shifted) << 23))
    return positive_nan((g * _minus_reciprocal(-1.0 - e)) * up)


@triton.jit
def sums_of_squares(lo, hi):
    """Of 16 values in two octets, ``[N]`` each."""
    lo0, lo1 = p.front_back(lo, 4)
    hi0, hi1 = p.front_back(hi, 4)
    s = fma(hi1, hi1, fma(lo1, lo1, fma(hi0, hi0, lo0 * lo0)))
    s0, s1, s2, s3 = p.quarters(s)
    return p.columns((s0 + s1) + (s2 + s3))


@triton.jit
def units_of(largest):
    """What sums are multiplied by to count units, and the unit; ``largest`` has the bits (int32) of the largest."""
    exponent = tl.maximum(largest >> 23, 39)
    to_units = ((292 - exponent) << 23).to(tl.float32, bitcast=True)
    unit = ((exponent - 38) << 23).to(tl.float32, bitcast=True)
    return to_units, unit


@triton.jit
def reciprocal_rms(largest, count, unit, k, eps):
    """``1 / sqrt(sum / k + eps)`` of ``count`` units; the sum is the largest where that is infinite or NaN."""
    total = tl.where(largest >= 0x7F800000, largest.to(tl.float32, bitcast=True), count.to(tl.float32) * unit)
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(total, k) + eps))
