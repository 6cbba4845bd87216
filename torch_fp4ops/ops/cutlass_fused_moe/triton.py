"""cutlass_fused_moe in Triton: any GPU from compute capability 8.0, ROCm included.

Rows are sorted by expert on the GPU, two grouped products decode the weights as they go, and a token's rows are
summed in a fixed order. Nothing synchronises and sizes depend on shapes alone, so calls can be captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import scale_layouts
from ...contracts import Call
from ...formats import BlockFormat
from .._triton_gemm_launch import (
    PLAIN,
    Config,
    Grouping,
    Operand,
    architecture,
    configuration,
    matmul,
    multiplied_as,
)
from .._triton_gemm_offline import MatmulCase, matmul_cases
from .._triton_launch import why_not
from .._triton_quantize import quantize_rows
from . import _modes, cutlass_fused_moe
from ._triton_kernels import Routing, combine, route, scales_by_row, swiglu

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_SWIGLU_STEP = 7
_SWIGLU = (3, 5, _SWIGLU_STEP)
"""Numbers of FlashInfer's ``ActivationType`` that have a kernel; the others are torch's."""


def _unsupported(call: Call) -> str | None:
    reason = why_not(call)
    if reason is not None:
        return reason
    weights = call.fc1_expert_weights
    mode = _modes.find_mode(
        weights.dtype, len(call.quant_scales), call.use_w4_group_scaling, call.use_mxfp8_act_scaling
    )
    assert mode is not None
    layout = _modes.resolve_layout(mode, call.weight_layout)
    if layout in _modes.SM90_LAYOUTS:
        return f"the kernels read plain rows: weight_layout 'linear' or '128x4', not {layout!r}"
    if mode.activations is None and call.input.dtype not in _SIXTEEN_BITS:
        return f"the kernels multiply activations of bfloat16 or float16, not {call.input.dtype}"
    if mode.weights is None:
        if weights.dtype != call.input.dtype:
            return f"input and weights of {call.input.dtype} and {weights.dtype}: the kernels need one dtype"
        if weights.shape[2] % 16 or call.fc2_expert_weights.shape[2] % 16:
            return "the kernels need hidden and inter to be multiples of 16"
    return None


@cutlass_fused_moe.backend("triton", unsupported=_unsupported, replayable=True)
def cutlass_fused_moe_triton(
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
    mode = _modes.find_mode(fc1_expert_weights.dtype, len(quant_scales), use_w4_group_scaling, use_mxfp8_act_scaling)
    assert mode is not None
    layout = _modes.resolve_layout(mode, weight_layout)
    assert layout is not None
    tokens, top_k = token_selected_experts.shape
    experts, hidden = fc2_expert_weights.shape[:2]
    out = input.new_empty((tokens, hidden), dtype=output_dtype)
    rows = tokens * top_k
    if not rows or not hidden or not experts:
        return out.zero_()
    scales: dict[str, Tensor] = dict(zip(mode.scales, quant_scales, strict=True))
    between = input.dtype if input_sf is None else output_dtype
    fc1 = _weights(fc1_expert_weights, scales.get("fc1_scales"), mode.weights, layout)
    fc2 = _weights(fc2_expert_weights, scales.get("fc2_scales"), mode.weights, layout)

    a_format = mode.activations.name if mode.activations else PLAIN
    dtype = multiplied_as(Operand(input, a_format), fc1)
    # Experts share the rows about evenly, as far as one can know without looking.
    rows_an_expert = -(-rows // (experts * ep_size))
    config = configuration(architecture(input.device), rows_an_expert, a_format, fc1.format, dtype)
    first = ep_rank * experts
    routing = route(token_selected_experts, first, experts, config.BM)

    # Input that comes quantised has no use for a scale.
    encode = (scales.get("fc1_act_global") if input_sf is None else None, scales.get("fc2_act_global"))
    fc1_encode, fc2_encode = scales_by_row(token_selected_experts, first, experts, *encode)
    if input_sf is not None:
        sf_layout = scale_layouts.layout_from_flags(swizzled_input_sf, False)
        x, share = Operand.of(mode.activations, input, input_sf, sf_layout), top_k
    else:
        x, share = _activations(input, mode.activations, fc1_encode, top_k)
    up_gate = input.new_empty((rows, fc1.elements.shape[1]), dtype=torch.float32)
    if activation_type not in _SWIGLU:
        up_gate.zero_()  # torch's functions see the rows of foreign experts too
    _grouped(x, fc1, routing, share, scales.get("fc1_global"), fc1_expert_biases, config, up_gate)
    parameters = (swiglu_alpha, swiglu_beta, swiglu_limit)
    if activation_type in _SWIGLU:
        activated = input.new_empty((rows, fc2.k), dtype=between)
        step = activation_type == _SWIGLU_STEP
        swiglu(up_gate, token_selected_experts, *parameters, activated, first, experts, step)
    else:  # these have no parameters
        activated = _modes.activate(activation_type, up_gate, None, None, None).to(between)
    del up_gate
    h, _ = _activations(activated, mode.activations, fc2_encode, 1)
    bias = fc2_expert_biases if tp_rank == 0 else None
    y = input.new_empty((rows, hidden), dtype=torch.float32)
    _grouped(h, fc2, routing, 1, scales.get("fc2_global"), bias, config, y)
    combine(y, token_selected_experts, token_final_scales, out, first, experts)
    return out


def _weights(weights: Tensor, scales: Tensor | None, fmt: BlockFormat | None, layout: str) -> Operand:
    if scales is None:
        return Operand(weights)
    return Operand.of(fmt, _modes.packed(weights), _modes.scale_bytes(scales), layout)


def _activations(x: Tensor, fmt: BlockFormat | None, encode: Tensor | None, top_k: int) -> tuple[Operand, int]:
    """Rows as the product takes them, quantised where the mode says so, and how many routed rows share each."""
    if fmt is None:
        return Operand(x), top_k
    if encode is not None and encode.numel() > 1 and top_k > 1:  # routed rows are quantised each for itself
        x = x.repeat_interleave(top_k, 0)
        top_k = 1
    codes = x.new_empty((x.shape[0], x.shape[1] // fmt.elements_per_byte), dtype=torch.uint8)
    scales = x.new_empty((x.shape[0], x.shape[1] // fmt.block_size), dtype=torch.uint8)
    quantize_rows(x, fmt, scale_layouts.LINEAR, encode, False, codes, scales)
    return Operand.of(fmt, codes, scales, scale_layouts.LINEAR), top_k


def _grouped(
    a: Operand,
    b: Operand,
    routing: Routing,
    share: int,
    alpha: Tensor | None,
    bias: Tensor | None,
    config: Config,
    out: Tensor,
) -> None:
    """The fp32 product of every routed row with its expert's weights. Rows of foreign experts stay unwritten."""
    alpha, bias = (None if t is None else t.contiguous() for t in (alpha, bias))
    matmul(a, b, out, grouping=Grouping(routing.schedule, routing.order, share, alpha, bias), config=config)


def offline_cases() -> Iterator[MatmulCase]:
    bf16: Any = torch.bfloat16
    for layout in (scale_layouts.LINEAR, scale_layouts.SWIZZLED_128X4):
        operands = [(PLAIN, "mxfp4", bf16), (PLAIN, "nvfp4", bf16)]
        if layout == scale_layouts.LINEAR:
            operands.append((PLAIN, PLAIN, bf16))
        else:
            operands += [("nvfp4", "nvfp4", bf16), ("mxfp8", "mxfp4", bf16)]
        yield from matmul_cases(operands, layout, grouped=True)
