"""nvfp4_kv_dequantize_paged in Triton: keys and values in one launch.

Any GPU from compute capability 8.0, ROCm included. A thread makes eight values from one word of codes.
"""

# mypy: disable-error-code="assignment"
# Kernels grow tuples, which Triton's compiler unrolls.

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import BLOCKFP4, MXFP4, NVFP4, kv_format
from .. import _kv
from .. import _triton_pack as pack
from .. import _triton_prims as p
from .. import _triton_tiles as t
from .._triton_launch import AotCase, launch, why_not
from . import nvfp4_kv_dequantize_paged, tokens_of

_SIZES = ["tokens", "pages", "table_row", "heads", "col_tiles", "row_tiles"]
_STRIDES = ["page", "entry", "head", "sf_page", "sf_entry", "sf_head"]


@triton.jit
def _dequantize(
    cache_ptr,
    sf_ptr,
    table_ptr,
    length_ptr,
    scale_ptr,
    out_ptr,
    tokens,
    pages,
    table_row,
    heads,
    col_tiles,
    row_tiles,
    strides,
    FORMAT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    ITERS: tl.constexpr,
):
    page_stride, entry_stride, head_stride, sf_page, sf_entry, sf_head = strides
    PER_SCALE: tl.constexpr = 4 if FORMAT == "mxfp4" else 2  # words
    i = tl.arange(0, T * C)
    pid = tl.program_id(0)
    sequence = (pid // col_tiles // row_tiles).to(tl.int64)
    first = pid // col_tiles % row_tiles * (T * ITERS) + i // C
    col = pid % col_tiles * C + i % C
    h = col // WORDS
    word = col % WORDS
    length = tl.minimum(tl.load(length_ptr + sequence), tokens)
    table_ptr += sequence * table_row
    # All loads come before the first store, past which the compiler moves none.
    words = ()
    steps = ()
    for n in tl.static_range(ITERS):
        token = first + n * T
        there = (token < length) & (h < heads)
        page = tl.load(table_ptr + token // PAGE_SIZE, mask=there, other=-1)
        there = there & (page >= 0) & (page < pages)
        page = page.to(tl.int64)
        entry = (token % PAGE_SIZE).to(tl.int64)
        row = page * page_stride + entry * entry_stride + h.to(tl.int64) * head_stride
        if ALIGNED == 4:
            words += (t.load_narrow(cache_ptr, row + word, there, 4),)
        else:
            whole = tl.zeros((T * C,), tl.uint32)
            for byte in tl.static_range(4):
                part = tl.load(cache_ptr + row + word * 4 + byte, mask=there, other=0)
                whole |= part.to(tl.uint32) << (8 * byte)
            words += (tl.expand_dims(whole, 1),)
        sf_row = page * sf_page + entry * sf_entry + h.to(tl.int64) * sf_head
        # Where no token is, the code and the scale's value are zero.
        steps += (tl.load(sf_ptr + sf_row + word // PER_SCALE, mask=there, other=0),)
    decode = tl.full((1,), 1.0, tl.float32)
    if scale_ptr is not None:
        decode = tl.load(scale_ptr + tl.arange(0, 1))

    for n in tl.static_range(ITERS):
        token = first + n * T
        values = p.decode_e2m1_word(words[n], 8)
        byte = steps[n].to(tl.uint32)
        if FORMAT == "nvfp4":
            step = p.decode_e4m3(byte)
        else:
            step = p.decode_ue8m0(byte)
        values = values * tl.expand_dims(step, 1)
        written = (token < tokens) & (h < heads)
        unit = ((sequence * tokens + token) * heads + h) * WORDS + word
        if out_ptr.dtype.element_ty == tl.uint8:  # E4M3
            lo, hi = tl.split(tl.reshape(values, (T * C, 4, 2)))
            multiplier = tl.where(step != step, step, decode)
            t.store_words(t.word_pointers(out_ptr, unit, 2), pack.e4m3(lo, hi, multiplier), written)
        else:
            values = p.round_to(values * tl.expand_dims(decode, 1), out_ptr.dtype.element_ty)
            place = unit[:, None] * 8 + tl.arange(0, 8)[None, :]
            tl.store(out_ptr + place, values, mask=written[:, None])


@triton.jit(do_not_specialize=[*_SIZES, *(f"{kv}_{s}" for kv in "kv" for s in _STRIDES)])
def dequantize_paged_kernel(
    k_cache_ptr,
    v_cache_ptr,
    k_sf_ptr,
    v_sf_ptr,
    table_ptr,
    length_ptr,
    k_scale_ptr,  # None for formats without a global scale
    v_scale_ptr,
    keys_ptr,
    values_ptr,
    tokens,
    pages,
    table_row,
    heads,
    col_tiles,
    row_tiles,
    k_page,
    k_entry,
    k_head,
    k_sf_page,
    k_sf_entry,
    k_sf_head,
    v_page,
    v_entry,
    v_head,
    v_sf_page,
    v_sf_entry,
    v_sf_head,
    FORMAT: tl.constexpr,  # nvfp4, mxfp4 or blockfp4
    PAGE_SIZE: tl.constexpr,
    WORDS: tl.constexpr,  # of 8 codes, in a head
    ALIGNED: tl.constexpr,  # bytes by which all of the cache is aligned: 4 or 1, the unit of its strides
    T: tl.constexpr,
    C: tl.constexpr,
    ITERS: tl.constexpr,
):
    """ITERS times T tokens by C words a program; program_id(1) is 0 for keys, 1 for values."""
    p.wait_for_previous()
    k_strides = (k_page, k_entry, k_head, k_sf_page, k_sf_entry, k_sf_head)
    v_strides = (v_page, v_entry, v_head, v_sf_page, v_sf_entry, v_sf_head)
    # fmt: off
    if tl.program_id(1) == 0:
        _dequantize(k_cache_ptr, k_sf_ptr, table_ptr, length_ptr, k_scale_ptr, keys_ptr, tokens, pages, table_row,
                    heads, col_tiles, row_tiles, k_strides, FORMAT, PAGE_SIZE, WORDS, ALIGNED, T, C, ITERS)
    else:
        _dequantize(v_cache_ptr, v_sf_ptr, table_ptr, length_ptr, v_scale_ptr, values_ptr, tokens, pages, table_row,
                    heads, col_tiles, row_tiles, v_strides, FORMAT, PAGE_SIZE, WORDS, ALIGNED, T, C, ITERS)
    # fmt: on


@nvfp4_kv_dequantize_paged.backend("triton", unsupported=why_not, replayable=True)
def nvfp4_kv_dequantize_paged_triton(
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
    fmt = kv_format(sf_vec_size, sf_use_ue8m0)
    assert fmt is not None
    page, heads = _kv.page_size(k_cache, kv_layout), _kv.heads_of(k_cache, kv_layout)
    batch = block_tables.shape[0]
    tokens = tokens_of(k_cache, block_tables, kv_layout, max_seq_len)
    dim = k_cache.shape[3] * 2
    keys, values = (k_cache.new_empty((batch, tokens, heads, dim), dtype=output_dtype) for _ in "kv")
    if not keys.numel():
        return keys, values
    if block_tables.stride(1) != 1:
        block_tables = block_tables.contiguous()
    k_strides, v_strides = _kv.strides(k_cache, kv_layout), _kv.strides(v_cache, kv_layout)
    aligned = math.gcd(4, k_cache.data_ptr(), v_cache.data_ptr(), *k_strides, *v_strides)
    aligned = aligned if aligned == 4 else 1
    words = dim // 8
    T, C, iters = tiling(batch * tokens, heads * words)
    col_tiles, row_tiles = triton.cdiv(heads * words, C), triton.cdiv(tokens, T * iters)
    # Triton knows no E4M3 on compute capability 8.0.
    outputs = (out.view(torch.uint8) if output_dtype == torch.float8_e4m3fn else out for out in (keys, values))
    launch(
        dequantize_paged_kernel,
        (batch * row_tiles * col_tiles, 2),
        T * C,
        k_cache.device,
        *(k_cache, v_cache, k_cache_sf, v_cache_sf, block_tables, seq_lens.contiguous(), k_scale, v_scale, *outputs),
        *(tokens, k_cache.shape[0], block_tables.stride(0), heads, col_tiles, row_tiles),
        *(*(s // aligned for s in k_strides), *_kv.strides(k_cache_sf, kv_layout)),
        *(*(s // aligned for s in v_strides), *_kv.strides(v_cache_sf, kv_layout)),
        FORMAT=fmt.name,
        PAGE_SIZE=page,
        WORDS=words,
        ALIGNED=aligned,
        T=T,
        C=C,
        ITERS=iters,
    )
    return keys, values


def tiling(tokens: int, cols: int) -> tuple[int, int, int]:
    """Tokens by words of a program, powers of two, and how many times it does that."""
    C = min(256, triton.next_power_of_2(cols))
    return 256 // C, C, 4 if tokens * cols >= 1 << 18 else 1


def aot_cases() -> Iterator[AotCase]:
    """Formats, output dtypes, D = 128 and a D that is no power of two, few and many tokens, an unaligned cache with
    page tables and lengths of int64."""
    pointers = {f"{kv}_{name}_ptr": "*u8" for kv in "kv" for name in ("cache", "sf")}
    sizes = dict.fromkeys((*_SIZES, *(f"{kv}_{s}" for kv in "kv" for s in _STRIDES)), "i32")
    for fmt, dtype, dim, tokens, aligned in (
        (NVFP4, "bf16", 128, 1 << 16, 4),
        (NVFP4, "u8", 128, 1 << 16, 4),
        (NVFP4, "fp16", 112, 1, 1),
        (MXFP4, "bf16", 128, 1 << 16, 4),
        (BLOCKFP4, "bf16", 128, 1 << 16, 4),
    ):
        T, C, iters = tiling(tokens, dim)
        index = "*i64" if aligned == 1 else "*i32"
        signature = {**pointers, **sizes, "table_ptr": index, "length_ptr": index}
        signature |= {"keys_ptr": f"*{dtype}", "values_ptr": f"*{dtype}"}
        constants = {"FORMAT": fmt.name, "PAGE_SIZE": 16, "WORDS": dim // 8, "ALIGNED": aligned}
        constants |= {"T": T, "C": C, "ITERS": iters}
        scales = ("k_scale_ptr", "v_scale_ptr")
        if fmt.has_global_scale:
            signature |= dict.fromkeys(scales, "*fp32")
        else:
            constants |= dict.fromkeys(scales)
        name = f"kv_dequantize_paged-{fmt.name}-{dtype}-D{dim}-aligned{aligned}-{T}x{C}x{iters}"
        yield AotCase(name, dequantize_paged_kernel, signature, constants, T * C)
