"""Prepared weights: the same product whatever form the checkpoint had, and a refusal where a backend can't read one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from torch_fp4ops import (
    BackendUnavailable,
    cutlass_fused_moe,
    mm_bf16_fp4,
    mm_fp4,
    mm_mxfp8,
    prepare_fp4_weight,
    prepare_sm90_moe_weights,
    scale_layouts,
)
from torch_fp4ops.block_quantization import quantize_mx
from torch_fp4ops.codecs import as_bytes
from torch_fp4ops.formats import MXFP4, MXFP8, NVFP4
from torch_fp4ops.ops.fp4_quantize import fp4_quantize
from torch_fp4ops.ops.mxfp8_quantize import mxfp8_quantize
from torch_fp4ops.testing import assert_same_bytes
from torch_fp4ops.testing.samples import values
from torch_fp4ops.weight_layouts import swap_nibbles, unpack_hopper_weight, unshuffle_matrix_a, unshuffle_matrix_sf_a

M, N, K = 5, 40, 160
SCALE = torch.tensor([300.0])
FORMATS = {16: {}, 32: {"sf_vec_size": 32, "sf_use_ue8m0": True}}


def quantized(rows: int, k: int, block: int, swizzled: bool = True):
    return fp4_quantize(
        values(rows, rows, k), SCALE if block == 16 else None, **FORMATS[block], is_sf_swizzled_layout=swizzled
    )


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("layout", ["plain", "trtllm", "hopper"])
@pytest.mark.parametrize("nibble_order", ["low_first", "high_first"])
@pytest.mark.parametrize("scale_layout", ["linear", "128x4", "flat"])
def test_every_form_of_a_checkpoint_gives_the_same_product(block, layout, nibble_order, scale_layout):
    (a, a_sf), (b, b_sf) = quantized(M, K, block), quantized(N, K, block)
    alpha = torch.tensor([1e-4])
    wanted = mm_fp4(a, b.T, a_sf, b_sf.T, alpha, block_size=block, use_nvfp4=block == 16)
    given = scale_layouts.unswizzle(b_sf, N, K // block, "128x4") if scale_layout == "linear" else b_sf
    given = given.flatten() if scale_layout == "flat" else given
    stored = swap_nibbles(b) if nibble_order == "high_first" else b
    form = "linear" if scale_layout == "linear" else "128x4"
    weight = prepare_fp4_weight(stored, given, layout, nibble_order, form, block_size=block)
    assert_same_bytes(weight.mm(a, a_sf, alpha).contiguous(), wanted)
    if layout == "hopper":
        assert weight.weight.shape == (128, 128) and weight.scale.shape == (128, 256 // block)
        codes, scales = unpack_hopper_weight(weight.weight, weight.scale, NVFP4 if block == 16 else MXFP4)
        assert_same_bytes(codes[:N, : K // 2].contiguous(), b)
    if layout == "trtllm":
        assert weight.weight.shape[0] == weight.scale.shape[0] == 128 and weight.scale.shape[1] % 4 == 0
        plain = unshuffle_matrix_a(weight.weight)
        assert_same_bytes(plain[:N, : K // 2].contiguous(), b)
        assert not plain[N:].any() and not plain[:, K // 2 :].any()
        scales = unshuffle_matrix_sf_a(weight.scale, *weight.scale.shape)
        linear = scale_layouts.unswizzle(b_sf, N, K // block, "128x4")
        assert_same_bytes(scales[:N, : K // block].contiguous(), linear)
        assert not scales[N:].any() and not scales[:, K // block :].any()


@pytest.mark.parametrize("layout", ["plain", "trtllm", "hopper"])
@pytest.mark.parametrize("eight", [False, True])
def test_mxfp8(layout, eight):
    a, a_sf = mxfp8_quantize(values(M, M, K), sf_swizzle_layout=1 if eight else 0)
    b, b_sf = mxfp8_quantize(values(N, N, K))
    weight = prepare_fp4_weight(b, b_sf, layout, scale_layout="128x4")
    wanted = mm_mxfp8(a, b.T, a_sf, b_sf, use_8x4_sf_layout=eight)
    assert_same_bytes(weight.mm(a, a_sf, use_8x4_sf_layout=eight).contiguous(), wanted)
    with pytest.raises(ValueError, match="alpha is given; allowed: None"):
        weight.mm(a, a_sf, torch.ones(1))


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("layout", ["plain", "trtllm", "hopper"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_activations(block, layout, dtype):
    b, b_sf = quantized(N, K, block)
    x, alpha = values(0, M, K, dtype=dtype), torch.tensor([1e-2])
    wanted = mm_bf16_fp4(x, b, b_sf, alpha, block_size=block)
    weight = prepare_fp4_weight(b, b_sf, layout, scale_layout="128x4", block_size=block).to("cpu")
    out = weight.mm(x, alpha=alpha)
    assert out.shape == (M, N) and out.dtype == dtype
    torch.testing.assert_close(out, wanted, rtol=0.01, atol=1e-4)  # sums of padded matrices differ in order
    assert weight.mm(x, None, alpha, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("layout", ["plain", "trtllm", "hopper"])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
def test_pickled_and_copied_weights_are_the_same(fmt, layout):
    codes, scales = mxfp8_quantize(values(1, N, K)) if fmt == "mxfp8" else quantized(N, K, 16)
    weight = prepare_fp4_weight(codes, scales, layout, scale_layout="128x4")
    for again in (pickle.loads(pickle.dumps(weight)), copy.deepcopy(weight)):
        assert (again.layout, again.n, again.k, again.block_size) == (layout, N, K, weight.block_size)
        assert_same_bytes(again.weight, weight.weight)
        assert_same_bytes(again.scale, weight.scale)


def test_only_the_device_of_a_weight_changes():
    weight = prepare_fp4_weight(*quantized(N, K, 16), scale_layout="128x4")
    assert weight.to("meta").scale.is_meta and weight.to(torch.device("cpu")).weight.dtype == torch.uint8
    with pytest.raises(ValueError, match=r"PreparedWeight.to: device is torch.bfloat16; allowed: a device"):
        weight.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"PreparedWeight.to: device is 'float16'; allowed: a device"):
        weight.to("float16")


def test_weights_are_compared_by_identity():
    weight, same = (prepare_fp4_weight(*quantized(N, K, 16), scale_layout="128x4") for _ in range(2))
    assert weight != same and weight == weight and len({weight, same}) == 2


def test_activations_that_do_not_fit_the_weight():
    (a, _), (b, b_sf) = quantized(M, K, 16), quantized(N, K, 16)
    weight = prepare_fp4_weight(b, b_sf, "hopper", scale_layout="128x4")
    with pytest.raises(ValueError, match="a_descale is None with a of torch.uint8; allowed: the scales of a"):
        weight.mm(a)
    with pytest.raises(ValueError, match=r"a is torch.float32; allowed: codes with their scales, or torch.bfloat16"):
        weight.mm(values(0, M, K).float())
    with pytest.raises(ValueError, match="a is torch.bfloat16 with scales of a; allowed: 16 bits"):
        weight.mm(values(0, M, K), b_sf)
    mxfp8 = prepare_fp4_weight(*mxfp8_quantize(values(0, N, K)), "hopper", scale_layout="128x4")
    with pytest.raises(ValueError, match="a is torch.bfloat16 with MXFP8 weights; allowed: 16 bits for FP4"):
        mxfp8.mm(values(0, M, K))


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, MXFP8], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("layout", ["plain", "trtllm", "hopper"])
def test_native_dtypes_of_activations(layout, fmt):
    """Of the weight's format; those of another one would be read as if they were."""
    (a, a_sf), b = (
        mxfp8_quantize(values(n, n, K)) if fmt is MXFP8 else quantized(n, K, fmt.block_size) for n in (M, N)
    )
    weight = prepare_fp4_weight(*b, layout, scale_layout="128x4", block_size=fmt.block_size)
    element = torch.float8_e4m3fn if fmt is MXFP8 else torch.float4_e2m1fn_x2
    scale = torch.float8_e4m3fn if fmt is NVFP4 else torch.float8_e8m0fnu
    wanted = weight.mm(a, a_sf)
    a, a_sf = as_bytes(a), as_bytes(a_sf)
    for first, second in ((a, a_sf), (a.view(element), a_sf.view(scale))):
        assert_same_bytes(weight.mm(first, second), wanted)
    for dtype in (torch.float4_e2m1fn_x2, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.int8):
        if dtype != element:
            with pytest.raises(ValueError, match=rf"a is {dtype}; allowed: torch.uint8 or {element}"):
                weight.mm(a.view(dtype), a_sf)
        if dtype != scale:
            with pytest.raises(ValueError, match=rf"a_descale is {dtype}; allowed: torch.uint8 or {scale}"):
                weight.mm(a, a_sf.view(dtype))


@pytest.mark.parametrize("layout", ["plain", "trtllm", "hopper"])
def test_activations_of_another_k_are_refused(layout):
    """Also where padding would make them fit."""
    weight = prepare_fp4_weight(*quantized(N, K, 16), layout, scale_layout="128x4")
    for k in (K - 32, K + 32, 2 * K):
        with pytest.raises(ValueError, match=rf"a is of shape \({M}, {k}\); allowed: \(m, {K}\)"):
            weight.mm(values(0, M, k))
        with pytest.raises(ValueError, match=rf"a is of shape \({M}, {k // 2}\); allowed: \(m, {K // 2}\)"):
            weight.mm(*quantized(M, k, 16))
    with pytest.raises(ValueError, match=rf"a is of shape \({K},\); allowed: \(m, {K}\)"):
        weight.mm(values(0, 1, K)[0])


def test_weights_of_two_formats_compile_one_after_the_other(fresh_dynamo):
    """From the second one on their block size is no constant."""
    multiply = torch.compile(lambda weight, x: weight.mm(x), fullgraph=True, backend="aot_eager")
    x = values(0, M, K)
    for block in (16, 32, 16):
        weight = prepare_fp4_weight(*quantized(N, K, block), "plain", scale_layout="128x4", block_size=block)
        assert_same_bytes(multiply(weight, x), weight.mm(x))


def test_a_weight_that_hopper_has_no_form_for_changes_nothing():
    b, b_sf = quantized(N, K, 32, swizzled=False)
    b_sf[3, 1] = 140
    before = b.clone(), b_sf.clone()
    with pytest.raises(
        ValueError, match="of mxfp4 with 1 blocks that can't be stored; allowed: scales from 2\\^-127 to"
    ):
        prepare_fp4_weight(b, b_sf, "hopper", block_size=32, rebind=True)
    assert_same_bytes(b, before[0])
    assert_same_bytes(b_sf, before[1])


@pytest.mark.parametrize("layout", ["trtllm", "hopper"])
def test_rebinding_leaves_one_copy(layout):
    module = nn.Module()
    b, b_sf = quantized(N, K, 16, swizzled=False)
    module.weight, module.scale = nn.Parameter(b, requires_grad=False), nn.Parameter(b_sf, requires_grad=False)
    old = module.weight.untyped_storage()
    weight = prepare_fp4_weight(module.weight, module.scale, layout, rebind=True)
    shape = (128, 96) if layout == "trtllm" else (128, 128)
    assert isinstance(module.weight, nn.Parameter) and module.weight.shape == weight.weight.shape == shape
    assert module.weight.data_ptr() == weight.weight.data_ptr() != old.data_ptr()
    assert module.scale.data_ptr() == weight.scale.data_ptr()
    assert set(module.state_dict()) == {"weight", "scale"}


def test_without_rebinding_the_checkpoint_stays():
    b, b_sf = quantized(N, K, 16, swizzled=False)
    before = b.clone(), b_sf.clone()
    prepare_fp4_weight(b, b_sf, nibble_order="high_first")
    assert_same_bytes(b, before[0])
    assert_same_bytes(b_sf, before[1])


@pytest.mark.parametrize("layout", ["trtllm", "hopper"])
def test_one_graph_for_any_number_of_rows(fresh_dynamo, layout):
    b, b_sf = quantized(N, K, 16, swizzled=False)
    weight = prepare_fp4_weight(b, b_sf, layout)

    def linear(x):
        return weight.mm(*torch.ops.fp4.fp4_quantize(x, SCALE), SCALE)

    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for m in (2, 9, 130):
        x = values(m, m, K)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        assert_same_bytes(compiled(x).contiguous(), linear(values(m, m, K)).contiguous())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_backend_that_reads_plain_weights_refuses_a_shuffled_one():
    (a, a_sf), (b, b_sf) = quantized(M, K, 16), quantized(N, K, 16, swizzled=False)
    weight = prepare_fp4_weight(b, b_sf)
    with pytest.raises(BackendUnavailable, match="'triton'.*plain weights, not b_layout='trtllm'"):
        weight.mm(a, a_sf, SCALE, backend="triton")


GOOD = dict(zip(("weight", "scale"), quantized(N, K, 16, swizzled=False), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "cutlass"}, "layout is 'cutlass'; allowed: 'plain' or 'trtllm' or 'hopper'"),
        ({"nibble_order": "guess"}, "nibble_order is 'guess'; allowed: 'low_first' or 'high_first'"),
        ({"scale_layout": "8x4"}, "scale_layout is '8x4'; allowed: 'linear' or '128x4'"),
        ({"scale_layout": "128x4"}, r"scale is \(40, 10\); allowed: \(128, 12\) \(128x4\)"),
        ({"weight": GOOD["weight"].int()}, "weight is torch.int32; allowed: uint8"),
        ({"weight": GOOD["weight"][0]}, r"weight is \(80,\); allowed: two dimensions"),
        ({"weight": GOOD["weight"][:, :3]}, "weight is 'of K = 6'; allowed: K a multiple of 16"),
        ({"scale": GOOD["scale"].float()}, "scale is torch.float32; allowed: torch.uint8 or torch.float8_e4m3fn"),
        (
            {"scale": GOOD["scale"].view(torch.float8_e8m0fnu)},
            "scale is torch.float8_e8m0fnu; allowed: torch.uint8 or torch.float8_e4m3fn for blocks of 16",
        ),
        (
            {"scale": GOOD["scale"].view(torch.float8_e4m3fn), "block_size": 32},
            "scale is torch.float8_e4m3fn; allowed: torch.uint8 or torch.float8_e8m0fnu for blocks of 32",
        ),
        ({"scale": GOOD["scale"].to("meta")}, "scale is device.*meta.*; allowed: cpu, where weight is"),
        ({"block_size": 0}, r"block_size is 0; allowed: 16 \(NVFP4\) or 32"),
        ({"block_size": 64}, r"block_size is 64; allowed: 16 \(NVFP4\) or 32"),
    ],
)
def test_rejections(change, message):
    with pytest.raises(ValueError, match=f"prepare_fp4_weight: {message}"):
        prepare_fp4_weight(**{**GOOD, **change})


def test_a_shuffled_weight_without_padding_is_refused_by_the_op():
    a, a_sf = quantized(M, K, 16)
    b, b_sf = quantized(N, K, 16)
    with pytest.raises(ValueError, match="b is of n = 40 with b_layout='trtllm'; allowed: n a multiple of 128"):
        torch.ops.fp4.mm_fp4(a, b.T, a_sf, b_sf.T, SCALE, b_layout="trtllm")
    with pytest.raises(ValueError, match="b_layout is 'nz'; allowed: 'plain' or 'trtllm' or 'hopper'"):
        torch.ops.fp4.mm_fp4(a, b.T, a_sf, b_sf.T, SCALE, b_layout="nz")


# Experts for compute capability 9.0


def moe_pieces(hidden=160, inter=96, experts=3):
    """Linear MXFP4 experts of sizes that no tile divides, with biases."""
    fc1, fc2 = values(1, experts, 2 * inter, hidden, scale=0.1), values(2, experts, hidden, inter, scale=0.1)
    pieces = [*quantize_mx(fc1.float(), MXFP4), *quantize_mx(fc2.float(), MXFP4)]
    return [*pieces, values(3, experts, 2 * inter), values(4, experts, hidden)]


@pytest.mark.parametrize("biases", [False, True])
def test_padded_and_interleaved_experts_give_the_unpadded_result(biases):
    pieces = moe_pieces()
    if not biases:
        pieces[4:] = None, None
    x, ids, scales = values(0, 7, 160), torch.tensor([[0, 2]] * 7), torch.tensor([[0.25, 0.75]] * 7)
    swiglu = {
        "swiglu_alpha": torch.full((3,), 1.702),
        "swiglu_beta": torch.ones(3),
        "swiglu_limit": torch.full((3,), 2.0),
    }
    group = {"use_w4_group_scaling": True, "backend": "reference", **swiglu}
    linear = cutlass_fused_moe(
        x, ids, scales, pieces[0], pieces[2], torch.float32, [pieces[1], pieces[3]], *pieces[4:],
        weight_layout="linear", **group,
    )  # fmt: skip
    new = prepare_sm90_moe_weights(*pieces)
    assert new.fc1_expert_weights.shape == (3, 256, 128) and new.fc2_expert_weights.shape == (3, 256, 64)
    padded = torch.nn.functional.pad(x, (0, 96))
    out = cutlass_fused_moe(padded, ids, scales, *new[:2], torch.float32, *new[2:], **group)
    torch.testing.assert_close(out[:, :160], linear, rtol=1e-5, atol=1e-5)
    assert not out[:, 160:].any()


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda t: t.int(), "fc1 is torch.int32; allowed: torch.uint8"),
        (0, lambda t: t[:, 1:], r"fc1 is of shape \(3, 191, 80\); allowed: \(3, 192, 80\)"),
        (3, lambda t: t[..., :1], r"fc2_scale is of shape \(3, 160, 1\); allowed: \(3, 160, 3\)"),
        (2, lambda t: t[0], r"fc2 is of shape \(160, 48\); allowed: three dimensions"),
        (4, lambda t: t[:, 1:], r"fc1_bias is of shape \(3, 191\)"),
    ],
)
def test_sm90_rejections(position, change, message):
    pieces = moe_pieces()
    pieces[position] = change(pieces[position])
    with pytest.raises(ValueError, match=f"prepare_sm90_moe_weights: {message}"):
        prepare_sm90_moe_weights(*pieces)
