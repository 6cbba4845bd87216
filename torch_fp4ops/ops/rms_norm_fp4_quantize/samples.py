"""Samples of rms_norm_fp4_quantize."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...testing.samples import values
from ..fp4_quantize.samples import FORMATS, LAYOUTS


def example(device: torch.device, m: int = 128, k: int = 4096) -> tuple[Any, ...]:
    x = torch.empty(m, k, dtype=torch.bfloat16, device=device)
    return (x, torch.ones(k, dtype=torch.bfloat16, device=device), torch.ones(1, device=device))


def samples() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    scale = torch.tensor([448.0 * 6 / 5])
    weight = values(9, 96)
    for name, fmt in FORMATS.items():
        for layout, flags in LAYOUTS.items():
            for m in (0, 17, 129):
                x = values(m, m, 96, scale=2.0 ** (m % 20))
                args = (x, weight, scale) if name == "nvfp4" else (x, weight)
                yield f"{name}-{layout}-{m}x96", args, {**fmt, **flags}
    for dtype in (torch.float16, torch.float32):
        args = (values(1, 5, 64, dtype=dtype), values(2, 64, dtype=torch.float32), scale)
        yield f"nvfp4-{dtype}", args, {}
    yield "nvfp4-rank4-eps", (values(2, 2, 3, 5, 32), weight[:32], scale), {"eps": 0.1}
    yield "nvfp4-strided", (values(3, 96, 40)[:, :33].T, weight, scale), {"eps": 0.0}
    yield "nvfp4-unaligned-weight", (values(3, 7, 64), weight[1:65], scale), {}
    yield "nvfp4-no-weight-inversed", (values(4, 9, 64), None, 1 / scale), {"is_global_scale_inversed": True}
    yield "nvfp4-per-row", (values(5, 4, 64), weight[:64], torch.tensor([100.0, 200.0, 400.0, 1e-3])), {}
    special = values(6, 8, 32, dtype=torch.float32)
    special[0] = 0.0
    special[1, 3], special[2, 20], special[3, 5] = float("nan"), float("inf"), 3e38
    special[4:] *= torch.tensor([[1e-18], [1e-30], [1e18], [1e20]])
    yield "nvfp4-special", (special, None, scale), {"eps": 0.0}
