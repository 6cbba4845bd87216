"""The fusions into fp4_quantize: what is rewritten, what is left alone, and that the results are right."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

from torch_fp4ops import OPS, compile_passes
from torch_fp4ops.testing import assert_same_bytes
from torch_fp4ops.testing.samples import values

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FP4 = torch.ops.fp4
SCALE = torch.tensor([300.0])
WEIGHT = values(7, 64).abs()


class Record(CustomGraphPass):
    """Sees the graph after the pass under test."""

    def __init__(self, inner):
        self.inner, self.ops = inner, []

    def __call__(self, graph):
        self.inner(graph)
        graph.lint()
        self.ops = [str(n.target) for n in graph.nodes if n.op == "call_function"]

    def uuid(self):
        return None

    @property
    def arithmetic(self):
        """ATen's and prims' calls but for views."""
        calls = [n.split(".")[1] for n in self.ops if n.startswith(("aten.", "prims."))]
        return [n for n in calls if n not in ("view", "reshape", "unsqueeze")]

    @property
    def fp4(self):
        return sorted(n.removeprefix("fp4.").removesuffix(".default") for n in self.ops if n.startswith("fp4."))


def compile_and_run(function, *inputs, fusions=(), dynamic=None):
    record = Record(compile_passes.FuseIntoFp4Quantize(*fusions))
    with config.patch(post_grad_custom_pre_pass=record):
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
        out = compiled(*inputs)
    return out, record, compiled


def quantize(y):
    return FP4.fp4_quantize(y, SCALE.to(y.device))


# What is found. Each gives the fused op's outputs.


def slices(x):
    k = x.shape[-1] // 2
    return quantize(F.silu(x[..., :k]) * x[..., k:])


def chunks(x):
    gate, up = x.chunk(2, dim=-1)
    return quantize(up * F.silu(gate))


def splits(x):
    gate, up = x.split([64, 64], dim=-1)
    return quantize(F.silu(gate) * up)


def sigmoid(x):
    gate, up = x.chunk(2, dim=-1)
    return quantize(gate * torch.sigmoid(gate) * up)


def in_fp32(x):
    gate, up = x.float().chunk(2, dim=-1)
    return quantize((F.silu(gate) * up).to(x.dtype))


def through_views(x):
    gate, up = x.unflatten(0, (-1, 1)).chunk(2, dim=-1)
    return quantize((F.silu(gate) * up).flatten(0, -2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "function", [slices, chunks, splits, sigmoid, in_fp32, through_views], ids=lambda f: f.__name__
)
def test_silu_and_mul_is_found(function, dtype):
    x = values(0, 5, 128, dtype=dtype)
    out, record, _ = compile_and_run(function, x)
    assert record.fp4 == ["silu_and_mul_fp4_quantize"]
    assert record.arithmetic == []
    for given, wanted in zip(out, FP4.silu_and_mul_fp4_quantize(x, SCALE), strict=True):
        assert_same_bytes(given, wanted)
    assert counters["fp4_fusions"] == {"silu_and_mul": 1}


class LlamaRMSNorm(nn.Module):
    """As in transformers: the norm in fp32, rounded, then the weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone(), requires_grad=False)

    def forward(self, hidden):
        dtype = hidden.dtype
        hidden = hidden.to(torch.float32)
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * hidden.to(dtype)


LLAMA = LlamaRMSNorm()


def functional(x):
    return quantize(F.rms_norm(x, (64,), WEIGHT.to(x.dtype), 1e-6)), 1e-6, True


def without_weight(x):
    return quantize(F.rms_norm(x, (64,), None, 1e-5)), 1e-5, False


def as_on_cuda(x):
    return quantize(torch.ops.aten._fused_rms_norm(x, [64], WEIGHT.to(x.dtype), 1e-6)[0]), 1e-6, True


def llama(x):
    return quantize(LLAMA(x)), 1e-6, True


def gemma(x):
    wide = x.float()
    normalized = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)
    return quantize((normalized * (WEIGHT.float() - 1 + 1.0)).to(x.dtype)), 1e-6, True


def square_and_no_eps(x):
    wide = x.float()
    return quantize((torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True)) * wide).to(x.dtype)), 0.0, False


NORMS = [functional, without_weight, as_on_cuda, llama, gemma, square_and_no_eps]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("function", NORMS, ids=lambda f: f.__name__)
def test_rms_norm_is_found(function, dtype):
    x = values(0, 5, 64, dtype=dtype)
    (out, eps, weighted), record, _ = compile_and_run(function, x)
    assert record.fp4 == ["rms_norm_fp4_quantize"]
    assert not set(record.arithmetic) & {"pow", "mean", "rsqrt"}
    # Inductor's decomposition rounds eps to fp32 already.
    wanted = FP4.rms_norm_fp4_quantize(x, WEIGHT if weighted else None, SCALE, eps)
    for given, right in zip(out, wanted, strict=True):
        assert_same_bytes(given, right)
    assert counters["fp4_fusions"] == {"rms_norm": 1}


def test_transformers_norm_is_found():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama", reason="needs transformers")
    norm = modeling.LlamaRMSNorm(64).bfloat16().requires_grad_(False)
    norm.weight.copy_(WEIGHT)
    x = values(0, 2, 3, 64)
    out, record, _ = compile_and_run(lambda x: quantize(norm(x)), x)
    assert record.fp4 == ["rms_norm_fp4_quantize"]
    for given, wanted in zip(out, FP4.rms_norm_fp4_quantize(x, WEIGHT, SCALE, norm.variance_epsilon), strict=True):
        assert_same_bytes(given, wanted)


FLAGS = [
    {"global_scale": 1 / SCALE, "is_global_scale_inversed": True, "is_sf_swizzled_layout": False},
    {"global_scale": SCALE, "is_sf_8x4_layout": True, "backend": "reference"},
    {"sf_vec_size": 32, "sf_use_ue8m0": True},
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_the_arguments_of_the_quantiser_are_kept(flags):
    x = values(0, 5, 128)

    def both(x):
        gate, up = x.chunk(2, dim=-1)
        return FP4.fp4_quantize(F.silu(gate) * up, **flags), FP4.fp4_quantize(F.rms_norm(x, (128,)), **flags)

    (silu, norm), record, _ = compile_and_run(both, x)
    assert record.fp4 == ["rms_norm_fp4_quantize", "silu_and_mul_fp4_quantize"]
    eps = float(torch.finfo(torch.float32).eps)
    wanted = FP4.silu_and_mul_fp4_quantize(x, **flags), FP4.rms_norm_fp4_quantize(x, None, eps=eps, **flags)
    for given, right in zip((*silu, *norm), (*wanted[0], *wanted[1]), strict=True):
        assert_same_bytes(given, right)


def test_a_norm_before_several_linears_is_fused_into_each():
    def qkv(x):
        y = F.rms_norm(x, (64,), WEIGHT, 1e-6)
        return FP4.fp4_quantize(y, SCALE), FP4.fp4_quantize(y.view(-1, 64), SCALE * 2)

    _, record, _ = compile_and_run(qkv, values(0, 2, 3, 64))
    assert record.fp4 == ["rms_norm_fp4_quantize"] * 2


def test_a_residual_that_is_used_elsewhere_does_not_matter():
    def block(x, residual):
        residual = x + residual
        return quantize(F.rms_norm(residual, (64,), WEIGHT, 1e-6)), residual.float() * 2

    _, record, _ = compile_and_run(block, values(0, 3, 64), values(1, 3, 64))
    assert record.fp4 == ["rms_norm_fp4_quantize"]


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(64, eps=1e-6)
        self.gate_up, self.down = nn.Linear(64, 256, bias=False), nn.Linear(128, 64, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_quantised_mlp(calibrated):
    """Through the layers of torch_fp4ops.nn, in three dimensions. Without a calibrated scale the layers need the
    largest value before they quantise, so nothing can be fused."""
    from torch_fp4ops.nn import quantize_

    torch.manual_seed(0)
    mlp = MLP().bfloat16().requires_grad_(False)
    quantize_(mlp, "nvfp4", activations="same")
    if calibrated:
        mlp.gate_up.input_global_scale, mlp.down.input_global_scale = torch.tensor([600.0]), torch.tensor([2000.0])
    x = values(0, 2, 5, 64)
    out, record, _ = compile_and_run(mlp, x)
    quantisers = [n for n in record.fp4 if "quantize" in n]
    fused = ["rms_norm_fp4_quantize", "silu_and_mul_fp4_quantize"]
    assert quantisers == (fused if calibrated else ["fp4_quantize"] * 2)
    wanted = mlp(x)
    assert (out - wanted).float().norm() < 0.1 * (wanted - x).float().norm()  # some codes are a step apart


# What is left alone


def product_used_twice(x):
    gate, up = x.chunk(2, dim=-1)
    y = F.silu(gate) * up
    return quantize(y), y + 1


def activation_used_twice(x):
    gate, up = x.chunk(2, dim=-1)
    s = F.silu(gate)
    return quantize(s * up), s + 1


def separate_tensors(x):
    return quantize(F.silu(x + 1) * (x + 2))


def up_first(x):
    up, gate = x.chunk(2, dim=-1)
    return quantize(F.silu(gate) * up)


def every_other_column(x):
    return quantize(F.silu(x[..., ::2]) * x[..., 1::2])


def halves_of_rows(x):
    gate, up = x.chunk(2, dim=0)
    return quantize(F.silu(gate) * up)


def three_parts(x):
    return quantize(F.silu(x[..., :32]) * x[..., 32:64])


def gelu(x):
    gate, up = x.chunk(2, dim=-1)
    return quantize(F.gelu(gate) * up)


def norm_used_twice(x):
    y = F.rms_norm(x, (128,))
    return quantize(y), y + 1


def norm_of_two_dimensions(x):
    return quantize(F.rms_norm(x, (4, 128)))


def layer_norm(x):
    return quantize(F.layer_norm(x, (128,)))


def mean_of_another(x):
    return quantize(x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6))


def cube(x):
    return quantize(x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6))


def a_weight_of_rows(x):
    return quantize(F.rms_norm(x, (128,)) * x[:, :1])


def in_fp64(x):
    gate, up = x.double().chunk(2, dim=-1)
    return quantize((F.silu(gate) * up).float())


LEFT_ALONE = [product_used_twice, activation_used_twice, separate_tensors, up_first, every_other_column]
LEFT_ALONE += [halves_of_rows, three_parts, gelu, norm_used_twice, norm_of_two_dimensions, layer_norm]
LEFT_ALONE += [mean_of_another, cube, a_weight_of_rows, in_fp64]


@pytest.mark.parametrize("function", LEFT_ALONE, ids=lambda f: f.__name__)
def test_left_alone(function):
    x = values(0, 4, 128, dtype=torch.float32).abs()
    _, record, _ = compile_and_run(function, x)
    assert record.fp4 == ["fp4_quantize"]


def test_what_the_named_backend_does_not_take_fused_is_left_alone(monkeypatch):
    quantizer, fused = OPS["fp4_quantize"], OPS["rms_norm_fp4_quantize"]
    taken = {name: dataclasses.replace(op._backends["reference"], name="mine") for name, op in OPS.items()}
    refused = dataclasses.replace(taken[fused.name], unsupported=lambda call: f"{call.input.shape[-1]} are too many")
    monkeypatch.setitem(quantizer._backends, "mine", taken[quantizer.name])

    def function(x):
        return FP4.fp4_quantize(F.rms_norm(x, (64,), None, 1e-6), SCALE, backend="mine")

    for backend, ops in ((refused, ["fp4_quantize"]), (taken[fused.name], ["rms_norm_fp4_quantize"])):
        monkeypatch.setitem(fused._backends, "mine", backend)
        torch._dynamo.reset()
        _, record, _ = compile_and_run(function, values(0, 4, 64))
        assert record.fp4 == ops


# Shapes, names, caches


@pytest.mark.parametrize("function", [chunks, lambda x: functional(x)[0]], ids=["silu_and_mul", "rms_norm"])
def test_one_compilation_for_every_number_of_rows(function):
    columns = 128 if function is chunks else 64
    fused = OPS["silu_and_mul_fp4_quantize"] if function is chunks else OPS["rms_norm_fp4_quantize"]
    more = (SCALE,) if function is chunks else (WEIGHT, SCALE)
    record = Record(compile_passes.FuseIntoFp4Quantize())
    with config.patch(post_grad_custom_pre_pass=record):
        compiled = torch.compile(function, fullgraph=True)
        for m in (0, 1, 2, 129):
            x = values(m, m, columns)
            torch._dynamo.decorators.mark_unbacked(x, 0)
            for given, wanted in zip(compiled(x), fused(x, *more), strict=True):
                assert_same_bytes(given, wanted)
    assert record.fp4 == [fused.name]
    assert counters["fp4_fusions"].total() == 1


def test_columns_that_are_dynamic_are_left_alone():
    _, record, _ = compile_and_run(slices, values(0, 4, 128), dynamic=True)
    assert record.fp4 == ["fp4_quantize"]


def test_only_the_named_fusions():
    def both(x):
        gate, up = x.chunk(2, dim=-1)
        return quantize(F.silu(gate) * up), quantize(F.rms_norm(x, (128,)))

    x = values(0, 4, 128)
    for name, left in (("silu_and_mul", "rms_norm"), ("rms_norm", "silu_and_mul")):
        torch._dynamo.reset()
        _, record, _ = compile_and_run(both, x, fusions=(name,))
        assert record.fp4 == ["fp4_quantize", f"{name}_fp4_quantize"], left
    with pytest.raises(ValueError, match="there is no fusion 'gelu'; allowed: silu_and_mul, rms_norm"):
        compile_passes.options("gelu")


def test_options_and_the_context_manager_fuse():
    x = values(0, 4, 128)
    wanted = FP4.silu_and_mul_fp4_quantize(x, SCALE)
    for given, right in zip(torch.compile(slices, options=compile_passes.options())(x), wanted, strict=True):
        assert_same_bytes(given, right)
    torch._dynamo.reset()
    with compile_passes.enabled("silu_and_mul"):
        out = torch.compile(slices)(x)
    assert_same_bytes(out[0], wanted[0])
    torch._dynamo.reset()
    counters.clear()
    with config.patch(force_disable_caches=True):
        torch.compile(slices)(x)  # off again
        assert not counters["fp4_fusions"]


def test_a_pass_that_was_there_before_runs_first():
    class Other(CustomGraphPass):
        calls = 0

        def __call__(self, graph):
            Other.calls += 1

        def uuid(self):
            return "other"

    x = values(0, 4, 128)
    with config.patch(post_grad_custom_pre_pass=Other(), force_disable_caches=True), compile_passes.enabled():
        torch.compile(slices)(x)
    assert Other.calls == 1 and counters["fp4_fusions"]["silu_and_mul"] == 1


def test_identity_for_caches():
    make = compile_passes.FuseIntoFp4Quantize
    assert make().uuid() == make("rms_norm", "silu_and_mul").uuid() != make("rms_norm").uuid()
    assert make(after=make()).uuid() != make().uuid()
    assert make(after=lambda graph: None).uuid() is None


@pytest.mark.gpu
@pytest.mark.parametrize("function", [slices, chunks, in_fp32, through_views], ids=lambda f: f.__name__)
def test_silu_and_mul_on_a_gpu(function):
    x = values(0, 300, 128).cuda()
    out, record, _ = compile_and_run(function, x)
    assert record.fp4 == ["silu_and_mul_fp4_quantize"]
    for given, wanted in zip(out, FP4.silu_and_mul_fp4_quantize(x.cpu(), SCALE), strict=True):
        assert_same_bytes(given.cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("function", ["rms_norm", "nn", "llama"])
def test_rms_norm_on_a_gpu(function):
    x, weight = values(0, 300, 64).cuda(), WEIGHT.cuda()
    module = nn.RMSNorm(64, eps=1e-6).cuda().bfloat16().requires_grad_(False)
    module.weight.copy_(weight)
    llama = LlamaRMSNorm().cuda()
    norm = {"rms_norm": lambda x: F.rms_norm(x, (64,), weight, 1e-6), "nn": module, "llama": llama}[function]
    out, record, _ = compile_and_run(lambda x: quantize(norm(x)), x)
    assert record.fp4 == ["rms_norm_fp4_quantize"], record.ops
    for given, wanted in zip(out, FP4.rms_norm_fp4_quantize(x.cpu(), WEIGHT, SCALE), strict=True):
        assert_same_bytes(given.cpu(), wanted)
