"""Samples of silu_and_mul_fp4_quantize."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...testing.samples import values
from ..fp4_quantize.samples import FORMATS, LAYOUTS


def example(device: torch.device, m: int = 128, k: int = 4096) -> tuple[Any, ...]:
    return (torch.empty(m, 2 * k, dtype=torch.bfloat16, device=device), torch.ones(1, device=device))


def samples() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    scale = torch.tensor([448.0 * 6 / 5])
    for name, fmt in FORMATS.items():
        for layout, flags in LAYOUTS.items():
            for m in (0, 17, 129):
                x = values(m, m, 192)
                args = (x, scale) if name == "nvfp4" else (x,)
                yield f"{name}-{layout}-{m}x96", args, {**fmt, **flags}
    for dtype in (torch.float16, torch.float32):
        yield f"nvfp4-{dtype}", (values(1, 5, 128, dtype=dtype, scale=3.0), scale), {}
    yield "nvfp4-rank4", (values(2, 2, 3, 5, 64), scale), {}
    yield "nvfp4-strided", (values(3, 96, 40)[:, :33].T, scale), {}
    yield "nvfp4-inversed", (values(4, 9, 128), 1 / scale), {"is_global_scale_inversed": True}
    yield "nvfp4-per-row", (values(5, 4, 128), torch.tensor([100.0, 200.0, 400.0, 1e-3])), {}
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), -90.0, 90.0, 2.5])
    gate, up = special.repeat_interleave(8).repeat(3, 1), special.repeat(3, 8)
    yield "nvfp4-special", (torch.cat((gate, up), dim=1), scale), {}
