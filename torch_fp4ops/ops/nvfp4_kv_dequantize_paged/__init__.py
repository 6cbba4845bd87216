"""nvfp4_kv_dequantize_paged: keys and values out of a paged FP4 cache, in order, in 16 or 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codecs import encode_e4m3
from ...contracts import Call, Out
from ...formats import kv_format
from ...registry import op
from ...selection import Preference
from .. import _kv, _scales

_DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def tokens_of(k_cache: Tensor, block_tables: Tensor, kv_layout: str, max_seq_len: int | None) -> int:
    """Tokens a sequence in the output."""
    return block_tables.shape[1] * _kv.page_size(k_cache, kv_layout) if max_seq_len is None else max_seq_len


def tokens_of_call(call: Call) -> int:
    return tokens_of(call.k_cache, call.block_tables, call.kv_layout, call.max_seq_len)


def _contract(call: Call) -> tuple[Out, Out]:
    fmt = _kv.require_format(call)
    _kv.require_layout(call)
    call.require_rank("k_cache", 4)
    heads, dim = _kv.heads_of(call.k_cache, call.kv_layout), call.k_cache.shape[3] * 2
    _scales.require_blocks(call, "k_cache", dim, fmt)
    _kv.require_caches(call, heads, dim, fmt)
    _kv.require_sequences(call)
    _kv.require_cache_scales(call, fmt)
    if call.max_seq_len is not None:
        longest = tokens_of(call.k_cache, call.block_tables, call.kv_layout, None)
        allowed = f"0 to the {longest} tokens that block_tables has pages for, or None for all of them"
        call.require(call.max_seq_len >= 0, "max_seq_len", call.max_seq_len, allowed)
        call.require(call.max_seq_len <= longest, "max_seq_len", call.max_seq_len, allowed)
    if call.output_dtype not in _DTYPES:
        call.require(False, "output_dtype", call.output_dtype, " or ".join(map(str, _DTYPES)))
    out = Out((call.block_tables.shape[0], tokens_of_call(call), heads, dim), call.output_dtype)
    return out, out


def _check_values(call: Call) -> None:
    _kv.check_cache_scales(call)
    _kv.check_sequences(call, tokens_of_call(call))


_PREFERENCES = (
    Preference(
        "triton",
        "cuda",
        "one launch for keys and values, where the reference takes dozens; NVIDIA H200: 755 us for 64 sequences of "
        "8192 tokens of 8 x 128, 85% of the copy rate",
    ),
)


@op(
    preferences=_PREFERENCES,
    contract=_contract,
    check_values=_check_values,
    byte_arguments=_kv.BYTES,
)
def nvfp4_kv_dequantize_paged(
    k_cache: Tensor,
    v_cache: Tensor,
    k_cache_sf: Tensor,
    v_cache_sf: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    kv_layout: str = "NHD",
    output_dtype: torch.dtype = torch.bfloat16,
    max_seq_len: int | None = None,
    *,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Dequantise sequences of a paged cache into contiguous keys and values: ``(code * SF) * k_scale``.

    The cache is what :func:`nvfp4_kv_quantize_store` writes. The output's shape follows from shapes alone, so the op
    compiles and is captured once for all lengths.

    Args:
        k_cache, v_cache: uint8 codes ``[pages, page_size, heads, D/2]`` (NHD) or ``[pages, heads, page_size, D/2]``
            (HND), D a multiple of the block. Any strides but a last one of 1.
        k_cache_sf, v_cache_sf: uint8 scales, the same with ``D / sf_vec_size``, linear.
        block_tables: int32 or int64 ``[batch, max_pages]``: token t of a sequence is entry ``t % page_size`` of page
            ``block_tables[sequence, t // page_size]``. Pages that the sequence does not reach may be anything.
        seq_lens: int32 or int64 ``[batch]``, tokens of each sequence, at most those of the output.
        k_scale, v_scale: float32, one element, the *decode* global scales; None for formats without one.
        kv_layout: ``"NHD"`` or ``"HND"``.
        output_dtype: bfloat16, float16 or float8_e4m3fn; rounded once, from fp32. E4M3 saturates at +-448 and keeps
            NaN; a ``k_scale`` divided by the scale of an FP8 cache gives that cache.
        max_seq_len: tokens a sequence in the output; None for ``max_pages * page_size``.
        sf_vec_size, sf_use_ue8m0: the format: 16 and False NVFP4, 32 and True MXFP4, 16 and True BlockFP4.
        backend: ``"auto"`` or a backend's name.

    Returns:
        Keys and values, each ``[batch, max_seq_len, heads, D]`` of ``output_dtype``; zeros from a sequence's end on.
        Blocks with a NaN scale are NaN. On a GPU, where looking would synchronise, a length above ``max_seq_len`` is
        cut to it, and the tokens of a page outside of the cache are zeros.

    Raises:
        ValueError: a wrong dtype, shape, stride, D, layout, format or ``max_seq_len``, and on the CPU a length or a
            page out of range, or a global scale that is not finite and above zero.

    Source: FlashInfer ``nvfp4_kv_dequantize_paged`` (NVFP4 to 16 bits into outputs given) with the cache tuples spelt
    out and the ends of sequences written.
    """
    fmt = kv_format(sf_vec_size, sf_use_ue8m0)
    assert fmt is not None
    page = _kv.page_size(k_cache, kv_layout)
    tokens = tokens_of(k_cache, block_tables, kv_layout, max_seq_len)
    index, there = _kv.present(block_tables, seq_lens, k_cache.shape[0], page, tokens)
    keys, values = (
        _kv.gather(cache, cache_sf, scale, fmt, kv_layout, index, there)
        for cache, cache_sf, scale in ((k_cache, k_cache_sf, k_scale), (v_cache, v_cache_sf, v_scale))
    )
    return _rounded(keys, output_dtype), _rounded(values, output_dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return encode_e4m3(x).view(dtype) if dtype == torch.float8_e4m3fn else x.to(dtype)
