"""mxfp8_quantize and mxfp8_dequantize: their layouts, padding and rejections."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad

from torch_fp4ops import mxfp8_dequantize, mxfp8_quantize, scale_layouts
from torch_fp4ops.block_quantization import quantize_mx
from torch_fp4ops.formats import MXFP8
from torch_fp4ops.testing import assert_same_bytes
from torch_fp4ops.testing.samples import values
from torch_fp4ops.testing.strategies import matrices

from .rejections import assert_rejected_by_contract

LAYOUTS = ["128x4", "8x4", "linear"]


@given(matrices(block=32), st.sampled_from([0, 1, 2]))
def test_is_the_recipe_in_the_layout(x, number):
    wanted, linear = quantize_mx(x, MXFP8)
    elements, scales = mxfp8_quantize(x, sf_swizzle_layout=number)
    assert_same_bytes(elements, wanted, "elements")
    assert_same_bytes(scales, scale_layouts.swizzle(linear, LAYOUTS[number]).flatten(), "scales")


@given(matrices(block=32), st.sampled_from([32, 64, 128, 256]))
def test_alignment_pads_k_with_zeros(x, alignment):
    plain, plain_scales = mxfp8_quantize(x, False)
    padding = -x.shape[1] % alignment
    wanted = pad(plain.view(torch.uint8), (0, padding)).view(plain.dtype)
    wanted_scales = pad(plain_scales.reshape(x.shape[0], x.shape[1] // 32), (0, padding // 32)).flatten()
    elements, scales = mxfp8_quantize(x, False, alignment)
    assert_same_bytes(elements, wanted, "elements")
    assert_same_bytes(scales, wanted_scales, "scales")


@given(matrices(block=32, special=False), st.sampled_from([0, 1, 2]))
def test_round_trip(x, number):
    elements, scales = mxfp8_quantize(x, sf_swizzle_layout=number)
    out = mxfp8_dequantize(elements, scales, sf_swizzle_layout=number)
    # Half a step of 3 mantissa bits; elements below 2^-6 of the block's step are subnormal.
    step = x.float().abs().unflatten(-1, (x.shape[1] // 32, 32)).amax(-1, keepdim=True).clamp(min=2.0**-126)
    bound = torch.maximum(x.float().abs() * 2.0**-4, (step * 2.0**-17).expand(-1, -1, 32).reshape(x.shape))
    assert ((out - x.float()).abs() <= bound).all()


def test_flag_and_number_name_the_same_layout():
    x = values(0, 9, 64)
    for flag, number in ((True, 0), (False, 2)):
        for a, b in zip(mxfp8_quantize(x, flag), mxfp8_quantize(x, not flag, sf_swizzle_layout=number), strict=True):
            assert_same_bytes(a, b)


VALID = {"input": values(0, 4, 64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": VALID["input"].double()}, r"input is torch.float64; allowed: torch.bfloat16 or"),
        ({"input": VALID["input"][0]}, r"input is of shape \(64,\); allowed: two dimensions"),
        ({"input": VALID["input"][:, :48]}, r"input is of K = 48; allowed: K a multiple of 32 \(mxfp8\)"),
        ({"alignment": 48}, r"alignment is 48; allowed: a positive multiple of 32"),
        ({"alignment": 0}, r"alignment is 0; allowed: a positive multiple of 32"),
        ({"sf_swizzle_layout": 3}, r"sf_swizzle_layout is 3; allowed: None, 0 \(128x4\)"),
        ({"sf_swizzle_layout": -1}, r"sf_swizzle_layout is -1; allowed: None, 0 \(128x4\)"),
    ],
)
def test_quantize_rejects(change, message):
    assert_rejected_by_contract(mxfp8_quantize, VALID, change, message)


ELEMENTS, SCALES = mxfp8_quantize(**VALID)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": ELEMENTS.float()}, r"input is torch.float32; allowed: torch.float8_e4m3fn"),
        ({"input": ELEMENTS[0]}, r"input is of shape \(64,\); allowed: two dimensions"),
        ({"input": ELEMENTS[:, :48]}, r"input is of K = 48"),
        ({"scale_tensor": SCALES.float()}, r"scale_tensor is torch.float32; allowed: torch.uint8"),
        ({"scale_tensor": SCALES[:8]}, r"scale_tensor is of shape \(8,\); allowed: shape \(512,\) \(128x4"),
        ({"is_sf_swizzled_layout": False}, r"scale_tensor is of shape \(512,\); allowed: shape \(8,\) \(linear"),
        ({"sf_swizzle_layout": 5}, r"sf_swizzle_layout is 5"),
        ({"out_dtype": torch.int32}, r"out_dtype is torch.int32"),
    ],
)
def test_dequantize_rejects(change, message):
    valid = {"input": ELEMENTS, "scale_tensor": SCALES}
    assert_rejected_by_contract(mxfp8_dequantize, valid, change, message)
