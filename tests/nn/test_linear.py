"""FP4Linear and MXFP8Linear: what they compute, and that no cast, copy or reload changes a byte of their weights."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from torch_fp4ops.block_quantization import dequantize_blocks
from torch_fp4ops.formats import FORMATS
from torch_fp4ops.nn import FP4Linear, MXFP8Linear
from torch_fp4ops.nn.linear import encode_scale
from torch_fp4ops.scale_layouts import SWIZZLED_128X4, unswizzle

K, N = 96, 40
KINDS = ("nvfp4-same", "nvfp4-bf16", "mxfp4-same", "mxfp4-bf16", "mxfp8-same")
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def options(kind: str) -> dict[str, str]:
    weight_format, activations = kind.split("-")
    return {} if weight_format == "mxfp8" else {"weight_format": weight_format, "activations": activations}


def quantized(kind: str, linear: nn.Linear | None = None) -> FP4Linear | MXFP8Linear:
    cls = MXFP8Linear if kind.startswith("mxfp8") else FP4Linear
    return cls.from_linear(linear or nn.Linear(K, N), **options(kind))


def empty(kind: str, **kwargs) -> FP4Linear | MXFP8Linear:
    cls = MXFP8Linear if kind.startswith("mxfp8") else FP4Linear
    return cls(K, N, **options(kind), **kwargs)


def as_bytes(layer: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    return {n: (b.dtype, b.view(torch.uint8).numpy().tobytes()) for n, b in layer.named_buffers()}


def decode(layer: nn.Module, codes: Tensor, scales: Tensor, global_scale: Tensor | None) -> Tensor:
    fmt = FORMATS[layer.format]
    linear_scales = unswizzle(scales, codes.shape[0], K // fmt.block_size, SWIZZLED_128X4)
    values = dequantize_blocks(codes, linear_scales, fmt).double()
    return values if global_scale is None else values / global_scale.double()


def decoded_weight(layer: nn.Module) -> Tensor:
    return decode(layer, layer.weight, layer.weight_scale, getattr(layer, "weight_global_scale", None))


def decoded_input(layer: nn.Module, x: Tensor) -> Tensor:
    """The activations that the operator multiplies, in float64."""
    if getattr(layer, "activations", "same") == "bf16":
        return (x if x.dtype == torch.float16 else x.to(torch.bfloat16)).double()
    if layer.format == "mxfp8":
        return decode(layer, *torch.ops.fp4.mxfp8_quantize(x), None)
    if layer.format == "mxfp4":
        return decode(layer, *torch.ops.fp4.fp4_quantize(x, None, 32, True), None)
    scale = layer.input_global_scale
    scale = (2688 / x.float().abs().max()).reshape(1) if scale is None else scale
    return decode(layer, *torch.ops.fp4.fp4_quantize(x, scale), scale)


def assert_is_the_product(layer: nn.Module, x: Tensor) -> None:
    """Against float64 within what rounding allows: fp32 sums of K products in any order, three roundings of alpha and
    of the product with it, one to the output and one of the bias added there."""
    a, w = decoded_input(layer, x), decoded_weight(layer)
    product, magnitude = a @ w.T, a.abs() @ w.abs().T
    bias = torch.zeros(N).double() if layer.bias is None else layer.bias.double()
    u, terms = UNIT[x.dtype], (K + 4) * UNIT[torch.float32]
    of_sum = terms / (1 - terms) * magnitude
    of_output = u * (product.abs() + of_sum)
    of_bias = u * (bias.abs() + (product + bias).abs() + of_sum + of_output)
    tiny = torch.finfo(x.dtype).tiny
    out = layer(x)
    assert out.dtype == x.dtype
    error = (out.double() - (product + bias)).abs()
    assert (error <= of_sum + of_output + of_bias + tiny).all(), error.max()


@every_kind
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_is_the_product_of_what_was_quantized(kind, dtype):
    layer = quantized(kind)
    assert_is_the_product(layer, torch.randn(33, K).to(dtype))


@every_kind
def test_weight_is_within_half_a_step(kind):
    linear = nn.Linear(K, N)
    layer = quantized(kind, linear)
    fmt = FORMATS[layer.format]
    amax = linear.weight.unflatten(1, (-1, fmt.block_size)).abs().amax(-1, keepdim=True).double()
    # The gap below the largest element is 2 of 6 for E2M1 and 32 of 448 for E4M3; a UE8M0 scale can be twice what the
    # block needs, an E4M3 scale off by 1/16 either way.
    step = amax / {"nvfp4": 6 * 15 / 16, "mxfp4": 6 / 2, "mxfp8": 448 / 2}[fmt.name]
    half_gap = 1 if fmt.element == "e2m1" else 16
    error = (decoded_weight(layer) - linear.weight).unflatten(1, (-1, fmt.block_size)).abs()
    assert (error <= step * half_gap).all()


@every_kind
def test_every_rank_gives_the_same_rows(kind):
    layer, x = quantized(kind), torch.randn(6, K)
    expected = layer(x)
    assert torch.equal(layer(x.view(2, 3, K)), expected.view(2, 3, N))
    assert torch.equal(layer(x.view(1, 3, 2, K)), expected.view(1, 3, 2, N))
    assert layer(x[0]).shape == (N,)
    assert layer(x[:0]).shape == (0, N)
    assert layer(x.view(2, 3, K)[:, :0]).shape == (2, 0, N)


def test_static_input_scale_is_used():
    linear, x = nn.Linear(K, N), torch.randn(5, K)
    scale = torch.tensor([2688 / 3.0])
    static = FP4Linear.from_linear(linear, input_global_scale=scale)
    assert_is_the_product(static, x)
    # Rows no longer depend on the rows beside them, which the dynamic scale can't promise.
    assert torch.equal(static(x)[:1], static(x[:1]))
    assert not torch.equal(static(x), FP4Linear.from_linear(linear)(x))


@every_kind
def test_zeros(kind):
    linear = nn.Linear(K, N)
    assert torch.equal(quantized(kind, linear)(torch.zeros(3, K)), linear.bias.expand(3, N))
    linear.weight.zero_()
    assert torch.equal(quantized(kind, linear)(torch.randn(3, K)), linear.bias.expand(3, N))
    assert torch.equal(empty(kind)(torch.randn(3, K)), torch.zeros(3, N))


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 1.0, 3e38, float("inf"), float("nan")])
def test_encode_scale_is_usable_whatever_the_input(value):
    scale = encode_scale(torch.tensor([[0.0, value], [0.0, 0.0]]))
    assert scale.shape == (1,) and scale.dtype == torch.float32
    assert 0 < scale.item() < float("inf") and (1 / scale).item() > 0
    assert torch.isfinite(scale * 2.0**63)
    if value in (1.0, 3e38):
        assert scale.item() == pytest.approx(2688 / value, rel=1e-6)
    assert torch.isfinite(encode_scale(torch.empty(0, 16)))


@every_kind
def test_nan_stays_in_its_row(kind):
    x = torch.randn(3, K)
    x[1, 5] = float("nan")
    out = quantized(kind)(x)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@every_kind
def test_bias_is_kept_as_it_is(kind):
    linear = nn.Linear(K, N, dtype=torch.bfloat16)
    layer = quantized(kind, linear)
    assert layer.bias is linear.bias and layer(torch.randn(2, K)).dtype == torch.float32
    without = quantized(kind, nn.Linear(K, N, bias=False))
    assert without.bias is None and dict(without.named_parameters()) == {}
    assert_is_the_product(without, torch.randn(2, K))
    assert not quantized(kind, nn.Linear(K, N).eval()).training


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.float16),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.float16),  # casts integer buffers too
}


@every_kind
@pytest.mark.parametrize("cast", CASTS)
def test_casts_reach_the_bias_only(kind, cast):
    layer = quantized(kind)
    before = as_bytes(layer)
    CASTS[cast](nn.Sequential(layer))
    assert as_bytes(layer) == before
    assert layer.bias.dtype != torch.float32


@every_kind
def test_moves_and_copies(kind):
    layer, x = quantized(kind), torch.randn(3, K)
    expected = layer(x)
    buffers = dict(layer.named_buffers())
    assert all(b is buffers[n] for n, b in layer.to("cpu").named_buffers())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert as_bytes(other) == as_bytes(layer) and torch.equal(other(x), expected)
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(other.buffers(), layer.buffers(), strict=True))
    moved = copy.deepcopy(layer).to(device="meta", dtype=torch.float16)
    assert all(b.is_meta and b.dtype == buffers[n].dtype for n, b in moved.named_buffers())
    assert all(b.shape == buffers[n].shape for n, b in moved.named_buffers())


@pytest.mark.gpu
@every_kind
def test_moves_to_a_gpu(kind):
    layer, x = quantized(kind), torch.randn(3, K, dtype=torch.bfloat16)
    expected, before = layer(x), as_bytes(layer)
    layer.to("cuda", torch.bfloat16)
    assert all(t.is_cuda for t in (*layer.buffers(), *layer.parameters()))
    torch.testing.assert_close(layer(x.cuda()).cpu(), expected, rtol=0.05, atol=0.05)
    assert as_bytes(layer.cpu()) == before


@every_kind
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(kind, assign):
    layer = quantized(kind)
    if kind == "nvfp4-same":
        assert "input_global_scale" not in layer.state_dict()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with torch.device("meta"):
        on_meta = empty(kind)
    on_meta = on_meta if assign else on_meta.to_empty(device="cpu")
    for fresh in (empty(kind), on_meta):
        fresh.load_state_dict(state, assign=assign)
        assert as_bytes(fresh) == as_bytes(layer) and torch.equal(fresh.bias, layer.bias)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_static_input_scale_comes_with_the_state_dict(device):
    layer = FP4Linear.from_linear(nn.Linear(K, N), input_global_scale=torch.tensor([7.0]))
    fresh = FP4Linear(K, N, device=device).to_empty(device="cpu")
    fresh.load_state_dict(layer.state_dict())
    assert as_bytes(fresh) == as_bytes(layer)
    fresh.load_state_dict(layer.state_dict())  # and again over the one it has now
    with pytest.raises(RuntimeError, match="Unexpected key.*input_global_scale"):
        FP4Linear(K, N, activations="bf16").load_state_dict(layer.state_dict())


def test_an_unquantized_state_dict_is_rejected():
    with pytest.raises(RuntimeError, match="weight is torch.bfloat16; allowed: torch.float8_e4m3fn"):
        MXFP8Linear(K, N).load_state_dict(nn.Linear(K, N).bfloat16().state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="allowed: torch.uint8"):
        FP4Linear(K, N).load_state_dict(nn.Linear(K, N).state_dict())


@every_kind
def test_from_linear_on_meta(kind):
    layer = quantized(kind, nn.Linear(K, N, device="meta"))
    expected = quantized(kind)
    assert [(n, b.shape, b.dtype) for n, b in layer.named_buffers()] == [
        (n, b.shape, b.dtype) for n, b in expected.named_buffers()
    ]
    assert all(t.is_meta for t in (*layer.buffers(), *layer.parameters()))


def test_repr_says_what_it_is():
    text = repr(FP4Linear(K, N, activations="bf16"))
    assert text == (
        "FP4Linear(in_features=96, out_features=40, format='nvfp4', activations='bf16', bias=True, weight_nbytes=2948)"
    )
    assert "format='mxfp8', bias=False" in repr(MXFP8Linear(K, N, bias=False))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("input_scale", [None, 100.0])
def test_alpha_follows_the_global_scales(assign, input_scale):
    """It is worked out once, so whatever changes a global scale has to reach it."""
    source = nn.Linear(64, 32, dtype=torch.bfloat16)
    activations = "bf16" if input_scale is None else "same"
    given = None if input_scale is None else torch.tensor([input_scale])
    layer = FP4Linear.from_linear(source, activations=activations, input_global_scale=given)

    def alpha(of: FP4Linear) -> Tensor:
        return 1.0 / (of.weight_global_scale if input_scale is None else of.input_global_scale * of.weight_global_scale)

    assert torch.equal(layer.alpha, alpha(layer))
    assert "alpha" not in layer.state_dict()
    other = FP4Linear(64, 32, activations=activations, dtype=torch.bfloat16)
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert torch.equal(other.alpha, layer.alpha)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))
    layer.weight_global_scale = layer.weight_global_scale * 2
    assert torch.equal(layer.alpha, alpha(layer)) and not torch.equal(other.alpha, layer.alpha)
    moved = copy.deepcopy(layer).to("meta")
    assert moved.alpha.is_meta


@pytest.mark.parametrize("activations", ["bf16", "same"])
def test_global_scales_replaced_or_written_for_a_call(activations):
    """A call goes by the scales that are there: of another layer's state dict, or written in place."""
    given = torch.tensor([100.0]) if activations == "same" else None
    few, many = nn.Linear(64, 32, dtype=torch.bfloat16), nn.Linear(64, 32, dtype=torch.bfloat16)
    many.weight.data.mul_(3)
    a, b = (FP4Linear.from_linear(t, activations=activations, input_global_scale=given) for t in (few, many))
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        before, wanted = a(x), b(x)
        alpha = a.alpha
        assert torch.equal(torch.func.functional_call(a, b.state_dict(), (x,)), wanted)
        assert torch.equal(a(x), before) and a.alpha is alpha
        for name, t in a.state_dict().items():
            t.copy_(b.state_dict()[name])
        assert torch.equal(a(x), wanted)
        assert torch.equal(a.to(torch.float16)(x), b.to(torch.float16)(x))
    assert not torch.equal(before, wanted)


@pytest.mark.parametrize("activations", ["bf16", "same"])
def test_global_scales_written_in_inference_mode(activations):
    """What is made there has no version counter of torch's."""
    source, x = nn.Linear(64, 32, dtype=torch.bfloat16), torch.randn(3, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        layer = FP4Linear.from_linear(source, activations=activations)
        new = FP4Linear(64, 32, activations=activations, dtype=torch.bfloat16)
        for given in (layer, new):
            if activations == "same":
                given.input_global_scale = torch.ones(1)
        if activations == "same":
            layer.input_global_scale.copy_(encode_scale(x))
        for name, t in new.state_dict().items():
            t.copy_(layer.state_dict()[name])
        assert torch.equal(new(x), layer(x))
        assert not new.weight_global_scale.is_inference()
    exact = source(x)
    assert (layer(x) - exact).norm() < 0.3 * exact.norm()


def test_a_state_dict_that_is_refused_brings_no_input_scale():
    layer = FP4Linear(K, N)
    state = FP4Linear.from_linear(nn.Linear(K, N), input_global_scale=torch.tensor([7.0])).state_dict()
    state["weight"] = state["weight"].float()
    with pytest.raises(RuntimeError, match="weight is torch.float32; allowed: torch.uint8"):
        layer.load_state_dict(state)
    assert layer.input_global_scale is None


def test_alpha_stays_where_graphs_read_it():
    layer = FP4Linear.from_linear(nn.Linear(64, 32), activations="bf16")
    alpha = layer.alpha
    layer.to("cpu", torch.float16)
    assert layer.alpha is alpha and layer._alpha_is_current()
