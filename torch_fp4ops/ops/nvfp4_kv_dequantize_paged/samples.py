"""Samples of nvfp4_kv_dequantize_paged: what nvfp4_kv_quantize_store wrote, pages in a shuffled order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...testing.samples import values
from ..nvfp4_kv_quantize_store import nvfp4_kv_quantize_store

FORMATS: dict[str, dict[str, Any]] = {
    "nvfp4": {},
    "mxfp4": {"sf_vec_size": 32, "sf_use_ue8m0": True},
    "blockfp4": {"sf_vec_size": 16, "sf_use_ue8m0": True},
}


def paged(
    seed: int,
    lengths: Sequence[int],
    heads: int,
    dim: int,
    page: int = 4,
    layout: str = "NHD",
    fmt: str = "nvfp4",
    stacked: bool = False,
    index: torch.dtype = torch.int32,
) -> tuple[Any, ...]:
    """Caches of random keys and values, page table, lengths and global scales, as the ops take them.

    The memory that no sequence reaches holds NaN scales and the table's other entries are no pages. ``stacked``:
    keys and values are views of one tensor. ``index``: dtype of page table and lengths.
    """
    generator = torch.Generator().manual_seed(seed)
    flags = FORMATS[fmt]
    counts = [-(-n // page) for n in lengths]
    pages, most = sum(counts) + 2, max(counts, default=0) + 1
    order = torch.randperm(pages, generator=generator).tolist()
    tables = torch.full((len(lengths), most), -1, dtype=torch.int32)
    slots: list[int] = []
    for i, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        own = [order.pop() for _ in range(count)]
        tables[i, :count] = torch.tensor(own, dtype=torch.int32)
        slots += [own[t // page] * page + t % page for t in range(n)]
    middle = (page, heads) if layout == "NHD" else (heads, page)
    caches: list[Tensor] = []
    for last in (dim // 2, dim // flags.get("sf_vec_size", 16)):
        if stacked:
            both = torch.full((pages, 2, *middle, last), 0xFF, dtype=torch.uint8)
            caches += [both[:, 0], both[:, 1]]
        else:
            caches += [torch.full((pages, *middle, last), 0xFF, dtype=torch.uint8) for _ in range(2)]
    new = (values(seed + 1, len(slots), heads, dim), values(seed + 2, len(slots), heads, dim))
    scales = (torch.tensor([5 / 2688]), torch.tensor([4 / 2688])) if fmt == "nvfp4" else (None, None)
    nvfp4_kv_quantize_store(*new, torch.tensor(slots, dtype=torch.int64), *caches, *scales, layout, **flags)
    return (*caches, tables.to(index), torch.tensor(lengths, dtype=index), *scales, layout)


def blank(device: torch.device, batch: int, tokens: int, heads: int, dim: int) -> tuple[Any, ...]:
    """Caches of zeros, every sequence as long as can be."""
    page = 16
    pages = -(-tokens // page)
    cache, sf = (
        torch.zeros(batch * pages, page, heads, last, dtype=torch.uint8, device=device)
        for last in (dim // 2, dim // 16)
    )
    tables = torch.arange(batch * pages, dtype=torch.int32, device=device).reshape(batch, pages)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
    scale = torch.ones(1, device=device)
    return cache, cache.clone(), sf, sf.clone(), tables, lengths, scale, scale.clone()


def example(device: torch.device, batch: int = 2, tokens: int = 64, heads: int = 8, dim: int = 128) -> tuple[Any, ...]:
    return blank(device, batch, tokens, heads, dim)


def samples() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    yield "no-sequence", paged(0, [], 2, 64), {}
    for layout in ("NHD", "HND"):
        yield f"{layout}-ragged", paged(1, [0, 1, 4, 11], 2, 112, 4, layout, stacked=True), {}
    yield "fp16-int64-tables", (*paged(2, [7, 2], 3, 64, index=torch.int64), torch.float16), {}
    yield "fp8", (*paged(3, [7, 0, 2], 1, 64, 8, "HND"), torch.float8_e4m3fn), {}
    yield "few-tokens", (*paged(4, [5, 3], 2, 64), torch.bfloat16, 6), {}
    for fmt in ("mxfp4", "blockfp4"):
        yield fmt, paged(5, [6, 1], 2, 96, fmt=fmt), FORMATS[fmt]
