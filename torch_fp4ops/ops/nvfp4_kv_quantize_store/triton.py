"""nvfp4_kv_quantize_store in Triton: keys and values in one launch, straight into the paged cache.

Any GPU from compute capability 8.0, ROCm included. A thread holds 16 values, two share a block of 32.
"""

# mypy: disable-error-code="assignment, var-annotated"
# Kernels grow tuples, which Triton's compiler unrolls.

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import MXFP4, NVFP4, kv_format
from .. import _kv
from .. import _triton_pack as pack
from .. import _triton_prims as p
from .. import _triton_tiles as t
from .._triton_launch import AotCase, launch, why_not
from . import nvfp4_kv_quantize_store

_SIZES = ["n", "slots", "heads", "col_tiles"]
_STRIDES = ["x_row", "x_head", "page", "entry", "head", "sf_page", "sf_entry", "sf_head"]


@triton.jit
def _quantize_store(
    x_ptr,
    slot_ptr,
    cache_ptr,
    sf_ptr,
    scale_ptr,
    n_rows,
    slots,
    heads,
    col_tiles,
    strides,
    FORMAT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    STORE: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    ITERS: tl.constexpr,
):
    SPLIT: tl.constexpr = 2 if FORMAT == "mxfp4" else 1  # threads a block
    x_row, x_head, page, entry, head, sf_page, sf_entry, sf_head = strides
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    UNITS: tl.constexpr = DTYPE.primitive_bitwidth // 8
    i = tl.arange(0, T * C)
    pid = tl.program_id(0)
    first = pid // col_tiles * (T * ITERS) + i // C
    col = pid % col_tiles * C + i % C
    h = col // (BLOCKS * SPLIT)
    part = col % (BLOCKS * SPLIT)  # 16 values each
    # All loads come before the first store, past which the compiler moves none.
    loaded = ()
    places = ()
    for n in tl.static_range(ITERS):
        row = first + n * T
        there = (row < n_rows) & (h < heads)
        unit = row.to(tl.int64) * x_row + h.to(tl.int64) * x_head + part * UNITS
        loaded += (t.load_units(t.unit_pointers(x_ptr, unit), there, UNITS),)
        places += (tl.load(slot_ptr + row, mask=there, other=-1).to(tl.int64),)
    h = h.to(tl.int64)
    for n in tl.static_range(ITERS):
        lo, hi = p.to_octets(loaded[n], DTYPE, None)
        if DTYPE.primitive_bitwidth == 16:
            pairs = loaded[n]
            amax = p.block_amax_of_pairs(pairs, lo, hi, DTYPE, SPLIT)
        else:
            pairs = None
            amax = p.block_amax(lo, hi, SPLIT)
        if FORMAT == "nvfp4":
            encode, decode = p.encode_decode(tl.load(scale_ptr), True)
            byte, multiplier = p.nvfp4_scale(amax, encode, decode)
        else:
            byte, multiplier = p.mxfp4_scale(amax)
        words = pack.e2m1(lo, hi, multiplier, pairs)
        slot = places[n]
        kept = (slot >= 0) & (slot < slots)
        place = slot // PAGE_SIZE * page + slot % PAGE_SIZE * entry + h * head + part * (8 // STORE)
        t.store_eight_bytes(cache_ptr, place, words, kept, STORE)
        place = slot // PAGE_SIZE * sf_page + slot % PAGE_SIZE * sf_entry + h * sf_head + part // SPLIT
        tl.store(sf_ptr + place, byte.to(tl.uint8), mask=kept & (part % SPLIT == 0))


@triton.jit(do_not_specialize=[*_SIZES, *(f"{kv}_{s}" for kv in "kv" for s in _STRIDES)])
def quantize_store_kernel(
    key_ptr,
    value_ptr,
    slot_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_sf_ptr,
    v_sf_ptr,
    k_scale_ptr,
    v_scale_ptr,
    n,
    slots,
    heads,
    col_tiles,
    k_x_row,
    k_x_head,
    k_page,
    k_entry,
    k_head,
    k_sf_page,
    k_sf_entry,
    k_sf_head,
    v_x_row,
    v_x_head,
    v_page,
    v_entry,
    v_head,
    v_sf_page,
    v_sf_entry,
    v_sf_head,
    FORMAT: tl.constexpr,  # nvfp4, mxfp4 or blockfp4
    PAGE_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,  # of the format, in a head
    STORE: tl.constexpr,  # bytes by which all of the cache is aligned: 8, 4 or 1
    T: tl.constexpr,
    C: tl.constexpr,
    ITERS: tl.constexpr,
):
    """ITERS times T rows by C sixteens of values a program; program_id(1) is 0 for keys, 1 for values."""
    p.wait_for_previous()
    k_strides = (k_x_row, k_x_head, k_page, k_entry, k_head, k_sf_page, k_sf_entry, k_sf_head)
    v_strides = (v_x_row, v_x_head, v_page, v_entry, v_head, v_sf_page, v_sf_entry, v_sf_head)
    # fmt: off
    if tl.program_id(1) == 0:
        _quantize_store(key_ptr, slot_ptr, k_cache_ptr, k_sf_ptr, k_scale_ptr, n, slots, heads, col_tiles,
                        k_strides, FORMAT, PAGE_SIZE, BLOCKS, STORE, T, C, ITERS)
    else:
        _quantize_store(value_ptr, slot_ptr, v_cache_ptr, v_sf_ptr, v_scale_ptr, n, slots, heads, col_tiles,
                        v_strides, FORMAT, PAGE_SIZE, BLOCKS, STORE, T, C, ITERS)
    # fmt: on


def _new_rows(x: Tensor, n: int) -> tuple[Tensor, int, int]:
    """``x[:n]`` with blocks that can be loaded in 16-byte units, and its strides in units."""
    x = x[:n]
    size = x.element_size()
    strides = [s * size if d > 1 else 0 for s, d in zip(x.stride(), x.shape, strict=True)]
    if x.stride(2) != 1 or strides[0] % 16 or strides[1] % 16 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
        strides = [s * size for s in x.stride()]
    return x, strides[0] // 16, strides[1] // 16


@nvfp4_kv_quantize_store.backend("triton", unsupported=why_not, replayable=True)
def nvfp4_kv_quantize_store_triton(
    append_key: Tensor,
    append_value: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_cache_sf: Tensor,
    v_cache_sf: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    kv_layout: str = "NHD",
    *,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    backend: str = "auto",
) -> None:
    fmt = kv_format(sf_vec_size, sf_use_ue8m0)
    assert fmt is not None
    n, heads, dim = slot_mapping.shape[0], *append_key.shape[1:]
    if not n * heads * dim or not k_cache.numel():
        return
    key, *key_strides = _new_rows(append_key, n)
    value, *value_strides = _new_rows(append_value, n)
    k_strides, v_strides = _kv.strides(k_cache, kv_layout), _kv.strides(v_cache, kv_layout)
    alignment = math.gcd(8, k_cache.data_ptr(), v_cache.data_ptr(), *k_strides, *v_strides)
    store = {8: 8, 4: 4}.get(alignment, 1)
    page_size = _kv.page_size(k_cache, kv_layout)
    cols = heads * dim // 16
    T, C, iters = tiling(n, cols)
    col_tiles = triton.cdiv(cols, C)
    launch(
        quantize_store_kernel,
        (triton.cdiv(n, T * iters) * col_tiles, 2),
        T * C,
        key.device,
        *(key, value, slot_mapping.contiguous(), k_cache, v_cache, k_cache_sf, v_cache_sf, k_scale, v_scale),
        *(n, k_cache.shape[0] * page_size, heads, col_tiles),
        *(*key_strides, *(s // store for s in k_strides), *_kv.strides(k_cache_sf, kv_layout)),
        *(*value_strides, *(s // store for s in v_strides), *_kv.strides(v_cache_sf, kv_layout)),
        FORMAT=fmt.name,
        PAGE_SIZE=page_size,
        BLOCKS=dim // fmt.block_size,
        STORE=store,
        T=T,
        C=C,
        ITERS=iters,
    )


def tiling(n: int, cols: int) -> tuple[int, int, int]:
    """Rows by sixteens of values of a program, powers of two, and how many times it does that."""
    C = min(64, triton.next_power_of_2(cols))
    return max(1, (64 if n * cols < 1 << 14 else 128) // C), C, 4 if n * cols >= 1 << 18 else 1


def aot_cases() -> Iterator[AotCase]:
    """One for each size of store, a decoding step's tile and a prefill's, D = 128 and a D that is no power of two, and
    slots of either dtype."""
    pointers = {f"{kv}_{name}_ptr": "*u8" for kv in "kv" for name in ("cache", "sf")}
    sizes = dict.fromkeys((*_SIZES, *(f"{kv}_{s}" for kv in "kv" for s in _STRIDES)), "i32")
    for fmt, dtype, store, dim, n in (
        (NVFP4, "bf16", 8, 128, 1),
        (NVFP4, "bf16", 8, 128, 1 << 16),
        (NVFP4, "fp16", 4, 112, 1 << 16),
        (NVFP4, "fp32", 1, 128, 1 << 16),
        (MXFP4, "bf16", 8, 128, 1 << 16),
    ):
        T, C, iters = tiling(n, dim // 2)
        x = {"key_ptr": f"*{dtype}", "value_ptr": f"*{dtype}", "slot_ptr": "*i32" if dtype == "fp16" else "*i64"}
        scales = ("k_scale_ptr", "v_scale_ptr")
        if fmt.has_global_scale:
            x |= dict.fromkeys(scales, "*fp32")
        constants = {"FORMAT": fmt.name, "PAGE_SIZE": 16, "BLOCKS": dim // fmt.block_size}
        constants |= {"STORE": store, "T": T, "C": C, "ITERS": iters}
        constants |= {scale: None for scale in scales if scale not in x}
        name = f"kv_store-{fmt.name}-{dtype}-D{dim}-store{store}-{T}x{C}x{iters}"
        yield AotCase(name, quantize_store_kernel, {**x, **pointers, **sizes}, constants, T * C)
