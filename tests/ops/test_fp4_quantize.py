"""fp4_quantize and fp4_dequantize: their layouts, flags and rejections."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_fp4ops import fp4_dequantize, fp4_quantize, scale_layouts
from torch_fp4ops.block_quantization import quantize_mx, quantize_nvfp4
from torch_fp4ops.formats import MXFP4
from torch_fp4ops.testing import assert_same_bytes
from torch_fp4ops.testing.samples import values
from torch_fp4ops.testing.strategies import matrices

from .rejections import assert_rejected, assert_rejected_by_contract

FLAGS = {"128x4": (True, False), "8x4": (True, True), "linear": (False, False)}


@given(matrices(), st.sampled_from(list(FLAGS)), st.booleans(), st.floats(2.0**-20, 2.0**20, width=32))
def test_nvfp4_is_the_recipe_in_the_layout(x, layout, inversed, scale):
    scale = torch.tensor([scale])
    encode, decode = (1 / scale, scale) if inversed else (scale, 1 / scale)
    wanted, linear = quantize_nvfp4(x, encode, decode)
    codes, scales = fp4_quantize(x, scale, 16, False, *FLAGS[layout], inversed)
    assert_same_bytes(codes, wanted, "codes")
    assert_same_bytes(scales, scale_layouts.swizzle(linear, layout), "scales")


@given(matrices(block=32), st.sampled_from(list(FLAGS)))
def test_mxfp4_is_the_recipe_in_the_layout(x, layout):
    wanted, linear = quantize_mx(x, MXFP4)
    codes, scales = fp4_quantize(x, None, 32, True, *FLAGS[layout])
    assert_same_bytes(codes, wanted, "codes")
    assert_same_bytes(scales, scale_layouts.swizzle(linear, layout), "scales")


@given(matrices(rows=st.integers(1, 140)), st.sampled_from(list(FLAGS)), st.booleans())
def test_dequantize_reads_every_layout_alike(x, layout, poison):
    scale = torch.tensor([3.0])
    codes, scales = fp4_quantize(x, scale, 16, False, *FLAGS[layout])
    if poison:  # padding bytes are not read
        rows, cols = x.shape[0], x.shape[1] // 16
        real = scale_layouts.swizzle(torch.ones(rows, cols, dtype=torch.uint8), layout).bool()
        scales = torch.where(real, scales, 0x7F)
    linear = fp4_quantize(x, scale, 16, False, False)
    wanted = fp4_dequantize(*linear, scale, 16, False, False)
    assert_same_bytes(fp4_dequantize(codes, scales, scale, 16, False, *FLAGS[layout]), wanted)


@given(matrices(special=False), st.floats(2.0**-20, 2.0**20, width=32))
def test_encode_and_decode_forms_are_duals(x, scale):
    """With a reciprocal that is exact both ways, both forms of the global scale give the same bytes."""
    scale = torch.tensor([scale]).log2().round().exp2()
    direct, inverse = fp4_quantize(x, scale), fp4_quantize(x, 1 / scale, is_global_scale_inversed=True)
    for a, b in zip(direct, inverse, strict=True):
        assert_same_bytes(a, b)
    assert_same_bytes(fp4_dequantize(*direct, scale), fp4_dequantize(*direct, 1 / scale, is_global_scale_inversed=True))


@given(matrices(special=False, dtypes=(torch.float32,)), st.floats(2.0**-10, 2.0**10, width=32))
def test_dequantize_any_global_scale_given_either_way(x, scale):
    scale = torch.tensor([scale])
    q = fp4_quantize(x, scale)
    assert_same_bytes(fp4_dequantize(*q, scale), fp4_dequantize(*q, 1 / scale, is_global_scale_inversed=True))


def test_codes_of_dequantized_values_are_the_codes():
    """Quantising is idempotent where every block holds its largest code."""
    x = values(0, 33, 64)
    scale = 2688 / x.float().abs().max().reshape(1)
    codes, scales = fp4_quantize(x, scale)
    again, again_scales = fp4_quantize(fp4_dequantize(codes, scales, scale), scale)
    assert (again == codes).float().mean() > 0.99
    assert (again_scales == scales).float().mean() > 0.99


def test_fp8_input_stands_for_a_tensor_that_was_quantised_by_amax_over_448():
    x = values(0, 8, 64, dtype=torch.float32)
    amax = x.abs().max()
    x8 = (x * (448 / amax)).to(torch.float8_e4m3fn)
    scale = (2688 / amax).reshape(1)
    wanted = fp4_quantize((x8.float() * (6 * (1 / scale))).half(), scale)
    for a, b in zip(fp4_quantize(x8, scale), wanted, strict=True):
        assert_same_bytes(a, b)
    error = fp4_dequantize(*fp4_quantize(x8, scale), scale) - x
    assert error.norm() / x.norm() < 0.12  # NVFP4 alone has 0.095


def test_per_row_global_scales_are_rows_quantised_alone():
    x, scales = values(0, 3, 32), torch.tensor([10.0, 200.0, 3000.0])
    codes, sf = fp4_quantize(x, scales, is_sf_swizzled_layout=False)
    for i in range(3):
        alone = fp4_quantize(x[i : i + 1], scales[i : i + 1], is_sf_swizzled_layout=False)
        assert_same_bytes(codes[i : i + 1], alone[0])
        assert_same_bytes(sf[i : i + 1], alone[1])


def test_leading_dimensions_flatten():
    x, scale = values(0, 2, 3, 64), torch.tensor([100.0])
    codes, sf = fp4_quantize(x, scale)
    flat_codes, flat_sf = fp4_quantize(x.reshape(6, 64), scale)
    assert codes.shape == (2, 3, 32)
    assert_same_bytes(codes.reshape(6, 32), flat_codes)
    assert_same_bytes(sf, flat_sf)


VALID = {"input": values(0, 4, 64), "global_scale": torch.tensor([100.0])}
MXFP4_FLAGS = {"sf_vec_size": 32, "sf_use_ue8m0": True, "global_scale": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": VALID["input"].double()}, r"input is torch.float64; allowed: torch.bfloat16 or .*float8_e4m3fn"),
        ({"input": VALID["input"].flatten()}, r"input is of shape \(256,\); allowed: two dimensions or more"),
        ({"input": VALID["input"][:, :40]}, r"input is of K = 40; allowed: K a multiple of 16 \(nvfp4\)"),
        ({"sf_vec_size": 32}, r"sf_vec_size is 32 with sf_use_ue8m0=False; allowed: 16 with False \(NVFP4\) or 32"),
        ({"sf_use_ue8m0": True}, r"sf_vec_size is 16 with sf_use_ue8m0=True; allowed: 16 with False"),
        ({"is_sf_swizzled_layout": False, "is_sf_8x4_layout": True}, r"is_sf_swizzled_layout is False; allowed: True"),
        ({"global_scale": None}, r"global_scale is None; allowed: a float32 tensor \(nvfp4\)"),
        ({"global_scale": torch.tensor([1])}, r"global_scale is torch.int64; allowed: torch.float32"),
        ({"global_scale": torch.ones(3)}, r"global_scale is of shape \(3,\); allowed: one element or one .* 4 rows"),
        ({**MXFP4_FLAGS, "global_scale": torch.ones(1)}, r"global_scale is given; allowed: None: mxfp4"),
        ({**MXFP4_FLAGS, "input": values(0, 4, 48)}, r"input is of K = 48; allowed: K a multiple of 32 \(mxfp4\)"),
        ({**MXFP4_FLAGS, "input": values(0, 4, 64, dtype=torch.float8_e4m3fn)}, r"input is torch.float8_e4m3fn; allo"),
    ],
)
def test_quantize_rejects(change, message):
    assert_rejected_by_contract(fp4_quantize, VALID, change, message)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_quantize_rejects_a_global_scale_that_is_not_finite_and_positive(value):
    change = {"global_scale": torch.tensor([value])}
    assert_rejected(fp4_quantize, VALID, change, r"global_scale is \[.*\]; allowed: finite values above zero")


CODES, SCALES = fp4_quantize(**VALID)
VALID_DEQUANTIZE = {"input": CODES, "scale": SCALES, "global_scale": VALID["global_scale"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": CODES.int()}, r"input is torch.int32; allowed: torch.uint8"),
        ({"input": CODES[0]}, r"input is of shape \(32,\); allowed: two dimensions"),
        ({"input": CODES[:, :20]}, r"input is of K = 40; allowed: K a multiple of 16"),
        ({"scale": SCALES.float()}, r"scale is torch.float32; allowed: torch.uint8"),
        ({"scale": SCALES[:4]}, r"scale is of shape \(4, 4\); allowed: shape \(128, 4\) \(128x4 scales of 4 rows"),
        ({"scale": SCALES.flatten()[:16]}, r"scale is of shape \(16,\); allowed: shape \(512,\)"),
        ({"scale": SCALES, "is_sf_swizzled_layout": False}, r"scale is of shape .*allowed: shape \(4, 4\) \(linear"),
        ({"scale": SCALES.T.contiguous().T}, r"scale is of strides \(1, 128\); allowed: contiguous"),
        ({"global_scale": None}, r"global_scale is None; allowed: a float32"),
        ({"sf_vec_size": 8}, r"sf_vec_size is 8 with"),
        ({"out_dtype": torch.float64}, r"out_dtype is torch.float64; allowed: torch.bfloat16 or"),
    ],
)
def test_dequantize_rejects(change, message):
    assert_rejected_by_contract(fp4_dequantize, VALID_DEQUANTIZE, change, message)


def test_dequantize_rejects_a_zero_global_scale():
    change = {"global_scale": torch.zeros(1)}
    assert_rejected(fp4_dequantize, VALID_DEQUANTIZE, change, r"global_scale is \[0.0\]; allowed: finite")
