"""The assertions that other tests rest on must be able to fail."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings

from torch_fp4ops import OPS
from torch_fp4ops.testing import (
    assert_attention_close,
    assert_matmul_close,
    assert_nearly_same,
    assert_right,
    assert_same_bytes,
    samples,
)
from torch_fp4ops.testing.strategies import matrices


def test_same_bytes_sees_every_difference():
    x = torch.arange(6.0).reshape(2, 3)
    assert_same_bytes(x, x.clone())
    nan = torch.tensor([float("nan")])
    assert_same_bytes(nan, nan.clone())
    assert_same_bytes(nan, -nan)
    with pytest.raises(AssertionError, match="bytes differ"):
        assert_same_bytes(nan, torch.ones(1))
    for other, message in (
        (x + torch.tensor([0, 0, 1e-6]), "bytes differ"),
        (x.double(), "dtype"),
        (x[:1], "shape"),
        (x.T.contiguous().T, "strides"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_same_bytes(other, x)
    with pytest.raises(AssertionError, match="1 of 4 bytes differ"):
        assert_same_bytes(torch.tensor([-0.0]), torch.tensor([0.0]))


def test_nearly_same_allows_a_share_of_the_bytes():
    x = torch.arange(200, dtype=torch.uint8)
    for differing, share in ((2, 0.01), (10, 0.05)):
        other = x.clone()
        other[:differing] ^= 1
        assert_nearly_same(other, x, differing=share)
        other[differing] ^= 1
        with pytest.raises(AssertionError, match=f"{differing + 1} of 200 bytes differ, more than {share:.0%}"):
            assert_nearly_same(other, x, differing=share)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_matmul_bound_passes_right_results_and_fails_wrong_ones(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-6, 7, (n, 96), generator=generator).float() for n in (5, 7))
    alpha = torch.rand(5, generator=generator)
    right = ((a @ b.T) * alpha[:, None]).to(dtype)
    assert_matmul_close(right, a, b, alpha)
    error = max(4 * torch.finfo(dtype).eps, 2e-3)
    with pytest.raises(AssertionError, match="where the bound is"):
        assert_matmul_close(right * (1 + error), a, b, alpha)
    wrong = right.clone()
    wrong[2, 3] = float("nan")
    with pytest.raises(AssertionError, match="NaN"):
        assert_matmul_close(wrong, a, b, alpha)
    for other in (right[:0], right[:1], right.expand(5, 5, 7)):
        with pytest.raises(AssertionError, match=r"the result is of shape .*, not \(5, 7\)"):
            assert_matmul_close(other, a, b, alpha)


def test_attention_of_another_shape_fails():
    q, k = torch.zeros(1, 1, 64), torch.zeros(1, 3, 1, 64, dtype=torch.float64)
    seen = torch.ones(1, 3, dtype=torch.bool)
    assert_attention_close(q, q, k, k, seen, 1.0)
    with pytest.raises(AssertionError, match=r"the result is of shape \(0, 1, 64\), not \(1, 1, 64\)"):
        assert_attention_close(q[:0], q, k, k, seen, 1.0)


@pytest.mark.parametrize("name", OPS)
def test_assert_right_fails_for_a_wrong_backend(name):
    """A backend that is off by a bit, or writes nothing, must not pass."""
    op = OPS[name]
    sample = next(s for s in samples(op) if any(size in s.name for size in ("17", "prefill", "ragged")))

    def wrong(*args, **kwargs):
        out = op.__wrapped__(*args, **kwargs)
        if out is None:
            args[3].view(torch.uint8)[0, 0] ^= 1
            return None
        first = (out if isinstance(out, torch.Tensor) else out[0]).clone()
        flat = first.view(-1).view(torch.uint8)
        flat[-1] ^= 0x40  # a high bit of the last element
        return first if isinstance(out, torch.Tensor) else (first, *out[1:])

    wrong.__annotations__ = op.__wrapped__.__annotations__
    wrong.__signature__ = op.signature
    op._backends["wrong"] = op._backends["reference"].__class__("wrong", wrong, lambda call: None)
    try:
        assert_right(op, sample, "reference")
        with pytest.raises(AssertionError):
            assert_right(op, sample, "wrong")
    finally:
        del op._backends["wrong"]


@pytest.mark.parametrize(
    "change",
    [
        lambda out: out.t().contiguous().t(),
        lambda out: torch.cat([out, out]),
        lambda out: out.double(),
        lambda out: None,
    ],
)
def test_assert_right_fails_for_outputs_that_are_not_promised(change, monkeypatch):
    op = OPS["mm_bf16_fp4"]
    sample = next(s for s in samples(op) if s.name.startswith("nvfp4-17"))
    wrong = dataclasses.replace(op._backends["reference"], run=lambda *a, **k: change(op.__wrapped__(*a, **k)))
    monkeypatch.setitem(op._backends, "wrong", wrong)
    with pytest.raises(AssertionError, match=r"mm_bf16_fp4, backend 'wrong', gave .* its contract promises torch.bf"):
        assert_right(op, sample, "wrong")


@settings(max_examples=30)
@given(matrices())
def test_strategies_draw_whole_blocks_of_16_bit_and_32_bit_floats(x):
    assert x.dim() == 2 and x.shape[1] % 16 == 0
    assert x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def test_samples_are_the_same_every_time_and_do_not_share_memory():
    first, second = (samples(OPS["mm_fp4"]) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        for s, t in zip(a.args, b.args, strict=True):
            if isinstance(s, torch.Tensor):
                assert_same_bytes(s, t)
                assert s.numel() == 0 or s.data_ptr() != t.data_ptr()


def test_a_product_too_large_for_its_dtype_is_infinite():
    a, b = torch.full((1, 16), 6.0), torch.full((2, 16), 6.0)
    b[1] = -6.0
    out = torch.tensor([[torch.inf, -torch.inf]], dtype=torch.float16)
    assert_matmul_close(out, a, b, torch.tensor([200.0]))  # 115200
    for alpha in (100.0, -200.0):  # 57600 fits, and the signs are others
        with pytest.raises(AssertionError):
            assert_matmul_close(out, a, b, torch.tensor([alpha]))
