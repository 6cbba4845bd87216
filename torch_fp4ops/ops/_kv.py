"""Contract pieces and reference forms that the ops on paged KV caches share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_quantization import dequantize_blocks
from ..contracts import Call
from ..formats import BlockFormat, kv_format
from ._scales import byte_arguments

_LAYOUTS = ("NHD", "HND")
BYTES = byte_arguments(
    ("k_cache", "v_cache"),
    ("k_cache_sf", "v_cache_sf"),
    lambda given: kv_format(given["sf_vec_size"], given["sf_use_ue8m0"]),
)


def require_format(call: Call) -> BlockFormat:
    """The format that ``sf_vec_size`` and ``sf_use_ue8m0`` name."""
    fmt = kv_format(call.sf_vec_size, call.sf_use_ue8m0)
    given = f"{call.sf_vec_size} with sf_use_ue8m0={call.sf_use_ue8m0}"
    allowed = "16 with False (NVFP4), 32 with True (MXFP4) or 16 with True (BlockFP4)"
    call.require(fmt is not None, "sf_vec_size", given, allowed)
    assert fmt is not None
    return fmt


def require_layout(call: Call) -> None:
    call.require(call.kv_layout in _LAYOUTS, "kv_layout", call.kv_layout, "'NHD' or 'HND'")


def page_size(cache: Tensor, kv_layout: str) -> int:
    return cache.shape[1 if kv_layout == "NHD" else 2]


def heads_of(cache: Tensor, kv_layout: str) -> int:
    return cache.shape[2 if kv_layout == "NHD" else 1]


def strides(cache: Tensor, kv_layout: str) -> tuple[int, int, int]:
    """From page to page, entry to entry and head to head; 0 where there is but one."""
    page, a, b, _ = (s if d > 1 else 0 for s, d in zip(cache.stride(), cache.shape, strict=True))
    return (page, a, b) if kv_layout == "NHD" else (page, b, a)


def require_caches(call: Call, heads: int, dim: int, fmt: BlockFormat) -> None:
    """Four caches of one number of pages and entries, for so many heads of so many values."""
    call.require_rank("k_cache", 4)
    pages, page = call.k_cache.shape[0], page_size(call.k_cache, call.kv_layout)
    middle = (page, heads) if call.kv_layout == "NHD" else (heads, page)
    for name, last in (("cache", dim // 2), ("cache_sf", dim // fmt.block_size)):
        for argument in (f"k_{name}", f"v_{name}"):
            call.require_dtype(argument, (torch.uint8,))
            call.require_shape(argument, (pages, *middle, last), f" ({call.kv_layout})")
            dense = getattr(call, argument).stride(-1) == 1
            given = f"of strides {tuple(getattr(call, argument).stride())}"
            call.require(dense, argument, given, "any strides but a last one of 1")


def require_cache_scales(call: Call, fmt: BlockFormat) -> None:
    """The decode scales of keys and values; None exactly for formats without one."""
    for argument in ("k_scale", "v_scale"):
        given = getattr(call, argument)
        if fmt.has_global_scale:
            call.require(given is not None, argument, "None", f"a float32 tensor ({fmt.name})")
            call.require_scalar(argument)
        else:
            call.require(given is None, argument, "given", f"None: {fmt.name} has no global scale")


def check_cache_scales(call: Call) -> None:
    """Reads data: only for a check of values, on the CPU."""
    for argument in ("k_scale", "v_scale"):
        if getattr(call, argument) is not None:
            call.require_positive(argument)


def require_sequences(call: Call, batch: int | None = None) -> None:
    """A page table and lengths, of so many sequences."""
    for argument, rank in (("block_tables", 2), ("seq_lens", 1)):
        call.require_dtype(argument, (torch.int32, torch.int64))
        call.require_rank(argument, rank)
    batch = call.block_tables.shape[0] if batch is None else batch
    call.require_shape("block_tables", (batch, call.block_tables.shape[1]), " (a row for each sequence)")
    call.require_shape("seq_lens", (batch,), " (one for each sequence)")


def check_sequences(call: Call, longest: int) -> None:
    """Reads data: only for a check of values, on the CPU."""
    if not call.seq_lens.numel():
        return
    shortest, most = (int(n) for n in call.seq_lens.aminmax())
    call.require(shortest >= 0 and most <= longest, "seq_lens", f"{shortest} to {most}", f"0 to {longest}")
    page, pages = page_size(call.k_cache, call.kv_layout), call.k_cache.shape[0]
    first_tokens = torch.arange(call.block_tables.shape[1], device=call.device) * page
    used = call.block_tables[first_tokens < call.seq_lens.unsqueeze(1)]
    if used.numel():
        low, high = (int(n) for n in used.aminmax())
        allowed = f"0 to {pages - 1} for every page that a sequence reaches"
        call.require(low >= 0 and high < pages, "block_tables", f"{low} to {high}", allowed)


def present(block_tables: Tensor, seq_lens: Tensor, pages: int, page: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Of each sequence's first tokens, ``[batch, tokens]``: the page, and whether the token is there.

    A token on a page outside of the cache isn't.
    """
    token = torch.arange(tokens, device=seq_lens.device)
    index = block_tables[:, token // page].long()
    there = (token < seq_lens.unsqueeze(1)) & (index >= 0) & (index < pages)
    return torch.where(there, index, 0), there


def gather(
    cache: Tensor,
    cache_sf: Tensor,
    scale: Tensor | None,
    fmt: BlockFormat,
    kv_layout: str,
    index: Tensor,
    there: Tensor,
) -> Tensor:
    """fp32 values ``[batch, tokens, heads, D]`` of the pages that ``present`` gives; zeros where no token is."""
    if kv_layout == "HND":
        cache, cache_sf = cache.transpose(1, 2), cache_sf.transpose(1, 2)
    page, heads, half = cache.shape[1:]
    if not index.numel() or not cache.numel():
        return cache.new_zeros((*index.shape, heads, half * 2), dtype=torch.float32)
    entry = torch.arange(index.shape[1], device=index.device) % page
    decode = None if scale is None else scale.reshape(())
    values = dequantize_blocks(cache[index, entry], cache_sf[index, entry], fmt, decode)
    return torch.where(there[..., None, None], values, 0.0)
