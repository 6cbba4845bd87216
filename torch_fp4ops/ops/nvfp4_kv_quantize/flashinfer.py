"""nvfp4_kv_quantize by FlashInfer: compute capability 10.0 and later."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Call
from .. import _flashinfer
from . import nvfp4_kv_quantize

KERNELS = {
    "flashinfer": _flashinfer.Kernel("nvfp4_kv_quantize", (100, 103, 107, 110, 120, 121), modules="fp4_kv_quant"),
}


def _unsupported(call: Call, name: str) -> str | None:
    if call.input.dtype == torch.float32:
        return "FlashInfer quantises bfloat16 and float16, not float32"
    return "FlashInfer's kernel needs a row" if not call.input.numel() else None


@_flashinfer.adapter(nvfp4_kv_quantize, KERNELS, _unsupported, exact=False)
def nvfp4_kv_quantize_flashinfer(
    input: Tensor, global_scale: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    codes, scales = _flashinfer.function("nvfp4_kv_quantize")(
        input=input.flatten(0, -2).contiguous(), global_scale=global_scale.reshape(1)
    )
    return codes.reshape(*input.shape[:-1], -1), scales.view(torch.uint8).reshape(*input.shape[:-1], -1)
