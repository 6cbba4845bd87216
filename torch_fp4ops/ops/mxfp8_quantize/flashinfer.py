"""mxfp8_quantize by FlashInfer: compute capability 10.0 and later."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Call
from .. import _flashinfer, _scales
from . import mxfp8_quantize

_CAPABILITIES = (90, 100, 103, 107, 110, 120, 121)
KERNELS = {
    "cuda": _flashinfer.Kernel("mxfp8_quantize", _CAPABILITIES, "cuda", modules="mxfp8_quantization_sm100"),
    "cute-dsl": _flashinfer.Kernel(
        "mxfp8_quantize",
        _CAPABILITIES[1:],
        "cute-dsl",
        packages=("cutlass",),
        at_run_time="compile a kernel with CuTe DSL",
    ),
}


def pick(capability: int, call: Call | None) -> str:
    """FlashInfer's faster kernel on 10.0 and 10.3, where its package is there."""
    return "cute-dsl" if capability in (100, 103) and _flashinfer.has_package("cutlass") else "cuda"


def _unsupported(call: Call, name: str) -> str | None:
    if call.input.dtype == torch.float32:
        return "FlashInfer quantises bfloat16 and float16, not float32"
    return "FlashInfer's kernels need a row" if not call.input.numel() else None


@_flashinfer.adapter(mxfp8_quantize, KERNELS, _unsupported, pick, exact=False)
def mxfp8_quantize_flashinfer(
    input: Tensor,
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    *,
    sf_swizzle_layout: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    from flashinfer import SfLayout

    if backend == "flashinfer":
        backend = pick(_flashinfer.capability_of(input.device), None)
    layout = _scales.mxfp8_layout(is_sf_swizzled_layout, sf_swizzle_layout)
    elements, scales = _flashinfer.function("mxfp8_quantize")(
        input=input.flatten(0, -2).contiguous(),
        is_sf_swizzled_layout=is_sf_swizzled_layout,
        alignment=alignment,
        backend=backend,
        sf_swizzle_layout=SfLayout(_scales.SF_LAYOUTS.index(layout)),
    )
    return elements.reshape(*input.shape[:-1], -1), scales.flatten()
