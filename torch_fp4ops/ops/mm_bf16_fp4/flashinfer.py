"""mm_bf16_fp4 by FlashInfer: bfloat16 x NVFP4 on compute capability 10.0 and later.

The op takes weights as ``fp4_quantize`` gives them. What a kernel wants instead, FlashInfer's
``prepare_bf16_fp4_weights`` makes at every call: nothing for cute-dsl-native, views for cute-dsl on 10.x, plain scales
for cudnn and blackwell-native, and for the others a weight packed anew, whose cost a benchmark should weigh.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Call
from .. import _flashinfer
from .._flashinfer_gemm import BLACKWELL, CUDNN_GRAPH, DSL
from .._matmul import reads_plain
from . import mm_bf16_fp4


def _kernel(choice: str, *capabilities: int, **more: object) -> _flashinfer.Kernel:
    return _flashinfer.Kernel("mm_bf16_fp4", capabilities, choice, **more)  # type: ignore[arg-type]


KERNELS = {
    "cudnn": _kernel("cudnn", *BLACKWELL, packages=("cudnn",), at_run_time=CUDNN_GRAPH),
    "cute-dsl": _kernel("cute-dsl", 100, 103, 107, 120, 121, packages=("cutlass",), at_run_time=DSL),
    "cute-dsl-native": _kernel("cute-dsl-native", 120, 121, packages=("cutlass",), at_run_time=DSL),
    "blackwell-native": _kernel("blackwell-native", 100, 103, at_run_time="compile FlashInfer's kernel"),
    "blackwell-tiled": _kernel("blackwell-tiled", 100, 103, at_run_time="compile FlashInfer's kernel"),
}


def pick(capability: int, call: Call | None) -> str:
    """The kernel whose weights need the least preparing."""
    if capability >= 120:
        return "cute-dsl-native" if (_flashinfer.version() or ()) >= (0, 7) else "cute-dsl"
    return "cudnn" if capability == 110 else "cute-dsl"


def _unsupported(call: Call, name: str) -> str | None:
    reason = reads_plain(call)
    if reason is not None:
        return reason
    out_dtype = call.out_dtype or call.a.dtype
    if call.a.dtype != torch.bfloat16 or call.block_size != 16:
        return "FlashInfer multiplies bfloat16 and NVFP4 only"
    if out_dtype == torch.float32 or (name == "blackwell-tiled" and out_dtype != torch.bfloat16):
        return "FlashInfer gives bfloat16 and float16 (blackwell-tiled: bfloat16 only)"
    if not call.a.shape[0]:
        return "FlashInfer's kernels need a row"
    if call.alpha is not None and call.alpha.numel() != 1:
        return "FlashInfer takes one alpha, not one for each row"
    if call.a.shape[1] % 64 or call.b.shape[0] % 64:
        return "k and n must be multiples of 64"
    return None


@_flashinfer.adapter(mm_bf16_fp4, KERNELS, _unsupported, pick)
def mm_bf16_fp4_flashinfer(
    a: Tensor,
    b: Tensor,
    b_descale: Tensor,
    alpha: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    block_size: int = 16,
    b_layout: str = "plain",
    backend: str = "auto",
) -> Tensor:
    if backend == "flashinfer":
        backend = pick(_flashinfer.capability_of(a.device), None)
    weight, scales, factor = _flashinfer.function("prepare_bf16_fp4_weights")(
        b=b,
        b_descale=b_descale,
        alpha=alpha if alpha is None else alpha.reshape(1),
        block_size=block_size,
        backend=backend,
    )
    out: Tensor = _flashinfer.function("mm_bf16_fp4")(
        a=a.contiguous(),
        b=weight,
        b_descale=scales,
        alpha=factor,
        out_dtype=out_dtype or a.dtype,
        block_size=block_size,
        backend=backend,
    )
    return out
