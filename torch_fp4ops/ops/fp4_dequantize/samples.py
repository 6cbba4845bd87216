"""Samples of fp4_dequantize: what fp4_quantize makes of its own samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..fp4_quantize import fp4_quantize
from ..fp4_quantize.samples import example as quantize_example
from ..fp4_quantize.samples import samples as quantize_samples


def example(device: torch.device, m: int = 128, k: int = 4096) -> tuple[Any, ...]:
    return (*fp4_quantize(*quantize_example(device, m, k)), torch.ones(1, device=device))


def samples() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    for name, args, kwargs in quantize_samples():
        codes, scales = fp4_quantize(*args, **kwargs)
        yield name, (codes, scales, *args[1:]), kwargs
        if name == "nvfp4-128x4-17x96":
            yield f"{name}-flat", (codes, scales.flatten(), *args[1:]), {**kwargs, "out_dtype": torch.bfloat16}
        if name == "mxfp4-8x4-17x96":
            yield f"{name}-fp16", (codes, scales), {**kwargs, "out_dtype": torch.float16}
