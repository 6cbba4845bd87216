"""Samples of mxfp8_dequantize: what mxfp8_quantize makes of its own samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..mxfp8_quantize import mxfp8_quantize
from ..mxfp8_quantize.samples import example as quantize_example
from ..mxfp8_quantize.samples import samples as quantize_samples


def example(device: torch.device, m: int = 128, k: int = 4096) -> tuple[Any, ...]:
    return mxfp8_quantize(*quantize_example(device, m, k))


def samples() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    for i, (name, args, kwargs) in enumerate(quantize_samples()):
        elements, scales = mxfp8_quantize(*args, **kwargs)
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        swizzled = args[1] if len(args) > 1 else True
        yield f"{name}-{dtype}", (elements, scales, swizzled), {**kwargs, "out_dtype": dtype}
