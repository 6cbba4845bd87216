"""The arithmetic of the fused quantisers: rounded once where it says so, near the exact values, in any order."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from torch_fp4ops.ops._activations import EXP2, fma, rms_norm, silu_and_mul
from torch_fp4ops.testing import assert_same_bytes
from torch_fp4ops.testing.samples import values
from torch_fp4ops.testing.strategies import matrices

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def rounded(exact: Fraction) -> float:
    """To the nearest fp32, ties to even, by integer arithmetic."""
    if not exact:
        return 0.0
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > magnitude
    step = Fraction(2) ** (max(exponent, -126) - 23)
    nearest = round(magnitude / step) * step  # Fraction rounds ties to even
    return math.copysign(float(nearest) if nearest < Fraction(2) ** 128 else math.inf, exact)


@given(floats, floats, floats, st.sampled_from([None, 0, 1, -1]))
@example(1 + 2**-23, 1 + 2**-23, 2.0**-60, None)  # just above a tie
@example(1 + 2**-12, 1 + 2**-12, -(2.0**-80), None)
@example(2.0**-80, 2.0**-60, 1.0, None)
def test_fma_rounds_once(a, b, c, cancel):
    if cancel is not None:  # c near -a * b, where the low bits of the product are all that is left
        c = -torch.tensor(a) * torch.tensor(b)
        c = float(torch.nextafter(c, c * (1 + cancel)) if math.isfinite(c) and cancel else c)
        if not math.isfinite(c):
            return
    given_ = float(fma(torch.tensor([a]), torch.tensor([b]), torch.tensor([c])))
    assert given_ == rounded(Fraction(a) * Fraction(b) + Fraction(c))


def test_fma_of_infinities_and_nan():
    inf, nan, one = (torch.tensor([v]) for v in (math.inf, math.nan, 1.0))
    assert fma(inf, one, one) == math.inf
    assert fma(one, one, -inf) == -math.inf
    assert fma(nan, one, one).isnan() and fma(inf, one, -inf).isnan()


def test_the_polynomial_is_as_near_as_it_says():
    f = torch.linspace(-0.5, 0.5, 100_001, dtype=torch.float64)
    power = sum(c * f**i for i, c in enumerate(EXP2))
    assert float((power / f.exp2() - 1).abs().max()) < 2.0**-22.5


def _silu(gate: torch.Tensor) -> torch.Tensor:
    return gate.double() / (1 + (-gate.double()).exp())


def assert_silu_close(gate: torch.Tensor) -> None:
    given_ = silu_and_mul(torch.stack((gate, torch.ones_like(gate)), dim=-1))[..., 0]
    bound = _silu(gate).abs() * (2.0**-21 + gate.double().abs() * 2.0**-26) + 2.0**-149
    assert bool(((given_ - _silu(gate)).abs() <= bound).all())


def test_silu_is_near_for_every_bf16_gate():
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    assert_silu_close(every[every.isfinite() & (every >= -86)])


@given(st.integers(0, 2**31), st.floats(1e-3, 40))
def test_silu_is_near(seed, scale):
    assert_silu_close(values(seed, 4096, dtype=torch.float32, scale=scale).clamp(min=-86))


def test_silu_at_its_ends():
    inf, nan = math.inf, math.nan
    gate = torch.tensor([-0.0, 0.0, -87.0, -3e38, -inf, inf, 1e30, nan, 1.0, -nan])
    up = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, -1.0, 2.0, 1.0, nan, 1.0])
    out = silu_and_mul(torch.cat((gate, up)))
    assert_same_bytes(out[:2], torch.tensor([-0.0, -0.0]))
    assert bool(((out[2:5] < 0) & (out[2:5] > -4e-36)).all())
    assert out[5:7].tolist() == [-inf, float(torch.tensor(1e30) * 2)]
    assert bool(out[7:].isnan().all()) and not bool(out[7:].signbit().any())


@given(matrices(rows=st.integers(1, 5), block=16, max_blocks=40, special=False), st.sampled_from([0.0, 1e-6, 1.0]))
def test_rms_norm_is_near(x, eps):
    wide = x.double()
    mean_square = wide.pow(2).mean(-1, keepdim=True)
    keep = (mean_square[:, 0] + eps > 2.0**-100) & (wide.pow(2).amax(-1) < 2.0**120)
    weight = values(0, x.shape[1])
    exact = wide / (mean_square + torch.tensor(eps).double()).sqrt() * weight.double()
    error = (rms_norm(x, weight, eps) - exact).abs()
    assert bool((error <= exact.abs() * 2.0**-21 + 2.0**-126)[keep].all())


@given(matrices(rows=st.integers(1, 5), block=16, max_blocks=40), st.integers(0, 2**31))
def test_rms_norm_does_not_depend_on_the_order_of_blocks(x, seed):
    blocks = x.unflatten(1, (-1, 16))
    order = torch.randperm(blocks.shape[1], generator=torch.Generator().manual_seed(seed))
    moved = rms_norm(blocks[:, order].flatten(1), None, 1e-6).unflatten(1, (-1, 16))
    assert_same_bytes(moved.flatten(1), rms_norm(x, None, 1e-6).unflatten(1, (-1, 16))[:, order].flatten(1))


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_rms_norm_of_rows_that_are_no_numbers(eps):
    x = values(0, 5, 32, dtype=torch.float32)
    x[0], x[1, 3], x[2, 20], x[3, 1], x[4] = 0.0, math.nan, math.inf, 3e38, 1e-30
    out = rms_norm(x, None, eps)
    assert bool(out[0].isnan().all()) if eps == 0 else not bool(out[0].any())
    assert bool(out[1].isnan().all())
    assert out[2].isnan().nonzero().flatten().tolist() == [20] and not bool(out[2].nan_to_num().any())
    assert not bool(out[3].any())
    assert not bool(out[out.isnan()].signbit().any())
    assert bool(out[4].isinf().all()) if eps == 0 else bool((out[4].abs() < 1e-26).all())
