"""Layers whose weights are in the layout "hopper": the same results, canonical state dicts, and no second copy."""

from __future__ import annotations

import copy
import io
import pickle
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from torch_fp4ops import set_backend
from torch_fp4ops.cuda_graphs import record_decisions
from torch_fp4ops.nn import FP4Linear, MXFP8Linear, prepare_, quantize_
from torch_fp4ops.nn._block_scaled import best_layout
from torch_fp4ops.testing import assert_same_bytes
from torch_fp4ops.testing.samples import values

K, N = 288, 72
KINDS = ("nvfp4-same", "nvfp4-bf16", "mxfp4-same", "mxfp4-bf16", "mxfp8-same")
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def quantized(kind: str, linear: nn.Linear | None = None) -> FP4Linear | MXFP8Linear:
    weight_format, activations = kind.split("-")
    linear = linear or nn.Linear(K, N)
    if weight_format == "mxfp8":
        return MXFP8Linear.from_linear(linear)
    return FP4Linear.from_linear(linear, weight_format=weight_format, activations=activations)


def both(kind: str) -> tuple[nn.Module, nn.Module]:
    """A layer as it was, and prepared."""
    plain = quantized(kind)
    prepared = copy.deepcopy(plain)
    assert prepared.prepare() is True
    return plain, prepared


def assert_same_state(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(given) == list(wanted)
    for name, tensor in wanted.items():
        assert_same_bytes(given[name], tensor, name)


def close(given: Tensor, wanted: Tensor) -> None:
    # Sums of matrices of other sizes differ in order.
    torch.testing.assert_close(given, wanted, rtol=0.01, atol=1e-3)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_result_is_the_same(kind, dtype):
    plain, prepared = both(kind)
    for shape in ((5, K), (0, K), (2, 3, K), (K,)):
        x = torch.randn(shape, dtype=dtype)
        out = prepared(x)
        assert out.shape == (*shape[:-1], N) and out.dtype == dtype and out.is_contiguous()
        close(out, plain(x))


@every_kind
def test_preparing_is_in_place_and_idempotent_and_can_be_undone(kind):
    plain = quantized(kind)
    layer = copy.deepcopy(plain)
    names = [name for name, _ in layer.named_buffers()]
    before = layer.weight_nbytes
    assert layer.prepare()
    weight, scale = layer.weight, layer.weight_scale
    assert weight.shape == (128, 512 // (1 if kind.startswith("mxfp8") else 2)) and weight.dtype == plain.weight.dtype
    assert layer.weight_nbytes > before and layer.weight_layout == "hopper"
    assert layer.weight_nbytes == sum(b.nbytes for n, b in layer.named_buffers() if n.startswith("weight"))
    assert weight.untyped_storage().nbytes() == weight.nbytes
    assert layer.prepare() and layer.weight is weight and layer.weight_scale is scale
    assert [name for name, _ in layer.named_buffers()] == names
    assert "weight_layout='hopper', weight_nbytes=" in repr(layer) and "weight_layout" not in repr(plain)
    assert layer.prepare("plain") and layer.prepare("plain") and layer.weight_layout == "plain"
    for name, buffer in plain.named_buffers():
        assert_same_bytes(getattr(layer, name), buffer, name)


@every_kind
def test_state_dicts_are_those_of_plain_layers(kind):
    plain, prepared = both(kind)
    assert_same_state(prepared.state_dict(), plain.state_dict())
    file, wanted = io.BytesIO(), io.BytesIO()
    torch.save(prepared.state_dict(), file)
    torch.save(plain.state_dict(), wanted)
    assert file.tell() == wanted.tell()  # without the padding
    other = quantized(kind)
    file.seek(0)
    assert other.load_state_dict(torch.load(file)) and other.weight_layout == "plain"
    assert_same_state(other.state_dict(), plain.state_dict())


@every_kind
@pytest.mark.parametrize("assign", [False, True])
def test_a_prepared_layer_loads_a_plain_state_dict(kind, assign):
    plain, prepared = quantized(kind), both(kind)[1]
    result = prepared.load_state_dict(plain.state_dict(), assign=assign)
    assert not result.missing_keys and prepared.weight_layout == "hopper"
    assert_same_state(prepared.state_dict(), plain.state_dict())
    x = torch.randn(3, K)
    close(prepared(x), plain(x))


def test_a_state_dict_that_does_not_fit_changes_nothing():
    plain, prepared = both("nvfp4-same")
    state = {**plain.state_dict(), "weight": plain.weight[:, :8]}
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        prepared.load_state_dict(state)
    assert prepared.weight_layout == "hopper"
    assert_same_bytes(prepared.state_dict()["weight"], plain.weight)


@every_kind
def test_moves_and_copies(kind):
    plain, prepared = both(kind)
    x = torch.randn(3, K)
    wanted = prepared(x)
    file = io.BytesIO()
    torch.save(prepared, file)
    file.seek(0)
    copies = [
        copy.deepcopy(prepared),
        pickle.loads(pickle.dumps(prepared)),
        torch.load(file, weights_only=False),
        copy.deepcopy(prepared).double().float(),
        copy.deepcopy(prepared).half().float(),
    ]
    for other in copies:
        assert other.weight_layout == "hopper"
        assert_same_bytes(other.weight, prepared.weight)
        assert_same_bytes(other.weight_scale, prepared.weight_scale)
        assert_same_state(
            {n: t for n, t in other.state_dict().items() if n != "bias"},
            {n: t for n, t in plain.state_dict().items() if n != "bias"},
        )
    assert_same_bytes(copies[0](x), wanted)
    assert_same_bytes(copies[1](x), wanted)


def test_a_pickle_from_before_there_were_layouts():
    layer = quantized("mxfp8-same")
    state = layer.__getstate__()
    state.pop("weight_layout", None)
    old = MXFP8Linear.__new__(MXFP8Linear)
    old.__setstate__(state)
    assert old.weight_layout == "plain" and old.prepare()


def test_a_weight_that_has_no_form_there_stays_plain():
    layer = FP4Linear.from_linear(nn.Linear(64, 8), weight_format="mxfp4")
    layer.weight_scale[0, 0] = 200
    weight = layer.weight
    assert layer.prepare() is False and layer.weight_layout == "plain" and layer.weight is weight
    prepared = both("mxfp4-same")[1]
    state = prepared.state_dict()
    state["weight_scale"][0, 0] = 200
    prepared.load_state_dict(state)
    assert prepared.weight_layout == "plain"
    assert_same_state(prepared.state_dict(), state)


def test_meta_layers_are_prepared_once_they_have_data():
    layer = MXFP8Linear(K, N, device="meta")
    assert layer.prepare() is False
    trained, prepared = quantized("mxfp8-same"), both("mxfp8-same")[1].to("meta")
    prepared.load_state_dict(trained.state_dict(), assign=True)
    assert prepared.weight_layout == "hopper"
    assert_same_state(prepared.state_dict(), trained.state_dict())


def test_unknown_layouts():
    with pytest.raises(ValueError, match="FP4Linear.prepare: layout is 'trtllm'; allowed: 'hopper' or 'plain'"):
        quantized("nvfp4-same").prepare("trtllm")
    with pytest.raises(ValueError, match="prepare_: layout is 'nz'; allowed: 'hopper' or 'plain'"):
        prepare_(nn.Linear(2, 2), "nz")


def mixed_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 200), nn.ReLU(), nn.Linear(200, 8)).bfloat16()
    quantize_(model, "nvfp4", "bf16", lambda module, name: name == "0")
    return quantize_(model, "mxfp8", filter_fn=lambda module, name: name == "2")


def test_a_model_prepares_all_its_layers_and_no_other():
    model, plain = mixed_model(), mixed_model()
    assert prepare_(model) is model
    assert [getattr(layer, "weight_layout", None) for layer in model] == ["hopper", None, "hopper", None, None]
    assert_same_state(model.state_dict(), plain.state_dict())
    x = values(0, 5, 64)
    close(model(x), plain(x))
    prepare_(model, "plain")
    assert_same_bytes(model(x), plain(x))


def test_nothing_is_prepared_by_itself_without_the_gpu(monkeypatch):
    assert quantized("nvfp4-same").weight_layout == "plain"
    # Nor where it is switched off.
    monkeypatch.setattr("torch_fp4ops.nn._block_scaled.best_layout", lambda *_: "hopper")
    linear = nn.Linear(64, 32)
    assert FP4Linear.from_linear(linear).weight_layout == "hopper"
    assert MXFP8Linear.from_linear(linear).weight_layout == "hopper"
    assert FP4Linear.from_linear(linear, prepare=False).weight_layout == "plain"
    assert MXFP8Linear.from_linear(linear, prepare=False).weight_layout == "plain"
    half = FP4Linear.from_linear(linear.half(), weight_format="mxfp4", activations="bf16")
    assert half.weight_layout == "plain"  # float16 and MXFP4 have no kernel there
    for prepare in (True, False):
        model = quantize_(nn.Sequential(nn.Linear(64, 32)), "mxfp4", prepare=prepare)
        assert model[0].weight_layout == ("hopper" if prepare else "plain")


def test_the_best_layout_follows_the_gpu_and_what_is_asked_for(monkeypatch):
    launch = pytest.importorskip("torch_fp4ops.ops._hopper_launch")
    cuda = torch.device("cuda", 0)
    assert best_layout(torch.device("cpu"), "mm_fp4") == "plain"
    monkeypatch.setattr(launch, "unavailable", lambda device: "another GPU")
    assert best_layout(cuda, "mm_fp4") == "plain"
    monkeypatch.setattr(launch, "unavailable", lambda device: None)
    assert best_layout(cuda, "mm_fp4") == "hopper"
    with set_backend(mm_fp4="triton"):  # which would refuse the layout
        assert best_layout(cuda, "mm_fp4") == "plain" and best_layout(cuda, "mm_mxfp8") == "hopper"
    monkeypatch.setitem(sys.modules, "torch_fp4ops.ops._hopper_launch", None)
    assert best_layout(cuda, "mm_fp4") == "plain"


@every_kind
def test_one_graph_for_every_m(kind):
    prepared = both(kind)[1]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(prepared, fullgraph=True, backend=counter)
    for m in (5, 1, 130):
        x = torch.randn(m, K, dtype=torch.bfloat16)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        assert_same_bytes(compiled(x), prepared(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model, x = prepare_(mixed_model()), values(0, 5, 64)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},), strict=strict)
    assert_same_bytes(program.module()(x), model(x))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert_same_bytes(torch.export.load(file).module()(values(1, 9, 64)), model(values(1, 9, 64)))


@pytest.mark.gpu
@every_kind
def test_on_a_gpu(kind):
    weight_format, activations = kind.split("-")
    torch.manual_seed(0)
    linear = nn.Linear(1024, 1000).bfloat16()
    plain = quantize_(nn.Sequential(linear), weight_format, activations)[0]
    torch.manual_seed(0)
    layer = quantize_(nn.Sequential(nn.Linear(1024, 1000).bfloat16().cuda()), weight_format, activations)[0]
    if torch.cuda.get_device_capability() == (9, 0):
        assert layer.weight_layout == "hopper"
        with record_decisions() as decisions:
            layer(torch.randn(5, 1024, dtype=torch.bfloat16, device="cuda"))
        assert any(backends == {"gluon"} for op, backends in decisions.backends().items() if op.startswith("mm_"))
    for m in (1, 17, 300):
        x = torch.randn(m, 1024, dtype=torch.bfloat16)
        out, wanted = layer(x.cuda()).cpu().float(), plain(x).float()
        assert ((out - wanted).norm() / wanted.norm()).item() < 0.01
    for name, tensor in layer.cpu().state_dict().items():
        assert_same_bytes(tensor, plain.state_dict()[name], name)
