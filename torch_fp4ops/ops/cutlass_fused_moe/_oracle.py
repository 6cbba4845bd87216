"""A float64 oracle of cutlass_fused_moe, token by token, with the error that fp32 arithmetic may make."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ... import scale_layouts
from ...block_quantization import dequantize_blocks, quantize_mx, quantize_nvfp4
from ...formats import MXFP8, NVFP4
from ...testing.numerics import matmul_bound
from . import _modes, cutlass_fused_moe


def _expert_weights(weights: Tensor, scales: Tensor | None, mode: _modes.Mode, layout: str) -> Tensor:
    if mode.weights is None or scales is None:
        return weights.double()
    packed = _modes.linear_weights(weights, layout)
    blocks = packed.shape[2] * 2 // mode.weights.block_size
    return dequantize_blocks(
        packed, _modes.linear_scales(scales, packed.shape[1], blocks, layout), mode.weights
    ).double()


def _as_activation(x: Tensor, mode: _modes.Mode, encode: Tensor | None, expert: int) -> Tensor:
    """What the quantiser makes of one row, its global scale left to alpha."""
    x = x.float().unsqueeze(0)
    if mode.activations is NVFP4:
        assert encode is not None
        e = encode.reshape(-1)[expert if encode.numel() > 1 else 0]
        x = dequantize_blocks(*quantize_nvfp4(x, e, 1 / e), NVFP4)
    elif mode.activations is MXFP8:
        x = dequantize_blocks(*quantize_mx(x, MXFP8), MXFP8)
    elif mode.e4m3_rows:
        x = _modes.round_rows_to_e4m3(x)
    return x.squeeze(0).double()


def _gemm(x: Tensor, w: Tensor, alpha: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """One row through one expert: the exact result and the error that fp32 sums may make."""
    factor = None if alpha is None else alpha.reshape(1)
    exact = x @ w.T * (1.0 if alpha is None else alpha.double())
    error = matmul_bound(x.unsqueeze(0), w, factor, exact.unsqueeze(0), torch.float32).squeeze(0)
    if bias is not None:
        exact = exact + bias.double()
        error = error + 2.0**-23 * exact.abs()
    return exact, error


def assert_close(out: Tensor, *args: Any, **kwargs: Any) -> None:
    """``out`` is what the arguments call for, within the error of fp32 arithmetic.

    The error of fc1 makes an interval around each activation. Rounding and quantising both its ends and its middle
    shows which codes could come out; fc2 carries that difference on. So every rounding that is certain must be
    right, and one that is not may go either way.
    """
    call = cutlass_fused_moe.check(*args, **kwargs)
    ids, final = call.token_selected_experts, call.token_final_scales
    flags = (call.use_w4_group_scaling, call.use_mxfp8_act_scaling)
    mode = _modes.find_mode(call.fc1_expert_weights.dtype, len(call.quant_scales), *flags)
    assert mode is not None
    layout = _modes.resolve_layout(mode, call.weight_layout)
    assert layout is not None
    scales = dict(zip(mode.scales, call.quant_scales, strict=True))
    w1 = _expert_weights(call.fc1_expert_weights, scales.get("fc1_scales"), mode, layout)
    w2 = _expert_weights(call.fc2_expert_weights, scales.get("fc2_scales"), mode, layout)
    x = call.input
    between = x.dtype
    if call.input_sf is not None:
        between, fmt = call.output_dtype, mode.activations
        assert fmt is not None
        sf_layout = scale_layouts.layout_from_flags(call.swizzled_input_sf, False)
        blocks = x.shape[1] * fmt.elements_per_byte // fmt.block_size
        x = dequantize_blocks(x, scale_layouts.unswizzle(call.input_sf, x.shape[0], blocks, sf_layout), fmt)

    def of(name: str, e: int) -> Tensor | None:
        t = scales.get(name, getattr(call, name, None))
        return None if t is None else t[e]

    exact, error = (
        torch.zeros(out.shape, dtype=torch.float64, device=out.device),
        torch.zeros_like(out, dtype=torch.float64),
    )
    for t, k in itertools.product(range(ids.shape[0]), range(ids.shape[1])):
        e = int(ids[t, k]) - call.ep_rank * w1.shape[0]
        if not 0 <= e < w1.shape[0]:
            continue
        row = x[t].double()
        if call.input_sf is None:
            row = _as_activation(x[t], mode, scales.get("fc1_act_global"), e)
        hidden, slack = _gemm(row, w1[e], of("fc1_global", e), of("fc1_expert_biases", e))
        swiglu = [None if p is None else p.double() for p in (of(f"swiglu_{n}", e) for n in ("alpha", "beta", "limit"))]
        signs = torch.tensor(list(itertools.product((-1, 0, 1), repeat=2)), device=out.device)
        # up and gate, or both halves of an ungated output, moved by their error in every combination
        moved = [torch.cat([half * s for half, s in zip(slack.chunk(2), pair, strict=True)]) for pair in signs]
        spread = torch.stack(
            [_modes.activate(call.activation_type, (hidden + m).unsqueeze(0), *swiglu)[0] for m in moved]
        )
        middle = spread[len(moved) // 2]
        wide = (spread - middle).abs().amax(0) + 2.0**-20 * middle.abs()
        encode = scales.get("fc2_act_global")
        ends = [_as_activation((middle + d).to(between), mode, encode, e) for d in (-wide, 0 * wide, wide)]
        either_way = torch.maximum((ends[0] - ends[1]).abs(), (ends[2] - ends[1]).abs())
        bias = of("fc2_expert_biases", e) if call.tp_rank == 0 else None
        y, slack = _gemm(ends[1], w2[e], of("fc2_global", e), bias)
        alpha = of("fc2_global", e)
        slack = slack + (either_way @ w2[e].abs().T) * (1.0 if alpha is None else alpha.double())
        exact[t] += final[t, k].double() * y
        error[t] += final[t, k].double().abs() * (slack + 2.0**-22 * y.abs())
    info = torch.finfo(out.dtype)
    error += (info.eps / 2 + 2.0**-22) * (exact.abs() + error) + info.smallest_normal * info.eps / 2
    off = (out.double() - exact).abs()
    assert not out.isnan().any(), "NaN in the result"
    if not bool((off <= error).all()):
        worst = (off / error).argmax()
        raise AssertionError(f"error {off.flatten()[worst]:.3e} where the bound is {error.flatten()[worst]:.3e}")
