"""Products left to cuBLAS: what it may not do with their sums."""

from __future__ import annotations

from collections import namedtuple
from unittest import mock

import pytest
import torch

from torch_fp4ops.replay import Trace

pytest.importorskip("triton", reason="needs Triton")

from torch_fp4ops.ops import _triton_product

SETTINGS = torch.backends.cuda.matmul
mm = torch.mm


@pytest.fixture
def allowed():
    """What sums in 16 bits were allowed by at each product."""
    seen = []

    def product(a, b, **kwargs):
        names = _triton_product._ALLOW_SUMS_IN_16_BITS[a.dtype]
        seen.append([name for name in names if getattr(SETTINGS, name)])
        return mm(a, b, **kwargs)

    names = [name for names in _triton_product._ALLOW_SUMS_IN_16_BITS.values() for name in names]
    before = {name: getattr(SETTINGS, name) for name in names}
    with mock.patch("torch.mm", product):
        yield seen
    for name, value in before.items():
        setattr(SETTINGS, name, value)


def operands(dtype):
    return torch.randn(3, 8).to(dtype), torch.randn(5, 8).to(dtype).t(), torch.empty(3, 5, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [False, True])
def test_sums_in_16_bits_are_not_allowed_while_it_multiplies(allowed, dtype, value):
    names = _triton_product._ALLOW_SUMS_IN_16_BITS[dtype]
    for name in names:
        setattr(SETTINGS, name, value)
    a, b, out = operands(dtype)
    _triton_product._multiply(a, b, out)
    with pytest.raises(RuntimeError):
        _triton_product._multiply(a, a, out)
    assert torch.equal(out, a @ b) and allowed == [[], []]
    assert all(getattr(SETTINGS, name) == value for name in names)


def test_a_replay_does_the_same(allowed):
    SETTINGS.allow_bf16_reduced_precision_reduction = True
    a, b, _ = operands(torch.bfloat16)
    with Trace([a, b]) as trace:
        out = torch.empty(3, 5, dtype=torch.bfloat16)
        _triton_product._multiply(a, b, out)
    again = trace.plan(out).carry_out([a + 1, b])
    assert torch.equal(again, (a + 1) @ b) and allowed == [[], []]
    assert SETTINGS.allow_bf16_reduced_precision_reduction


def test_where_k_may_not_be_split_nothing_is_changed():
    """Then there are no parts whose sums could be rounded. ``Fixed`` can't be changed."""
    name = "allow_bf16_reduced_precision_reduction"
    Fixed = namedtuple("Fixed", [name, f"{name}_split_k"])
    with mock.patch("torch.backends.cuda.matmul", Fixed(True, False)):
        _triton_product._multiply(*operands(torch.bfloat16))
    with mock.patch("torch.backends.cuda.matmul", Fixed(True, True)), pytest.raises(AttributeError):
        _triton_product._multiply(*operands(torch.bfloat16))
