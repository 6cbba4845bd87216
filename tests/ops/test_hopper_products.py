"""Hopper products of all codes and scales and any size, cut up as they are when ops are called."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_fp4ops.formats import MXFP4, MXFP8, NVFP4
from torch_fp4ops.testing import assert_matmul_close
from torch_fp4ops.testing.samples import values
from torch_fp4ops.weight_layouts import pack_hopper_weight

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
