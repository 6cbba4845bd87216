"""The modes of cutlass_fused_moe: which weights, activations and ``quant_scales`` each has, and how to read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import scale_layouts
from ...contracts import Call
from ...formats import MXFP4, MXFP8, NVFP4, BlockFormat
from ...weight_layouts import (
    deinterleave_moe_scales_for_sm90_mixed_gemm,
    deinterleave_moe_weights_for_sm90_mixed_gemm,
)


@dataclass(frozen=True)
class Mode:
    """A combination of weight and activation formats; ``scales`` names the entries of ``quant_scales``."""

    name: str
    weights: BlockFormat | None
    activations: BlockFormat | None
    scales: tuple[str, ...]
    flashinfer_layout: str | None
    e4m3_rows: bool = False
    """Whether activations are rounded to E4M3 with one scale a row, from the row's largest magnitude."""


UNQUANTIZED = Mode("bf16", None, None, (), "linear")
W4A16_MXFP4 = Mode("w4a16_mxfp4", MXFP4, None, ("fc1_scales", "fc2_scales"), "sm90_interleaved")
W4A8_MXFP4 = Mode(
    "w4a8_mxfp4",
    MXFP4,
    None,
    ("fc1_scales", "fc1_global", "fc2_act_global", "fc2_scales", "fc2_global"),
    "sm90_interleaved_fp8",
    e4m3_rows=True,
)
W4A16_NVFP4 = Mode("w4a16_nvfp4", NVFP4, None, ("fc1_scales", "fc1_global", "fc2_scales", "fc2_global"), None)
W4A4_NVFP4 = Mode(
    "w4a4_nvfp4",
    NVFP4,
    NVFP4,
    ("fc1_act_global", "fc1_scales", "fc1_global", "fc2_act_global", "fc2_scales", "fc2_global"),
    "128x4",
)
W4A8_MXFP4_MXFP8 = Mode(
    "w4a8_mxfp4_mxfp8", MXFP4, MXFP8, ("fc1_scales", "fc1_global", "fc2_scales", "fc2_global"), "128x4"
)

SM90_LAYOUTS = {"sm90_interleaved": "fp4", "sm90_interleaved_fp8": "fp4_fp8"}
"""Layouts of the SM90 mixed-input GEMM, and the type of their interleave."""
LAYOUTS = ("flashinfer", "linear", "128x4", *SM90_LAYOUTS)

_OFFSET_OF_ONE = 127 - 6
"""The W4A8 kernels take scales as offsets: ``2^(offset - 6)``, the fixed 6 being part of the factor [E]."""


def find_mode(
    weight_dtype: torch.dtype, n_scales: int, use_w4_group_scaling: bool, use_mxfp8_act_scaling: bool
) -> Mode | None:
    """The mode that these arguments of a call mean; None if they mean none."""
    flags = (use_w4_group_scaling, use_mxfp8_act_scaling)
    candidates = {(False, False): (W4A4_NVFP4,), (True, False): (W4A16_MXFP4, W4A16_NVFP4, W4A8_MXFP4)}
    candidates[(False, True)] = (W4A8_MXFP4_MXFP8,)
    if weight_dtype.is_floating_point:
        return UNQUANTIZED if flags == (False, False) and n_scales == 0 else None
    if weight_dtype not in (torch.uint8, torch.int64):
        return None
    for mode in candidates.get(flags, ()):
        if len(mode.scales) == n_scales:
            return mode
    return None


def resolve_layout(mode: Mode, weight_layout: str) -> str | None:
    return mode.flashinfer_layout if weight_layout == "flashinfer" else weight_layout


def layouts_of(mode: Mode) -> tuple[str, ...]:
    """The layouts that a mode's weights may have."""
    if mode is W4A8_MXFP4:
        return ("sm90_interleaved_fp8",)
    return ("linear", "128x4", *(("sm90_interleaved",) if mode is W4A16_MXFP4 else ()))


def packed(weights: Tensor) -> Tensor:
    """FP4 weights as bytes; FlashInfer passes them viewed as int64."""
    return weights.view(torch.uint8) if weights.dtype == torch.int64 else weights


def scale_bytes(scales: Tensor) -> Tensor:
    """Block scales as bytes; FlashInfer passes them four to an int32."""
    return scales.view(torch.uint8) if scales.dtype == torch.int32 else scales


def require_scales(call: Call, mode: Mode, layout: str, name: str, experts: int, rows: int, cols: int) -> None:
    """Check the entry ``name`` of ``quant_scales``: the block scales of ``[experts, rows, cols]``, whatever layout."""
    t = call.quant_scales[mode.scales.index(name)]
    argument = f"quant_scales[{mode.scales.index(name)}] ({name})"
    dtypes = (torch.uint8, torch.int32)
    call.require(t.dtype in dtypes, argument, t.dtype, "torch.uint8, or torch.int32 with four scales each")
    call.require(t.is_contiguous(), argument, f"of strides {tuple(t.stride())}", "contiguous")
    if layout in SM90_LAYOUTS:
        shape: tuple[int, ...] = (experts, rows // 64, cols // 4, 16, 16)
    elif layout == "128x4":
        shape = (experts, *scale_layouts.scale_shape(rows, cols, layout))
    else:
        shape = (experts, rows, cols)
    if t.dtype == torch.int32:
        shape = (*shape[:-1], shape[-1] // 4)
    wanted = f"shape {shape} as weight_layout={call.weight_layout!r} has it"
    call.require(tuple(t.shape) == shape, argument, t.shape, wanted)


def linear_weights(weights: Tensor, layout: str) -> Tensor:
    """Packed weights ``[E, rows, K/2]`` in plain order, from any layout."""
    weights = packed(weights)
    if layout in SM90_LAYOUTS:
        return deinterleave_moe_weights_for_sm90_mixed_gemm(weights, SM90_LAYOUTS[layout])
    return weights


def linear_scales(scales: Tensor, rows: int, cols: int, layout: str) -> Tensor:
    """Block scales ``[E, rows, cols]`` in plain order, from any layout."""
    scales = scale_bytes(scales)
    if layout in SM90_LAYOUTS:
        linear = deinterleave_moe_scales_for_sm90_mixed_gemm(scales)
        return linear + _OFFSET_OF_ONE if layout == "sm90_interleaved_fp8" else linear
    return scale_layouts.unswizzle(scales, rows, cols, layout)


def round_rows_to_e4m3(x: Tensor) -> Tensor:
    """fp32 rows rounded to E4M3 under the scale ``amax / 448`` of each, and back."""
    scale = x.abs().amax(-1, keepdim=True) / 448.0
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * scale


@dataclass(frozen=True)
class Activation:
    """What lies between the two GEMMs. Gated ones take halves (up, gate) of fc1's output."""

    name: str
    gated: bool
    apply: Callable[..., Tensor]


def _swiglu(up: Tensor, gate: Tensor, alpha: float | Tensor, beta: float | Tensor, limit: Tensor) -> Tensor:
    gate = torch.minimum(gate, limit)
    up = torch.maximum(torch.minimum(up, limit), -limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


def _swiglu_step(up: Tensor, gate: Tensor, limit: Tensor) -> Tensor:
    return torch.minimum(F.silu(gate), limit) * torch.maximum(torch.minimum(up, limit), -limit)


ACTIVATIONS = {
    0: Activation("Gelu", False, F.gelu),
    1: Activation("Relu", False, F.relu),
    2: Activation("Silu", False, F.silu),
    3: Activation("Swiglu", True, _swiglu),
    4: Activation("Geglu", True, lambda up, gate: F.gelu(gate) * up),
    5: Activation("SwigluBias", True, _swiglu),
    6: Activation("Relu2", False, lambda x: F.relu(x).square()),
    7: Activation("SwigluStep", True, _swiglu_step),
}
"""By the number of FlashInfer's ``ActivationType``."""


def activate(
    activation_type: int,
    hidden: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    limit: Tensor | None,
) -> Tensor:
    """Apply an activation to fc1's fp32 output ``[rows, 2I or I]``; the three are one expert's parameters, 0-D."""
    activation = ACTIVATIONS[activation_type]
    if not activation.gated:
        return activation.apply(hidden)
    up, gate = hidden.chunk(2, dim=-1)
    if activation.apply is _swiglu:
        unlimited = hidden.new_full((), float("inf")) if limit is None else limit
        return _swiglu(up, gate, 1.0 if alpha is None else alpha, 0.0 if beta is None else beta, unlimited)
    if activation.apply is _swiglu_step:
        # 7.0 is FlashInfer's default for this variant.
        return _swiglu_step(up, gate, hidden.new_full((), 7.0) if limit is None else limit)
    return activation.apply(up, gate)
