"""cutlass_fused_moe by FlashInfer: W4A16 and W4A8 MXFP4 on 9.0; W4A4 NVFP4 and MXFP4 x MXFP8 from 10.0 on; bf16 on all.

Tactics are FlashInfer's default ones; see the known defects for why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...contracts import Call
from ...formats import MXFP8
from .. import _flashinfer
from . import _modes, cutlass_fused_moe

_ARCHITECTURES = (90, 100, 103, 107, 110, 120, 121)
_KERNEL = _flashinfer.Kernel(
    "cutlass_fused_moe",
    _ARCHITECTURES,
    modules={90: "fused_moe_90", 100: "fused_moe_100", 103: "fused_moe_103", 120: "fused_moe_120", 121: "fused_moe_120"}
    | dict.fromkeys((107, 110), "fused_moe_100"),
)
KERNELS = {"flashinfer": _KERNEL, "cutlass": _KERNEL}


def _mode(call: Call) -> _modes.Mode:
    flags = (call.use_w4_group_scaling, call.use_mxfp8_act_scaling)
    mode = _modes.find_mode(call.fc1_expert_weights.dtype, len(call.quant_scales), *flags)
    assert mode is not None
    return mode


def _unsupported(call: Call, name: str) -> str | None:
    mode, capability = _mode(call), _flashinfer.capability_of(call.device)
    if mode.flashinfer_layout is None:
        return f"FlashInfer's cutlass_fused_moe has no mode {mode.name}"
    if mode.weights is not None and (mode.activations is None) is not (capability == 90):
        return f"FlashInfer's {mode.name} is for compute capability {'9.0' if mode.activations is None else '10.0 on'}"
    if mode is _modes.W4A8_MXFP4 and not _flashinfer.accepted("cutlass_fused_moe", use_wfp4afp8_humming=True):
        return "this version of FlashInfer has no W4A8 MXFP4 (use_wfp4afp8_humming)"
    if _modes.resolve_layout(mode, call.weight_layout) != mode.flashinfer_layout:
        return f"FlashInfer reads weight_layout {mode.flashinfer_layout!r} in mode {mode.name}"
    if not call.input.numel():
        return "FlashInfer's kernels need a row"
    if mode.weights is None:
        if not call.input.dtype == call.fc1_expert_weights.dtype == call.output_dtype:
            return "FlashInfer wants one dtype for input, weights and output"
    elif mode.activations is None and (call.input.dtype, call.output_dtype) != (torch.bfloat16, torch.bfloat16):
        return "FlashInfer's W4A16 and W4A8 take and give bfloat16"
    if call.input.dtype == torch.float32 or call.output_dtype == torch.float32:
        return "FlashInfer takes and gives bfloat16 and float16, not float32"
    if mode.activations is MXFP8 and call.input_sf is None:
        return "FlashInfer wants the input quantised to MXFP8 already"
    if _modes.ACTIVATIONS[call.activation_type].name not in _activations():
        return f"this version of FlashInfer has no activation {_modes.ACTIVATIONS[call.activation_type].name}"
    if (call.fc1_expert_biases is None) is not (call.fc2_expert_biases is None):
        return "FlashInfer takes biases of both products or of none"
    hidden, inter = call.fc2_expert_weights.shape[1], _inter(call)
    # Of 16-bit weights 256 bits, what one of the epilogues writes at once.
    multiple = {_modes.UNQUANTIZED: 16, _modes.W4A4_NVFP4: 64}.get(mode, 128)
    if hidden % multiple or inter % multiple:
        return f"FlashInfer's {mode.name} needs hidden and inter in multiples of {multiple}"
    return None


def _activations() -> Mapping[str, Any]:
    """FlashInfer's by name: the numbers have changed between versions."""
    from flashinfer import ActivationType

    members: Mapping[str, Any] = ActivationType.__members__
    return members


def _inter(call: Call) -> int:
    weights = call.fc2_expert_weights
    return int(weights.shape[2]) * {torch.int64: 16, torch.uint8: 2}.get(weights.dtype, 1)


@_flashinfer.adapter(cutlass_fused_moe, KERNELS, _unsupported, exact=False, part=lambda call: _mode(call).name)
def cutlass_fused_moe_flashinfer(
    input: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor,
    fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor,
    output_dtype: torch.dtype,
    quant_scales: list[Tensor],
    fc1_expert_biases: Tensor | None = None,
    fc2_expert_biases: Tensor | None = None,
    input_sf: Tensor | None = None,
    swiglu_alpha: Tensor | None = None,
    swiglu_beta: Tensor | None = None,
    swiglu_limit: Tensor | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    *,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    use_wfp4afp8_humming: bool = False,
    activation_type: int = 3,
    swizzled_input_sf: bool = True,
    weight_layout: str = "flashinfer",
    backend: str = "auto",
) -> Tensor:
    flags = (use_w4_group_scaling, use_mxfp8_act_scaling)
    mode = _modes.find_mode(fc1_expert_weights.dtype, len(quant_scales), *flags)
    assert mode is not None
    # FlashInfer tells the modes apart by the dtype that payload is viewed as: bytes for W4A16, int64 for other codes.
    payload = fc1_expert_weights.dtype
    if mode.weights is not None:
        payload = torch.uint8 if use_w4_group_scaling else torch.int64
    activation = _modes.ACTIVATIONS[activation_type].name
    # Some versions take any of these for a wish for Swiglu, whatever the activation; one without a use is left out.
    if activation not in ("Swiglu", "SwigluBias"):
        swiglu_alpha = swiglu_beta = None
        swiglu_limit = swiglu_limit if activation == "SwigluStep" else None
    outputs: list[Tensor] = _flashinfer.function("cutlass_fused_moe")(
        input=input.contiguous(),
        token_selected_experts=token_selected_experts.int().contiguous(),  # it checks no strides
        token_final_scales=token_final_scales.contiguous(),
        fc1_expert_weights=fc1_expert_weights.view(payload),
        fc2_expert_weights=fc2_expert_weights.view(payload),
        output_dtype=output_dtype,
        quant_scales=[_scale(name, t) for name, t in zip(mode.scales, quant_scales, strict=True)],
        fc1_expert_biases=_bias(fc1_expert_biases, output_dtype),
        fc2_expert_biases=_bias(fc2_expert_biases, output_dtype),
        input_sf=input_sf,
        swiglu_alpha=_dense(swiglu_alpha),
        swiglu_beta=_dense(swiglu_beta),
        swiglu_limit=_dense(swiglu_limit),
        tp_size=tp_size,
        tp_rank=tp_rank,
        ep_size=ep_size,
        ep_rank=ep_rank,
        use_w4_group_scaling=use_w4_group_scaling,
        use_mxfp8_act_scaling=use_mxfp8_act_scaling,
        activation_type=_activations()[activation],
        swizzled_input_sf=swizzled_input_sf,
        # Sums a token's experts in a fixed order, in fp32; the fused way adds rounded parts in any order.
        **_flashinfer.accepted(
            "cutlass_fused_moe", use_fused_finalize=False, use_wfp4afp8_humming=use_wfp4afp8_humming
        ),
    )
    return outputs[0]  # the others are for its mode of minimal latency


def _scale(name: str, t: Tensor) -> Tensor:
    """Block scales four to an int32. To FlashInfer an activation scale without a dimension is for all experts."""
    if t.dtype == torch.uint8:
        return t.view(torch.int32)
    return t.reshape(()) if name.endswith("_act_global") and t.numel() == 1 else t.contiguous()


def _dense(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()


def _bias(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None else t.to(dtype).contiguous()
