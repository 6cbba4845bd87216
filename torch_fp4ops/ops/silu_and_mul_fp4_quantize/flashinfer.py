"""silu_and_mul_fp4_quantize by FlashInfer: NVFP4, compute capability 10.0 and later; y is rounded to input's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Call
from .. import _flashinfer
from . import silu_and_mul_fp4_quantize

KERNELS = {
    "flashinfer": _flashinfer.Kernel(
        "silu_and_mul_nvfp4_quantize",
        (100, 103, 107, 110, 120, 121),
        packages=("cutlass",),
        at_run_time="compile a kernel with CuTe DSL",
    ),
}


def _unsupported(call: Call, name: str) -> str | None:
    if call.sf_use_ue8m0:
        return "FlashInfer fuses the activation with NVFP4 only, not with MXFP4"
    if call.input.dtype == torch.float32:
        return "FlashInfer takes bfloat16 and float16, not float32"
    if call.is_global_scale_inversed:
        return "FlashInfer takes the encode scale, not its inverse (is_global_scale_inversed)"
    if call.global_scale.numel() != 1:
        return "FlashInfer takes one global scale, not one for each row"
    return "FlashInfer's kernel needs a row" if not call.input.numel() else None


# A step of bfloat16 is a sixteenth of E4M3's, so rounding to it carries one block scale in 64 over to a neighbour on
# average, and with that the codes of a block. 5% leaves room for small outputs; FlashInfer's own tests allow as much.
@_flashinfer.adapter(silu_and_mul_fp4_quantize, KERNELS, _unsupported, exact=False, differing=0.05)
def silu_and_mul_fp4_quantize_flashinfer(
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
    assert global_scale is not None  # NVFP4 has one
    codes, scales = _flashinfer.function("silu_and_mul_nvfp4_quantize")(
        input=input.flatten(0, -2).contiguous(),
        global_scale=global_scale.reshape(1),
        sf_vec_size=sf_vec_size,
        is_sf_swizzled_layout=is_sf_swizzled_layout,
        is_sf_8x4_layout=is_sf_8x4_layout,
        # Left out, it would be read from the environment, and change the meaning.
        **_flashinfer.accepted("silu_and_mul_nvfp4_quantize", nvfp4_4over6=None),
    )
    return codes.reshape(*input.shape[:-1], -1), scales
