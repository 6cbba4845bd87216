"""quantize_: which layers it replaces, that a failed call changes nothing, and every rejection."""

from __future__ import annotations

import copy
import re
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.testing._internal.two_tensor import TwoTensor

from torch_fp4ops.nn import FP4Linear, MXFP8Linear, quantize_

KINDS = (("nvfp4", "same"), ("nvfp4", "bf16"), ("mxfp4", "same"), ("mxfp4", "bf16"), ("mxfp8", "same"))
every_kind = pytest.mark.parametrize(("weight_format", "activations"), KINDS, ids=["-".join(k) for k in KINDS])


class Subclass(nn.Linear):
    pass


class Net(nn.Module):
    """Two users of one Linear, a subclass, and layers at several depths."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(64, 64)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)), self.shared])
        self.other = Subclass(64, 64)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        for block in self.blocks:
            x = self.norm(x + block(x))
        return self.other(self.shared(x))


def types(model: nn.Module) -> dict[str, type]:
    return {n: type(m) for n, m in model.named_modules(remove_duplicate=False)}


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@every_kind
def test_replaces_every_linear_and_nothing_else(weight_format, activations):
    model = Net().eval()
    expected, bias = model(torch.ones(2, 64)), model.shared.bias
    assert quantize_(model, weight_format, activations) is model
    cls = MXFP8Linear if weight_format == "mxfp8" else FP4Linear
    quantized = {n for n, t in types(model).items() if t is cls}
    assert quantized == {"shared", "blocks.0.0", "blocks.0.2", "blocks.1"}
    assert not any(type(m) is nn.Linear for m in model.modules()) and type(model.other) is Subclass
    assert model.blocks[1] is model.shared and model.shared.bias is bias
    assert {m.format for m in model.modules() if isinstance(m, cls)} == {weight_format}
    assert all(not m.training for m in model.modules())
    out = model(torch.ones(2, 64))
    assert nn.functional.cosine_similarity(out, expected).min() > 0.9


def test_filter_sees_names_and_modules():
    seen = []

    def only_blocks(module: nn.Module, name: str) -> bool:
        seen.append((name, type(module)))
        return name.startswith("blocks.0")

    model = Net()
    quantize_(model, "nvfp4", filter_fn=only_blocks)
    assert sorted(seen) == [(n, nn.Linear) for n in ("blocks.0.0", "blocks.0.2", "blocks.1", "shared")]
    assert type(model.shared) is nn.Linear and type(model.blocks[0][2]) is FP4Linear


def test_attention_output_of_torch_is_left_alone():
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    quantize_(model, "nvfp4")
    assert type(model.self_attn.out_proj) is NonDynamicallyQuantizableLinear
    before = torch.backends.mha.get_fastpath_enabled()
    try:  # as the docstring says
        torch.backends.mha.set_fastpath_enabled(False)
        assert model(torch.randn(2, 5, 64)).isfinite().all()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_old_weights_are_freed_one_at_a_time(monkeypatch):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    old = [weakref.ref(layer.weight) for layer in model]
    alive, from_linear = [], FP4Linear.from_linear
    count = lambda: sum(w() is not None for w in old)  # noqa: E731
    monkeypatch.setattr(FP4Linear, "from_linear", lambda *a, **k: (alive.append(count()), from_linear(*a, **k))[1])
    quantize_(model, "nvfp4")
    assert alive == [4, 3, 2, 1] and count() == 0
    assert sum(b.nbytes for b in model.buffers()) < 4 * 64 * 64
    assert {n for n, _ in model.named_parameters()} == {f"{i}.bias" for i in range(4)}


def test_meta_then_to_empty_then_load():
    x = torch.randn(3, 64)
    for weight_format, activations in KINDS:
        source = quantize_(Net(), weight_format, activations)
        with torch.device("meta"):
            model = quantize_(Net(), weight_format, activations)
        assert all(t.is_meta for t in (*model.buffers(), *model.parameters()))
        model.to_empty(device="cpu").load_state_dict(source.state_dict())
        assert model.blocks[1] is model.shared
        assert torch.equal(model(x), source(x))
        assert torch.equal(copy.deepcopy(model)(x), source(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp4",), "weight_format is 'fp4'; allowed: 'nvfp4' or 'mxfp4' or 'mxfp8'"),
        (("nvfp4", "fp16"), "activations is 'fp16'; allowed: 'same' or 'bf16'"),
        (("mxfp8", "bf16"), "activations is 'bf16' with weight_format='mxfp8'; allowed: 'same'"),
        (("nvfp4", "same", lambda module, name: False), "no layer was selected"),
    ],
)
def test_bad_arguments(arguments, message):
    model = Net()
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize_(model, *arguments)
    assert type(model.shared) is nn.Linear


def test_the_model_itself_cannot_be_replaced():
    with pytest.raises(ValueError, match="'': the model itself is the layer; use FP4Linear.from_linear"):
        quantize_(nn.Linear(64, 64), "nvfp4")


def test_what_is_compiled_by_itself_is_refused(fresh_dynamo):
    model = nn.Sequential(torch.compile(nn.Linear(64, 32), backend="eager"), nn.ReLU())
    with pytest.raises(ValueError, match="'0._orig_mod': it is compiled by itself, .*; quantise it first"):
        quantize_(model, "nvfp4")
    whole = torch.compile(nn.Sequential(nn.Linear(64, 32), nn.ReLU()), backend="eager")
    x = torch.randn(3, 64)
    before = whole(x)
    quantize_(whole, "nvfp4")
    assert not torch.equal(whole(x), before)


def test_a_weight_of_another_shape_than_the_layer_says_is_refused():
    linear = nn.Linear(64, 32, bias=False)
    linear.weight = nn.Parameter(torch.randn(16, 64))
    with pytest.raises(ValueError, match=r"'0': weight is of shape \(16, 64\); allowed: \(32, 64\)"):
        quantize_(nn.Sequential(linear), "nvfp4")


def test_every_offender_is_named_and_nothing_is_changed():
    bad = {
        "narrow": nn.Linear(24, 8),
        "nan": nn.Linear(64, 8),
        "float64": nn.Linear(64, 8, dtype=torch.float64),
        "hooked": nn.Linear(64, 8),
        "patched": nn.Linear(64, 8),
        "subclass": nn.Linear(64, 8),
    }
    bad["nan"].weight[3, 3] = float("nan")
    bad["hooked"].register_forward_hook(lambda *a: None)
    bad["patched"].forward = lambda x: x
    bad["subclass"].weight = nn.Parameter(TwoTensor(torch.ones(8, 64), torch.ones(8, 64)))
    bad["narrow_again"] = bad["narrow"]
    model = nn.ModuleDict({"good": nn.Linear(64, 64), **bad})
    before = dict(model.named_modules(remove_duplicate=False))
    with pytest.raises(ValueError) as caught:
        quantize_(model, "nvfp4")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("quantize_: 6 of the 7 selected layers can't become nvfp4, so nothing was changed")
    assert lines[1:-1] == [
        "  'narrow', 'narrow_again': in_features is 24; allowed: a positive multiple of 16 (nvfp4)",
        "  'nan': weight holds NaN or infinite values; allowed: finite values",
        "  'float64': weight is torch.float64; allowed: torch.bfloat16 or torch.float16 or torch.float32",
        "  'hooked': it has hooks (forward_hooks), which the new layer would lose",
        "  'patched': it has a forward of its own, which the new layer would lose",
        "  'subclass': weight is a TwoTensor; allowed: a plain tensor",
    ]
    assert "filter_fn=" in lines[-1]
    after = dict(model.named_modules(remove_duplicate=False))
    assert all(after[n] is m for n, m in before.items())
    quantize_(model, "nvfp4", filter_fn=lambda module, name: name not in bad)
    assert type(model["good"]) is FP4Linear


# Compiled


def compile_counted(model: nn.Module):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


@every_kind
@pytest.mark.parametrize("lead", [(), (3,)], ids=["rank2", "rank3"])
def test_one_graph_for_every_m(weight_format, activations, lead):
    model = quantize_(Net(), weight_format, activations)
    compiled, counter = compile_counted(model)
    for m in (5, 1, 0, 2, 130):
        x = torch.randn(m, *lead, 64)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1


@every_kind
def test_dynamic_m_without_marks(weight_format, activations):
    model = quantize_(Net(), weight_format, activations)
    compiled, counter = compile_counted(model)
    for m in (5, 2, 130, 129):
        x = torch.randn(m, 64)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1
    compiled(torch.randn(2, 3, 64))
    compiled(torch.randn(2, 3, 64))
    assert counter.frame_count == 2  # a rank is a new graph to Dynamo, and only one


def test_layers_alike_share_no_state_in_the_graph():
    """Static and dynamic input scales, with and without a bias, are graphs of their own and right."""
    linear = nn.Linear(64, 64)
    scale = torch.tensor([500.0])
    layers = [
        FP4Linear.from_linear(linear),
        FP4Linear.from_linear(linear, input_global_scale=scale),
        FP4Linear.from_linear(nn.Linear(64, 64, bias=False)),
        MXFP8Linear.from_linear(linear),
    ]
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    for layer in layers:
        compiled, counter = compile_counted(layer)
        assert torch.equal(compiled(x), layer(x)) and counter.frame_count == 1
