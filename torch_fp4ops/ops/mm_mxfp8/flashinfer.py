"""mm_mxfp8 by FlashInfer: compute capability 10.0 and later, by the kernels of five libraries."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Call
from .. import _flashinfer
from .. import _flashinfer_gemm as gemm
from . import mm_mxfp8

_CUTLASS = dict.fromkeys(gemm.BLACKWELL, "mxfp8_gemm_cutlass") | dict.fromkeys((120, 121), "mxfp8_gemm_cutlass_sm120")
KERNELS = gemm.kernels("mm_mxfp8", _CUTLASS, cute_dsl=(100, 103, 107))


def _unsupported(call: Call, name: str) -> str | None:
    (m, k), n = call.a.shape, call.b.shape[1]
    reason = gemm.why_not(call, name, None if m else "FlashInfer's kernels need a row")
    if reason is not None:
        return reason
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
