"""Samples of mm_fp4."""

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
from ...weight_layouts import pack_hopper_weight, shuffle_matrix_a, shuffle_matrix_sf_a
from .. import _matmul
from ..fp4_quantize import fp4_quantize
from ..fp4_quantize.samples import example as quantize_example
from . import a_layout


def example(device: torch.device, m: int = 16, n: int = 4096, k: int = 4096) -> tuple[Any, ...]:
    (a, a_sf), (b, b_sf) = (fp4_quantize(*quantize_example(device, rows, k)) for rows in (m, n))
    return a, b.T, a_sf, b_sf.T, torch.ones(1, device=device)


def samples() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    scale = torch.tensor([448.0 * 6 / 5])
    mxfp4 = {"sf_vec_size": 32, "sf_use_ue8m0": True}
    for m, n, k in ((0, 24, 64), (1, 8, 96), (17, 40, 160), (129, 136, 64)):
        a, a_sf = fp4_quantize(values(m, m, k), scale)
        b, b_sf = fp4_quantize(values(n, n, k), scale)
        yield f"nvfp4-{m}x{n}x{k}", (a, b.T, a_sf, b_sf.T, 1 / (scale * scale)), {}
        a, a_sf = fp4_quantize(values(m, m, k), None, **mxfp4)
        b, b_sf = fp4_quantize(values(n, n, k), None, **mxfp4)
        kwargs = {"block_size": 32, "use_nvfp4": False}
        yield f"mxfp4-{m}x{n}x{k}", (a, b.T, a_sf, b_sf.T, None, torch.float16), kwargs
    m, n, k = 9, 16, 64
    a, a_sf = fp4_quantize(values(m, m, k), scale, is_sf_8x4_layout=True)
    b, b_sf = fp4_quantize(values(n, n, k), scale)
    alpha = 1 / (scale * scale)
    yield "8x4-flat-fp32", (a, b.T, a_sf.flatten(), b_sf.flatten(), alpha, torch.float32), {"use_8x4_sf_layout": True}
    a, a_sf = fp4_quantize(values(m, m, k), scale)
    yield "alpha-per-row", (a, b.T, a_sf, b_sf.T, alpha * torch.arange(1, m + 1)), {}
    # Sizes that every library's kernels take.
    m, n, k = 5, 256, 256
    a, a_sf = fp4_quantize(values(m, m, k), scale)
    b, b_sf = fp4_quantize(values(n, n, k), scale)
    yield "nvfp4-round", (a, b.T, a_sf, b_sf.T, alpha), {}
    linear = scale_layouts.unswizzle(b_sf, n, k // 16, "128x4")
    shuffled = shuffle_matrix_a(b), shuffle_matrix_sf_a(linear).view(b_sf.shape)
    yield "trtllm", (a, shuffled[0].T, a_sf, shuffled[1].T, alpha), {"b_layout": "trtllm"}
    hopper_sizes = (("", NVFP4, 5, 200, 432), ("-steps", NVFP4, 9, 144, 320), ("", MXFP4, 19, 128, 256))
    for name, fmt, m, n, k in hopper_sizes:
        flags = mxfp4 if fmt is MXFP4 else {}
        a, a_sf = fp4_quantize(values(m, m, k), scale if fmt is NVFP4 else None, **flags)
        b, b_sf = fp4_quantize(values(n, n, k), scale if fmt is NVFP4 else None, **flags, is_sf_swizzled_layout=False)
        packed, scales = pack_hopper_weight(b, b_sf, fmt)
        hopper = {"b_layout": "hopper", "block_size": fmt.block_size, "use_nvfp4": fmt is NVFP4}
        yield f"hopper-{fmt.name}{name}", (a, packed.T, a_sf, scales.T, alpha), hopper


def assert_close(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    alpha: Tensor | None = None,
    *_: Any,
    **kw: Any,
) -> None:
    """Within the bound of exact products and fp32 sums."""
    fmt = NVFP4 if kw.get("use_nvfp4", True) else MXFP4
    k = a.shape[1] * 2
    layout = a_layout(kw.get("use_8x4_sf_layout", False))
    a_scales = scale_layouts.unswizzle(a_descale, a.shape[0], k // fmt.block_size, layout)
    weight, b_scales = _matmul.plain_weight(b.T, b_descale.t(), k, fmt, kw.get("b_layout", "plain"))
    assert_matmul_close(out, dequantize_blocks(a, a_scales, fmt), dequantize_blocks(weight, b_scales, fmt), alpha)
