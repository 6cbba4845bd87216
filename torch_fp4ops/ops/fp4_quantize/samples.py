"""Samples of fp4_quantize."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...testing.samples import values

LAYOUTS: dict[str, dict[str, Any]] = {
    "128x4": {},
    "8x4": {"is_sf_8x4_layout": True},
    "linear": {"is_sf_swizzled_layout": False},
}
FORMATS: dict[str, dict[str, Any]] = {"nvfp4": {}, "mxfp4": {"sf_vec_size": 32, "sf_use_ue8m0": True}}


def example(device: torch.device, m: int = 128, k: int = 4096) -> tuple[Any, ...]:
    return (torch.empty(m, k, dtype=torch.bfloat16, device=device), torch.ones(1, device=device))


def samples() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    scale = torch.tensor([448.0 * 6 / 5])
    for name, fmt in FORMATS.items():
        for layout, flags in LAYOUTS.items():
            for m in (0, 1, 17, 129):
                x = values(m, m, 96)
                args = (x, scale) if name == "nvfp4" else (x,)
                yield f"{name}-{layout}-{m}x96", args, {**fmt, **flags}
    for dtype in (torch.float16, torch.float32, torch.float8_e4m3fn):
        yield f"nvfp4-{dtype}", (values(1, 5, 64, dtype=dtype), scale), {}
    yield "nvfp4-rank4", (values(2, 2, 3, 5, 32), scale), {}
    yield "nvfp4-strided", (values(3, 64, 40)[:, :33].T, scale), {}
    yield "nvfp4-inversed", (values(4, 9, 64), 1 / scale), {"is_global_scale_inversed": True}
    yield "nvfp4-per-row", (values(5, 4, 64), torch.tensor([100.0, 200.0, 400.0, 1e-3])), {}
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -6.0, 448.0, 1e-45, 2.5])
    yield "nvfp4-special", (special.repeat_interleave(2).repeat(3, 4), scale), {}
    yield "nvfp4-underflow", (values(6, 3, 32, dtype=torch.float32, scale=1e-9), scale), {}
