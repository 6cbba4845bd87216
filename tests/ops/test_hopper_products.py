"""Hopper products of all codes and scales and any size, cut up as they are when ops are called."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_fp4ops import mm_bf16_fp4
from torch_fp4ops.formats import MXFP4, MXFP8, NVFP4
from torch_fp4ops.testing import assert_matmul_close
from torch_fp4ops.testing.samples import values
from torch_fp4ops.weight_layouts import pack_hopper_weight, unpack_hopper_weight

from .test_hopper import dequantized, storable

pytest.importorskip("triton.experimental.gluon", reason="needs Gluon")

from torch_fp4ops.ops import _hopper_launch
from torch_fp4ops.ops._triton_gemm_launch import Operand

from ..gluon_interpreter import interpreted

KINDS = [(NVFP4, False), (NVFP4, True), (MXFP4, False), (MXFP8, False)]


def check_product(m, n, k, fmt, half, device):
    """NaN blocks included, which must reach their column of the result and no other."""
    codes, scales = storable(m + n, n, k, fmt)
    if fmt is NVFP4:
        scales[0, 3], scales[n // 2, 0] = 0x7F, 0xFF
    clean = torch.arange(n) % 3 > 0  # leave rows without NaN
    scales[clean] = torch.where((scales[clean] & 0x7F) == 0x7F, 0x3F, scales[clean])
    values_of = dequantized(codes, scales, fmt)
    x = values(m, m, k, dtype=torch.float16 if half else torch.bfloat16)
    alpha = torch.rand(m, generator=torch.Generator().manual_seed(m)) + 0.5
    weight, scale = (t.to(device) for t in pack_hopper_weight(codes, scales, fmt))
    for out_dtype, factor in ((torch.bfloat16, None), (torch.float32, alpha), (torch.float16, alpha[:1])):
        out = torch.full((m, weight.shape[0]), 1e4, dtype=out_dtype, device=device)
        given_alpha = None if factor is None else factor.to(device)
        _hopper_launch.product(Operand(x.to(device)), weight, scale, fmt, out, given_alpha)
        out = out.cpu()
        nan = values_of.isnan().any(1)
        assert out[:, :n][:, nan].isnan().all() and not out[:, n:].any() and nan.sum() < n
        assert_matmul_close(out[:, :n][:, ~nan], x, values_of[~nan], factor)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 13, 64, 129, 300])
@pytest.mark.parametrize(("n", "k"), [(200, 288), (384, 2080)])
@pytest.mark.parametrize(("fmt", "half"), KINDS)
def test_on_a_gpu(m, n, k, fmt, half):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    check_product(m, n, k, fmt, half, "cuda")


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(1, 40) | st.integers(1, 300),
    n=st.integers(2, 300),
    blocks=st.integers(4, 40),
    kind=st.sampled_from(KINDS),
    processors=st.sampled_from([1, 3, 132]),
    seed=st.integers(0, 1000),
)
def test_in_the_interpreter(m, n, blocks, kind, processors, seed):
    with interpreted(seed), mock.patch.object(_hopper_launch, "processors", lambda device: processors):
        check_product(m, n, blocks * 32, *kind, "cpu")


def test_weights_may_be_anywhere():
    """Also where neither TMA nor a view as words takes them, as in a buffer that holds a whole checkpoint."""
    packed = pack_hopper_weight(*storable(0, 128, 256, NVFP4), NVFP4)
    moved = []
    for t, offset in zip(packed, (2, 7), strict=True):
        moved.append(torch.empty(t.numel() + offset, dtype=torch.uint8)[offset:].view(t.shape).copy_(t))
    for m in (1, 20):
        x = values(m, m, 256)
        outs = [product(x, *weight) for weight in (packed, moved)]
        outs += [mm_bf16_fp4(x, *weight, b_layout="hopper", backend="reference") for weight in (packed, moved)]
        first, second, wanted, again = (out.nan_to_num(nan=7.0) for out in outs)
        assert torch.equal(first, second) and torch.equal(wanted, again)


def test_rows_may_all_be_the_same_one():
    weight, scale = pack_hopper_weight(*storable(0, 128, 256, NVFP4), NVFP4)
    for m in (3, 20):
        x = values(0, 1, 256).expand(m, 256)
        outs = (product(rows, weight, scale).nan_to_num(nan=7.0) for rows in (x, x.contiguous()))
        assert torch.equal(*outs)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 128, 256), (3, 0, 256), (3, 128, 0), (20, 128, 0)])
def test_empty(m, n, k):
    """A sum of nothing is 0."""
    for fmt in (NVFP4, MXFP4, MXFP8):
        codes = torch.zeros(n, k // fmt.elements_per_byte, dtype=torch.uint8)
        weight, scale = pack_hopper_weight(codes, torch.zeros(n, k // fmt.block_size, dtype=torch.uint8), fmt)
        assert all(t.numel() == 0 for t in unpack_hopper_weight(weight, scale, fmt)) == (n * k == 0)
        out = product(values(0, m, k), weight, scale, fmt)
        assert out.shape == (m, n) and not out.any()
        if fmt is not MXFP8:
            x = values(0, m, k)
            out = mm_bf16_fp4(x, weight, scale, block_size=fmt.block_size, b_layout="hopper", backend="reference")
            assert out.shape == (m, n) and not out.any()


def product(x, weight, scale, fmt=NVFP4):
    out = torch.full((x.shape[0], weight.shape[0]), 7.0, dtype=torch.bfloat16)
    with interpreted(), mock.patch.object(_hopper_launch, "processors", lambda device: 132):
        _hopper_launch.product(Operand(x), weight, scale, fmt, out, None)
    return out
