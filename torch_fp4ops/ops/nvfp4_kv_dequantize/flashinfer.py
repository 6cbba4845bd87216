"""nvfp4_kv_dequantize by FlashInfer: compute capability 8.0 and later.

On an NVIDIA H200 it is exact and reaches 7% (K = 128) to 16% (K = 1024) of the copy rate (0.6.18.post1), the Triton
kernel 90%: so ``auto`` never chooses it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Call
from .. import _flashinfer
from . import nvfp4_kv_dequantize

KERNELS = {
    "flashinfer": _flashinfer.Kernel(
        "nvfp4_kv_dequantize", (80, 86, 89, 90, 100, 103, 107, 110, 120, 121), modules="fp4_kv_dequant"
    ),
}


def _unsupported(call: Call, name: str) -> str | None:
    if call.output_dtype == torch.float32:
        return "FlashInfer gives bfloat16 and float16, not float32"
    if call.fp4_data.numel() >= 1 << 30:  # two elements a byte
        return "FlashInfer's kernel counts elements in 32 bits"
    return "FlashInfer's kernel needs a row" if not call.fp4_data.numel() else None


@_flashinfer.adapter(nvfp4_kv_dequantize, KERNELS, _unsupported)
def nvfp4_kv_dequantize_flashinfer(
    fp4_data: Tensor,
    block_scales: Tensor,
    global_scale: Tensor,
    output_dtype: torch.dtype = torch.bfloat16,
    *,
    backend: str = "auto",
) -> Tensor:
    codes = fp4_data.flatten(0, -2).contiguous()
    out = _flashinfer.function("nvfp4_kv_dequantize")(
        fp4_data=codes.clone() if codes.data_ptr() % 2 else codes,  # it loads two bytes at a time
        block_scales=block_scales.flatten(0, -2).contiguous(),
        global_scale=global_scale.reshape(1),
        output_dtype=output_dtype,
    )
    return out.reshape(*fp4_data.shape[:-1], -1)
