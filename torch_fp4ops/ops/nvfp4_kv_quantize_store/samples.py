"""Samples of nvfp4_kv_quantize_store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...testing.samples import values


def example(device: torch.device, tokens: int = 16, heads: int = 8, dim: int = 128) -> tuple[Any, ...]:
    new = torch.empty(tokens, heads, dim, dtype=torch.bfloat16, device=device)
    page = 16
    cache, sf = (
        torch.empty(tokens // page + 1, page, heads, last, dtype=torch.uint8, device=device)
        for last in (dim // 2, dim // 16)
    )
    scale = torch.ones(1, device=device)
    return new, new, torch.arange(tokens, device=device), cache, cache.clone(), sf, sf.clone(), scale, scale


def samples() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    k_scale, v_scale = torch.tensor([5 / 2688]), torch.tensor([4 / 2688])
    pages, page, heads = 3, 4, 2
    for layout in ("NHD", "HND"):
        for name, rows, dim, slots in (
            ("empty", 0, 64, []),
            ("decode", 1, 64, [5]),
            ("all-skipped", 2, 64, [-1, -1]),
            ("prefill", 6, 112, [0, -1, 11, 4, -7]),  # one more row than slots: padding
        ):
            middle = (page, heads) if layout == "NHD" else (heads, page)
            # A stacked cache, so that K and V are strided views.
            cache = torch.full((pages, 2, *middle, dim // 2), 0xAA, dtype=torch.uint8)
            scales = torch.full((pages, 2, *middle, dim // 16), 0x55, dtype=torch.uint8)
            key, value = values(1, rows, heads, dim), values(2, rows, heads, dim)
            mapping = torch.tensor(slots, dtype=torch.int32 if name == "decode" else torch.int64)
            caches = (cache[:, 0], cache[:, 1], scales[:, 0], scales[:, 1])
            yield f"{layout}-{name}", (key, value, mapping, *caches, k_scale, v_scale, layout), {}
    for name, block in (("mxfp4", 32), ("blockfp4", 16)):
        key, value = values(3, 5, heads, 96), values(4, 5, heads, 96)
        cache, scales = (torch.full((pages, page, heads, n), 0xAA, dtype=torch.uint8) for n in (48, 96 // block))
        mapping = torch.tensor([3, 9, -1, 11])
        args = (key, value, mapping, cache, cache.clone(), scales, scales.clone(), None, None)
        yield name, args, {"sf_vec_size": block, "sf_use_ue8m0": True}
