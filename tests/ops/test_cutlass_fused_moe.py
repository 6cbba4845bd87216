"""cutlass_fused_moe: modes and layouts agree, parallelism adds up, an exact case, and the rejections."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_fp4ops import cutlass_fused_moe, scale_layouts
from torch_fp4ops.formats import MXFP4
from torch_fp4ops.ops.cutlass_fused_moe.samples import EXPERTS, HIDDEN, INTER, assert_close, routing, weights
from torch_fp4ops.testing import assert_same_bytes, samples
from torch_fp4ops.testing.samples import values
from torch_fp4ops.weight_layouts import reorder_gate_up

from .rejections import assert_rejected, assert_rejected_by_contract

BF16 = torch.bfloat16
SAMPLES = {s.name: s for s in samples(cutlass_fused_moe)}


def run(name: str, **change):
    sample = SAMPLES[name]
    names = list(cutlass_fused_moe.signature.parameters)
    return cutlass_fused_moe(**{**dict(zip(names, sample.args, strict=False)), **sample.kwargs, **change})


def test_swiglu_by_hand():
    """One expert, identity weights: fc1's rows are up first, gate second."""
    x = torch.tensor([[0.5, -1.0]])
    fc1 = torch.cat([torch.eye(2), 2 * torch.eye(2)]).unsqueeze(0)  # up = x, gate = 2x
    fc2 = torch.eye(2).unsqueeze(0)
    ids, scales = torch.zeros(1, 1, dtype=torch.int32), torch.full((1, 1), 3.0)
    out = cutlass_fused_moe(x, ids, scales, fc1, fc2, torch.float32, [])
    gate = 2 * x
    torch.testing.assert_close(out, 3 * gate * torch.sigmoid(gate) * x)
    alpha, beta, limit = torch.tensor([1.702]), torch.tensor([1.0]), torch.tensor([0.75])
    out = cutlass_fused_moe(
        x, ids, scales, fc1, fc2, torch.float32, [], swiglu_alpha=alpha, swiglu_beta=beta, swiglu_limit=limit
    )
    gate, up = torch.tensor([[0.75, -2.0]]), torch.tensor([[0.5, -0.75]])
    torch.testing.assert_close(out, 3 * gate * torch.sigmoid(1.702 * gate) * (up + 1))


def test_layouts_of_one_mode_give_the_same_bytes():
    linear = run("w4a16-mxfp4-linear")
    s1, s2 = SAMPLES["w4a16-mxfp4-linear"].args[6]
    swizzled = [scale_layouts.swizzle(s, "128x4") for s in (s1, s2)]
    assert_same_bytes(run("w4a16-mxfp4-linear", quant_scales=swizzled, weight_layout="128x4"), linear)
    interleaved = SAMPLES["w4a16-mxfp4-flashinfer"]
    turned = {
        "fc1_expert_weights": interleaved.args[3],
        "fc2_expert_weights": interleaved.args[4],
        "quant_scales": interleaved.args[6],
        "weight_layout": "sm90_interleaved",
    }
    assert_same_bytes(run("w4a16-mxfp4-linear", **turned), linear)


def test_w4a8_is_w4a16_with_activations_in_e4m3():
    """The same weights in both forms: only the rounding of the activations lies between."""
    fine = SAMPLES["w4a16-mxfp4-flashinfer-512"]
    x = values(6, 5, 512)
    plain = dict.fromkeys(("fc1_expert_biases", "fc2_expert_biases", "swiglu_alpha", "swiglu_beta", "swiglu_limit"))
    exact, rounded = run(fine.name, input=x, **plain).double(), run("w4a8-mxfp4-flashinfer-512", input=x).double()
    assert 0.005 < (rounded - exact).norm() / exact.norm() < 0.06


def test_gpt_oss_checkpoint_order():
    """Rows that alternate gate and up, reordered, give what [up; gate] gives."""
    fc1 = SAMPLES["bf16-1"].args[3]
    checkpoint = torch.empty_like(fc1)
    checkpoint[:, 0::2], checkpoint[:, 1::2] = fc1[:, INTER:], fc1[:, :INTER]
    reordered = reorder_gate_up(checkpoint, "alternating_gate_up", "up_gate")
    assert_same_bytes(run("bf16-1", fc1_expert_weights=reordered), run("bf16-1"))


@pytest.mark.parametrize("name", ["w4a4-nvfp4", "mxfp4-mxfp8"])
def test_quantising_the_input_outside_changes_nothing(name):
    # Beyond the dtype that the activation is rounded to, which follows the input or the output: both bfloat16 here.
    assert_same_bytes(run(f"{name}-quantized-input"), run(name))


def test_expert_parallel_ranks_add_up():
    x, (ids, scales) = values(0, 9, HIDDEN), routing(9, 2 * EXPERTS)
    fc1, fc2 = values(1, 2 * EXPERTS, 2 * INTER, HIDDEN, scale=0.1), values(2, 2 * EXPERTS, HIDDEN, INTER, scale=0.1)
    bias = values(3, 2 * EXPERTS, HIDDEN)
    arguments = (x, ids, scales)
    whole = cutlass_fused_moe(*arguments, fc1, fc2, torch.float32, [], None, bias)
    parts = [
        cutlass_fused_moe(*arguments, fc1[h], fc2[h], torch.float32, [], None, bias[h], ep_size=2, ep_rank=rank)
        for rank, h in enumerate((slice(0, EXPERTS), slice(EXPERTS, None)))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=0, atol=1e-5)
    foreign = cutlass_fused_moe(
        x, torch.zeros_like(ids), scales, fc1[:EXPERTS], fc2[:EXPERTS], torch.float32, [], ep_size=2, ep_rank=1
    )
    assert (foreign == 0).all()


def test_tensor_parallel_ranks_add_up():
    x, route = values(0, 9, HIDDEN).float(), routing(9)
    fc1, fc2 = values(1, EXPERTS, 2 * INTER, HIDDEN, scale=0.1).float(), values(2, EXPERTS, HIDDEN, INTER).float()
    bias = values(3, EXPERTS, HIDDEN)
    whole = cutlass_fused_moe(x, *route, fc1, fc2, torch.float32, [], None, bias)
    half = INTER // 2
    up, gate = fc1.chunk(2, dim=1)
    parts = [
        cutlass_fused_moe(
            x,
            *route,
            torch.cat([up[:, s], gate[:, s]], dim=1),
            fc2[:, :, s].contiguous(),
            torch.float32,
            [],
            None,
            bias,
            tp_size=2,
            tp_rank=rank,
        )
        for rank, s in enumerate((slice(0, half), slice(half, None)))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=0, atol=1e-4)


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.integers(0, 20), st.sampled_from(sorted(n for n in SAMPLES if n[-4:] != "-512")))
def test_within_the_oracle_s_bound(seed, tokens, name):
    sample = SAMPLES[name]
    if sample.kwargs.get("ep_size", 1) > 1 or sample.args[0].dtype not in (BF16, torch.float16):
        return
    args = (values(seed, tokens, HIDDEN, dtype=sample.args[0].dtype), *routing(tokens), *sample.args[3:])
    assert_close(cutlass_fused_moe(*args, **sample.kwargs), *args, **sample.kwargs)


@pytest.mark.parametrize("name", ["bf16-bias-swiglu", "w4a16-mxfp4-linear", "w4a4-nvfp4", "mxfp4-mxfp8"])
def test_the_oracle_notices_what_is_wrong(name):
    sample = SAMPLES[name]
    out = cutlass_fused_moe(*sample.args, **sample.kwargs)
    x, ids, scales, fc1, *rest = sample.args
    swapped = torch.cat([fc1[:, INTER:], fc1[:, :INTER]], dim=1)
    for wrong in ((x, ids, scales, swapped), (x, ids.roll(1, 0), scales, fc1), (x, ids, scales * 1.02, fc1)):
        with pytest.raises(AssertionError, match="where the bound is"):
            assert_close(out, *wrong, *rest, **sample.kwargs)


def test_the_gpu_form_of_the_reference_agrees(monkeypatch):
    """On a GPU the reference computes every row with every expert, so as not to look at the routing."""
    from torch_fp4ops.ops.cutlass_fused_moe import _reference

    for name in ("bf16-bias-swiglu", "w4a4-nvfp4", "bf16-ep-rank1"):
        wanted = run(name)
        with monkeypatch.context() as patch:
            patch.setattr(_reference, "_may_look_at_data", lambda x: False)
            torch.testing.assert_close(run(name), wanted, rtol=2.0**-7, atol=1e-3)


X, ROUTE = values(5, 5, HIDDEN), routing(5)
NAMES = list(cutlass_fused_moe.signature.parameters)
BASE = dict(zip(NAMES, SAMPLES["bf16-1"].args, strict=False)) | {
    "input": X,
    "token_selected_experts": ROUTE[0],
    "token_final_scales": ROUTE[1],
}
FC1, FC2 = BASE["fc1_expert_weights"], BASE["fc2_expert_weights"]
W1, S1, _ = weights(2 * INTER, HIDDEN, MXFP4, 6)
W4A8 = dict(zip(NAMES, SAMPLES["w4a8-mxfp4-flashinfer-512"].args, strict=False)) | {
    "use_w4_group_scaling": True,
    "use_wfp4afp8_humming": True,
}
MX = dict(zip(NAMES, SAMPLES["w4a16-mxfp4-linear"].args, strict=False)) | SAMPLES["w4a16-mxfp4-linear"].kwargs
W4A4 = dict(zip(NAMES, SAMPLES["w4a4-nvfp4"].args, strict=False)) | SAMPLES["w4a4-nvfp4"].kwargs


def replaced(scales, i, new):
    return [*scales[:i], new, *scales[i + 1 :]]


@pytest.mark.parametrize(
    ("valid", "change", "message"),
    [
        (BASE, {"input": X.double()}, r"input is torch.float64"),
        (BASE, {"use_wfp4afp8_humming": True}, r"use_wfp4afp8_humming is True; allowed: False with 0 quant_scales"),
        (W4A8, {"use_wfp4afp8_humming": False}, r"use_wfp4afp8_humming is False; allowed: True with 5"),
        (W4A8, {"weight_layout": "linear"}, r"weight_layout is 'linear' in mode w4a8.*'sm90_interleaved_fp8'"),
        (BASE, {"input": X[0]}, r"input is of shape \(128,\); allowed: 2 dimensions"),
        (BASE, {"input": X[:, :64]}, r"input is of shape \(5, 64\); allowed: \(tokens, 128\)"),
        (BASE, {"fc1_expert_weights": FC1[0]}, r"fc1_expert_weights is of shape .*allowed: 3 dimensions"),
        (BASE, {"fc1_expert_weights": FC1.mT}, r"fc1_expert_weights is of strides .*allowed: contiguous"),
        (BASE, {"fc1_expert_weights": FC1[:, :128].contiguous()}, r"fc1_expert_weights is of shape .*\(3, 256, 128\)"),
        (BASE, {"fc2_expert_weights": FC2.half()}, r"fc2_expert_weights is torch.float16; allowed: torch.bfloat16"),
        (BASE, {"fc2_expert_weights": FC2[:2]}, r"fc2_expert_weights is of shape \(2, 128, 128\); allowed: shape \(3"),
        (BASE, {"fc1_expert_weights": FC1.int()}, r"quant_scales is 0 tensors for torch.int32 weights"),
        (BASE, {"quant_scales": [X]}, r"quant_scales is 1 tensors for torch.bfloat16 weights.*float weights: none"),
        (BASE, {"output_dtype": torch.int8}, r"output_dtype is torch.int8"),
        (BASE, {"activation_type": 9}, r"activation_type is 9; allowed: one of \[0, 1, 2, 3, 4, 5, 6, 7\]"),
        (BASE, {"weight_layout": "nz"}, r"weight_layout is 'nz'; allowed: 'flashinfer' or 'linear'"),
        (BASE, {"token_selected_experts": ROUTE[0].float()}, r"token_selected_experts is torch.float32"),
        (
            BASE,
            {"token_selected_experts": ROUTE[0][:4]},
            r"token_selected_experts is of shape \(4, 2\); .*\(5, top_k\)",
        ),
        (BASE, {"token_selected_experts": ROUTE[0][0]}, r"token_selected_experts is of shape \(2,\); .*2 dimensions"),
        (BASE, {"token_final_scales": ROUTE[1].half()}, r"token_final_scales is torch.float16"),
        (
            BASE,
            {"token_final_scales": ROUTE[1][:, :1]},
            r"token_final_scales is of shape \(5, 1\); .*\(5, 2\), that of",
        ),
        (BASE, {"ep_rank": 1}, r"ep_rank is 1; allowed: 0 to 0"),
        (BASE, {"ep_size": 0}, r"ep_size is 0; allowed: 1 or more"),
        (BASE, {"tp_size": 2, "tp_rank": 2}, r"tp_rank is 2; allowed: 0 to 1"),
        (BASE, {"fc1_expert_biases": torch.ones(3, 128)}, r"fc1_expert_biases is of shape \(3, 128\); .*\(3, 256\)"),
        (BASE, {"fc2_expert_biases": torch.ones(3, 128).int()}, r"fc2_expert_biases is torch.int32"),
        (BASE, {"swiglu_alpha": torch.ones(2)}, r"swiglu_alpha is of shape \(2,\); allowed: shape \(3,\)"),
        (BASE, {"swiglu_limit": torch.ones(3).half()}, r"swiglu_limit is torch.float16; allowed: torch.float32"),
        (BASE, {"input_sf": torch.ones(8)}, r"input_sf is given; allowed: None for an input of floats"),
        (MX, {"quant_scales": [S1]}, r"quant_scales is 1 tensors for torch.uint8 weights, use_w4_group_scaling=True"),
        (
            MX,
            {"quant_scales": [S1.float(), S1]},
            r"quant_scales\[0\] \(fc1_scales\) is torch.float32; allowed: .*uint8",
        ),
        (
            MX,
            {"quant_scales": [S1[:, :4], S1]},
            r"quant_scales\[0\] \(fc1_scales\) is .*strides|is of shape \(3, 4, 4\)",
        ),
        (MX, {"weight_layout": "flashinfer"}, r"quant_scales\[0\] \(fc1_scales\) is of shape .*\(3, 4, 1, 16, 16\)"),
        (MX, {"input": X.to(torch.float8_e4m3fn)}, r"input is torch.float8_e4m3fn"),
        (W4A4, {"weight_layout": "sm90_interleaved"}, r"weight_layout is 'sm90_interleaved' in mode w4a4_nvfp4"),
        (W4A4, {"input": torch.zeros(5, 64).byte()}, r"input_sf is None; allowed: the block scales of a quantised"),
        (
            W4A4,
            {"quant_scales": replaced(W4A4["quant_scales"], 2, torch.ones(2))},
            r"quant_scales\[2\] \(fc1_global\) is of shape \(2,\); allowed: shape \(3,\)",
        ),
        (
            W4A4,
            {"quant_scales": replaced(W4A4["quant_scales"], 0, torch.ones(2))},
            r"quant_scales\[0\] \(fc1_act_global\) is of shape \(2,\); allowed: shape \(3,\), or one element",
        ),
        (
            W4A4,
            {"quant_scales": replaced(W4A4["quant_scales"], 5, torch.ones(3).half())},
            r"quant_scales\[5\] \(fc2_global\) is torch.float16; allowed: torch.float32",
        ),
    ],
)
def test_rejects(valid, change, message):
    assert_rejected_by_contract(cutlass_fused_moe, valid, change, message)


def test_w4a16_nvfp4_has_no_layout_of_flashinfer_s():
    with pytest.raises(
        ValueError, match=r"weight_layout is 'flashinfer' in mode w4a16_nvfp4; allowed: 'linear' or '128x4'"
    ):
        run("w4a16-nvfp4", weight_layout="flashinfer")


@pytest.mark.parametrize("expert", [-1, 3, 1000])
def test_rejects_expert_ids_out_of_range(expert):
    ids = ROUTE[0].clone()
    ids[2, 1] = expert
    change = {"token_selected_experts": ids}
    assert_rejected(cutlass_fused_moe, BASE, change, r"token_selected_experts is between .*; allowed: 0 to 2")


@pytest.mark.parametrize("scale", [0.0, 2.0**-128])
def test_rejects_a_global_scale_of_zero_or_without_a_finite_reciprocal(scale):
    change = {"quant_scales": replaced(W4A4["quant_scales"], 0, torch.tensor(scale))}
    assert_rejected(cutlass_fused_moe, W4A4, change, r"quant_scales\[0\] \(fc1_act_global\) is .*; allowed: finite")
