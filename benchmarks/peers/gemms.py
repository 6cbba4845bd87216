"""Peers of the matrix products."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_fp4ops import scale_layouts
from torch_fp4ops.testing import Sample

from ..cases import Case
from ..inputs import Weight, block_size
from ..verify import Expected
from ._peer import Multiply, Peer, Prepared, Unsuitable, WeightPeer, imported
from .marlin import load as load_marlin
from .quantizers import flashinfer

_FOOTPRINT = 512 << 20


def _cublas(case: Case, samples: Sequence[Sample], expected: Expected) -> Prepared:
    """torch.mm in bf16 with dequantised operands: what one has without quantised weights."""
    a, b, _ = expected.operands
    a16, b16 = a.bfloat16(), b.bfloat16()  # values of FP4 times a block scale are exact in bf16
    # bf16 weights are four times as large, so fewer sets make the same footprint.
    count = max(1, min(len(samples), -(-_FOOTPRINT // (a16.nbytes + b16.nbytes))))
    sets = [(a16, b16)] + [(a16.clone(), b16.clone()) for _ in range(count - 1)]
    return Prepared([lambda a=a, b=b: torch.mm(a, b.T) for a, b in sets])


@functools.cache
def _tuned_gemlite() -> Any:
    package, helper = imported("gemlite"), imported("gemlite.helper")
    tuned = Path(package.__file__).parent / "configs" / "h100.json"
    if tuned.exists():
        package.load_config(str(tuned))
    return helper


def _gemlite(weight: Weight, alpha: Tensor | None) -> Multiply:
    """gemlite's W4A16 Triton kernels (A16W4_MXFP, A16W4_NVFP) with its own packing, in its settings for the H100."""
    helper = _tuned_gemlite()
    device = str(weight.elements.device)
    blocks = weight.k // block_size(weight.fmt)
    scales = scale_layouts.unswizzle(weight.scales, weight.n, blocks, scale_layouts.SWIZZLED_128X4).contiguous()
    codes = weight.elements.clone()  # it may pack in place
    if weight.fmt == "mxfp4":
        make = helper.A16W4_MXFP(device=device, dtype=torch.bfloat16)
        layer = make.from_packed_weights(codes, scales.view(torch.float8_e8m0fnu))
    else:
        make = helper.A16W4_NVFP(device=device, dtype=torch.bfloat16)
        encode = 1 / (torch.ones(1, device=device) if alpha is None else alpha)
        layer = make.from_packed_weights(codes, scales=scales.view(torch.float8_e4m3fn), meta_scale=encode)
    return layer


def _triton_kernels(weight: Weight, alpha: Tensor | None) -> Multiply:
    """matmul_ogs of triton_kernels, one dense product without routing, with weights in its default layouts."""
    if weight.fmt != "mxfp4":
        raise Unsuitable("its 4-bit weights are MXFP4")
    ogs = imported("triton_kernels.matmul_ogs")
    tensors = imported("triton_kernels.tensor")
    layouts = imported("triton_kernels.tensor_details").layout
    numerics = imported("triton_kernels.numerics")
    blocks = weight.k // block_size(weight.fmt)
    scales = scale_layouts.unswizzle(weight.scales, weight.n, blocks, scale_layouts.SWIZZLED_128X4).contiguous()
    of_values, value_options = layouts.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    of_scales, scale_options = layouts.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
    # One expert: the layouts are of batches [1, K, N].
    values = tensors.wrap_torch_tensor(weight.elements[None].transpose(-2, -1), dtype=tensors.FP4)
    values = tensors.convert_layout(values, of_values, **value_options)
    swizzled = tensors.wrap_torch_tensor(scales[None].transpose(-2, -1))
    swizzled = tensors.convert_layout(swizzled, of_scales, **scale_options)
    flex = ogs.FlexCtx(rhs_data=numerics.InFlexData())
    precision = ogs.PrecisionConfig(weight_scale=swizzled, flex_ctx=flex)
    return lambda a: ogs.matmul_ogs(a, values, None, precision_config=precision).view(-1, weight.n)


WEIGHT_ONLY = (
    WeightPeer("marlin", load_marlin),
    WeightPeer("gemlite", _gemlite),
    WeightPeer("triton_kernels", _triton_kernels),
)

GEMMS = (
    Peer("cublas-bf16", ("mm_bf16_fp4", "mm_fp4", "mm_mxfp8"), _cublas),
    Peer("flashinfer-direct", ("mm_fp4", "mm_mxfp8"), flashinfer),
    *(peer.peer for peer in WEIGHT_ONLY),
)
