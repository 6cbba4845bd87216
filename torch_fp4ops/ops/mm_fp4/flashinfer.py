"""mm_fp4 by FlashInfer: compute capability 10.0 and later, by the kernels of five libraries."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Call
from .. import _flashinfer
from .._matmul import PLAIN, TRTLLM
from . import mm_fp4

_BLACKWELL = (100, 103, 107, 110, 120, 121)
_CUTLASS = dict.fromkeys(_BLACKWELL, "fp4_gemm_cutlass") | {
    103: "fp4_gemm_cutlass_sm103",
    120: "fp4_gemm_cutlass_sm120",
    121: "fp4_gemm_cutlass_sm120",
}
_DSL = "compile a kernel with CuTe DSL"


def _kernel(choice: str, *capabilities: int, **more: object) -> _flashinfer.Kernel:
    return _flashinfer.Kernel("mm_fp4", capabilities, choice, **more)  # type: ignore[arg-type]


KERNELS = {
    # FlashInfer's own choice, by capability, size and CUDA version, among those that read plain weights.
    "flashinfer": _kernel("auto", *_BLACKWELL, modules=_CUTLASS),
    "cutlass": _kernel("cutlass", *_BLACKWELL, modules=_CUTLASS),
    "cudnn": _kernel("cudnn", *_BLACKWELL, packages=("cudnn",), at_run_time="build a cuDNN graph"),
    "trtllm": _kernel(
        "trtllm", 100, 103, 107, modules={100: "trtllm_gemm", 103: "trtllm_gemm", 107: "trtllm_gemm_sm107"}, cubins=True
    ),
    "cute-dsl": _kernel("cute-dsl", 100, 103, 107, 120, 121, packages=("cutlass",), at_run_time=_DSL),
    "cutedsl_low_latency": _kernel("cutedsl_low_latency", 100, 103, 107, packages=("cutlass",), at_run_time=_DSL),
    "b12x": _kernel("b12x", 120, 121, packages=("cutlass",), at_run_time=_DSL),
}


def _unsupported(call: Call, name: str) -> str | None:
    (m, packed_k), n = call.a.shape, call.b.shape[1]
    k, nvfp4 = 2 * packed_k, call.use_nvfp4
    reads = TRTLLM if name == "trtllm" else PLAIN
    if call.b_layout != reads:
        return f"{name} reads weights of b_layout={reads!r}, not {call.b_layout!r}; see prepare_fp4_weight"
    if not m or not n:
        return "FlashInfer's kernels need a row and a column"
    if call.out_dtype == torch.float32:
        return "FlashInfer gives bfloat16 and float16, not float32"
    if call.use_8x4_sf_layout and name != "trtllm":
        return f"{name} reads scales of a in the 128x4 layout only"
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
