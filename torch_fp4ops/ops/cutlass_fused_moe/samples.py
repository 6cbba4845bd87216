"""Samples of cutlass_fused_moe: every mode, in every weight layout that it can have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import scale_layouts
from ...block_quantization import quantize_mx, quantize_nvfp4
from ...formats import MXFP4, NVFP4
from ...testing.samples import values
from ...weight_layouts import interleave_moe_scales_for_sm90_mixed_gemm, interleave_moe_weights_for_sm90_mixed_gemm
from ..fp4_quantize import fp4_quantize
from ..mxfp8_quantize import mxfp8_quantize
from ._oracle import assert_close

__all__ = ["assert_close", "routing", "samples", "weights"]

EXPERTS, HIDDEN, INTER, TOP_K = 3, 128, 128, 2


def routing(tokens: int, experts: int = EXPERTS) -> tuple[Tensor, Tensor]:
    """Distinct experts for each token, and normalised scales."""
    generator = torch.Generator().manual_seed(tokens)
    weights, ids = torch.rand(tokens, experts, generator=generator).topk(TOP_K, dim=1)
    return ids.int(), weights / weights.sum(1, keepdim=True)


def weights(rows: int, k: int, fmt: Any, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed weights of all experts, linear block scales, decode scale of each expert."""
    w = values(seed, EXPERTS, rows, k, dtype=torch.float32, scale=k**-0.5)
    if fmt is MXFP4:
        return (*quantize_mx(w, fmt), torch.ones(EXPERTS))
    encode = 2688 / w.abs().amax((1, 2))
    return (*quantize_nvfp4(w, encode.view(-1, 1, 1), 1 / encode.view(-1, 1, 1)), 1 / encode)


def scale_offsets(scales: Tensor) -> tuple[Tensor, Tensor]:
    """UE8M0 scales ``[E, rows, blocks]`` as the W4A8 mode has them: offsets, and the factor of each expert.

    The exponents of an expert may be 11 apart at most.
    """
    lowest = scales.amin((1, 2), keepdim=True)
    assert bool((scales - lowest <= 11).all())
    return scales - lowest + 1, torch.exp2(lowest.flatten().float() - 127.0) * 0.5 * 64


def example(
    device: torch.device, tokens: int = 16, hidden: int = 2880, inter: int = 2880, experts: int = 32, top_k: int = 4
) -> tuple[Any, ...]:
    """Unquantised; the shapes are GPT-OSS 20B's."""
    x, fc1, fc2 = (
        torch.empty(shape, dtype=torch.bfloat16, device=device)
        for shape in ((tokens, hidden), (experts, 2 * inter, hidden), (experts, hidden, inter))
    )
    ids = torch.zeros(tokens, top_k, dtype=torch.int32, device=device)
    return x, ids, torch.ones(tokens, top_k, device=device), fc1, fc2, torch.bfloat16, []


def samples() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    bf16 = torch.bfloat16
    fc1, fc2 = values(1, EXPERTS, 2 * INTER, HIDDEN, scale=0.1), values(2, EXPERTS, HIDDEN, INTER, scale=0.1)
    for tokens in (0, 1, 17):
        x = values(tokens, tokens, HIDDEN)
        yield f"bf16-{tokens}", (x, *routing(tokens), fc1, fc2, bf16, []), {}
    x, route = values(5, 5, HIDDEN), routing(5)
    biases = (values(3, EXPERTS, 2 * INTER), values(4, EXPERTS, HIDDEN))
    swiglu = {
        "swiglu_alpha": torch.full((EXPERTS,), 1.702),
        "swiglu_beta": torch.ones(EXPERTS),
        "swiglu_limit": torch.tensor([7.0, 1.0, 0.5]),
    }
    yield "bf16-bias-swiglu", (x, *route, fc1, fc2, bf16, [], *biases), swiglu
    yield "bf16-tp-rank1", (x, *route, fc1, fc2, bf16, [], *biases), {"tp_size": 2, "tp_rank": 1}
    ids, scales = routing(5, 2 * EXPERTS)
    yield "bf16-ep-rank1", (x, ids.long(), scales, fc1, fc2, torch.float32, []), {"ep_size": 2, "ep_rank": 1}
    for kind in (0, 1, 2, 4, 5, 6, 7):
        half = fc1 if kind in (4, 5, 7) else fc1[:, :INTER].contiguous()
        yield (
            f"bf16-activation{kind}",
            (x.half(), *route, half.half(), fc2.half(), torch.float16, []),
            {"activation_type": kind},
        )

    w1, s1, g1 = weights(2 * INTER, HIDDEN, MXFP4, 6)
    w2, s2, g2 = weights(HIDDEN, INTER, MXFP4, 7)
    group = {"use_w4_group_scaling": True}
    yield "w4a16-mxfp4-linear", (x, *route, w1, w2, bf16, [s1, s2]), {**group, "weight_layout": "linear"}
    folded = [interleave_moe_scales_for_sm90_mixed_gemm(s) for s in (s1, s2)]
    turned = [interleave_moe_weights_for_sm90_mixed_gemm(w) for w in (w1, w2)]
    yield "w4a16-mxfp4-flashinfer", (x, *route, *turned, bf16, folded, *biases), {**group, **swiglu}

    # Every tile of FlashInfer's kernels divides these sizes. The first has biases, which makes it the largest: probes
    # take that.
    k = 512
    large = [values(i, EXPERTS, rows, k, scale=0.04) for i, rows in ((10, 2 * k), (11, k))]
    (v1, t1), (v2, t2) = (quantize_mx(w.float(), MXFP4) for w in large)
    turned = [interleave_moe_weights_for_sm90_mixed_gemm(w) for w in (v1, v2)]
    folded = [interleave_moe_scales_for_sm90_mixed_gemm(s) for s in (t1, t2)]
    wide = (values(12, EXPERTS, 2 * k), values(13, EXPERTS, k))
    yield "w4a16-mxfp4-flashinfer-512", (values(5, 5, k), *route, *turned, bf16, folded, *wide), {**group, **swiglu}
    turned = [interleave_moe_weights_for_sm90_mixed_gemm(w, "fp4_fp8") for w in (v1, v2)]
    (o1, f1), (o2, f2) = (scale_offsets(t) for t in (t1, t2))
    folded = [interleave_moe_scales_for_sm90_mixed_gemm(o) for o in (o1, o2)]
    w4a8 = [folded[0], f1, torch.ones(()), folded[1], f2]
    humming = {**group, "use_wfp4afp8_humming": True}
    yield "w4a8-mxfp4-flashinfer-512", (values(6, 5, k), *route, *turned, bf16, w4a8), humming

    swizzled = [scale_layouts.swizzle(s, "128x4") for s in (s1, s2)]
    int32 = [s.view(torch.int32) for s in swizzled]
    mxfp8 = {"use_mxfp8_act_scaling": True}
    stored = (w1.view(torch.int64), w2.view(torch.int64))
    yield "mxfp4-mxfp8", (x, *route, *stored, bf16, [int32[0], g1, int32[1], g2]), mxfp8
    x8, x8_sf = mxfp8_quantize(x)
    args = (x8, *route, *stored, bf16, [int32[0], g1, int32[1], g2], None, None, x8_sf)
    yield "mxfp4-mxfp8-quantized-input", args, mxfp8

    w1, s1, g1 = weights(2 * INTER, HIDDEN, NVFP4, 8)
    w2, s2, g2 = weights(HIDDEN, INTER, NVFP4, 9)
    yield "w4a16-nvfp4", (x, *route, w1, w2, bf16, [s1, g1, s2, g2]), {**group, "weight_layout": "linear"}
    swizzled = [scale_layouts.swizzle(s, "128x4") for s in (s1, s2)]
    act1, act2 = torch.tensor(2688 / 5.0), torch.full((EXPERTS,), 2688 / 2.0)
    packed = [act1, swizzled[0], g1 / act1, act2, swizzled[1], g2 / act2]
    stored = (w1.view(torch.int64), w2.view(torch.int64))
    yield "w4a4-nvfp4", (x, *route, *stored, bf16, packed), {}
    x4, x4_sf = fp4_quantize(x, act1, is_sf_swizzled_layout=False)
    args = (x4, *route, *stored, bf16, packed, None, None, x4_sf)
    yield "w4a4-nvfp4-quantized-input", args, {"swizzled_input_sf": False}
