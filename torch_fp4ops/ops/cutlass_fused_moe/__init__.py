"""cutlass_fused_moe: a mixture of experts, routed rows through two grouped GEMMs and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ... import scale_layouts
from ...contracts import SCALES, Call, Out, can_be_scales
from ...formats import MXFP8, NVFP4, BlockFormat
from ...registry import op
from ...selection import Preference
from .. import _preferences, _scales
from . import _modes
from ._reference import fused_moe


def _contract(call: Call) -> Out:
    mode, layout = _require_mode(call)
    fc1, fc2 = call.fc1_expert_weights, call.fc2_expert_weights
    for name in ("fc1_expert_weights", "fc2_expert_weights"):
        call.require_rank(name, 3)
        call.require_contiguous(name)
    call.require_dtype("fc2_expert_weights", (fc1.dtype,))
    # Bytes or elements per stored item: int64 holds 16 codes, uint8 two, a float one value.
    pack = 16 if fc1.dtype == torch.int64 else 2 if mode.weights else 1
    experts, hidden, inter = fc1.shape[0], fc1.shape[2] * pack, fc2.shape[2] * pack
    # By comparison: a number that is traced has no hash.
    known = [activation for number, activation in _modes.ACTIVATIONS.items() if number == call.activation_type]
    call.require(bool(known), "activation_type", call.activation_type, f"one of {sorted(_modes.ACTIVATIONS)}")
    fc1_rows = inter * (2 if known[0].gated else 1)
    call.require_shape("fc1_expert_weights", (experts, fc1_rows, fc1.shape[2]))
    call.require_shape("fc2_expert_weights", (experts, hidden, fc2.shape[2]))
    tokens = _require_input(call, mode, hidden)
    if mode.weights:
        _require_quant_scales(call, mode, layout, experts, hidden, inter, fc1_rows)
    _require_routing(call, tokens)
    for name, shape in (
        ("fc1_expert_biases", (experts, fc1_rows)),
        ("fc2_expert_biases", (experts, hidden)),
        ("swiglu_alpha", (experts,)),
        ("swiglu_beta", (experts,)),
        ("swiglu_limit", (experts,)),
    ):
        if getattr(call, name) is not None:
            call.require_shape(name, shape)
            call.require_dtype(name, _scales.FLOATS if "bias" in name else (torch.float32,))
    _scales.require_out_dtype(call, "output_dtype")
    return Out((tokens, hidden), call.output_dtype)


def _require_mode(call: Call) -> tuple[_modes.Mode, str]:
    given = call.weight_layout
    call.require(given in _modes.LAYOUTS, "weight_layout", given, " or ".join(map(repr, _modes.LAYOUTS)))
    dtype = call.fc1_expert_weights.dtype
    flags = (call.use_w4_group_scaling, call.use_mxfp8_act_scaling)
    mode = _modes.find_mode(dtype, len(call.quant_scales), *flags)
    call.require(
        mode is not None,
        "quant_scales",
        f"{len(call.quant_scales)} tensors for {dtype} weights, use_w4_group_scaling={flags[0]} and "
        f"use_mxfp8_act_scaling={flags[1]}",
        "float weights: none; uint8 or int64 weights: 2 (W4A16 MXFP4), 4 (W4A16 NVFP4) or 5 (W4A8 MXFP4) with "
        "use_w4_group_scaling, 4 (MXFP4 x MXFP8) with use_mxfp8_act_scaling, 6 (W4A4 NVFP4) with neither",
    )
    assert mode is not None
    humming = call.use_wfp4afp8_humming
    allowed = f"{not humming} with {len(call.quant_scales)} quant_scales: 5 and True are the W4A8 mode"
    call.require(humming is (mode is _modes.W4A8_MXFP4), "use_wfp4afp8_humming", humming, allowed)
    layout = _modes.resolve_layout(mode, given)
    possible = _modes.layouts_of(mode)
    allowed = " or ".join(map(repr, possible))
    call.require(layout in possible, "weight_layout", f"{given!r} in mode {mode.name}", allowed)
    assert layout is not None
    return mode, layout


def _require_input(call: Call, mode: _modes.Mode, hidden: int) -> int:
    x = call.input
    call.require_rank("input", 2)
    quantized = {None: (), NVFP4: (torch.uint8,), MXFP8: (torch.float8_e4m3fn,)}[mode.activations]
    call.require_dtype("input", (*_scales.FLOATS, *quantized))
    columns = hidden // 2 if x.dtype == torch.uint8 else hidden
    call.require(x.shape[1] == columns, "input", x.shape, f"(tokens, {columns})")
    needs_scales = x.dtype not in _scales.FLOATS
    given = "None" if call.input_sf is None else "given"
    allowed = "the block scales of a quantised input" if needs_scales else "None for an input of floats"
    call.require((call.input_sf is not None) is needs_scales, "input_sf", given, allowed)
    if needs_scales:
        assert mode.activations is not None
        layout = scale_layouts.layout_from_flags(call.swizzled_input_sf, False)
        _scales.require_scales(call, "input_sf", x.shape[0], hidden // mode.activations.block_size, layout)
    return x.shape[0]


def _require_quant_scales(
    call: Call, mode: _modes.Mode, layout: str, experts: int, hidden: int, inter: int, fc1_rows: int
) -> None:
    assert mode.weights is not None
    block = mode.weights.block_size
    # The interleave works on tiles of 64 rows and 128 columns.
    k_tile, row_tile = (128, 64) if layout in _modes.SM90_LAYOUTS else (block, 1)
    sizes = (("fc1_expert_weights", hidden, fc1_rows), ("fc2_expert_weights", inter, hidden))
    for name, k, rows in sizes:
        call.require(k % k_tile == 0, name, f"of K = {k}", f"K a multiple of {k_tile} ({mode.name}, {layout})")
        call.require(rows % row_tile == 0, name, f"of {rows} rows", f"rows a multiple of {row_tile} ({layout})")
    _modes.require_scales(call, mode, layout, "fc1_scales", experts, fc1_rows, hidden // block)
    _modes.require_scales(call, mode, layout, "fc2_scales", experts, hidden, inter // block)
    for i, name in enumerate(mode.scales):
        if name.endswith("_global"):
            t = call.quant_scales[i]
            argument = f"quant_scales[{i}] ({name})"
            call.require(t.dtype == torch.float32, argument, t.dtype, "torch.float32")
            per_expert = tuple(t.shape) == (experts,)
            one = name.endswith("_act_global") and t.numel() == 1
            allowed = f"shape ({experts},)" + (", or one element" if "_act_" in name else "")
            call.require(per_expert or one, argument, t.shape, allowed)


def _require_routing(call: Call, tokens: int) -> None:
    ids = call.token_selected_experts
    call.require_rank("token_selected_experts", 2)
    call.require_dtype("token_selected_experts", (torch.int32, torch.int64))
    call.require(ids.shape[0] == tokens, "token_selected_experts", ids.shape, f"({tokens}, top_k)")
    call.require_dtype("token_final_scales", (torch.float32,))
    call.require_shape("token_final_scales", ids.shape, ", that of token_selected_experts")
    for size, rank in (("tp_size", "tp_rank"), ("ep_size", "ep_rank")):
        n, r = getattr(call, size), getattr(call, rank)
        call.require(n >= 1, size, n, "1 or more")
        call.require(0 <= r < n, rank, r, f"0 to {n - 1}")


def _check_values(call: Call) -> None:
    ids = call.token_selected_experts
    experts = call.fc1_expert_weights.shape[0] * call.ep_size
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        given = f"between {low} and {high}"
        call.require(low >= 0 and high < experts, "token_selected_experts", given, f"0 to {experts - 1}")
    mode, _ = _require_mode(call)
    for i, name in enumerate(mode.scales):
        if name.endswith("_global"):
            t = call.quant_scales[i]
            call.require(can_be_scales(t), f"quant_scales[{i}] ({name})", t.tolist(), SCALES)


_PREFERENCES = (
    _preferences.FLASHINFER,
    Preference(
        "triton",
        "cuda",
        "routing, products and activation without a synchronisation, so graphs capture it; NVIDIA H200: 86 us for one "
        "token of GPT-OSS 120B in W4A16 MXFP4; the reference multiplies in fp32, one expert after another",
    ),
    # After Triton, so that only weights in a layout that it refuses wait for FlashInfer's import.
    Preference("flashinfer", "cuda", "reads weight_layout 'sm90_interleaved' and 'sm90_interleaved_fp8'", (9, 0)),
)


def _scales_of(weights: bool) -> Callable[[Mapping[str, Any]], BlockFormat | None]:
    def format_of(given: Mapping[str, Any]) -> BlockFormat | None:
        fc1, scales = given.get("fc1_expert_weights"), given.get("quant_scales") or ()
        if fc1 is None:
            return None
        mode = _modes.find_mode(fc1.dtype, len(scales), given["use_w4_group_scaling"], given["use_mxfp8_act_scaling"])
        if mode is None:
            return None
        return mode.weights if weights else mode.activations

    return format_of


_BYTES = _scales.byte_arguments((), ("quant_scales",), _scales_of(True)) | _scales.byte_arguments(
    (), ("input_sf",), _scales_of(False)
)


@op(
    preferences=_PREFERENCES,
    contract=_contract,
    check_values=_check_values,
    byte_arguments=_BYTES,
)
def cutlass_fused_moe(
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
    """Mixture of experts: ``sum_k scale[t, k] * fc2(activation(fc1(x[t])))`` over the experts that token t selected.

    fc1 holds, for each expert, the *up* rows first and the *gate* rows second. With ``limit`` infinite, ``alpha`` 1
    and ``beta`` 0 where they are not given::

        gate = min(gate, limit);  up = clamp(up, -limit, limit)
        activation = gate * sigmoid(alpha * gate) * (up + beta)

    Both GEMMs accumulate in fp32; the activation is computed in fp32 and rounded to the input's dtype (to
    ``output_dtype`` if the input is quantised) before fc2, and then quantised where the mode says so. The sum over k
    is fp32.

    ====================  ==========================  ==========================================================
    mode                  weights                     ``quant_scales``
    ====================  ==========================  ==========================================================
    bf16                  float                       none
    W4A16 MXFP4           uint8 or int64, packed      fc1, fc2 block scales; ``use_w4_group_scaling``
    W4A8 MXFP4            uint8 or int64, packed      fc1 scale offsets, fc1 factor [E], fc2 activation scale (not
                                                      read), fc2 the same two; ``use_w4_group_scaling`` and
                                                      ``use_wfp4afp8_humming``
    W4A16 NVFP4           uint8 or int64, packed      fc1 block scales, fc1 decode scale [E], fc2 the same two;
                                                      ``use_w4_group_scaling`` (not in FlashInfer)
    W4A4 NVFP4            uint8 or int64, packed      fc1 activation encode scale (1 or [E]), fc1 block scales, fc1
                                                      alpha [E] = 1/(activation * weight encode scale), fc2 the same
    MXFP4 x MXFP8         uint8 or int64, packed      fc1 block scales, fc1 factor [E], fc2 the same two;
                                                      ``use_mxfp8_act_scaling``
    ====================  ==========================  ==========================================================

    In W4A8 the input and the activation are rounded to E4M3 under one scale a row, ``amax / 448``; a weight is
    ``code * 2^(offset - 6) * factor``, as FlashInfer's ``preprocess_moe_weights_for_sm90_mixed_gemm_humming`` makes
    it, the residual that it gives times 64 being the factor.

    Args:
        input: ``[tokens, H]``, bfloat16, float16 or float32; quantised to NVFP4 (uint8 ``[tokens, H/2]``) or MXFP8
            (float8_e4m3fn) already, with ``input_sf``, in the modes with such activations.
        token_selected_experts: int32 or int64 ``[tokens, top_k]``, *global* expert ids, 0 to ``E * ep_size - 1``. A
            wrong id raises on the CPU and counts as foreign on a GPU, where reading it would synchronise.
        token_final_scales: float32 ``[tokens, top_k]``.
        fc1_expert_weights: ``[E, 2I, H]`` (packed: H/2 bytes) of the local experts; ``[E, I, H]`` if not gated.
        fc2_expert_weights: ``[E, H, I]`` (packed: I/2 bytes).
        output_dtype: bfloat16, float16 or float32.
        quant_scales: as in the table. Block scales uint8, or int32 with four each.
        fc1_expert_biases, fc2_expert_biases: float ``[E, 2I]``, ``[E, H]``; fc2's is added on tp_rank 0 only.
        input_sf: block scales of a quantised input, 128x4 swizzled unless ``swizzled_input_sf`` is False.
        swiglu_alpha, swiglu_beta, swiglu_limit: float32 ``[E]``.
        tp_size, tp_rank: tensor parallelism: weights are this rank's slice of I; the caller sums over ranks.
        ep_size, ep_rank: expert parallelism: local experts are ids ``ep_rank * E`` and on; others are skipped.
        activation_type: FlashInfer's ``ActivationType``: 3 Swiglu, 4 Geglu, 5 SwigluBias, 7 SwigluStep, and not gated
            0 Gelu, 1 Relu, 2 Silu, 6 Relu2.
        weight_layout: ``"linear"`` (plain rows, block scales ``[E, rows, K/block]``); ``"128x4"`` (plain rows, each
            expert's scales 128x4 swizzled, ``[E, round_up(rows, 128), round_up(K/block, 4)]``);
            ``"sm90_interleaved"`` (W4A16 MXFP4: payload and scales as the two ``interleave_moe_*_for_sm90_mixed_gemm``
            make them), ``"sm90_interleaved_fp8"`` (W4A8: the same with the type ``"fp4_fp8"``); ``"flashinfer"``,
            whichever of these FlashInfer's function expects in the mode.
        backend: ``"auto"`` or a backend's name.

    Returns:
        ``[tokens, H]`` of ``output_dtype``; zeros for a token without a local expert.

    Raises:
        ValueError: a wrong dtype, shape, mode, layout, scale, rank or (on the CPU) expert id.

    Source: FlashInfer ``cutlass_fused_moe`` without ``output`` and the launch knobs; what follows there is
    keyword-only.
    """
    return fused_moe(
        input,
        token_selected_experts,
        token_final_scales,
        fc1_expert_weights,
        fc2_expert_weights,
        output_dtype,
        quant_scales,
        fc1_expert_biases,
        fc2_expert_biases,
        input_sf,
        (swiglu_alpha, swiglu_beta, swiglu_limit),
        add_fc2_bias=tp_rank == 0,
        first_expert=ep_rank * fc1_expert_weights.shape[0],
        flags=(use_w4_group_scaling, use_mxfp8_act_scaling),
        activation_type=activation_type,
        swizzled_input_sf=swizzled_input_sf,
        weight_layout=weight_layout,
    )
