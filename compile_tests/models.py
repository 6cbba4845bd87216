"""Small functions of one bf16 matrix ``[rows, 64]`` that between them call every op."""

from __future__ import annotations

import torch

from torch_fp4ops import fp4_quantize, mxfp8_quantize
from torch_fp4ops.formats import NVFP4
from torch_fp4ops.ops.cutlass_fused_moe.samples import weights
from torch_fp4ops.testing.samples import values

OPS = torch.ops.fp4
SCALE = torch.tensor([500.0])
ALPHA = 1 / SCALE
W, W_SF = fp4_quantize(values(1, 24, 64), SCALE)
W_MX, W_MX_SF = fp4_quantize(values(1, 24, 64), None, 32, True)
W8, W8_SF = mxfp8_quantize(values(1, 24, 64))
FC1, FC1_SF, FC1_GLOBAL = weights(64, 64, NVFP4, 6)
FC2, FC2_SF, FC2_GLOBAL = weights(64, 32, NVFP4, 7)


def quantize_in_every_layout(x):
    return (
        OPS.fp4_quantize(x, SCALE),
        OPS.fp4_quantize(x, SCALE, is_sf_swizzled_layout=False),
        OPS.fp4_quantize(x, None, 32, True, True, True),
        OPS.mxfp8_quantize(x, alignment=128),
    )


def fused_quantisers(x):
    return OPS.silu_and_mul_fp4_quantize(x, SCALE), OPS.rms_norm_fp4_quantize(x, x[:1].sum(0), None, 0.1, 32, True)


def fp4_round_trip(x):
    codes, scales = OPS.fp4_quantize(x * 2, SCALE)
    return OPS.fp4_dequantize(codes, scales, SCALE) + 1


def nvfp4_linear(x):
    codes, scales = OPS.fp4_quantize(x, SCALE)
    return OPS.mm_fp4(codes, W.t(), scales, W_SF.t(), ALPHA * ALPHA) + 1


def mxfp4_linear_8x4(x):
    codes, scales = OPS.fp4_quantize(x, None, 32, True, True, True)
    flags = {"block_size": 32, "use_nvfp4": False, "use_8x4_sf_layout": True}
    return OPS.mm_fp4(codes, W_MX.t(), scales.flatten(), W_MX_SF.t(), **flags)


def weight_only_linear(x):
    return OPS.mm_bf16_fp4(x, W, W_SF, ALPHA), OPS.mm_bf16_fp4(x, W_MX, W_MX_SF, block_size=32)


def mxfp8_linear(x):
    elements, scales = OPS.mxfp8_quantize(x)
    return OPS.mm_mxfp8(elements, W8.t(), scales, W8_SF), OPS.mxfp8_dequantize(elements, scales)


def kv_round_trip(x):
    codes, scales = OPS.nvfp4_kv_quantize(x, ALPHA)
    return OPS.nvfp4_kv_dequantize(codes, scales, ALPHA)


def kv_store(x):
    caches = [torch.zeros(70, 4, 2, d, dtype=torch.uint8) for d in (32, 32, 4, 4)]
    key = x.unsqueeze(1).expand(-1, 2, -1)
    OPS.nvfp4_kv_quantize_store(key, key, torch.arange(x.shape[0]), *caches, ALPHA, ALPHA)
    return caches


def mixture_of_experts(x):
    ids = torch.stack([torch.zeros(x.shape[0]), torch.ones(x.shape[0])], dim=1).int()
    scales = [FC1_SF, FC1_GLOBAL, FC2_SF, FC2_GLOBAL]
    flags = {"use_w4_group_scaling": True, "weight_layout": "linear"}
    return OPS.cutlass_fused_moe(x, ids, ids + 0.5, FC1, FC2, torch.bfloat16, scales, **flags)


CHAINS = (
    quantize_in_every_layout,
    fused_quantisers,
    fp4_round_trip,
    nvfp4_linear,
    mxfp4_linear_8x4,
    weight_only_linear,
    mxfp8_linear,
    kv_round_trip,
    kv_store,
    mixture_of_experts,
)
