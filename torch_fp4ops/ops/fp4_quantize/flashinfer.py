"""fp4_quantize by FlashInfer: compute capability 10.0 and later. It rounds some ties otherwise than the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Call
from .. import _flashinfer
from . import fp4_quantize

# From CUDA 12.9 on FlashInfer has one module for the family of 12.0.
_FAMILY_12 = "120f" if tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2])) >= (12, 9) else ""

KERNELS = {
    "cuda": _flashinfer.Kernel(
        "fp4_quantize",
        (90, 100, 103, 107, 110, 120, 121),
        "cuda",
        modules={c: f"fp4_quantization_{(c >= 120 and _FAMILY_12) or c}" for c in (90, 100, 103, 107, 110, 120, 121)},
    ),
    "cute-dsl": _flashinfer.Kernel(
        "fp4_quantize",
        (100, 103, 107, 110, 120, 121),
        "cute-dsl",
        packages=("cutlass",),
        at_run_time="compile a kernel with CuTe DSL",
    ),
}


def pick(capability: int, call: Call | None) -> str:
    """FlashInfer's faster kernel on 10.0 and 10.3, where its package is there and it gets the call right."""
    inversed = call is not None and call.is_global_scale_inversed
    fits = capability in (100, 103) and not inversed and _flashinfer.has_package("cutlass")
    return "cute-dsl" if fits else "cuda"


def _unsupported(call: Call, name: str) -> str | None:
    if call.input.dtype == torch.float32:
        return "FlashInfer quantises bfloat16, float16 and float8_e4m3fn, not float32"
    if call.global_scale is not None and call.global_scale.numel() != 1:
        return "FlashInfer takes one global scale, not one for each row"
    return "FlashInfer's kernels need a row" if not call.input.numel() else None


@_flashinfer.adapter(fp4_quantize, KERNELS, _unsupported, pick, exact=False)
def fp4_quantize_flashinfer(
    input: Tensor,
    global_scale: Tensor | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    is_global_scale_inversed: bool = False,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    if backend == "flashinfer":
        backend = "cuda" if is_global_scale_inversed else pick(_flashinfer.capability_of(input.device), None)
    codes, scales = _flashinfer.function("fp4_quantize")(
        # Contiguous: it takes a second-to-last stride of 1 for a matrix stored by columns, and turns the result.
        input=input.flatten(0, -2).contiguous(),
        global_scale=global_scale if global_scale is None else global_scale.reshape(1),
        sf_vec_size=sf_vec_size,
        sf_use_ue8m0=sf_use_ue8m0,
        is_sf_swizzled_layout=is_sf_swizzled_layout,
        is_sf_8x4_layout=is_sf_8x4_layout,
        is_global_scale_inversed=is_global_scale_inversed,
        backend=backend,
        # Left out, it would be read from the environment, and change the meaning.
        **_flashinfer.accepted("fp4_quantize", nvfp4_4over6=None),
    )
    return codes.reshape(*input.shape[:-1], -1), scales
