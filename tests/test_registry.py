"""The mechanism on an op made for the purpose: schema, fake, validation, backends, autograd."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_fp4ops import replay
from torch_fp4ops.capture import FirstUseInCapture
from torch_fp4ops.contracts import Call, Out
from torch_fp4ops.registry import OPS, op
from torch_fp4ops.selection import BackendUnavailable, Preference, set_backend


def _contract(call: Call) -> Out:
    call.require_dtype("x", (torch.float32, torch.uint8))
    call.require_rank("x", 2)
    call.require(call.x.shape[1] % 2 == 0, "x", call.x.shape, "an even number of columns")
    if call.y is not None:
        call.require_shape("y", call.x.shape)
        call.require_contiguous("y")
    call.require(call.times >= 0, "times", call.times, "0 or more")
    return Out(call.x.shape, torch.uint8 if call.to_integer else torch.float32)


def _check_values(call: Call) -> None:
    if call.y is not None:
        call.require_positive("y")


@op(
    contract=_contract,
    check_values=_check_values,
    byte_arguments={"x": lambda given: (torch.float8_e8m0fnu if given["times"] == 3 else torch.float8_e4m3fn,)},
    preferences=[Preference("late", "cpu", "a row for the test")],
)
def _test_scale(
    x: Tensor, y: Tensor | None = None, times: int = 2, *, to_integer: bool = False, backend: str = "auto"
) -> Tensor:
    """Scale."""
    out = x.float() * times
    return out.to(torch.uint8) if to_integer else out


@op(contract=lambda call: None, mutates=("x",))
def _test_write(x: Tensor, value: Tensor, *, backend: str = "auto") -> None:
    """Write."""
    x.copy_(value)


scale, write = OPS.pop("_test_scale"), OPS.pop("_test_write")


@scale.backend("late", unsupported=lambda call: "takes fewer than 100 rows" if call.x.shape[0] >= 100 else None)
def _late(
    x: Tensor, y: Tensor | None = None, times: int = 2, *, to_integer: bool = False, backend: str = "auto"
) -> Tensor:
    return scale.__wrapped__(x, y, times, to_integer=to_integer) + (0 if to_integer else 1000)


x = torch.ones(3, 4)


def test_schema_comes_from_the_signature():
    text = str(torch.ops.fp4._test_scale.default._schema)
    assert text.startswith("fp4::_test_scale(Tensor x, Tensor? y=None, SymInt times=2, *, bool to_integer=False")
    assert "Tensor(a0!) x" in str(torch.ops.fp4._test_write.default._schema)


def test_auto_follows_the_preference_rows_then_the_reference(recwarn):
    assert scale(x)[0, 0] == 1002
    with pytest.warns(UserWarning, match="_test_scale runs its pure-PyTorch reference.*fewer than 100 rows"):
        assert scale(torch.ones(100, 2))[0, 0] == 2
    recwarn.clear()
    scale(torch.ones(101, 2))
    assert not recwarn.list  # one warning an op


def test_a_named_backend_raises_instead_of_falling_through():
    assert torch.ops.fp4._test_scale(x, backend="reference")[0, 0] == 2
    with pytest.raises(BackendUnavailable, match=r"_test_scale: backend 'late', asked for by backend=.*fewer than 100"):
        scale(torch.ones(100, 2), backend="late")
    with pytest.raises(ValueError, match=r"_test_scale: backend is 'nope'.*'auto', 'reference', 'late'"):
        scale(x, backend="nope")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((x.double(),), r"_test_scale: x is torch.float64; allowed: torch.float32 or torch.uint8"),
        ((torch.ones(4),), r"_test_scale: x is of shape \(4,\); allowed: 2 dimensions"),
        ((torch.ones(4, 3),), r"x is of shape \(4, 3\); allowed: an even number of columns"),
        ((x, torch.ones(3, 2)), r"y is of shape \(3, 2\); allowed: shape \(3, 4\)"),
        ((x, torch.ones(3)), r"y is of shape \(3,\); allowed: shape \(3, 4\)"),
        ((x, torch.ones(4, 3).T), r"y is of strides \(1, 3\); allowed: contiguous"),
        ((x, torch.zeros(3, 4)), r"y is \[\[0.0, .*allowed: finite values above zero"),
        ((x, x.to("meta")), r"y is meta; allowed: cpu, where x is"),
        ((x, None, -1), r"times is -1; allowed: 0 or more"),
    ],
)
def test_rejections_name_op_argument_given_and_allowed(args, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.fp4._test_scale(*args)


@pytest.mark.parametrize("make", [Tensor.to_sparse, Tensor.to_sparse_csr, Tensor.to_mkldnn])
def test_tensors_without_strides_are_refused_by_name(make, monkeypatch):
    dense = torch.ones(3, 4)
    for on_cpu in (False, True):
        monkeypatch.setattr(replay, "ON_CPU", on_cpu)
        for given, name in (((make(dense),), "x"), ((dense, make(dense)), "y")):
            with pytest.raises(ValueError, match=rf"_test_scale: {name} is torch\._?\w+; allowed: torch.strided"):
                scale.default(*given)


def test_nothing_runs_before_validation():
    target = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="backend is 'nope'"):
        write(target, torch.ones(2, 2), backend="nope")
    assert (target == 0).all()


def test_fake_and_meta_come_from_the_contract():
    out = torch.ops.fp4._test_scale(x.to("meta"))
    assert (out.shape, out.dtype, out.device.type) == ((3, 4), torch.float32, "meta")
    with pytest.raises(ValueError, match="even number of columns"):
        torch.ops.fp4._test_scale(torch.ones(4, 3, device="meta"))


def test_opcheck():
    torch.library.opcheck(scale.default, (x,))
    torch.library.opcheck(write.default, (x.clone(), x))


def test_python_call_views_native_bytes():
    data = torch.arange(8, dtype=torch.uint8).reshape(2, 4)
    viewed = scale(data.view(torch.float8_e4m3fn), backend="reference")
    assert torch.equal(viewed, scale(data, backend="reference"))
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        torch.ops.fp4._test_scale(data.view(torch.float8_e4m3fn))


def test_python_call_refuses_native_dtypes_of_other_formats():
    """Which one is right follows from the other arguments, defaults and those given by position among them."""
    e4m3, e8m0 = (torch.ones(2, 4, dtype=torch.uint8).view(t) for t in (torch.float8_e4m3fn, torch.float8_e8m0fnu))
    for args, kwargs in (((e8m0,), {}), ((), {"x": e8m0}), ((e8m0,), {"times": 2}), ((e4m3, None, 3), {})):
        given = (args[0] if args else kwargs["x"]).dtype
        allowed = torch.float8_e4m3fn if given == e8m0.dtype else torch.float8_e8m0fnu
        with pytest.raises(ValueError, match=rf"fp4._test_scale: x is {given}; allowed: torch.uint8 or {allowed}$"):
            scale(*args, **kwargs)
    for out in (scale(e8m0, None, 3, backend="reference"), scale(x=e8m0, times=3, backend="reference")):
        assert torch.equal(out, torch.full((2, 4), 3.0))
    with pytest.raises(RuntimeError, match="at most 5 argument"):
        scale(e4m3, None, 2, False, "auto", "one too many")


def test_defaults_that_aot_inductor_loses_are_none_in_the_schema():
    """The function keeps its own: None, which torch then hands over, means that."""

    @op(contract=lambda call: Out(call.x.shape, call.to))
    def _test_defaults(
        x: Tensor, n: int = 3, to: torch.dtype = torch.float64, *, power: int = 2, backend: str = "auto"
    ) -> Tensor:
        """Scale and raise."""
        return (x * n).to(to) ** power

    OPS.pop("_test_defaults")
    text = str(torch.ops.fp4._test_defaults.default._schema)
    assert "SymInt n=3, ScalarType? to=None, *, SymInt? power=None, str backend=" in text
    wanted = torch.full((2,), 36.0, dtype=torch.float64)
    x = torch.full((2,), 2.0)
    call = torch.ops.fp4._test_defaults
    for given in (call(x), call(x, 3, None), call(x, to=None, power=None), call(x, 3, torch.float64, power=2)):
        assert given.equal(wanted) and given.dtype == wanted.dtype
    assert call(x, 1, torch.float32, power=3).equal(torch.full((2,), 8.0))
    assert call(x.to("meta"), 3, None).dtype == torch.float64


def test_backend_with_another_schema_or_a_taken_name_is_refused():
    def shorter(x: Tensor, *, backend: str = "auto") -> Tensor:
        return x

    with pytest.raises(TypeError, match=r"backend 'short' of _test_scale has the schema .*; the op has"):
        scale.backend("short", unsupported=lambda call: None)(shorter)
    for name in ("late", "auto", "reference"):
        with pytest.raises(ValueError, match=f"has a backend named '{name}'"):
            scale.backend(name, unsupported=lambda call: None)(_late)


def test_one_function_as_several_backends():
    """A foreign library's kernels: the function is told which of them was chosen, however it was."""

    class Trusting:
        def why_not(self, op, backend, call, *, named, launch):
            return None

        def run(self, backend, call, args, kwargs):
            return backend(*args, **kwargs)

    def named(x: Tensor, y: Tensor | None = None, times: int = 2, *, to_integer: bool = False, backend: str = "auto"):
        return x.float() + (1 if backend == "one" else 2)

    named.__annotations__ = inspect.get_annotations(_late, eval_str=True)
    for name in ("one", "two"):
        scale.backend(name, unsupported=lambda call: None, trust=Trusting())(named)
    try:
        assert scale(x, backend="one")[0, 0] == 2
        assert scale(x, backend="flashinfer_two")[0, 0] == 3
        with pytest.raises(ValueError, match="backend is 'flashinfer_reference'"):  # which is no library's
            scale(x, backend="flashinfer_reference")
        with set_backend("two"):
            assert scale(x)[0, 0] == 3
    finally:
        del scale._backends["one"], scale._backends["two"]


def test_a_backend_that_cannot_be_imported_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("import a_package_that_does_not_exist\n")
    package = types.ModuleType("op_folder_for_test")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "op_folder_for_test", package)
    monkeypatch.setattr(scale, "__module__", "op_folder_for_test")
    monkeypatch.setattr(scale, "_loaded", False)
    monkeypatch.setattr(scale, "unimportable", {})
    with pytest.raises(BackendUnavailable, match="broken.*not importable.*a_package_that_does_not_exist"):
        scale(x, backend="broken")
    assert "broken" in scale.backend_names()


def test_threads_that_come_while_backends_are_imported_wait_for_them(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "from torch_fp4ops import OPS\n"
        "time.sleep(0.3)\n"
        "op = OPS['_test_scale']\n"
        "op.backend('slow', unsupported=lambda call: None)(op.__wrapped__)\n"
    )
    package = types.ModuleType("slow_op_folder_for_test")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "slow_op_folder_for_test", package)
    monkeypatch.setitem(OPS, "_test_scale", scale)
    monkeypatch.setattr(scale, "__module__", "slow_op_folder_for_test")
    monkeypatch.setattr(scale, "_backends", dict(scale._backends))
    monkeypatch.setattr(scale, "_loaded", False)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: scale(x, backend="slow"), range(4)))
    assert all(torch.equal(out, scale(x, backend="reference")) for out in results)


class TestAutograd:
    def test_backward_raises_and_forward_does_not(self):
        leaf = torch.ones(3, 4, requires_grad=True)
        out = scale(leaf, backend="reference")
        assert out.requires_grad and out[0, 0] == 2
        with pytest.raises(NotImplementedError, match="_test_scale has no backward.*no_grad"):
            (out.sum() + leaf.sum()).backward()
        assert leaf.grad is None

    def test_transforms_that_differentiate_raise(self):
        for transform in (torch.func.grad, torch.func.jacrev):
            with pytest.raises(NotImplementedError, match="_test_scale has no backward.*no_grad"):
                transform(lambda t: scale(t, backend="reference").sum())(x)

    def test_integer_outputs_refuse_inputs_that_require_grad(self):
        leaf = torch.ones(3, 4, requires_grad=True)
        with pytest.raises(NotImplementedError, match="_test_scale.*integer codes.*no_grad"):
            scale(leaf, to_integer=True)
        with torch.no_grad():
            assert scale(leaf, to_integer=True).dtype == torch.uint8

    def test_compiled_forward_runs_and_backward_raises(self, fresh_dynamo):
        leaf = torch.ones(3, 4, requires_grad=True)
        compiled = torch.compile(lambda t: torch.ops.fp4._test_scale(t) * 2, fullgraph=True, backend="aot_eager")
        out = compiled(leaf)
        assert out[0, 0] == 2004
        with pytest.raises(NotImplementedError, match="_test_scale has no backward"):
            out.sum().backward()

    def test_forward_mode_raises_where_there_is_a_tangent(self):
        tangent = torch.ones(3, 4)
        for transform in (lambda f: torch.func.jvp(f, (x,), (tangent,)), lambda f: torch.func.jacfwd(f)(x)):
            with pytest.raises(NotImplementedError, match="_test_scale has no forward-mode derivative.*detach"):
                transform(lambda t: scale(t, backend="reference"))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, tangent)
            with pytest.raises(NotImplementedError, match="_test_scale has no forward-mode derivative"):
                scale(dual, backend="reference")
            assert torch.equal(scale(dual.detach(), backend="reference"), scale(x, backend="reference"))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_no_grad_fn_where_nothing_requires_grad(self, mode):
        with mode():
            assert scale(x, backend="reference").grad_fn is None

    def test_writing_bumps_the_version_counter(self):
        target = torch.zeros(3, 4)
        before = target._version
        write(target, x)
        assert target._version > before and torch.equal(target, x)
        with torch.inference_mode():
            write(frozen := torch.zeros(3, 4), x)
            assert torch.equal(frozen, x)


@pytest.mark.parametrize("error", [BackendUnavailable("why"), FirstUseInCapture("kernel f would be compiled")])
def test_errors_pickle(error):
    """Worker processes send exceptions home."""
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)


def test_an_op_is_the_same_one_pickled_and_copied():
    op = OPS["fp4_quantize"]
    assert pickle.loads(pickle.dumps(op)) is op is copy.deepcopy(op)
