"""Samples of mm_mxfp8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import scale_layouts
from ...block_quantization import dequantize_blocks
from ...formats import MXFP8
from ...testing.numerics import assert_matmul_close
from ...testing.samples import values
from ...weight_layouts import pack_hopper_weight, shuffle_matrix_a, shuffle_matrix_sf_a
from .. import _matmul
from ..mm_fp4 import a_layout
from ..mxfp8_quantize import mxfp8_quantize
from ..mxfp8_quantize.samples import example as quantize_example


def example(device: torch.device, m: int = 16, n: int = 4096, k: int = 4096) -> tuple[Any, ...]:
    (a, a_sf), (b, b_sf) = (mxfp8_quantize(*quantize_example(device, rows, k)) for rows in (m, n))
    return a, b.T, a_sf, b_sf


def samples() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    for m, n, k in ((0, 24, 64), (1, 8, 96), (17, 40, 160), (129, 136, 64)):
        a, a_sf = mxfp8_quantize(values(m, m, k))
        b, b_sf = mxfp8_quantize(values(n, n, k))
        yield f"{m}x{n}x{k}", (a, b.T, a_sf, b_sf), {}
        a, a_sf = mxfp8_quantize(values(m, m, k), sf_swizzle_layout=1)
        yield f"8x4-{m}x{n}x{k}", (a, b.T, a_sf, b_sf), {"use_8x4_sf_layout": True, "out_dtype": torch.float32}
    # Sizes that every library's kernels take.
    m, n, k = 5, 256, 256
    a, a_sf = mxfp8_quantize(values(m, m, k))
    b, b_sf = mxfp8_quantize(values(n, n, k))
    yield "round", (a, b.T, a_sf, b_sf), {}
    linear = scale_layouts.unswizzle(b_sf, n, k // 32, "128x4")
    yield "trtllm", (a, shuffle_matrix_a(b).T, a_sf, shuffle_matrix_sf_a(linear)), {"b_layout": "trtllm"}
    m, n, k = 5, 200, 416
    a, a_sf = mxfp8_quantize(values(m, m, k))
    b, b_sf = mxfp8_quantize(values(n, n, k), is_sf_swizzled_layout=False)
    packed, scales = pack_hopper_weight(b, b_sf.view(n, k // 32), MXFP8)
    yield "hopper", (a, packed.view(b.dtype).T, a_sf, scales.flatten()), {"b_layout": "hopper"}


def assert_close(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    *,
    use_8x4_sf_layout: bool = False,
    b_layout: str = "plain",
    **_: Any,
) -> None:
    """Within the bound of exact products and fp32 sums."""
    k = a.shape[1]
    a_scales = scale_layouts.unswizzle(a_descale, a.shape[0], k // MXFP8.block_size, a_layout(use_8x4_sf_layout))
    weight, b_scales = _matmul.plain_weight(b.T, b_descale, k, MXFP8, b_layout)
    assert_matmul_close(out, dequantize_blocks(a, a_scales, MXFP8), dequantize_blocks(weight, b_scales, MXFP8))
