"""Kernels from elsewhere: compile-safe, held to a contract or to the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_fp4ops import OPS, BackendUnavailable, probe, register_extern
from torch_fp4ops.contracts import Call, Out
from torch_fp4ops.ops.nvfp4_kv_quantize import nvfp4_kv_quantize

X, GLOBAL = torch.randn(4, 32, dtype=torch.bfloat16), torch.ones(1)


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.setattr(probe, "_verdicts", {})
    before = dict(OPS)
    nvfp4_kv_quantize.backend_names()
    monkeypatch.setattr(nvfp4_kv_quantize, "_backends", dict(nvfp4_kv_quantize._backends))
    yield
    for name in OPS.keys() - before.keys():
        del OPS[name]


def _contract(call: Call) -> Out:
    call.require_rank("x", 2)
    return Out(call.x.shape, torch.float32)


def test_a_function_becomes_an_op_that_compiles(fresh_dynamo):
    def _test_extern_double(x: Tensor, times: int = 2) -> Tensor:
        """Double, by way of numpy."""
        return torch.from_numpy(x.numpy() * times)

    double = register_extern("_test_extern_double", _test_extern_double, _contract)
    assert double.__doc__ == "Double, by way of numpy."
    x = torch.randn(3, 4)
    compiled = torch.compile(lambda t: torch.ops.fp4._test_extern_double(t, 3) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), 3 * x + 1)
    torch.library.opcheck(double.default, (x,))
    with pytest.raises(ValueError, match="_test_extern_double: x is of shape"):
        torch.ops.fp4._test_extern_double(x[0])


@pytest.mark.parametrize(
    ("number", "result"),
    list(
        enumerate(
            [
                lambda x: x,
                lambda x: x.flatten()[12:].view(3, 4),
                lambda x: x.double(),
                lambda x: x[:1].clone(),
                lambda x: x.t().contiguous().t(),
            ]
        )
    ),
)
def test_an_op_that_breaks_its_contract_raises(number, result):
    def wrong(x: Tensor) -> Tensor:
        return result(x)[:3]

    name = f"_test_extern_wrong{number}"
    register_extern(name, wrong, lambda call: Out((3, 4), torch.float32))
    with pytest.raises(RuntimeError, match=f"fp4.{name} gave .*its contract promises"):
        getattr(torch.ops.fp4, name)(torch.randn(6, 4))


def test_an_op_that_gives_one_tensor_twice_raises():
    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        out = x + 1
        return out, out

    register_extern("_test_extern_twice", twice, lambda call: (_contract(call), _contract(call)))
    with pytest.raises(RuntimeError, match="gave memory of its arguments, or the same twice"):
        torch.ops.fp4._test_extern_twice(torch.randn(3, 4))


def test_a_backend_that_breaks_the_contract_never_runs():
    def strided(input: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = nvfp4_kv_quantize.__wrapped__(input, global_scale)
        return codes.t().contiguous().t(), scales

    register_extern("nvfp4_kv_quantize.strided", strided)
    with pytest.raises(BackendUnavailable, match="failed its probe: RuntimeError: .* gave .* of strides"):
        torch.ops.fp4.nvfp4_kv_quantize(X, GLOBAL, backend="strided")


def test_a_backend_is_probed_and_named():
    calls = []

    def mine(input: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(input.shape)
        return nvfp4_kv_quantize.__wrapped__(input, global_scale)

    op = register_extern(
        "nvfp4_kv_quantize.mine", mine, unsupported=lambda call: None if call.input.dim() == 2 else "2-D only"
    )
    assert op is nvfp4_kv_quantize
    codes, _ = torch.ops.fp4.nvfp4_kv_quantize(X, GLOBAL, backend="mine")
    assert torch.equal(codes, nvfp4_kv_quantize(X, GLOBAL, backend="reference")[0])
    assert len(calls) == 2 and calls[1] == X.shape  # the first is the probe's
    with pytest.raises(BackendUnavailable, match="2-D only"):
        op(X.unsqueeze(0), GLOBAL, backend="mine")
    with pytest.raises(ValueError, match="has a backend named 'mine'"):
        register_extern("nvfp4_kv_quantize.mine", mine)


def test_a_wrong_backend_never_runs():
    def zeros(input: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = nvfp4_kv_quantize.__wrapped__(input, global_scale)
        return codes * 0, scales

    register_extern("nvfp4_kv_quantize.zeros", zeros)
    with pytest.raises(BackendUnavailable, match="zeros.*is wrong: .* elements differ"):
        torch.ops.fp4.nvfp4_kv_quantize(X, GLOBAL, backend="zeros")


def test_rejections():
    def other(x: Tensor) -> Tensor:
        return x

    for name, contract, message in (
        ("mm_fp5.mine", None, "there is no op 'mm_fp5'"),
        ("mm_fp4", _contract, "there is an op 'mm_fp4' already"),
        ("_test_extern_none", None, r"a new op \('_test_extern_none'\) needs a contract"),
        ("mm_fp4.mine", _contract, "the contract of 'mm_fp4' holds"),
    ):
        with pytest.raises(ValueError, match=f"register_extern: {message}"):
            register_extern(name, other, contract)
    with pytest.raises(TypeError, match="backend 'mine' of mm_fp4 has the schema"):
        register_extern("mm_fp4.mine", other)

    def number_first(n: int, x: Tensor) -> Tensor:
        return x + n

    def of_a_device(x: Tensor, device: str = "a") -> Tensor:
        return x + 1

    for function, message in (
        (number_first, "the first argument of '_test_extern_none' is n: int; allowed: a Tensor"),
        (of_a_device, "'_test_extern_none' has an argument 'device', which a contract's Call has, too"),
    ):
        with pytest.raises(TypeError, match=f"register_extern: {message}"):
            register_extern("_test_extern_none", function, _contract)
