"""Samples of nvfp4_kv_dequantize: what nvfp4_kv_quantize makes of its own samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..nvfp4_kv_quantize import nvfp4_kv_quantize
from ..nvfp4_kv_quantize.samples import example as quantize_example
from ..nvfp4_kv_quantize.samples import samples as quantize_samples


def example(device: torch.device, m: int = 128, k: int = 1024) -> tuple[Any, ...]:
    x, scale = quantize_example(device, m, k)
    return (*nvfp4_kv_quantize(x, scale), scale)


def samples() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    for i, (name, args, kwargs) in enumerate(quantize_samples()):
        dtype = (torch.bfloat16, torch.float16, torch.float32)[i % 3]
        yield f"{name}-{dtype}", (*nvfp4_kv_quantize(*args, **kwargs), args[1], dtype), {}
