"""Samples of nvfp4_kv_quantize."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...testing.samples import values


def example(device: torch.device, m: int = 128, k: int = 1024) -> tuple[Any, ...]:
    return (torch.empty(m, k, dtype=torch.bfloat16, device=device), torch.ones(1, device=device))


def samples() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    scale = torch.tensor([5 / 2688])
    for m, k in ((0, 64), (1, 64), (17, 112), (130, 128)):
        yield f"{m}x{k}", (values(m, m, k), scale), {}
    yield "fp16-heads", (values(1, 5, 8, 64, dtype=torch.float16), scale), {}
    yield "fp32-strided", (values(2, 6, 4, 128, dtype=torch.float32)[:, :, ::2], scale.squeeze()), {}
