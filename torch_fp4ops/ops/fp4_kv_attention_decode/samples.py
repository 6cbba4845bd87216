"""Samples of fp4_kv_attention_decode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...formats import kv_format
from ...testing.numerics import assert_attention_close
from ...testing.samples import values
from .. import _kv
from ..nvfp4_kv_dequantize_paged.samples import FORMATS, blank, paged
from . import in_window


def example(
    device: torch.device,
    batch: int = 2,
    tokens: int = 256,
    q_heads: int = 32,
    heads: int = 8,
    dim: int = 128,
) -> tuple[Any, ...]:
    q = torch.empty(batch, q_heads, dim, dtype=torch.bfloat16, device=device)
    return (q, *blank(device, batch, tokens, heads, dim))


def samples() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    yield "no-sequence", (values(0, 0, 4, 64), *paged(0, [], 2, 64)), {}
    for layout in ("NHD", "HND"):
        yield f"{layout}-ragged", (values(1, 4, 4, 64), *paged(1, [0, 1, 4, 37], 2, 64, 4, layout, stacked=True)), {}
    strided = values(2, 2, 10, 128)[:, 1:7]
    yield "D128-strided-q", (strided, *paged(2, [33, 70], 2, 128, 16)), {"sm_scale": 0.2}
    yield "D256-one-kv-head", (values(3, 2, 20, 256), *paged(3, [21, 9], 1, 256, 8, "HND")), {}
    q16 = values(4, 3, 8, 64, dtype=torch.float16)
    yield "fp16-window-cap", (q16, *paged(4, [3, 50, 19], 2, 64, 16)), {"window_left": 16, "logits_soft_cap": 2.0}
    yield "int64-tables", (values(7, 2, 4, 64), *paged(7, [40, 21], 2, 64, 16, index=torch.int64)), {}
    yield "window-of-one", (values(5, 2, 2, 64), *paged(5, [9, 30], 2, 64)), {"window_left": 0}
    for fmt in ("mxfp4", "blockfp4"):
        yield fmt, (values(6, 2, 4, 64), *paged(6, [26, 5], 2, 64, fmt=fmt)), FORMATS[fmt]


def assert_close(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_cache_sf: Tensor,
    v_cache_sf: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    kv_layout: str = "NHD",
    *,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    **_: Any,
) -> None:
    """Within the bound of an online softmax in fp32 over the decoded cache."""
    fmt = kv_format(sf_vec_size, sf_use_ue8m0)
    assert fmt is not None
    page = _kv.page_size(k_cache, kv_layout)
    tokens = block_tables.shape[1] * page
    index, there = _kv.present(block_tables, seq_lens, k_cache.shape[0], page, tokens)
    # Code times scale is exact; the global scales are factors that the oracle applies in float64.
    k, v = (
        _kv.gather(cache, cache_sf, None, fmt, kv_layout, index, there).double()
        for cache, cache_sf in ((k_cache, k_cache_sf), (v_cache, v_cache_sf))
    )
    k, v = (t if s is None else t * s.double() for t, s in ((k, k_scale), (v, v_scale)))
    seen = in_window(there, seq_lens, window_left)
    sm_scale = q.shape[2] ** -0.5 if sm_scale is None else sm_scale
    assert_attention_close(out, q, k, v, seen, sm_scale, logits_soft_cap)
