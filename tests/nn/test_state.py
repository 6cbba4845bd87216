"""What replaces, writes or loads the tensors of quantised layers: all of it takes effect, or none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from torch_fp4ops.nn import FP4Linear, MXFP8Linear

K, N = 256, 128  # both layouts have tensors of these sizes
KINDS = ("nvfp4-same", "nvfp4-bf16", "mxfp4-bf16", "mxfp8-same")
every_kind = pytest.mark.parametrize("kind", KINDS)
in_both_layouts = pytest.mark.parametrize("layout", ["plain", "hopper"])


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def quantized(kind: str, scale: float = 1.0, **options) -> FP4Linear | MXFP8Linear:
    linear = nn.Linear(K, N)
    linear.weight.mul_(scale)
    weight_format, activations = kind.split("-")
    if weight_format == "mxfp8":
        return MXFP8Linear.from_linear(linear, **options)
    return FP4Linear.from_linear(linear, weight_format=weight_format, activations=activations, **options)


def tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def compiled(layer: nn.Module):
    return torch.compile(layer, fullgraph=True, backend="aot_eager")


def exported(layer: nn.Module, x: Tensor):
    return torch.export.export(layer, (x,)).module()


def close(given: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(given, wanted, rtol=0.01, atol=1e-3)


@every_kind
def test_tensors_given_for_a_call_are_read_as_what_they_are(kind):
    plain, other = quantized(kind), quantized(kind, 3.0)
    prepared = copy.deepcopy(plain)
    assert prepared.prepare() and other.prepare()
    assert prepared.weight.shape == plain.weight.shape  # so that shapes of weights tell nothing
    x = torch.randn(4, K)
    call = torch.func.functional_call
    for given in (other.state_dict(), {name: t.clone() for name, t in tensors(other).items() if name != "alpha"}):
        close(call(prepared, given, (x,)), other(x))
        close(call(plain, given, (x,)), other(x))
        close(torch.compile(lambda given: call(prepared, given, (x,)), backend="aot_eager")(given), other(x))
    assert prepared.weight_layout == "hopper"
    close(prepared(x), plain(x))


@every_kind
def test_the_state_of_a_prepared_layer_is_a_snapshot(kind):
    layer = quantized(kind)
    assert layer.prepare()
    x = torch.randn(4, K)
    before = layer(x)
    state = layer.state_dict()
    for t in state.values():
        t.zero_()
    assert torch.equal(layer(x), before)
    assert layer.state_dict(keep_vars=True)["bias"] is layer.bias


@in_both_layouts
@every_kind
@pytest.mark.parametrize("wrong", ["weight", "weight_scale", "bias", "dtype", "list", "none", "meta", "sparse"])
def test_a_refused_state_changes_nothing(kind, layout, wrong):
    layer, state = quantized(kind), quantized(kind, 3.0).state_dict()
    layer.prepare(layout)
    before = {name: (t, t.clone()) for name, t in tensors(layer).items()}
    changes = {
        "dtype": Tensor.int,
        "list": Tensor.tolist,
        "none": lambda t: None,
        "meta": lambda t: t.to("meta"),
        "sparse": Tensor.to_sparse,
    }
    if wrong in changes:
        state["weight_scale"] = changes[wrong](state["weight_scale"])
    else:
        state[wrong] = state[wrong][:1]
    with pytest.raises(RuntimeError, match=r"weight_scale is .*; allowed|size mismatch for (weight|bias)"):
        layer.load_state_dict(state)
    assert layer.weight_layout == layout
    for name, t in tensors(layer).items():
        assert t is before[name][0] and torch.equal(t.view(torch.uint8), before[name][1].view(torch.uint8))


@in_both_layouts
@every_kind
def test_what_is_loaded_goes_where_it_was(kind, layout):
    layer, other = quantized(kind), quantized(kind, 3.0)
    layer.prepare(layout)
    where = tensors(layer)
    x = torch.randn(4, K)
    layer.load_state_dict(other.state_dict())
    assert layer.weight_layout == layout
    assert all(t is where[name] for name, t in tensors(layer).items())
    close(layer(x), other(x))
    if "alpha" in where:
        assert torch.equal(layer.alpha, other.alpha)


def test_what_no_state_has_is_no_part_of_one():
    """``alpha`` is named as unexpected, and nothing else."""
    layer = quantized("nvfp4-bf16")
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*\"alpha\"") as error:
        layer.load_state_dict({**layer.state_dict(), "alpha": torch.ones(3)})
    assert "allowed" not in str(error.value)


def test_a_state_without_the_weight_leaves_it_packed(monkeypatch):
    layer = quantized("nvfp4-bf16")
    assert layer.prepare()
    monkeypatch.setattr(type(layer), "prepare", lambda *_: pytest.fail("the weight is unpacked"))
    layer.load_state_dict({"bias": torch.ones(N)}, strict=False)
    assert layer.bias.eq(1).all()


@in_both_layouts
def test_hooks_before_loading_come_first(layout):
    layer = quantized("nvfp4-same")
    layer.prepare(layout)
    wanted = quantized("nvfp4-same", 3.0, input_global_scale=torch.tensor([7.0]))
    calls = []

    def rename(module, state, prefix, *_):
        calls.append(module)
        for name in [name for name in state if name.startswith(prefix + "old_")]:
            state[prefix + name[len(prefix) + 4 :]] = state.pop(name)

    layer.register_load_state_dict_pre_hook(rename)
    model, x = nn.ModuleDict({"layer": layer}), torch.randn(4, K)
    for _ in range(2):
        model.load_state_dict({f"layer.old_{name}": t for name, t in wanted.state_dict().items()})
    assert calls == [layer, layer]
    assert layer.input_global_scale.item() == 7
    close(layer(x), wanted(x))

    layer.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: state.update({prefix + "weight": x}))
    with pytest.raises(RuntimeError, match=r"layer.weight is torch.float32; allowed: torch.uint8"):
        model.load_state_dict({f"layer.old_{name}": t for name, t in wanted.state_dict().items()})
    close(layer(x), wanted(x))


def test_a_given_input_scale_is_the_layers_own():
    given = torch.tensor([100.0])
    layers = [quantized("nvfp4-same", input_global_scale=given) for _ in range(2)]
    layers[0].load_state_dict({**layers[0].state_dict(), "input_global_scale": torch.tensor([1.0])})
    given.zero_()
    assert [layer.input_global_scale.item() for layer in layers] == [1, 100]


def _registered(layer: FP4Linear) -> None:
    layer.register_buffer("input_global_scale", torch.tensor([600.0]))


def _put(layer: FP4Linear) -> None:
    layer._buffers["weight_global_scale"] = layer.weight_global_scale * 2


def _put_too(layer: FP4Linear) -> None:
    layer._buffers["input_global_scale"] = torch.tensor([600.0])


def _emptied(layer: FP4Linear) -> None:
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    layer.to("meta").to_empty(device="cpu")
    for name, t in layer.state_dict().items():
        t.copy_(state[name])


def _put_for_meta(layer: FP4Linear) -> None:
    state = layer.state_dict()
    layer.to("meta")
    for name, t in state.items():
        where = layer._parameters if name == "bias" else layer._buffers
        where[name] = nn.Parameter(t.clone(), False) if name == "bias" else t.clone()


@pytest.mark.parametrize("kind", ["nvfp4-same", "nvfp4-bf16"])
@pytest.mark.parametrize("change", [_registered, _put, _put_too, _emptied, _put_for_meta])
def test_graphs_have_the_alpha_of_the_scales(kind, change):
    if kind == "nvfp4-bf16" and change in (_registered, _put_too):
        pytest.skip("it has no input scale")
    layer = quantized(kind)
    if change is _put and kind == "nvfp4-same":
        _registered(layer)
    change(layer)
    x = torch.randn(4, K)
    fresh = quantized(kind)
    fresh.load_state_dict(layer.state_dict())
    wanted = fresh(x)
    close(layer(x), wanted)
    close(compiled(layer)(x), wanted)
    if change is not _put:  # tensors that torch.export puts in their place tell nothing
        close(exported(layer, x)(x), wanted)


def test_graphs_read_alpha_where_it_is():
    """The usual layer has no kernel for it in each call."""
    layer, x = quantized("nvfp4-bf16"), torch.randn(4, K)
    for graph in (torch.export.export(layer, (x,)), torch.export.export(layer, (x,), strict=True)):
        assert not [node for node in graph.graph.nodes if "reciprocal" in str(node.target)]
    layer.alpha.mul_(2)
    close(compiled(layer)(x) - layer.bias, 2 * (quantized_again(layer)(x) - layer.bias))


def quantized_again(layer: FP4Linear) -> FP4Linear:
    new = copy.deepcopy(layer)
    new.weight_global_scale = layer.weight_global_scale.clone()  # which renews alpha
    return new
