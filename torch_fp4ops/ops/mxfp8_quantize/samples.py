"""Samples of mxfp8_quantize."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...testing.samples import values


def example(device: torch.device, m: int = 128, k: int = 4096) -> tuple[Any, ...]:
    return (torch.empty(m, k, dtype=torch.bfloat16, device=device),)


def samples() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    for m in (0, 1, 17, 129):
        yield f"128x4-{m}x96", (values(m, m, 96),), {}
        yield f"linear-{m}x96", (values(m, m, 96), False), {}
        yield f"8x4-{m}x96", (values(m, m, 96),), {"sf_swizzle_layout": 1}
    for dtype in (torch.float16, torch.float32):
        yield f"{dtype}", (values(1, 5, 64, dtype=dtype),), {}
    yield "rank3-aligned", (values(2, 2, 5, 96), True, 128), {}
    yield "strided", (values(3, 64, 40)[:, :33].T,), {}
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -6.0, 448.0, 1e-45, 3.4e38])
    yield "special", (special.repeat_interleave(4).repeat(3, 2),), {}
