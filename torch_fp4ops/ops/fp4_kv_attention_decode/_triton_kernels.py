"""Triton kernels of fp4_kv_attention_decode: flash-decoding in parts of the sequences, and the sum of the parts.

A program has one kv head and goes through its part of a sequence tile by tile, keys and values as the tall side of its
products and the head's query heads as the narrow one. ``_triton_cache`` decodes the tiles. With one warp, sums never
leave a thread's registers.

The formats "e4m3" and "plain" (16 bits) are what benchmarks compare with: the same kernel over such caches.
"""

# mypy: disable-error-code="assignment, misc"
# Kernels rebind names to other types, which Triton's compiler unrolls.

from __future__ import annotations

import triton
import triton.language as tl

from .. import _triton_pairs as pairs
from .. import _triton_prims as p
from . import _triton_cache as c

__all__ = ["NOT_SPECIALIZED", "attend_kernel", "combine_kernel"]

NOT_SPECIALIZED = [
    *("sm_scale", "cap", "window_left", "heads", "tokens", "pages", "q_row", "q_head", "table_row"),
    *(f"{cache}_{stride}" for cache in ("k", "v", "k_sf", "v_sf") for stride in ("page", "entry", "head")),
]

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(a, b, acc):
    if p.INTERPRETED:  # its products of bfloat16 are garbage
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _rows(ptr, page, entry, head, strides, ALIGNED: tl.constexpr):
    """Where tokens' rows start. All but the page's part stays the same from tile to tile."""
    page_stride, entry_stride, head_stride = strides
    start = ptr + (entry.to(tl.int64) * entry_stride + head * head_stride)
    return tl.multiple_of(start + pairs.wide_product(page, page_stride), ALIGNED)


@triton.jit
def _tile(
    first, m, total, acc, q, k_ptr, v_ptr, k_sf_ptr, v_sf_ptr, table_ptr, start, end, pages, factor, cap, head,
    k_strides, v_strides, k_sf_strides, v_sf_strides, FORMAT: tl.constexpr, DTYPE: tl.constexpr, PER: tl.constexpr,
    RUN: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr, CAP: tl.constexpr,
    ALIGNED: tl.constexpr, SF_ALIGNED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Maxima, sums of weights, row by row of the tile, and weighted sums of values, with tokens ``first`` to
    ``first + BN`` added."""
    W: tl.constexpr = D // PER
    token = first + tl.arange(0, BN)
    there = (token >= start) & (token < end)
    page = tl.load(table_ptr + token // PAGE_SIZE, mask=there, other=0)
    if page.dtype == tl.int64:
        page = tl.where((page >= 0) & (page < pages), page, -1).to(tl.int32)
    page = page.to(tl.uint32, bitcast=True)
    there = there & (page < pages.to(tl.uint32, bitcast=True))
    # Some page is read for every token, which takes no masks: the weights of those that aren't there are 0. Only what
    # is not finite would still count.
    page = tl.minimum(page, (pages - 1).to(tl.uint32, bitcast=True))
    finite = there if FORMAT == "plain" else None
    if BN % PAGE_SIZE == 0:
        entry = tl.arange(0, BN) % PAGE_SIZE
    else:
        entry = token % PAGE_SIZE

    k_words = c.words(_rows(k_ptr, page, entry, head, k_strides, ALIGNED), None, W, ALIGNED)
    v_words = c.words(_rows(v_ptr, page, entry, head, v_strides, ALIGNED), finite, W, ALIGNED)
    k_scale, v_scale = k_words, v_words
    if k_sf_ptr is not None:
        k_scale = c.scales(_rows(k_sf_ptr, page, entry, head, k_sf_strides, SF_ALIGNED), None, D // BLOCK)
        v_scale = c.scales(_rows(v_sf_ptr, page, entry, head, v_sf_strides, SF_ALIGNED), there, D // BLOCK)
    k = c.keys(k_words, k_scale, PER, RUN, FORMAT, DTYPE)
    s = _dot(k, q, tl.zeros((BN, q.shape[1]), tl.float32)) * factor
    if CAP:
        s = cap - 2.0 * cap / (tl.exp2(s) + 1.0)  # cap * tanh
    s = tl.where(c.in_row_order(there)[:, None], s, -float("inf"))
    most = tl.maximum(m, tl.max(s, 0))
    base = tl.where(most == -float("inf"), 0.0, most)
    weights = tl.exp2(s - base[None, :])
    rescale = tl.exp2(m - base)
    # Rows 8 apart are one thread's.
    own = tl.sum(tl.reshape(weights, (BN // 8, 8, weights.shape[1])), 0)
    total = tl.fma(total, tl.broadcast_to(rescale[None, :], total.shape), own)
    v = c.values(v_words, v_scale, PER, RUN, FORMAT, DTYPE)
    acc = _dot(v, c.paired(p.round_to(weights, DTYPE), RUN), acc * rescale[None, :])
    return most, total, acc


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_sf_ptr,  # None for caches without block scales
    v_sf_ptr,
    table_ptr,
    length_ptr,
    k_scale_ptr,  # None for 1
    v_scale_ptr,
    out_ptr,
    sums_ptr,  # None for one split
    stats_ptr,
    sm_scale,
    cap,
    window_left,
    heads,
    tokens,  # of the page table
    pages,
    q_row,
    q_head,
    table_row,
    k_page,
    k_entry,
    k_head,
    v_page,
    v_entry,
    v_head,
    k_sf_page,
    k_sf_entry,
    k_sf_head,
    v_sf_page,
    v_sf_entry,
    v_sf_head,
    FORMAT: tl.constexpr,  # nvfp4, mxfp4, blockfp4; e4m3 or plain
    D: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a kv head
    ROWS: tl.constexpr,  # that, padded to what a product takes
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    ALIGNED: tl.constexpr,  # bytes by which rows of the caches are aligned
    SF_ALIGNED: tl.constexpr,
    SPLITS: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One part of a sequence, for the query heads of one kv head."""
    PER: tl.constexpr = 2 if FORMAT == "plain" else (4 if FORMAT == "e4m3" else 8)
    RUN: tl.constexpr = 4 if PER == 8 else 2
    BLOCK: tl.constexpr = 32 if FORMAT == "mxfp4" else 16
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    LOWERED: tl.constexpr = (7 if DTYPE == tl.float16 else 8) if FORMAT == "nvfp4" else 0
    p.wait_for_previous()
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)  # neighbours read what lies side by side
    split = pid // heads % SPLITS
    sequence = (pid // heads // SPLITS).to(tl.int64)

    end = tl.maximum(tl.minimum(tl.load(length_ptr + sequence), tokens), 0).to(tl.int32)
    start = 0
    if WINDOW:
        start = tl.maximum(end - 1 - window_left, 0)
    first_tile = start // BN
    tiles = tl.cdiv(end, BN) - first_tile
    per_split = tl.cdiv(tiles, SPLITS)
    lowest = (first_tile + split * per_split) * BN
    highest = tl.minimum(lowest + per_split * BN, end)

    factor = sm_scale * 2.0**LOWERED
    if k_scale_ptr is not None:
        factor = factor * tl.load(k_scale_ptr)
    factor = factor * _LOG2_E
    if CAP:
        factor = factor * 2.0 / cap
        cap = cap * _LOG2_E

    row = tl.arange(0, ROWS)
    q_start = q_ptr + sequence * q_row + (head * GROUP + row) * q_head
    summand = c.value_of_summand(tl.arange(0, D), D // PER, PER, RUN)
    q = pairs.load_16_bits(q_start[None, :] + summand[:, None], (row < GROUP)[None, :])
    table_ptr += sequence * table_row
    m = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((8, ROWS), tl.float32)
    acc = tl.zeros((D, ROWS), tl.float32)
    k_strides, v_strides = (k_page, k_entry, k_head), (v_page, v_entry, v_head)
    k_sf_strides, v_sf_strides = (k_sf_page, k_sf_entry, k_sf_head), (v_sf_page, v_sf_entry, v_sf_head)
    if p.INTERPRETED:  # it takes no range of tensors
        first = lowest
        while first < highest:
            m, total, acc = _tile(
                first, m, total, acc, q, k_ptr, v_ptr, k_sf_ptr, v_sf_ptr, table_ptr, start, end, pages, factor, cap,
                head, k_strides, v_strides, k_sf_strides, v_sf_strides, FORMAT, DTYPE, PER, RUN, BLOCK, D,
                PAGE_SIZE, CAP, ALIGNED, SF_ALIGNED, BN,
            )  # fmt: skip
            first += BN
    else:
        for first in tl.range(lowest, highest, BN, num_stages=STAGES):
            m, total, acc = _tile(
                first, m, total, acc, q, k_ptr, v_ptr, k_sf_ptr, v_sf_ptr, table_ptr, start, end, pages, factor, cap,
                head, k_strides, v_strides, k_sf_strides, v_sf_strides, FORMAT, DTYPE, PER, RUN, BLOCK, D,
                PAGE_SIZE, CAP, ALIGNED, SF_ALIGNED, BN,
            )  # fmt: skip

    unit = tl.full((1,), 2.0**LOWERED, tl.float32)
    if v_scale_ptr is not None:
        unit = unit * tl.load(v_scale_ptr)
    sums = tl.sum(total, 0)
    column = tl.arange(0, D)
    there = row < GROUP
    out_row = (sequence * heads + head) * GROUP + row
    if SPLITS == 1:
        acc = acc * (unit / tl.where(sums == 0.0, 1.0, sums))[None, :]
        place = out_row[None, :] * D + c.value_of_column(column, D // PER, PER)[:, None]
        tl.store(out_ptr + place, p.round_to(acc, out_ptr.dtype.element_ty), mask=there[None, :])
    else:
        part = out_row * SPLITS + split
        tl.store(stats_ptr + part * 2, m, mask=there)
        tl.store(stats_ptr + part * 2 + 1, sums, mask=there)
        tl.store(sums_ptr + part[None, :] * D + column[:, None], acc * unit, mask=there[None, :])


@triton.jit
def combine_kernel(
    sums_ptr, stats_ptr, out_ptr, PER: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr
):
    """The parts of one query head, always added up in the same order; columns to where they belong."""
    p.wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, PADDED)
    stats = stats_ptr + (row * SPLITS + split) * 2
    m = tl.load(stats, mask=split < SPLITS, other=-float("inf"))
    weight = tl.load(stats + 1, mask=split < SPLITS, other=0.0)
    most = tl.max(m, 0)
    share = tl.where(weight == 0.0, 0.0, tl.exp2(m - most))
    total = tl.sum(share * weight, 0)
    column = tl.arange(0, D)
    place = (row * SPLITS + split)[:, None] * D + column[None, :]
    sums = tl.load(sums_ptr + place, mask=(split < SPLITS)[:, None], other=0.0)
    out = tl.sum(sums * share[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    target = out_ptr + row * D + c.value_of_column(column, D // PER, PER)
    tl.store(target, p.round_to(out, out_ptr.dtype.element_ty))
