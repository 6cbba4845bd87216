"""What the FlashInfer adapters of the GEMMs share: where kernels of one kind run, and what all of them refuse."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..contracts import Call
from . import _flashinfer
from ._matmul import PLAIN, TRTLLM

__all__ = ["BLACKWELL", "CUDNN_GRAPH", "DSL", "kernels", "why_not"]

BLACKWELL = (100, 103, 107, 110, 120, 121)
CUDNN_GRAPH = "build a cuDNN graph"
DSL = "compile a kernel with CuTe DSL"
_TRTLLM = {100: "trtllm_gemm", 103: "trtllm_gemm", 107: "trtllm_gemm_sm107"}


def kernels(function: str, cutlass: Mapping[int, str], cute_dsl: tuple[int, ...]) -> dict[str, _flashinfer.Kernel]:
    """The kernels of ``mm_fp4`` or ``mm_mxfp8``: the modules of cutlass's, and where cute-dsl's runs."""

    def dsl(choice: str, capabilities: tuple[int, ...]) -> _flashinfer.Kernel:
        return _flashinfer.Kernel(function, capabilities, choice, packages=("cutlass",), at_run_time=DSL)

    return {
        # FlashInfer's own choice, by capability, size and version, among those that read plain weights.
        "flashinfer": _flashinfer.Kernel(function, BLACKWELL, "auto", modules=cutlass),
        "cutlass": _flashinfer.Kernel(function, BLACKWELL, "cutlass", modules=cutlass),
        "cudnn": _flashinfer.Kernel(function, BLACKWELL, "cudnn", packages=("cudnn",), at_run_time=CUDNN_GRAPH),
        "trtllm": _flashinfer.Kernel(function, tuple(_TRTLLM), "trtllm", modules=_TRTLLM, cubins=True),
        "cute-dsl": dsl("cute-dsl", cute_dsl),
        "cutedsl_low_latency": dsl("cutedsl_low_latency", (100, 103, 107)),
        "b12x": dsl("b12x", (120, 121)),
    }


def why_not(call: Call, name: str, empty: str | None) -> str | None:
    """Why kernel ``name`` can't take a call of either; ``empty`` is the reason that the sizes give, if they do."""
    reads = TRTLLM if name == "trtllm" else PLAIN
    if call.b_layout != reads:
        return f"{name} reads weights of b_layout={reads!r}, not {call.b_layout!r}; see prepare_fp4_weight"
    if empty:
        return empty
    if call.out_dtype == torch.float32:
        return "FlashInfer gives bfloat16 and float16, not float32"
    if call.use_8x4_sf_layout and name != "trtllm":
        return f"{name} reads scales of a in the 128x4 layout only"
    return None
