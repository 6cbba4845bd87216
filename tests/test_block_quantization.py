"""The recipes against a scalar implementation in numpy's float32, and what they promise of every block."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from torch_fp4ops.block_quantization import dequantize_blocks, quantize_mx, quantize_nvfp4
from torch_fp4ops.codecs import decode_e4m3, decode_ue8m0, unpack_e2m1
from torch_fp4ops.formats import MXFP4, MXFP8, NVFP4
from torch_fp4ops.testing.strategies import matrices

f32 = np.float32
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]


def nearest_index(grid: list[float], value: float) -> int:
    """Nearest entry of the grid, ties to the even index, beyond the end the last."""
    if not value <= grid[-1]:  # infinite, or the NaN that an infinity times a multiplier of zero is
        return len(grid) - 1
    return min(range(len(grid)), key=lambda i: (abs(grid[i] - value), i % 2))


def scalar_nvfp4_block(block: list[float], encode: np.float32, decode: np.float32) -> tuple[int, list[int]]:
    """The documented recipe, one fp32 operation after the other."""
    signs = [8 if math.copysign(1, v) < 0 else 0 for v in block]
    if any(math.isnan(v) for v in block):
        return 0x7F, [s | 7 for s in signs]
    with np.errstate(all="ignore"):
        amax = f32(max(abs(v) for v in block))
        scale = nearest_index(E4M3, float(encode * (amax * (f32(1) / f32(6)))))
        if E4M3[scale] == 0:
            return scale, signs
        multiplier = min(f32(1) / (f32(E4M3[scale]) * decode), np.finfo(f32).max)
        return scale, [
            s | nearest_index(E2M1, float(abs(f32(v)) * multiplier)) for s, v in zip(signs, block, strict=True)
        ]


@given(matrices(rows=st.integers(1, 3), max_blocks=2), st.sampled_from([1.0, 0.37, 2688 / 5, 1e-30, 1e30, 3e-39, 3e38]))
@example(torch.tensor([[1e-45] * 16]), 3e38)  # the multiplier overflows and is limited
@example(torch.tensor([[math.inf] + [1.0] * 15]), 3e-39)  # the multiplier underflows: 0 * infinity
@example(torch.tensor([[5.0] + [1e-3] * 15]), 1e-5)  # the scale underflows to zero
def test_nvfp4_equals_the_scalar_recipe(x, encode):
    encode = torch.tensor(encode)
    decode = 1.0 / encode
    packed, scales = quantize_nvfp4(x, encode, decode)
    codes = unpack_e2m1(packed)
    for m in range(x.shape[0]):
        for b in range(x.shape[1] // 16):
            block = x[m, 16 * b : 16 * b + 16].float().tolist()
            scale, wanted = scalar_nvfp4_block(block, f32(encode.item()), f32(decode.item()))
            assert scales[m, b] == scale
            assert codes[m, 16 * b : 16 * b + 16].tolist() == wanted


@given(matrices(block=32, rows=st.integers(1, 20)), st.sampled_from([MXFP4, MXFP8]), st.sampled_from(["up", "floor"]))
def test_mx_scale_is_the_power_of_two_of_its_rule(x, fmt, rule):
    _, scales = quantize_mx(x, fmt, rule)
    amax = x.float().reshape(*scales.shape, 32).abs().amax(-1)
    assert torch.equal(scales == 255, amax.isnan())
    normal = amax.isfinite() & (amax >= 2.0**-100) & (amax <= 2.0**100)
    step, amax = decode_ue8m0(scales)[normal].double(), amax[normal].double()
    if rule == "up":
        largest = fmt.element_max * step
        # fp32(1/element_max) is not exact: half an ulp of slack where amax sits on the step.
        assert (amax <= largest * (1 + 2.0**-23)).all()
        assert (amax > largest / 2 * (1 - 2.0**-23)).all()
    else:
        assert torch.equal(step.log2(), amax.log2().floor() - fmt.element_max_exponent)


@given(matrices(block=32, rows=st.integers(1, 20), special=False), st.sampled_from([MXFP4, MXFP8]))
def test_mx_elements_are_nearest(x, fmt):
    """No code is nearer than the one chosen: half the spacing of the element grid bounds the error."""
    elements, scales = quantize_mx(x, fmt)
    out = dequantize_blocks(elements, scales, fmt)
    step = decode_ue8m0(scales).repeat_interleave(32, -1)
    scaled = (x.float() / step).abs().double()
    if fmt is MXFP4:
        spacing = torch.where(scaled < 2, 0.5, torch.where(scaled < 4, 1.0, 2.0))
    else:
        spacing = (scaled.clamp(min=2.0**-6).log2().floor() - 3).exp2()
    assert ((out.double() - x.double()).abs() <= spacing / 2 * step * (1 + 2.0**-20)).all()


@given(matrices(special=False))
def test_nvfp4_error_is_within_half_a_step(x):
    amax = x.float().abs().max() if x.numel() else torch.tensor(1.0)
    encode = 2688 / amax if amax > 1e-30 else torch.tensor(1.0)
    packed, scales = quantize_nvfp4(x, encode, 1 / encode)
    out = dequantize_blocks(packed, scales, NVFP4, 1 / encode)
    step = (decode_e4m3(scales).double() / encode.double()).repeat_interleave(16, -1)
    error, scaled = (out.double() - x.double()).abs(), x.double().abs() / step
    # Rounding SF moves a block's largest value by up to 1/16 beyond 6; a step that underflowed gives zeros.
    spacing = torch.where(scaled < 2, 0.5, torch.where(scaled < 4, 1.0, 2.0))
    fine = error <= spacing / 2 * step * (1 + 2.0**-20)
    assert (fine | (step == 0) | (scales.repeat_interleave(16, -1) < 8)).all()


@pytest.mark.parametrize("where", [0, 7, 15])
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_poisons_its_block_and_no_other(where, sign):
    x = torch.ones(1, 64)
    x[0, 16 + where] = math.copysign(math.nan, sign)
    packed, scales = quantize_nvfp4(x, torch.tensor(1.0), torch.tensor(1.0))
    out = dequantize_blocks(packed, scales, NVFP4)
    assert scales[0, 1] == 0x7F
    assert out[0, 16:32].isnan().all()
    assert not out[0, :16].isnan().any() and not out[0, 32:].isnan().any()
    for fmt in (MXFP4, MXFP8):
        elements, scales = quantize_mx(x, fmt)
        out = dequantize_blocks(elements, scales, fmt)
        assert scales[0].tolist()[0] == 255
        assert out[0, :32].isnan().all() and not out[0, 32:].isnan().any()


def test_infinity_saturates_nvfp4_and_stays_infinite_in_mx():
    x = torch.ones(1, 32)
    x[0, 3] = -math.inf
    packed, scales = quantize_nvfp4(x, torch.tensor(1.0), torch.tensor(1.0))
    assert dequantize_blocks(packed, scales, NVFP4)[0, 3] == -6 * 448
    for fmt in (MXFP4, MXFP8):
        assert dequantize_blocks(*quantize_mx(x, fmt), fmt)[0, 3] == -math.inf


@given(matrices())
def test_zero_blocks_are_zero(x):
    zero = x * 0
    zero = torch.where(zero.isnan(), 0, zero)
    for elements, scales, fmt in (
        (*quantize_nvfp4(zero, torch.tensor(3.0), torch.tensor(1 / 3)), NVFP4),
        *(((*quantize_mx(zero[:, : zero.shape[1] // 32 * 32], fmt), fmt)) for fmt in (MXFP4, MXFP8)),
    ):
        assert (scales == 0).all()
        out = dequantize_blocks(elements, scales, fmt)
        assert (out == 0).all()
        assert torch.equal(torch.signbit(out), torch.signbit(zero[:, : out.shape[1]]))


def test_unknown_scale_rule():
    with pytest.raises(ValueError, match=r"scale_rule is 'nearest'.*'up' and 'floor'"):
        quantize_mx(torch.ones(1, 32), MXFP4, "nearest")
