"""silu_and_mul_fp4_quantize by FlashInfer, whose kernel rounds the product to the input's dtype before it quantises."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from torch_fp4ops import BackendUnavailable, explain, probe, silu_and_mul_fp4_quantize
from torch_fp4ops.ops import _flashinfer
from torch_fp4ops.testing import samples
from torch_fp4ops.testing.samples import values

from .flashinfer_stand_ins import exists

flashinfer = pytest.importorskip("flashinfer", reason="FlashInfer is not installed", exc_type=ImportError)
FUNCTION = "silu_and_mul_nvfp4_quantize"


def test_it_says_what_it_does_not_take(pretend):
    op = silu_and_mul_fp4_quantize
    by_name = {s.name: s for s in samples(op)}

    def reason(name: str) -> str | None:
        sample = by_name[name]
        return op.find_backend("flashinfer", "test").unsupported(op.check(*sample.args, **sample.kwargs))

    pretend(90)
    assert "is for compute capability 10.0, 10.3, 10.7, 11.0, 12.0, 12.1, not 9.0" in reason("nvfp4-128x4-17x96")
    pretend(100, packages=())
    assert "needs the package 'cutlass'" in reason("nvfp4-128x4-17x96")
    pretend(100)
    if not exists(FUNCTION):
        assert "no silu_and_mul_nvfp4_quantize in flashinfer; 0.6.16 and later have it" in reason("nvfp4-8x4-17x96")
        return
    for layout in ("128x4", "8x4", "linear"):
        assert reason(f"nvfp4-{layout}-17x96") is None
        assert "NVFP4 only" in reason(f"mxfp4-{layout}-17x96")
        assert "needs a row" in reason(f"nvfp4-{layout}-0x96")
    assert reason("nvfp4-rank4") is reason("nvfp4-strided") is reason("nvfp4-torch.float16") is None
    assert "not float32" in reason("nvfp4-torch.float32")
    assert "encode scale" in reason("nvfp4-inversed")
    assert "one global scale" in reason("nvfp4-per-row")
    x, scale = by_name["nvfp4-128x4-17x96"].args
    with pytest.raises(BackendUnavailable, match="not its inverse"):
        silu_and_mul_fp4_quantize(x, 1 / scale, is_global_scale_inversed=True, backend="flashinfer")


def test_a_function_that_the_installed_version_lacks_is_named_with_the_version_that_has_it(pretend, monkeypatch):
    _flashinfer.function.cache_clear()
    monkeypatch.delattr(flashinfer, FUNCTION, raising=False)
    pretend(100)
    x, scale = values(0, 4, 128), torch.ones(1)
    reason = "has no silu_and_mul_nvfp4_quantize: no .* in flashinfer; 0.6.16 and later have it"
    with pytest.raises(BackendUnavailable, match=reason):
        silu_and_mul_fp4_quantize(x, scale, backend="flashinfer")
    assert re.search(f"  flashinfer: .*{reason}", explain(silu_and_mul_fp4_quantize, x, scale))


@pytest.fixture
def calls(pretend):
    """Those that FlashInfer's function gets on 10.0."""
    if not exists(FUNCTION):
        pytest.skip("this FlashInfer has no silu_and_mul_nvfp4_quantize")
    return pretend(100)


def test_it_passes_its_probe_with_the_product_rounded(calls):
    x, scale = values(0, 2, 3, 128), torch.tensor([300.0])
    flags = {"is_sf_8x4_layout": True}
    codes, scales = silu_and_mul_fp4_quantize(x, scale, **flags, backend="flashinfer")
    assert codes.shape == (2, 3, 32) and scales.shape == (8, 4)
    name, given = calls[-1]
    assert name == FUNCTION and given.pop("input").shape == (6, 128)
    assert given.pop("nvfp4_4over6", None) is None and torch.equal(given.pop("global_scale"), scale)
    assert given == {"sf_vec_size": 16, "is_sf_swizzled_layout": True, "is_sf_8x4_layout": True}
    assert "flashinfer: can take it; no preference for it here" in explain(silu_and_mul_fp4_quantize, x, scale)


def test_the_probe_knows_up_from_gate(calls, monkeypatch):
    right = _flashinfer.function(FUNCTION)

    def up_first(input: torch.Tensor, **given: Any) -> Any:
        return right(input=torch.cat(input.chunk(2, dim=-1)[::-1], dim=-1), **given)

    monkeypatch.setattr(_flashinfer, "function", lambda name: up_first)
    with pytest.raises(BackendUnavailable, match=r"is wrong: \d+ of \d+ elements differ"):
        silu_and_mul_fp4_quantize(values(0, 4, 128), torch.ones(1), backend="flashinfer")


def test_it_compiles_only_when_named_and_never_offline(calls, monkeypatch):
    x, scale = values(0, 4, 128), torch.ones(1)
    text = explain(silu_and_mul_fp4_quantize, x, scale)
    assert "  flashinfer: its first use would compile a kernel with CuTe DSL" in text
    monkeypatch.setenv(probe.OFFLINE_VARIABLE, "1")
    with pytest.raises(BackendUnavailable, match="CuTe DSL, which TORCH_FP4OPS_OFFLINE forbids"):
        silu_and_mul_fp4_quantize(x, scale, backend="flashinfer")
    assert not calls
