"""mm_fp4, mm_bf16_fp4 and mm_mxfp8 against float64, and their rejections."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_fp4ops import fp4_quantize, mm_bf16_fp4, mm_fp4, mm_mxfp8, mxfp8_quantize
from torch_fp4ops.ops.mm_bf16_fp4.samples import assert_close as assert_bf16_fp4_close
from torch_fp4ops.ops.mm_fp4.samples import assert_close as assert_fp4_close
from torch_fp4ops.ops.mm_mxfp8.samples import assert_close as assert_mxfp8_close
from torch_fp4ops.testing.samples import values
from torch_fp4ops.testing.strategies import row_counts

from .rejections import assert_rejected_by_contract

SIZES = st.tuples(row_counts(140), st.integers(1, 140), st.integers(1, 7))
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
SEEDS = st.integers(0, 2**31)
SCALE = torch.tensor([448.0])


@given(SIZES, SEEDS, DTYPES, st.booleans(), st.booleans(), st.booleans())
def test_mm_fp4(size, seed, dtype, nvfp4, per_row, eight):
    m, n, blocks = size
    flags = {} if nvfp4 else {"sf_vec_size": 32, "sf_use_ue8m0": True}
    scale = SCALE if nvfp4 else None
    k = blocks * (16 if nvfp4 else 32)
    a, a_sf = fp4_quantize(values(seed, m, k), scale, **flags, is_sf_8x4_layout=eight)
    b, b_sf = fp4_quantize(values(seed + 1, n, k), scale, **flags)
    alpha = torch.rand(m if per_row else 1, generator=torch.Generator().manual_seed(seed)) / 100
    kwargs = {"use_8x4_sf_layout": eight, "use_nvfp4": nvfp4, "block_size": 16 if nvfp4 else 32}
    out = mm_fp4(a, b.T, a_sf, b_sf.T, alpha, dtype, **kwargs)
    assert (out.shape, out.dtype) == ((m, n), dtype)
    assert_fp4_close(out, a, b.T, a_sf, b_sf.T, alpha, **kwargs)


@given(SIZES, SEEDS, st.sampled_from([torch.bfloat16, torch.float16]), st.sampled_from([16, 32]), st.booleans())
def test_mm_bf16_fp4(size, seed, dtype, block, per_row):
    m, n, blocks = size
    a = values(seed, m, blocks * block, dtype=dtype)
    scale = SCALE if block == 16 else None
    b, b_sf = fp4_quantize(values(seed + 1, n, blocks * block), scale, block, block == 32)
    alpha = torch.rand(m if per_row else 1, generator=torch.Generator().manual_seed(seed)) / 10
    out = mm_bf16_fp4(a, b, b_sf, alpha, block_size=block)
    assert (out.shape, out.dtype) == ((m, n), dtype)
    assert_bf16_fp4_close(out, a, b, b_sf, alpha, block_size=block)


@given(SIZES, SEEDS, DTYPES, st.booleans())
def test_mm_mxfp8(size, seed, dtype, eight):
    m, n, blocks = size
    a, a_sf = mxfp8_quantize(values(seed, m, blocks * 32), sf_swizzle_layout=1 if eight else 0)
    b, b_sf = mxfp8_quantize(values(seed + 1, n, blocks * 32))
    out = mm_mxfp8(a, b.T, a_sf, b_sf, out_dtype=dtype, use_8x4_sf_layout=eight)
    assert (out.shape, out.dtype) == ((m, n), dtype)
    assert_mxfp8_close(out, a, b.T, a_sf, b_sf, use_8x4_sf_layout=eight)


def test_the_bound_notices_a_wrong_scale_and_a_wrong_nibble():
    a, a_sf = fp4_quantize(values(0, 8, 64), SCALE)
    b, b_sf = fp4_quantize(values(1, 8, 64), SCALE)
    out = mm_fp4(a, b.T, a_sf, b_sf.T, None, torch.float32)
    wrong_scale, wrong_nibble = a_sf.clone(), b.clone()
    wrong_scale[0, 0] += 1
    wrong_nibble[0, 0] ^= 1
    for args in ((a, b.T, wrong_scale, b_sf.T), (a, wrong_nibble.T, a_sf, b_sf.T)):
        with pytest.raises(AssertionError, match="where the bound is"):
            assert_fp4_close(out, *args)


def test_nan_scales_reach_the_output():
    x = values(0, 4, 32)
    x[2, 5] = float("nan")
    a, a_sf = fp4_quantize(x, SCALE)
    b, b_sf = fp4_quantize(values(1, 8, 32), SCALE)
    out = mm_fp4(a, b.T, a_sf, b_sf.T)
    assert out[2].isnan().all() and not out[[0, 1, 3]].isnan().any()


def test_native_dtypes_are_viewed():
    a, a_sf = fp4_quantize(values(0, 4, 32), SCALE)
    b, b_sf = fp4_quantize(values(1, 8, 32), SCALE)
    native = torch.float4_e2m1fn_x2
    out = mm_fp4(a.view(native), b.view(native).T, a_sf.view(torch.float8_e4m3fn), b_sf.view(torch.float8_e4m3fn).T)
    assert torch.equal(out, mm_fp4(a, b.T, a_sf, b_sf.T))


A, A_SF = fp4_quantize(values(0, 4, 64), SCALE)
B, B_SF = fp4_quantize(values(1, 8, 64), SCALE)
MM_FP4 = {"a": A, "b": B.T, "a_descale": A_SF, "b_descale": B_SF.T, "alpha": torch.ones(1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": A.int()}, r"a is torch.int32; allowed: torch.uint8"),
        ({"b": B.T.int()}, r"b is torch.int32; allowed: torch.uint8"),
        ({"a": A[0]}, r"a is of shape \(32,\); allowed: 2 dimensions"),
        ({"b": B[0]}, r"b is of shape \(32,\); allowed: 2 dimensions"),
        ({"b": B.T.contiguous()}, r"b is of strides \(8, 1\); allowed: column-major: the .T view"),
        ({"b": B[:, :16].contiguous().T}, r"b is of shape \(16, 8\); allowed: \(32, n\): the packed K of a"),
        ({"a": A[:, :20], "b": B[:, :20].contiguous().T}, r"a is of K = 40; allowed: K a multiple of 16 \(nvfp4\)"),
        ({"block_size": 32}, r"block_size is 32 with use_nvfp4=True; allowed: 16 for NVFP4, 32 for MXFP4"),
        ({"use_nvfp4": False}, r"block_size is 16 with use_nvfp4=False"),
        ({"a_descale": A_SF[:8]}, r"a_descale is of shape \(8, 4\); allowed: shape \(128, 4\) \(128x4 scales"),
        ({"a_descale": A_SF, "use_8x4_sf_layout": True}, r"a_descale is of shape .*allowed: shape \(8, 4\) \(8x4"),
        ({"a_descale": A_SF.float()}, r"a_descale is torch.float32; allowed: torch.uint8"),
        ({"b_descale": B_SF}, r"b_descale is of shape \(128, 4\); allowed: shape \(4, 128\) .*transposed"),
        ({"b_descale": B_SF.T.contiguous()}, r"b_descale is of strides \(128, 1\); allowed: column-major"),
        ({"b_descale": B_SF.flatten()[:8]}, r"b_descale is of shape \(8,\); allowed: shape \(512,\)"),
        ({"b_descale": B_SF.T.float()}, r"b_descale is torch.float32"),
        ({"alpha": torch.ones(3)}, r"alpha is of shape \(3,\); allowed: one element or one for each of the 4 rows"),
        ({"alpha": torch.ones(1).double()}, r"alpha is torch.float64; allowed: torch.float32"),
        ({"out_dtype": torch.int8}, r"out_dtype is torch.int8; allowed: torch.bfloat16 or"),
    ],
)
def test_mm_fp4_rejects(change, message):
    assert_rejected_by_contract(mm_fp4, MM_FP4, change, message)


X = values(0, 4, 64)
MM_BF16_FP4 = {"a": X, "b": B, "b_descale": B_SF, "alpha": torch.ones(1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": X.float()}, r"a is torch.float32; allowed: torch.bfloat16 or torch.float16"),
        ({"b": B.int()}, r"b is torch.int32; allowed: torch.uint8"),
        ({"a": X[0]}, r"a is of shape \(64,\); allowed: 2 dimensions"),
        ({"b": B[0]}, r"b is of shape \(32,\); allowed: 2 dimensions"),
        ({"b": B.T.contiguous().T}, r"b is of strides \(1, 8\); allowed: contiguous"),
        ({"b": B[:, :16].contiguous()}, r"b is of shape \(8, 16\); allowed: \(n, 64 / 2\): K of a, packed"),
        ({"a": X[:, :40]}, r"a is of K = 40; allowed: K a multiple of 16"),
        ({"block_size": 8}, r"block_size is 8; allowed: 16 \(NVFP4\) or 32 \(MXFP4\)"),
        ({"b_descale": B_SF[:8]}, r"b_descale is of shape \(8, 4\); allowed: shape \(128, 4\)"),
        ({"b_descale": B_SF.float()}, r"b_descale is torch.float32"),
        ({"alpha": torch.ones(5)}, r"alpha is of shape \(5,\)"),
        ({"out_dtype": torch.int8}, r"out_dtype is torch.int8"),
    ],
)
def test_mm_bf16_fp4_rejects(change, message):
    assert_rejected_by_contract(mm_bf16_fp4, MM_BF16_FP4, change, message)


A8, A8_SF = mxfp8_quantize(values(0, 4, 64))
B8, B8_SF = mxfp8_quantize(values(1, 8, 64))
MM_MXFP8 = {"a": A8, "b": B8.T, "a_descale": A8_SF, "b_descale": B8_SF}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": A8.float()}, r"a is torch.float32; allowed: torch.float8_e4m3fn"),
        ({"b": B8.T.float()}, r"b is torch.float32; allowed: torch.float8_e4m3fn"),
        ({"a": A8[0]}, r"a is of shape \(64,\); allowed: 2 dimensions"),
        ({"b": B8[0]}, r"b is of shape \(64,\); allowed: 2 dimensions"),
        ({"b": B8.T.contiguous()}, r"b is of strides \(8, 1\); allowed: column-major"),
        ({"b": B8[:, :32].contiguous().T}, r"b is of shape \(32, 8\); allowed: \(64, n\): K of a"),
        ({"a": A8[:, :48], "b": B8[:, :48].contiguous().T}, r"a is of K = 48; allowed: K a multiple of 32"),
        ({"a_descale": A8_SF.reshape(128, 4)}, r"a_descale is of shape \(128, 4\); allowed: 1 dimension$"),
        ({"b_descale": B8_SF.reshape(128, 4)}, r"b_descale is of shape \(128, 4\); allowed: 1 dimension$"),
        ({"a_descale": A8_SF[:8]}, r"a_descale is of shape \(8,\); allowed: shape \(512,\) \(128x4"),
        ({"use_8x4_sf_layout": True}, r"a_descale is of shape \(512,\); allowed: shape \(32,\) \(8x4"),
        ({"b_descale": B8_SF[:8]}, r"b_descale is of shape \(8,\); allowed: shape \(512,\)"),
        ({"b_descale": B8_SF.float()}, r"b_descale is torch.float32"),
        ({"out_dtype": torch.int8}, r"out_dtype is torch.int8"),
    ],
)
def test_mm_mxfp8_rejects(change, message):
    assert_rejected_by_contract(mm_mxfp8, MM_MXFP8, change, message)
