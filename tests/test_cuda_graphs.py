"""piecewise, pad_to, warmup, records of decisions and the capture guard, as far as a CPU can show them."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import torch_fp4ops
from torch_fp4ops import OPS, capture, explain, set_backend
from torch_fp4ops.cuda_graphs import FirstUseInCapture, pad_to, piecewise, record_decisions, warmup
from torch_fp4ops.nn import quantize_
from torch_fp4ops.registry import Backend
from torch_fp4ops.testing import samples
from torch_fp4ops.testing.samples import values


@pytest.fixture(autouse=True)
def _inference(fresh_dynamo):
    with torch.no_grad():
        yield


def quantized() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).bfloat16()
    return quantize_(model, "nvfp4", "bf16")


# pad_to


@pytest.mark.parametrize(("n", "padded"), [(1, 1), (2, 4), (4, 4), (5, 8), (8, 8), (9, 9), (0, 1)])
def test_pads_to_the_next_size_and_leaves_larger_ones(n, padded):
    x = torch.ones(n, 3)
    out = pad_to([8, 1, 4])(x)
    assert out.shape == (padded, 3)
    assert out[:n].equal(x) and not out[n:].any()
    assert (out is x) == (n == padded)


@pytest.mark.parametrize("dim", [1, -2])
def test_pads_the_dimension_with_the_value(dim):
    out = pad_to([4], dim=dim)(torch.zeros(2, 3, 2, dtype=torch.int64), value=-1)
    assert out.shape == (2, 4, 2)
    assert (out[:, 3] == -1).all() and not out[:, :3].any()


@pytest.mark.parametrize("dtype", [torch.float4_e2m1fn_x2, torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_pads_codes_with_zero_bytes(dtype):
    x = torch.arange(1, 7, dtype=torch.uint8).view(3, 2)
    out = pad_to([4])(x.view(dtype))
    assert out.dtype == dtype
    assert out.view(torch.uint8).tolist() == [*x.tolist(), [0, 0]]


def test_a_tensor_without_the_dimension_is_not_padded():
    for x, dim in ((torch.ones(3), 1), (torch.ones(()), 0), (torch.ones(3), -2)):
        with pytest.raises(ValueError, match=rf"pad_to: x is of shape .*; allowed: one with a dimension {dim}"):
            pad_to([4], dim=dim)(x)


@pytest.mark.parametrize("sizes", [[], [0], [4, -1], [2.0], [True]])
def test_sizes_are_checked(sizes):
    for function in (pad_to, lambda given: piecewise(nn.Identity(), given)):
        with pytest.raises(ValueError, match=r"sizes is .*; allowed: one or more ints above zero"):
            function(sizes)


# piecewise on a CPU


@pytest.mark.parametrize("replay", ["inductor", "direct"])
def test_piecewise_compiles_and_gives_what_eager_gives(replay):
    model = quantized()
    split = ["fp4::mm_bf16_fp4", "fp4::fp4_quantize.default"]
    step = piecewise(model, sizes=[1, 2, 4], split=split, replay=replay)
    for size in (1, 2, 4, 3, 4, 4, 4):
        x = values(size, size, 64)
        torch.testing.assert_close(step(x), model(x), atol=0.01, rtol=0.02)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("replay", ["inductor", "direct"])
def test_piecewise_remembers_the_backends_of_each_listed_size(replay):
    step = piecewise(quantized(), sizes=[2, 4], replay=replay)
    assert explain(step) == "nothing has been captured yet"
    with set_backend("reference"):
        warmup(step, [(2, 64), (4, 64)])
    step(values(0, 3, 64))
    assert set(step.decisions) == {2, 4}
    before = explain(step)
    step(values(0, 2, 64))  # replays on a GPU: what was recorded stays
    assert explain(step) == before
    for size, decisions in step.decisions.items():
        assert decisions.backends() == {"mm_bf16_fp4": {"reference"}}
        assert f"size {size}:\n  mm_bf16_fp4: reference (decided by set_backend), 2 x" in before
        assert f"a bfloat16 [{size}, 96]" in before


@pytest.mark.parametrize(
    "name",
    [
        "fp4::nothing",
        "mm_fp4",
        "nowhere::op",
        "fp4::mm_fp4.out",
        "::",
        "",
        "fp4::name",
        "fp4::__class__",
        "__name__::upper",
    ],
)
def test_split_names_are_checked(name):
    with pytest.raises(ValueError, match=r"piecewise: split has .*; allowed: names of registered ops"):
        piecewise(nn.Identity(), [1], split=["fp4::mm_fp4", name])


def test_replays_are_checked():
    with pytest.raises(ValueError, match="piecewise: replay is 'trees'; allowed: 'inductor', 'direct'"):
        piecewise(nn.Identity(), [1], replay="trees")


@pytest.mark.parametrize(
    ("args", "message"), [((3,), "no tensor among the arguments"), ((torch.ones(3),), r"of shape \(3,\); allowed")]
)
def test_the_size_is_that_of_the_first_tensor(args, message):
    with pytest.raises(ValueError, match=f"piecewise: .*{message}"):
        piecewise(nn.Identity(), [1], dim=1)(*args)
    seen = piecewise(lambda n, x: x + n, [5], dim=1)
    seen(1, x=torch.ones(2, 5))
    assert list(seen.decisions) == [5]


# warmup and records


def test_warmup_makes_tensors_where_the_model_is():
    where = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.zeros(2, device="meta"))

        def forward(self, x):
            where.append(x.device.type)
            return x

    warmup(Model(), [(1, 2)])
    step = piecewise(Model(), [1])
    step._compiled = step.function  # meta tensors don't compile
    warmup(step, [(1, 2)])
    assert where == ["meta"] * 4


def test_warmup_takes_shapes_arguments_and_keywords():
    calls = []

    def function(x, y=None):
        calls.append((tuple(x.shape), x.dtype, x.device.type, y))

    warmup(function, [(2, 3), (torch.ones(1), 5), {"x": torch.ones(4), "y": 6}], dtype=torch.float16, device="cpu")
    assert calls[::2] == calls[1::2]
    float16 = ((2, 3), torch.float16, "cpu", None)
    assert calls[::2] == [float16, ((1,), torch.float32, "cpu", 5), ((4,), torch.float32, "cpu", 6)]
    with pytest.raises(ValueError, match=r"warmup: an entry of shapes is a int; allowed: a shape, a tuple or dict"):
        warmup(function, [7])


def test_records_count_calls_and_keep_what_was_rejected():
    x = values(0, 5, 64)
    with record_decisions() as outer:
        for _ in range(3):
            torch.ops.fp4.fp4_quantize(x, torch.ones(1))
        with record_decisions() as inner:
            torch.ops.fp4.mxfp8_quantize(x)
        assert inner.backends() == {"mxfp8_quantize": {"reference"}}
    torch.ops.fp4.mxfp8_dequantize(*torch.ops.fp4.mxfp8_quantize(x))
    assert outer.backends() == {"fp4_quantize": {"reference"}, "mxfp8_quantize": {"reference"}}
    assert explain(outer).startswith("fp4_quantize: reference (decided by auto), 3 x ")
    assert "input bfloat16 [5, 64]" in str(outer)
    assert explain(capture.Decisions()) == "no op of torch_fp4ops was called"


# The guard


class FakeDriver:
    """Enough of a Triton driver to reach the compilation of a kernel without a GPU."""

    def get_current_device(self):
        return 99  # whose kernels nobody else compiles

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launches(monkeypatch):
    """The Triton backends run on CPU tensors up to where a kernel would be compiled; the names of those kernels."""
    triton = pytest.importorskip("triton")
    from torch_fp4ops.ops import _triton_launch

    reached = []

    def compile_nothing(**compilation):
        reached.append(compilation["fn"].name)
        return True  # Triton then launches nothing either

    hook = _triton_launch._refuse_to_compile_in_capture(compile_nothing)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    monkeypatch.setattr(triton.runtime.driver, "_active", FakeDriver())
    for op in OPS.values():
        backend = op.find_backend("triton", "test")
        monkeypatch.setitem(op._backends, "triton", Backend("triton", backend.run, lambda call: None))
    for module in [m for name, m in sys.modules.items() if name.startswith("torch_fp4ops.ops.")]:
        if hasattr(module, "architecture"):  # some have it by name
            monkeypatch.setattr(module, "architecture", lambda device: "sm90")
    return reached


@pytest.mark.parametrize("name", OPS)
def test_every_kernel_is_behind_the_guard(name, launches, monkeypatch):
    """Also that Triton can describe each of our specialisations to the hook, which happens on no other path."""
    op = OPS[name]
    sample = next(s for s in reversed(samples(op)) if s.args[0].numel())
    op.default(*sample.clone().args, **{**sample.kwargs, "backend": "triton"})
    assert launches
    monkeypatch.setattr(capture, "capturing", lambda: True)
    pattern = rf"torch.ops.fp4.{name}, backend 'triton': Triton kernel {launches[0]} would be compiled .* for .*\[\d+"
    with pytest.raises(FirstUseInCapture, match=pattern):
        op.default(*sample.clone().args, **{**sample.kwargs, "backend": "triton"})


def test_the_guard_leaves_other_peoples_kernels_alone(launches, monkeypatch):
    import triton

    @triton.jit
    def kernel(n):
        pass

    monkeypatch.setattr(capture, "capturing", lambda: True)
    kernel[(1,)](3)
    assert launches == [kernel.fn.__qualname__]


def test_the_guard_is_installed_with_the_kernels():
    triton = pytest.importorskip("triton")
    OPS["fp4_quantize"].find_backend("triton", "test")
    assert "_refuse_to_compile_in_capture" in triton.knobs.runtime.jit_cache_hook.__qualname__


def test_first_use_is_refused_in_a_capture_only(monkeypatch):
    capture.refuse_first_use("a probe would run")
    monkeypatch.setattr(capture, "capturing", lambda: True)
    with pytest.raises(FirstUseInCapture, match="a probe would run while a CUDA graph is being captured. Warm it up"):
        capture.refuse_first_use("a probe would run")
    assert torch_fp4ops.cuda_graphs.FirstUseInCapture is FirstUseInCapture
