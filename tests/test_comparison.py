"""compare: exact where nothing differs, the format's error where only the format does, and a wrong layer found."""

from __future__ import annotations

import builtins
import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from torch_fp4ops import OPS, BackendUnavailable, compare, probe, register_extern
from torch_fp4ops.comparison import OUTPUT, Distance, distance
from torch_fp4ops.nn import quantize_
from torch_fp4ops.ops.mm_bf16_fp4 import mm_bf16_fp4

X = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
SHAPES = ((128, 256), (256, 96), (96, 64))
EXACT = Distance(1.0, 0.0, 0.0)
KINDS = [("nvfp4", "same"), ("nvfp4", "bf16"), ("mxfp4", "same"), ("mxfp4", "bf16"), ("mxfp8", "same")]
QUICK = {"warmup": 0, "repeats": 1}


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(*shape) for shape in SHAPES)).bfloat16()


def quantized(weight_format: str = "nvfp4", activations: str = "bf16") -> nn.Sequential:
    return quantize_(plain(), weight_format, activations)


@pytest.fixture
def broken(monkeypatch):
    """A backend of mm_bf16_fp4 that is wrong for one number of columns only, which no probe sees."""
    monkeypatch.setattr(probe, "_verdicts", {})
    mm_bf16_fp4.backend_names()
    monkeypatch.setattr(mm_bf16_fp4, "_backends", dict(mm_bf16_fp4._backends))

    def wrong_for_96(
        a: Tensor,
        b: Tensor,
        b_descale: Tensor,
        alpha: Tensor | None = None,
        *,
        out_dtype: torch.dtype | None = None,
        block_size: int = 16,
        b_layout: str = "plain",
    ) -> Tensor:
        how = {"out_dtype": out_dtype, "block_size": block_size, "b_layout": b_layout}
        out = mm_bf16_fp4.run_backend("reference", a, b, b_descale, alpha, **how)
        return out + 100 if out.shape[1] == 96 else out

    register_extern("mm_bf16_fp4.broken", wrong_for_96)
    return {"mm_bf16_fp4": "broken"}


@pytest.mark.parametrize(("weight_format", "activations"), KINDS)
def test_a_backend_against_itself_is_exact(weight_format, activations):
    found = compare(quantized(weight_format, activations), X, ("reference", "reference"), repeats=3)
    assert found.runs == ("reference", "reference (2)")
    assert [row.layer for row in found.rows] == ["0", "1", "2", OUTPUT]
    assert all(row.accumulated == EXACT for row in found.rows)
    assert [row.local for row in found.rows] == [EXACT] * 3 + [None]
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in found.times.values())
    assert all(taken == ["reference"] for by_op in found.backends.values() for taken in by_op.values())
    assert not found.failures(min_cosine=1.0) and not found.unmatched


def format_error(t: Tensor, weight_format: str) -> float:
    """Relative error of a tensor in a format, there and back through the ops."""
    ops, x = torch.ops.fp4, t.detach().bfloat16()
    if weight_format == "mxfp8":
        back = ops.mxfp8_dequantize(*ops.mxfp8_quantize(x))
    else:
        nvfp4 = weight_format == "nvfp4"
        encode = 2688 / x.float().abs().amax().reshape(1)
        kind = {"sf_vec_size": 16, "sf_use_ue8m0": False} if nvfp4 else {"sf_vec_size": 32, "sf_use_ue8m0": True}
        scale = encode if nvfp4 else None
        back = ops.fp4_dequantize(*ops.fp4_quantize(x, scale, **kind), scale, **kind)
    return float((back.double() - x.double()).norm() / x.double().norm())


@pytest.mark.parametrize(("weight_format", "activations"), KINDS)
def test_a_format_against_the_original_errs_as_the_format_does(weight_format, activations):
    """Rounding errors of weights and activations are independent of the other factor, so their squares add up."""
    original = plain()
    found = compare(quantized(weight_format, activations), X, "reference", baseline=original, **QUICK)
    inputs = [X]
    with torch.no_grad():
        for layer in original[:-1]:
            inputs.append(layer(inputs[-1]))
    for row, layer, x in zip(found.rows, original, inputs, strict=False):
        expected = format_error(layer.weight, weight_format)
        if activations == "same":
            expected = math.hypot(expected, format_error(x, weight_format))
        assert row.local.relative_l2 == pytest.approx(expected, rel=0.2)
        # The cosine of a vector and itself with an independent error.
        assert row.local.cosine == pytest.approx(1 / math.hypot(1, expected), abs=0.5 * expected**2)
    rows = found.rows
    assert rows[0].accumulated == rows[0].local  # nothing lies before the first
    assert rows[2].accumulated.relative_l2 > rows[2].local.relative_l2
    assert rows[3].accumulated == rows[2].accumulated == found.output()


def test_a_wrong_layer_is_found_where_it_is(broken):
    found = compare(quantized(), X, ("reference", broken), **QUICK)
    first, wrong, behind, output = found.rows
    assert first.accumulated == first.local == EXACT
    assert wrong.accumulated == wrong.local and wrong.local.max_abs > 90
    assert behind.local == EXACT and behind.accumulated.cosine < 0.9 and output.accumulated == behind.accumulated
    assert [line.partition(":")[0] for line in found.failures(0.9)] == [
        "mm_bf16_fp4=broken, 1",
        "mm_bf16_fp4=broken, 1 alone",
        "mm_bf16_fp4=broken, 2",
        "mm_bf16_fp4=broken, output",
    ]
    assert found.backends["mm_bf16_fp4=broken"] == {"mm_bf16_fp4": ["broken"]}


def test_calls_that_one_run_does_not_make_are_named(broken):
    class Routed(nn.Module):
        """The second layer sees the rows that the first sends there, the third only where there are many."""

        def __init__(self):
            super().__init__()
            self.layers = quantize_(
                nn.ModuleList([nn.Linear(128, 96), nn.Linear(96, 64), nn.Linear(96, 32)]), "nvfp4", "bf16"
            )

        def forward(self, x):
            h = self.layers[0](x)
            sent = h[h[:, 0] > 0]
            out = self.layers[1](sent)
            return h.sum() + out.sum() + (self.layers[2](h).sum() if len(sent) == len(h) else 0)

    found = compare(Routed().bfloat16(), X, ("reference", broken), **QUICK)
    assert [row.layer for row in found.rows] == ["layers.0", OUTPUT]
    shape, call = found.unmatched
    assert "call 1 of layers.1: distance: given is of shapes [[64, 64]]; allowed: those of wanted" in shape
    assert call == "call 1 of layers.2: the first run does not make it"
    assert f"not compared: {call}" in str(found)


def test_a_layer_that_is_called_twice_has_two_rows():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(128, 128)

        def forward(self, x):
            return {"hidden": self.layer(self.layer(x)), "length": torch.tensor(3)}

    found = compare(quantize_(Twice().bfloat16(), "mxfp8"), {"x": X}, ("reference", "auto"), **QUICK)
    assert [(row.layer, row.call) for row in found.rows] == [("layer", 0), ("layer", 1), (OUTPUT, 0)]
    assert "\nlayer (call 2)  MXFP8Linear" in str(found)


class Direct(nn.Module):
    """Calls an operator itself, between layers that don't."""

    class Inner(nn.Module):
        def forward(self, x):
            return torch.ops.fp4.fp4_dequantize(*torch.ops.fp4.fp4_quantize(x, torch.ones(1)), torch.ones(1))

    def __init__(self):
        super().__init__()
        self.inner, self.act = self.Inner(), nn.ReLU()

    def forward(self, x):
        return self.act(self.inner(x))


def test_which_layers_are_compared():
    def names(model, **options):
        return [row.layer for row in compare(model, X, ("reference", "reference"), **QUICK, **options).rows[:-1]]

    assert names(Direct()) == ["inner"]
    assert names(Direct(), layers="leaves") == ["inner", "act"]
    assert names(Direct(), layers=lambda module, name: isinstance(module, nn.ReLU)) == ["act"]
    assert names(plain()) == ["0", "1", "2"]  # no operator anywhere: leaves


def test_a_layer_that_the_baseline_has_not_is_named():
    model = nn.Sequential(plain(), nn.Linear(64, 64).bfloat16())
    baseline = nn.Sequential(plain(), nn.Identity())
    deeper = nn.Sequential(plain(), nn.Sequential(nn.Linear(64, 64).bfloat16()))
    found = compare(quantize_(deeper, "nvfp4"), X, "auto", baseline=baseline, **QUICK)
    assert [row.layer for row in found.rows] == ["0.0", "0.1", "0.2", OUTPUT]
    assert found.unmatched == ("1.0, which not every model has",)
    assert not compare(quantize_(model, "nvfp4"), X, "auto", baseline=baseline, local=False, **QUICK).rows[0].local


class Stateful(nn.Module):
    made = 0

    def __init__(self):
        super().__init__()
        Stateful.made += 1
        self.layer = quantized()[0]
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return self.layer(x * self.seen)


def test_a_function_gives_every_run_a_fresh_model():
    assert compare(Stateful, X, ("reference", "auto"), **QUICK).output() == EXACT
    assert Stateful.made == 3  # one for each run, and one to find the layers
    assert compare(Stateful(), X, ("reference", "auto"), **QUICK).output() != EXACT


def test_a_compiled_model_is_compared_eagerly_and_timed_compiled(fresh_dynamo):
    model, calls = quantized(), []

    def backend(graph, inputs):
        return lambda *args: calls.append(1) or graph(*args)

    found = compare(
        torch.compile(model, backend=backend), X, ("reference", "auto"), baseline=plain(), warmup=0, repeats=3
    )
    assert [row.layer for row in found.of("auto")] == ["0", "1", "2", OUTPUT]
    assert found.of("reference") == [replace(row, run="reference") for row in found.of("auto")]
    assert len(calls) == 2 * 3


def test_a_whole_transformer_with_experts():
    """Fused experts, which are no Linear, count too: they call an operator."""
    pytest.importorskip("transformers", reason="needs transformers, of the extra 'demo'")
    from compile_tests import architectures

    model, inputs = architectures.quantized("qwen_moe"), architectures.inputs("qwen_moe", 2)
    found = compare(model, inputs, "auto", baseline=architectures.unquantized("qwen_moe"), **QUICK)
    layers = [row.layer for row in found.rows]
    assert {"model.layers.0.mlp.experts", "model.layers.1.self_attn.q_proj"} <= set(layers) and not found.unmatched
    assert all(row.local.cosine > 0.97 for row in found.rows[:-1]) and found.output().cosine > 0.9
    dit = architectures.quantized("dit", activations="same")
    found = compare(dit, architectures.inputs("dit", 20), "auto", baseline=architectures.unquantized("dit"), **QUICK)
    assert found.rows[0].layer == "time.0" and found.output().cosine > 0.9


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(quantized(), nn.Dropout(0.5))
    model[0].eval()
    assert compare(model, X, ("reference", "auto"), **QUICK).output() == EXACT  # no dropout
    assert model.training and model[1].training and not model[0].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_writes_into_its_inputs_gets_the_same_ones_each_time():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = quantized()

        def forward(self, x):
            x += 1
            return self.layer(x)

    x = X.clone()
    assert compare(Writes(), x, ("reference", "reference"), **QUICK).output() == EXACT
    assert torch.equal(x, X)


def test_distances():
    ones, inf, nan = torch.ones(4), math.inf, math.nan
    assert distance(ones, ones.double()) == EXACT
    assert distance(torch.zeros(0), torch.zeros(0)) == EXACT
    assert distance(2 * ones, ones) == Distance(1.0, 1.0, 1.0)
    assert distance(-ones, ones) == Distance(-1.0, 2.0, 2.0)
    assert distance(ones, 0 * ones) == Distance(0.0, inf, 1.0)
    assert distance([ones, 0 * ones], [ones, ones]).relative_l2 == pytest.approx(0.5**0.5)
    masked = torch.tensor([-inf, 1.0])
    assert distance(masked, masked) == EXACT and distance(masked * 2, masked) == Distance(1.0, 1.0, 1.0)
    for bad in (torch.tensor([nan, 1.0]), torch.tensor([inf, 1.0])):
        for pair in ((bad, masked), (masked, bad)):
            assert math.isnan(distance(*pair).cosine) and math.isnan(distance(*pair).max_abs)
    for factor in (1e200, 1e-200, 1e-310):  # whose squares float64 lacks
        least = torch.tensor([2.0, 0.0], dtype=torch.float64) * factor
        assert distance(least + least.flip(0), least).relative_l2 == 1.0
        assert distance(least + least.flip(0), least).cosine == pytest.approx(0.5**0.5)
    turned = torch.tensor([1 + 1j, 2.0])
    assert distance(turned, turned.clone()) == EXACT
    assert distance(turned, turned.conj()).max_abs == 2.0
    with pytest.raises(ValueError, match=r"given is of shapes \[\[4\]\]; allowed: those of wanted, \[\[3\]\]"):
        distance(ones, ones[:3])


def test_nan_is_a_failure_whatever_is_asked_for():
    x = X.clone()
    x[3] = math.nan
    failures = compare(quantized(), x, ("reference", "auto"), **QUICK).failures()
    assert failures[0] == "auto, 0: NaN, or an infinity that reference has not" and len(failures) == 7


@pytest.mark.parametrize("wrong", [math.nan, 1.5])
def test_a_cosine_that_none_can_have(wrong):
    with pytest.raises(ValueError, match=f"failures: min_cosine is {wrong}; allowed: -1 to 1"):
        compare(quantized(), X, ("reference", "auto"), **QUICK).failures(wrong)


def test_json_and_plot(tmp_path, monkeypatch, broken):
    found = compare(quantized(), X, ("reference", broken, "auto"), **QUICK)
    found.save_json(tmp_path / "found.json")
    saved = json.loads((tmp_path / "found.json").read_text())
    assert saved["runs"] == list(found.runs) and len(saved["rows"]) == len(found.rows) == 8
    assert saved["rows"][1]["local"]["max_abs"] == found.rows[1].local.max_abs
    zeros = compare(
        quantized(),
        0 * X,
        "auto",
        baseline=nn.Sequential(*(nn.Linear(*s, bias=False) for s in SHAPES)).bfloat16(),
        **QUICK,
    )
    zeros.save_json(tmp_path / "zeros.json")
    assert json.loads((tmp_path / "zeros.json").read_text())["rows"][0]["local"]["relative_l2"] == "inf"
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra 'bench'")
    for name, comparison in (("found", found), ("exact", compare(quantized(), X, ("auto", "auto"), **QUICK))):
        comparison.plot(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    really_import = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return really_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"pip install 'torch-fp4ops\[bench\]'"):
        found.plot(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 3}, "model is a int; allowed: an nn.Module or what makes one"),
        ({"model": lambda: X}, "model is a Tensor; allowed"),
        ({"inputs": 3}, "inputs is a int; allowed: a tensor, a tuple, a list or a dict"),
        ({"backends": "reference"}, "backends is ('reference',); allowed: 2 or more without a baseline"),
        ({"backends": (), "baseline": nn.Identity()}, "backends is (); allowed: 1 or more with a baseline"),
        ({"backends": ("reference", "tritno")}, "backends names 'tritno'; allowed: 'auto', "),
        ({"backends": ("reference", {"mm_fp4": "tritno"})}, "backends names 'tritno'; allowed: 'auto', 'b12x'"),
        ({"backends": ("reference", {"mm_fp5": "triton"})}, "backends names the op 'mm_fp5'; allowed: '*', cutlass"),
        ({"backends": 3}, "backends is 3; allowed: names of backends, or dicts of names by op"),
        ({"backends": ("reference", None)}, "backends has None; allowed: names of backends, or dicts"),
        ({"backends": ("reference", {})}, "backends has {}; allowed: names of backends, or dicts"),
        ({"backends": ("reference", {"mm_fp4": 3})}, "backends has {'mm_fp4': 3}; allowed: names of backends"),
        ({"layers": "all"}, "layers is 'all'; allowed: 'quantized', 'leaves' or a function"),
        ({"layers": lambda module, name: False}, "layers selects no module"),
        ({"warmup": -1}, "warmup is -1; allowed: 0 or more"),
        ({"repeats": 0}, "repeats is 0; allowed: 1 or more"),
    ],
)
def test_rejections(change, message):
    given = {"model": quantized(), "inputs": X, "backends": ("reference", "auto"), **change}
    with pytest.raises(ValueError) as error:
        compare(**given)
    assert f"compare: {message}" in str(error.value)


def test_other_rejections():
    class Counts(nn.Module):
        def forward(self, x):
            return [3, x.argmax()]

    with pytest.raises(ValueError, match="the model gives a list without floating-point tensors"):
        compare(Counts(), X, ("reference", "auto"), **QUICK)
    with pytest.raises(BackendUnavailable, match="cutlass_fused_moe|mm_bf16_fp4.*can't take this call"):
        compare(quantized(), X, ("reference", {"mm_bf16_fp4": "cudnn"}), **QUICK)
    found = compare(quantized(), X, ("reference", "auto"), **QUICK)
    with pytest.raises(ValueError, match="run is 'reference'; allowed: 'auto'"):
        found.of("reference")


@pytest.mark.gpu
@pytest.mark.parametrize(("weight_format", "activations"), KINDS)
def test_triton_stays_with_the_reference(weight_format, activations):
    model = copy.deepcopy(quantized(weight_format, activations)).cuda()
    found = compare(model, X.cuda(), ("reference", "triton"), **QUICK)
    # Both round fp32 sums of other orders to bfloat16.
    assert not found.failures(0.9999), str(found)
    assert {b for taken in found.backends["triton"].values() for b in taken} == {"triton"}
    assert set(found.backends["triton"]) <= set(OPS)
