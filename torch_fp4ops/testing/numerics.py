"""Assertions with bounds that are derived from the arithmetic, not tuned until they pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codecs import as_bytes

__all__ = [
    "assert_attention_close",
    "assert_matmul_close",
    "assert_nearly_same",
    "assert_same_bytes",
    "attention_and_bound",
    "matmul_bound",
]


def assert_same_bytes(given: Tensor, wanted: Tensor, what: str = "output") -> None:
    """Equal shape, dtype, strides and bits, signs of zero included.

    Bits of a NaN are the hardware's choice in float16, bfloat16 and float32, so there all NaNs are equal.

    Raises AssertionError that counts the differing bytes and shows the first.
    """
    for name in ("shape", "dtype"):
        g, w = getattr(given, name), getattr(wanted, name)
        assert g == w, f"{what}: {name} {g}, not {w}"
    strides = given.stride(), wanted.stride()
    assert strides[0] == strides[1] or not given.numel(), f"{what}: strides {strides[0]}, not {strides[1]}"
    if given.dtype in (torch.float16, torch.bfloat16, torch.float32):
        given, wanted = (torch.where(t.isnan(), torch.nan, t) for t in (given, wanted))
    g, w = (as_bytes(t.reshape(-1).contiguous()).view(torch.uint8).cpu() for t in (given, wanted))
    differ = (g != w).nonzero()
    if len(differ):
        first = int(differ[0])
        raise AssertionError(
            f"{what}: {len(differ)} of {g.numel()} bytes differ; "
            f"the first is byte {first} of the flat output: {g[first]:#04x}, not {w[first]:#04x}"
        )


def assert_nearly_same(given: Tensor, wanted: Tensor, what: str = "output", differing: float = 0.01) -> None:
    """For code that is not held to the reference's roundings: equal shape and dtype, and at most a share ``differing``
    of the bytes of codes differs, or the relative (Frobenius) error of floating-point values is at most 2%."""
    for name in ("shape", "dtype"):
        g, w = getattr(given, name), getattr(wanted, name)
        assert g == w, f"{what}: {name} {g}, not {w}"
    if given.dtype in (torch.float16, torch.bfloat16, torch.float32):
        error = (given.double() - wanted.double()).norm()
        assert error <= 0.02 * wanted.double().norm(), f"{what}: relative error {error / wanted.double().norm():.3g}"
        return
    codes, others = (as_bytes(t.reshape(-1).contiguous()).view(torch.uint8).cpu() for t in (given, wanted))
    differ = int((codes != others).sum())
    allowed = int(codes.numel() * differing)
    assert differ <= allowed, f"{what}: {differ} of {codes.numel()} bytes differ, more than {differing:.0%}"


def matmul_bound(a: Tensor, b: Tensor, alpha: Tensor | None, exact: Tensor, out_dtype: torch.dtype) -> Tensor:
    """How far ``round(alpha * fp32_sum(a @ b.T))`` may lie from the exact float64 result.

    Each of the K additions in fp32 may be off by 2^-23 of the running sum (tensor cores truncate where IEEE
    arithmetic rounds), and every running sum is at most the sum of magnitudes: ``K * 2^-23 * (|a| @ |b|.T)``.
    The product with alpha and the final rounding add one relative rounding each, of fp32 and of the output's dtype,
    and the output may be subnormal.

    Args:
        a, b: float64 ``[m, k]`` and ``[n, k]``, whose products are exact in fp32.
        alpha: float32, one element or one for each row, or None.
        exact: float64 ``[m, n]``, the exact result, alpha included.
        out_dtype: dtype of the result that is checked.
    """
    factor = 1.0 if alpha is None else alpha.double().reshape(-1, 1).abs()
    summation = a.shape[1] * 2.0**-23 * (a.abs() @ b.abs().T) * factor
    info = torch.finfo(out_dtype)
    rounding = (info.eps / 2 + 2.0**-23) * (exact.abs() + summation)
    return summation + rounding + info.smallest_normal * info.eps / 2


def assert_matmul_close(given: Tensor, a: Tensor, b: Tensor, alpha: Tensor | None = None) -> None:
    """``given`` is ``alpha * (a @ b.T)`` within :func:`matmul_bound`; ``a`` and ``b`` are exact, any float dtype."""
    a, b = a.double(), b.double()
    exact = a @ b.T
    if alpha is not None:
        exact = exact * alpha.double().reshape(-1, 1)
    _assert_same_shape(given, exact)
    error = (given.double() - exact).abs()
    bound = matmul_bound(a, b, alpha, exact, given.dtype)
    assert not given.isnan().any(), "NaN in the result"
    # What may round to more than the dtype can hold is right as an infinity.
    overflows = given.isinf() & (given.sign() == exact.sign()) & (exact.abs() + bound >= torch.finfo(given.dtype).max)
    _assert_within(given, torch.where(overflows, 0.0, error), bound)


def _assert_same_shape(given: Tensor, wanted: Tensor) -> None:
    assert given.shape == wanted.shape, f"the result is of shape {tuple(given.shape)}, not {tuple(wanted.shape)}"


def _assert_within(given: Tensor, error: Tensor, bound: Tensor) -> None:
    if not bool((error <= bound).all()):
        worst = (error / bound).argmax()
        raise AssertionError(
            f"error {error.flatten()[worst]:.3e} where the bound is {bound.flatten()[worst]:.3e}, "
            f"at flat index {int(worst)} of {tuple(given.shape)}"
        )


def attention_and_bound(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sm_scale: float, logits_soft_cap: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Attention of one query a sequence in float64, and how far an online softmax in fp32 may lie from it.

    With N tokens, e = 2^-24, and ``A = sum_t p_t |v_t|`` the scale of an output:

    * A logit is a sum of D exact products, off by ``2De`` of the sum of their magnitudes, times factors that round to
      8e together; the cap's tanh adds 16e of the cap. Its difference to the maximum rounds once more, 4e of both.
    * A weight is ``exp2`` of that, off by 4e. Weights of earlier tokens are multiplied again whenever the maximum
      grows, at most once for 16 tokens, 4e each time, and 2e for the whole way that the maximum goes.
    * If weights are off by the factors ``1 + x_t``, the weighted mean is by at most ``2 A max|x_t|``.
    * For the product with v a weight is rounded to the output's dtype. It is at most 1, the largest one is 1. Weights
      below 2^-126 may be lost.
    * The sums over tokens are off by ``2Ne`` of the sums of magnitudes, above and below the fraction's line.
    * The factors of the end round to 8e together, the output to its dtype.

    Args:
        q: ``[batch, q_heads, D]``, exact, any float dtype.
        k, v: float64 ``[batch, tokens, heads, D]``, exact, global scales included.
        seen: bool ``[batch, tokens]``.
        sm_scale, logits_soft_cap: as of ``fp4_kv_attention_decode``.
        dtype: of the result that is checked.
    """
    e = 2.0**-24
    batch, q_heads, dim = q.shape
    group = q_heads // k.shape[2]
    k, v = (t.transpose(1, 2).repeat_interleave(group, 1) for t in (k, v))  # [batch, q_heads, tokens, D]
    hidden = ~seen[:, None, :, None]
    k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    q = q.double().unsqueeze(-1)
    logits = (k @ q).squeeze(-1) * sm_scale
    off = 2 * dim * e * (k.abs() @ q.abs()).squeeze(-1) * abs(sm_scale) + 8 * e * logits.abs()
    if logits_soft_cap is not None:
        logits = logits_soft_cap * (logits / logits_soft_cap).tanh()
        off = off + 16 * e * logits_soft_cap
    if not logits.shape[-1]:
        return torch.zeros_like(q.squeeze(-1)), torch.zeros_like(q.squeeze(-1))
    tokens = seen.sum(-1).view(batch, 1, 1)
    largest = logits.abs().amax(-1, keepdim=True)
    weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0).unsqueeze(-2)
    exact = (weights @ v).squeeze(-2)
    magnitude = (weights @ v.abs()).squeeze(-2)

    info = torch.finfo(dtype)
    factor = (off + 4 * e * (logits.abs() + largest)).amax(-1, keepdim=True)
    factor = factor + 4 * e * (2 + tokens / 16) + 4 * e * largest
    relative = 2 * factor.expm1() + info.eps / 2 + 4 * tokens * e + 8 * e
    smallest = info.smallest_normal * info.eps / 2
    bound = magnitude * relative + (smallest + 2.0**-126) * v.abs().sum(-2)
    bound = bound + info.eps / 2 * (exact.abs() + bound) + smallest
    return exact, torch.where(tokens == 0, 0.0, bound)


def assert_attention_close(
    given: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    sm_scale: float,
    logits_soft_cap: float | None = None,
) -> None:
    """``given`` is attention within :func:`attention_and_bound`, whose arguments these are; zeros without a token."""
    exact, bound = attention_and_bound(q, k, v, seen, sm_scale, logits_soft_cap, given.dtype)
    _assert_same_shape(given, exact)
    assert not given.isnan().any(), "NaN in the result"
    _assert_within(given, (given.double() - exact).abs(), bound)
