"""Samples of mm_bf16_fp4."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import scale_layouts
from ...block_quantization import dequantize_blocks
from ...formats import MXFP4, NVFP4
from ...testing.numerics import assert_matmul_close
from ...testing.samples import values
from ..fp4_quantize import fp4_quantize
from ..fp4_quantize.samples import example as quantize_example


def example(device: torch.device, m: int = 16, n: int = 4096, k: int = 4096) -> tuple[Any, ...]:
    scale = torch.ones(1, device=device)
    b, b_sf = fp4_quantize(*quantize_example(device, n, k))
    return torch.empty(m, k, dtype=torch.bfloat16, device=device), b, b_sf, scale


def samples() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    scale = torch.tensor([448.0 * 6 / 5])
    for m, n, k in ((0, 24, 64), (1, 8, 96), (17, 40, 160), (129, 136, 64)):
        b, b_sf = fp4_quantize(values(n, n, k), scale)
        yield f"nvfp4-{m}x{n}x{k}", (values(m, m, k), b, b_sf, 1 / scale), {}
        b, b_sf = fp4_quantize(values(n, n, k), None, 32, True)
        yield f"mxfp4-{m}x{n}x{k}", (values(m, m, k, dtype=torch.float16), b, b_sf.flatten()), {"block_size": 32}
    b, b_sf = fp4_quantize(values(16, 16, 64), scale)
    strided = values(3, 9, 128)[:, ::2]
    yield "strided-fp32-out", (strided, b, b_sf, 1 / scale), {"out_dtype": torch.float32}
    yield "alpha-per-row", (values(4, 5, 64), b, b_sf, torch.linspace(0.1, 2, 5)), {}
    # Sizes that every library's kernels take.
    b, b_sf = fp4_quantize(values(5, 256, 256), scale)
    yield "nvfp4-round", (values(5, 5, 256), b, b_sf, 1 / scale), {}


def assert_close(
    out: Tensor, a: Tensor, b: Tensor, b_descale: Tensor, alpha: Tensor | None = None, *, block_size: int = 16, **_: Any
) -> None:
    """Within the bound of exact products and fp32 sums."""
    fmt = {16: NVFP4, 32: MXFP4}[block_size]
    scales = scale_layouts.unswizzle(b_descale, b.shape[0], a.shape[1] // block_size, "128x4")
    assert_matmul_close(out, a, dequantize_blocks(b, scales, fmt), alpha)
