"""The reference body of cutlass_fused_moe: one expert after the other, all of its rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import scale_layouts
from ...block_quantization import dequantize_blocks, quantize_mx, quantize_nvfp4
from ...formats import MXFP8, NVFP4
from . import _modes


class _Layer:
    """One of the two GEMMs: its weights in any layout, dequantised an expert at a time."""

    def __init__(self, weights: Tensor, scales: dict[str, Tensor], prefix: str, mode: _modes.Mode, layout: str):
        self.mode = mode
        self.block_scales = None
        if mode.weights:
            weights = _modes.linear_weights(weights, layout)
            blocks = weights.shape[2] * 2 // mode.weights.block_size
            block_scales = scales[f"{prefix}_scales"]
            self.block_scales = _modes.linear_scales(block_scales, weights.shape[1], blocks, layout)
        self.weights = weights
        self.alpha = scales.get(f"{prefix}_global")
        self.activation_scale = scales.get(f"{prefix}_act_global")

    def quantize(self, x: Tensor, expert: int) -> Tensor:
        """x as the GEMM sees it: through the activation format and back, less the global scale (alpha has it)."""
        if self.mode.activations is NVFP4:
            assert self.activation_scale is not None
            encode = self.activation_scale.reshape(-1)
            encode = encode[expert if len(encode) > 1 else 0]
            return dequantize_blocks(*quantize_nvfp4(x, encode, 1.0 / encode), NVFP4)
        if self.mode.activations is MXFP8:
            return dequantize_blocks(*quantize_mx(x, MXFP8), MXFP8)
        return _modes.round_rows_to_e4m3(x.float()) if self.mode.e4m3_rows else x.float()

    def __call__(self, x: Tensor, expert: int, bias: Tensor | None) -> Tensor:
        weight = self.weights[expert]
        if self.block_scales is not None:
            assert self.mode.weights is not None
            weight = dequantize_blocks(weight, self.block_scales[expert], self.mode.weights)
        out = x @ weight.float().T
        if self.alpha is not None:
            out = out * self.alpha[expert]
        return out if bias is None else out + bias[expert].float()


def fused_moe(
    x: Tensor,
    expert_ids: Tensor,
    final_scales: Tensor,
    fc1_weights: Tensor,
    fc2_weights: Tensor,
    output_dtype: torch.dtype,
    quant_scales: list[Tensor],
    fc1_bias: Tensor | None,
    fc2_bias: Tensor | None,
    input_sf: Tensor | None,
    swiglu: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    add_fc2_bias: bool,
    first_expert: int,
    flags: tuple[bool, bool],
    activation_type: int,
    swizzled_input_sf: bool,
    weight_layout: str,
) -> Tensor:
    mode = _modes.find_mode(fc1_weights.dtype, len(quant_scales), *flags)
    assert mode is not None
    layout = _modes.resolve_layout(mode, weight_layout)
    assert layout is not None
    scales = dict(zip(mode.scales, quant_scales, strict=True))
    fc1 = _Layer(fc1_weights, scales, "fc1", mode, layout)
    fc2 = _Layer(fc2_weights, scales, "fc2", mode, layout)
    between = x.dtype if input_sf is None else output_dtype
    if input_sf is not None:
        assert mode.activations is not None
        fmt = mode.activations
        blocks = x.shape[1] * fmt.elements_per_byte // fmt.block_size
        sf_layout = scale_layouts.layout_from_flags(swizzled_input_sf, False)
        x = dequantize_blocks(x, scale_layouts.unswizzle(input_sf, x.shape[0], blocks, sf_layout), fmt)

    out = torch.zeros(x.shape[0], fc2.weights.shape[1], dtype=torch.float32, device=x.device)
    for expert in range(fc1.weights.shape[0]):
        selected = expert_ids == first_expert + expert
        weight = torch.where(selected, final_scales, 0.0).sum(1, keepdim=True)
        hit = selected.any(1)
        rows = hit.nonzero().squeeze(1) if _may_look_at_data(x) else None
        part = x if rows is None else x[rows]
        part = part if input_sf is not None else fc1.quantize(part, expert)
        hidden = fc1(part, expert, fc1_bias)
        parameters = (None if p is None else p[expert] for p in swiglu)
        hidden = _modes.activate(activation_type, hidden, *parameters).to(between)
        y = fc2(fc2.quantize(hidden, expert), expert, fc2_bias if add_fc2_bias else None)
        if rows is None:
            # Not a product with zero: a row of another expert may overflow here.
            out += torch.where(hit.unsqueeze(1), y * weight, 0.0)
        else:
            out.index_add_(0, rows, y * weight[rows])
    return out.to(output_dtype)


def _may_look_at_data(x: Tensor) -> bool:
    """How many rows an expert has is data: a CPU may look, on a GPU looking would synchronise."""
    return x.device.type == "cpu"
