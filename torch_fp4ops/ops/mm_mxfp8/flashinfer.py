"""mm_mxfp8 by FlashInfer: compute capability 10.0 and later, by the kernels of five libraries."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Call
from .. import _flashinfer
from .._matmul import PLAIN, TRTLLM
from . import mm_mxfp8

_BLACKWELL = (100, 103, 107, 110, 120, 121)
_CUTLASS = dict.fromkeys(_BLACKWELL, "mxfp8_gemm_cutlass") | dict.fromkeys((120, 121), "mxfp8_gemm_cutlass_sm120")
_DSL = "compile a kernel with CuTe DSL"


def _kernel(choice: str, *capabilities: int, **more: object) -> _flashinfer.Kernel:
    return _flashinfer.Kernel("mm_mxfp8", capabilities, choice, **more)  # type: ignore[arg-type]


KERNELS = {
    # FlashInfer's own choice, by capability, among those that read plain weights.
    "flashinfer": _kernel("auto", *_BLACKWELL, modules=_CUTLASS),
    "cutlass": _kernel("cutlass", *_BLACKWELL, modules=_CUTLASS),
    "cudnn": _kernel("cudnn", *_BLACKWELL, packages=("cudnn",), at_run_time="build a cuDNN graph"),
    "trtllm": _kernel(
        "trtllm", 100, 103, 107, modules={100: "trtllm_gemm", 103: "trtllm_gemm", 107: "trtllm_gemm_sm107"}, cubins=True
    ),
    "cute-dsl": _kernel("cute-dsl", 100, 103, 107, packages=("cutlass",), at_run_time=_DSL),
    "cutedsl_low_latency": _kernel("cutedsl_low_latency", 100, 103, 107, packages=("cutlass",), at_run_time=_DSL),
    "b12x": _kernel("b12x", 120, 121, packages=("cutlass",), at_run_time=_DSL),
}


def _unsupported(call: Call, name: str) -> str | None:
    (m, k), n = call.a.shape, call.b.shape[1]
    reads = TRTLLM if name == "trtllm" else PLAIN
    if call.b_layout != reads:
        return f"{name} reads weights of b_layout={reads!r}, not {call.b_layout!r}; see prepare_fp4_weight"
    if not m:
        return "FlashInfer's kernels need a row"
    if call.out_dtype == torch.float32:
        return "FlashInfer gives bfloat16 and float16, not float32"
    if call.use_8x4_sf_layout and name != "trtllm":
        return f"{name} reads scales of a in the 128x4 layout only"
    if n % 32:
        return "n must be a multiple of 32"
    if name == "trtllm" and (call.out_dtype != torch.bfloat16 or k % 256):
        return "trtllm gives bfloat16 and takes k in multiples of 256"
    if name == "b12x" and k % 128:
        return "b12x takes k in multiples of 128"
    if name == "cutedsl_low_latency" and (m > 8 or k % 128):
        return "cutedsl_low_latency takes at most 8 rows, and k in multiples of 128"
    return None


@_flashinfer.adapter(mm_mxfp8, KERNELS, _unsupported)
def mm_mxfp8_flashinfer(
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    use_8x4_sf_layout: bool = False,
    b_layout: str = "plain",
    backend: str = "auto",
) -> Tensor:
    out: Tensor = _flashinfer.function("mm_mxfp8")(
        a=a.contiguous(),
        b=b,
        a_descale=a_descale,
        b_descale=b_descale,
        out_dtype=out_dtype,
        use_8x4_sf_layout=use_8x4_sf_layout,
        backend="auto" if backend == "flashinfer" else backend,
    )
    return out
