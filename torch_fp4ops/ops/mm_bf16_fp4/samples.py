"""Samples of mm_bf16_fp4."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...block_quantization import dequantize_blocks
from ...formats import MXFP4, NVFP4
from ...testing.numerics import assert_matmul_close
from ...testing.samples import values
from ...weight_layouts import pack_hopper_weight
from .. import _matmul
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
    for fmt, dtype, m, n, k in ((NVFP4, torch.float16, 9, 200, 272), (MXFP4, torch.bfloat16, 33, 128, 512)):
        flags = (scale, 16, False, False) if fmt is NVFP4 else (None, 32, True, False)
        b, b_sf = fp4_quantize(values(n, n, k), *flags)
        packed = pack_hopper_weight(b, b_sf, fmt)
        hopper = {"block_size": fmt.block_size, "b_layout": "hopper"}
        yield f"hopper-{fmt.name}", (values(m, m, k, dtype=dtype), *packed, 1 / scale), hopper


def assert_close(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    b_descale: Tensor,
    alpha: Tensor | None = None,
    *,
    block_size: int = 16,
    b_layout: str = "plain",
    **_: Any,
) -> None:
    """Within the bound of exact products and fp32 sums."""
    fmt = {16: NVFP4, 32: MXFP4}[block_size]
    weight, scales = _matmul.plain_weight(b, b_descale, a.shape[1], fmt, b_layout)
    assert_matmul_close(out, a, dequantize_blocks(weight, scales, fmt), alpha)
