"""mm_fp4 by FlashInfer: compute capability 10.0 and later, by the kernels of five libraries."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Call
from .. import _flashinfer
from .. import _flashinfer_gemm as gemm
from . import mm_fp4

_CUTLASS = dict.fromkeys(gemm.BLACKWELL, "fp4_gemm_cutlass") | {
    103: "fp4_gemm_cutlass_sm103",
    120: "fp4_gemm_cutlass_sm120",
    121: "fp4_gemm_cutlass_sm120",
}
KERNELS = gemm.kernels("mm_fp4", _CUTLASS, cute_dsl=(100, 103, 107, 120, 121))


def _unsupported(call: Call, name: str) -> str | None:
    (m, packed_k), n = call.a.shape, call.b.shape[1]
    k, nvfp4 = 2 * packed_k, call.use_nvfp4
    empty = None if m and n else "FlashInfer's kernels need a row and a column"
    reason = gemm.why_not(call, name, empty)
    if reason is not None:
        return reason
    if nvfp4 and call.alpha is None:
        return "FlashInfer's NVFP4 kernels read alpha: pass torch.ones(1) for none"
    if call.alpha is not None and call.alpha.numel() != 1:
        one_a_row = name == "cute-dsl" and _flashinfer.capability_of(call.device) in (100, 103)
        if not one_a_row or (_flashinfer.version() or ()) < (0, 7):
            return "an alpha for each row is for cute-dsl on compute capability 10.0 and 10.3, from FlashInfer 0.7 on"
    if not nvfp4 and name in ("trtllm", "cutlass"):
        return f"{name} multiplies NVFP4 only"
    if name == "trtllm" and call.out_dtype != torch.bfloat16:
        return "trtllm gives bfloat16 only"
    if k % 32 or n % (32 if name in ("cutlass", "flashinfer") else 8):
        return "k must be a multiple of 32, and n of 32 for cutlass, of 8 for the others"
    if name == "cutedsl_low_latency" and (m > 8 or k % (64 if nvfp4 else 128)):
        return "cutedsl_low_latency takes at most 8 rows, and k in multiples of 64 (NVFP4) or 128 (MXFP4)"
    return None


@_flashinfer.adapter(mm_fp4, KERNELS, _unsupported)
def mm_fp4_flashinfer(
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    block_size: int = 16,
    use_8x4_sf_layout: bool = False,
    use_nvfp4: bool = True,
    b_layout: str = "plain",
    backend: str = "auto",
) -> Tensor:
    columns = -(-a.shape[1] * 2 // block_size // 4) * 4
    out: Tensor = _flashinfer.function("mm_fp4")(
        a=a.contiguous(),
        b=b,
        # It reads scales as matrices; ours may be flat.
        a_descale=a_descale.view(-1, columns),
        b_descale=b_descale if b_descale.dim() == 2 else b_descale.view(-1, columns).T,
        alpha=alpha if alpha is None else alpha.reshape(-1).contiguous(),
        out_dtype=out_dtype,
        block_size=block_size,
        use_8x4_sf_layout=use_8x4_sf_layout,
        use_nvfp4=use_nvfp4,
        backend="auto" if backend == "flashinfer" else backend,
    )
    return out
