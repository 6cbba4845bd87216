"""silu_and_mul_fp4_quantize and rms_norm_fp4_quantize: what they are fused from, and rejections."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_fp4ops import fp4_dequantize, fp4_quantize, rms_norm_fp4_quantize
from torch_fp4ops import silu_and_mul_fp4_quantize as silu_quantize
from torch_fp4ops.formats import MXFP4, NVFP4, BlockFormat
from torch_fp4ops.ops._activations import rms_norm, silu_and_mul
from torch_fp4ops.testing import assert_same_bytes
from torch_fp4ops.testing.samples import values
from torch_fp4ops.testing.strategies import matrices

from .rejections import assert_rejected, assert_rejected_by_contract

FLAGS = {"128x4": (True, False), "8x4": (True, True), "linear": (False, False)}
LAYOUTS = tuple(FLAGS)
FORMATS = (NVFP4, MXFP4)
SCALE = torch.tensor([300.0])


def tail(fmt: BlockFormat, layout: str, inversed: bool = False) -> tuple[Any, ...]:
    """The arguments behind the global scale, or eps."""
    return fmt.block_size, fmt is MXFP4, *FLAGS[layout], inversed


def scale_for(fmt: BlockFormat, scale: float = 300.0) -> Tensor | None:
    return torch.tensor([scale]) if fmt is NVFP4 else None


# What they are


@given(matrices(block=64, max_blocks=3), st.sampled_from(FORMATS), st.sampled_from(LAYOUTS))
def test_silu_and_mul_is_the_pair_in_fp32(x, fmt, layout):
    pair = fp4_quantize(silu_and_mul(x), scale_for(fmt), *tail(fmt, layout))
    for given_, wanted in zip(silu_quantize(x, scale_for(fmt), *tail(fmt, layout)), pair, strict=True):
        assert_same_bytes(given_, wanted)


@given(matrices(block=32, max_blocks=3), st.sampled_from(FORMATS), st.sampled_from(LAYOUTS))
def test_rms_norm_is_the_pair_in_fp32(x, fmt, layout):
    weight = values(0, x.shape[1])
    pair = fp4_quantize(rms_norm(x, weight, 1e-6), scale_for(fmt), *tail(fmt, layout))
    fused = rms_norm_fp4_quantize(x, weight, scale_for(fmt), 1e-6, *tail(fmt, layout))
    for given_, wanted in zip(fused, pair, strict=True):
        assert_same_bytes(given_, wanted)


def test_codes_are_near_those_of_the_pair_in_bf16():
    """The pair that rounds to bf16 in between decodes to nearly the same, and is no nearer to the exact values."""
    x, weight = values(0, 64, 512), values(1, 256)
    y = torch.nn.functional.silu(x[:, :256].double()) * x[:, 256:].double()
    n = torch.nn.functional.rms_norm(x[:, :256].double(), (256,), weight.double(), 1e-6)
    for fused, exact in ((silu_quantize(x, SCALE), y), (rms_norm_fp4_quantize(x[:, :256], weight, SCALE), n)):
        pair = fp4_quantize(exact.bfloat16(), SCALE)
        assert (fused[0] != pair[0]).float().mean() < 0.05
        errors = [float((fp4_dequantize(*out, SCALE) - exact).norm() / exact.norm()) for out in (fused, pair)]
        assert errors[0] < 0.11 and errors[0] < 1.001 * errors[1]


def test_leading_dimensions_flatten():
    x = values(0, 2, 3, 64)
    for op, args in ((silu_quantize, (SCALE,)), (rms_norm_fp4_quantize, (None, SCALE))):
        codes, sf = op(x, *args)
        flat = op(x.reshape(6, 64), *args)
        assert codes.shape[:2] == (2, 3)
        assert_same_bytes(codes.flatten(0, 1), flat[0])
        assert_same_bytes(sf, flat[1])


# Rejections

VALID_SILU = {"input": values(0, 4, 64), "global_scale": SCALE}
VALID_NORM = {"input": values(0, 4, 64), "weight": values(1, 64), "global_scale": SCALE}
MXFP4_FLAGS = {"sf_vec_size": 32, "sf_use_ue8m0": True, "global_scale": None}
SHARED = [
    ({"input": values(0, 4, 64).double()}, r"input is torch.float64; allowed: torch.bfloat16 or torch.float16 or"),
    ({"input": values(0, 4, 64).to(torch.float8_e4m3fn)}, r"input is torch.float8_e4m3fn; allowed: torch.bfloat16"),
    ({"input": values(0, 64)}, r"input is of shape \(64,\); allowed: two dimensions or more"),
    ({"sf_vec_size": 32}, r"sf_vec_size is 32 with sf_use_ue8m0=False; allowed: 16 with False \(NVFP4\) or 32"),
    ({"is_sf_swizzled_layout": False, "is_sf_8x4_layout": True}, r"is_sf_swizzled_layout is False; allowed: True"),
    ({"global_scale": None}, r"global_scale is None; allowed: a float32 tensor \(nvfp4\)"),
    ({"global_scale": torch.tensor([1])}, r"global_scale is torch.int64; allowed: torch.float32"),
    ({"global_scale": torch.ones(3)}, r"global_scale is of shape \(3,\); allowed: one element or one .* 4 rows"),
    ({**MXFP4_FLAGS, "global_scale": SCALE}, r"global_scale is given; allowed: None: mxfp4"),
]
SILU = [
    ({"input": values(0, 4, 65)}, r"input is of shape \(4, 65\); allowed: an even last dimension: gate and up"),
    ({"input": values(0, 4, 48)}, r"input is of K = 24; allowed: K a multiple of 16 \(nvfp4\)"),
    ({**MXFP4_FLAGS, "input": values(0, 4, 96)}, r"input is of K = 48; allowed: K a multiple of 32 \(mxfp4\)"),
]
NORM = [
    ({"weight": values(1, 64).double()}, r"weight is torch.float64; allowed: torch.bfloat16 or"),
    ({"weight": values(1, 32)}, r"weight is of shape \(32,\); allowed: shape \(64,\): one for each of the K columns"),
    ({"weight": values(1, 1, 64)}, r"weight is of shape \(1, 64\); allowed: shape \(64,\)"),
    ({"eps": -1e-6}, r"eps is -1e-06; allowed: zero or more"),
    ({"eps": math.nan}, r"eps is nan; allowed: zero or more"),
    ({"input": values(0, 4, 24), "weight": None}, r"input is of K = 24; allowed: K a multiple of 16"),
]


@pytest.mark.parametrize(("change", "message"), SHARED + SILU)
def test_silu_and_mul_rejects(change, message):
    assert_rejected_by_contract(silu_quantize, VALID_SILU, change, message)


@pytest.mark.parametrize(("change", "message"), SHARED + NORM)
def test_rms_norm_rejects(change, message):
    assert_rejected_by_contract(rms_norm_fp4_quantize, VALID_NORM, change, message)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_global_scale_that_is_not_finite_and_positive_is_rejected(value):
    change = {"global_scale": torch.tensor([value])}
    assert_rejected(silu_quantize, VALID_SILU, change, r"global_scale is \[.*\]; allowed: finite values above zero")
    assert_rejected(rms_norm_fp4_quantize, VALID_NORM, change, r"global_scale is \[.*\]; allowed: finite")
