"""Triton kernels of fp4_kv_attention_decode: flash-decoding in parts of the sequences, and the sum of the parts.

A program has the query heads of one kv head as the rows of its products and goes through its part of the sequence
tile by tile: one warp, so that weights go from one product to the next within a thread's registers.

The cache is loaded as 32-bit words of PER values along D, and stays packed until a thread holds what it will multiply.
Tensor cores take pairs of values that follow each other along the summed dimension in one register:

* For ``q @ k.T`` that is D. Its order doesn't matter if q has the same one, so a pair is value i of a word and value
  i + PER / 2: both lie at the same place of a half word.
* For ``weights @ v`` it is the tokens. Half words of two tokens, half a tile apart, are put into one word first; then a
  pair is value i of the one and of the other. Tiles of k take the same order of tokens.

So a pair is decoded by a few operations on whole words and scaled by one packed product. Columns of the sums come out
in the order that the words give them; ``value_of_column`` says which.

Codes times block scales are exact in the type of q: see ``_triton_gemm``. For NVFP4 the unit of the codes goes into
the scale, times 2^-LOWERED to stay in range; 2^LOWERED is part of the logits' factor and the output's.

The formats "e4m3" and "plain" (16 bits) are what benchmarks compare with: the same kernel over such caches.
"""

# mypy: disable-error-code="assignment, var-annotated, misc"
# Kernels grow tuples and rebind names to other types, which Triton's compiler unrolls.

from __future__ import annotations

import triton
import triton.language as tl

from .. import _triton_pairs as pairs
from .. import _triton_prims as p

__all__ = ["NOT_SPECIALIZED", "attend_kernel", "combine_kernel", "value_of_column"]

NOT_SPECIALIZED = [
    *("sm_scale", "cap", "window_left", "heads", "max_pages", "pages", "q_row", "q_head", "table_row"),
    *(f"{cache}_{stride}" for cache in ("k", "v", "k_sf", "v_sf") for stride in ("page", "entry", "head")),
]

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def value_of_column(n, WORDS: tl.constexpr, PER: tl.constexpr):
    """Which of the D values column n of the sums is."""
    UPPER: tl.constexpr = WORDS // 8
    word = n % 8 * UPPER + n // 8 % UPPER
    return word * PER + n // WORDS


@triton.jit
def _value_of_summand(n, WORDS: tl.constexpr, PER: tl.constexpr, RUN: tl.constexpr):
    """Which of the D values position n of the summed dimension of ``q @ k.T`` is."""
    UPPER: tl.constexpr = WORDS // 4
    HALF: tl.constexpr = PER // 2
    own = n // (8 * RUN) * RUN + n // 2 % RUN  # of a thread's pairs
    word = n // (2 * RUN) % 4 * UPPER + own // HALF
    return word * PER + own % HALF + n % 2 * HALF


# Loading


@triton.jit
def _words(ptr, row, there, WORDS: tl.constexpr, ALIGNED: tl.constexpr):
    """``[R, WORDS]`` words of rows that start at ``row`` units of ALIGNED bytes; zeros where no row is."""
    col = tl.arange(0, WORDS)[None, :]
    if ALIGNED >= 4:
        start = ptr.to(tl.pointer_type(tl.uint32)) + (row * (ALIGNED // 4))[:, None]
        return tl.load(start + col, mask=there[:, None], other=0)
    else:
        start = ptr + (row * ALIGNED)[:, None] + col * 4
        word = tl.zeros((row.shape[0], WORDS), tl.uint32)
        for i in tl.static_range(4):
            word |= tl.load(start + i, mask=there[:, None], other=0).to(tl.uint32) << (8 * i)
        return word


@triton.jit
def _scales(ptr, row, there, COUNT: tl.constexpr, ALIGNED: tl.constexpr, FORMAT: tl.constexpr):
    """fp32 block scales ``[R, COUNT]`` of rows that start at ``row`` units of ALIGNED bytes."""
    place = (row * ALIGNED)[:, None] + tl.arange(0, COUNT)[None, :]
    byte = tl.load(ptr + place, mask=there[:, None], other=0).to(tl.uint32)
    if FORMAT == "nvfp4":
        return p.decode_e4m3(byte)
    else:
        return p.decode_ue8m0(byte)


@triton.jit
def _spread(scale, WORDS: tl.constexpr):
    """``[R, COUNT]`` to the words that they belong to, ``[R, WORDS]``."""
    R: tl.constexpr = scale.shape[0]
    COUNT: tl.constexpr = scale.shape[1]
    wide = tl.broadcast_to(tl.expand_dims(scale, 2), (R, COUNT, WORDS // COUNT))
    return tl.reshape(wide, (R, WORDS))


# Decoding pairs


@triton.jit
def _pair_of_scales(lo, hi, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Block scales of the low and the high values, as what :func:`_scaled` multiplies by."""
    if FORMAT == "nvfp4":
        if DTYPE == tl.float16:
            lo, hi = lo * 128.0, hi * 128.0  # UNIT 2^14 / 2^7
        else:
            lo, hi = lo * 2.0**118, hi * 2.0**118  # UNIT 2^126 / 2^8
    return pairs.pack_halves(lo, hi, DTYPE)


@triton.jit
def _scaled(words, i, scales, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Value i of the low and of the high half words, times the scales' halves. The compiler makes packed products."""
    if FORMAT == "plain":
        return pairs.halves(words, DTYPE)
    elif FORMAT == "e4m3":
        lo, hi = pairs.halves(pairs.e4m3_pair(words, i), DTYPE)
        return lo * 2.0**120, hi * 2.0**120
    else:
        lo, hi = pairs.halves(pairs.e2m1_pair(words, i, DTYPE), DTYPE)
        if FORMAT != "nvfp4":  # a scale may need all of bfloat16's range: no room for the codes' unit
            lo, hi = lo * 2.0**126, hi * 2.0**126
        scale_lo, scale_hi = pairs.halves(scales, DTYPE)
        return lo * scale_lo, hi * scale_hi


@triton.jit
def _stack(parts, COUNT: tl.constexpr):
    """COUNT tensors ``[A, B, C]`` to one ``[A, B, C, COUNT]``."""
    A: tl.constexpr = parts[0].shape[0]
    B: tl.constexpr = parts[0].shape[1]
    C: tl.constexpr = parts[0].shape[2]
    if COUNT == 1:
        return tl.reshape(parts[0], (A, B, C, 1))
    elif COUNT == 2:
        return tl.join(parts[0], parts[1])
    elif COUNT == 4:
        four = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
        return tl.reshape(four, (A, B, C, 4))
    else:
        even = tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6]))
        odd = tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7]))
        return tl.reshape(tl.join(even, odd), (A, B, C, 8))


@triton.jit
def _keys(words, scale, PER: tl.constexpr, RUN: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Words ``[BN, W]`` and their scales to k ``[BN, D]``, rows as :func:`_in_row_order`."""
    BN: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    H: tl.constexpr = PER // 2
    SCALED: tl.constexpr = FORMAT != "plain" and FORMAT != "e4m3"
    scales = words
    if SCALED:
        scales = _spread(_pair_of_scales(scale, scale, FORMAT, DTYPE), W)
    parts = ()
    for i in tl.static_range(H):
        lo, hi = _scaled(words, i, scales, FORMAT, DTYPE)
        parts += (tl.join(lo, hi),)
    # Tokens (half, sixteenth, 8), then words (4, W / 4), pairs and their halves.
    k = tl.reshape(_stack(parts, H), (2, BN // 16, 8, 4, W // 4, 2, H))
    k = tl.reshape(tl.permute(k, (1, 0, 2, 3, 4, 6, 5)), (BN, 4, W * H // (4 * RUN), RUN, 2))
    return tl.reshape(tl.permute(k, (0, 2, 1, 3, 4)), (BN, W * PER))


@triton.jit
def _values(words, scale, PER: tl.constexpr, RUN: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Words ``[BN, W]`` and their scales to v.T ``[D, BN]``; columns as the rows of :func:`_paired`."""
    BN: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    H: tl.constexpr = PER // 2
    SCALED: tl.constexpr = FORMAT != "plain" and FORMAT != "e4m3"
    first, second = pairs.front_back_rows(words)
    scales = first
    if SCALED:
        scale_first, scale_second = pairs.front_back_rows(scale)
        scales = _spread(_pair_of_scales(scale_first, scale_second, FORMAT, DTYPE), W)
    low = (first & 0xFFFF) | (second << 16)
    high = (first >> 16) | (second & 0xFFFF0000)
    parts = ()
    for i in tl.static_range(PER):
        if i < H:
            lo, hi = _scaled(low, i, scales, FORMAT, DTYPE)
        else:
            lo, hi = _scaled(high, i - H, scales, FORMAT, DTYPE)
        parts += (tl.join(lo, hi),)
    v = tl.reshape(_stack(parts, PER), (BN // (8 * RUN), RUN, 4, 8, W // 8, 2, PER))
    return tl.reshape(tl.permute(v, (6, 4, 3, 0, 2, 1, 5)), (W * PER, BN))


@triton.jit
def _in_row_order(there):
    """What is said of the tile's tokens, of k's rows: those of a token and of its partner are 8 apart."""
    BN: tl.constexpr = there.shape[0]
    return tl.reshape(tl.permute(tl.reshape(there, (2, BN // 16, 8)), (1, 0, 2)), (BN,))


@triton.jit
def _paired(weights, RUN: tl.constexpr):
    """Rows of ``[BN, ROWS]`` in the order in which threads hold them as summands: a token and its partner side by
    side, RUN such pairs in a thread."""
    BN: tl.constexpr = weights.shape[0]
    ROWS: tl.constexpr = weights.shape[1]
    pair = tl.permute(tl.reshape(weights, (BN // 16, 2, 8, ROWS)), (0, 2, 1, 3))
    pair = tl.permute(tl.reshape(pair, (BN // (8 * RUN), RUN, 4, 2, ROWS)), (0, 2, 1, 3, 4))
    return tl.reshape(pair, (BN, ROWS))


# Kernels


@triton.jit
def _dot(a, b, acc):
    if p.INTERPRETED:  # its products of bfloat16 are garbage
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _row(page, entry, head, strides):
    """Where a token's row starts, in units."""
    page_stride, entry_stride, head_stride = strides
    return page * page_stride + entry.to(tl.int64) * entry_stride + head * head_stride


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
    page = tl.load(table_ptr + token // PAGE_SIZE, mask=there, other=-1)
    there = there & (page >= 0) & (page < pages)
    page = page.to(tl.int64)
    entry = token % PAGE_SIZE

    k_words = _words(k_ptr, _row(page, entry, head, k_strides), there, W, ALIGNED)
    v_words = _words(v_ptr, _row(page, entry, head, v_strides), there, W, ALIGNED)
    k_scale, v_scale = k_words, v_words
    if k_sf_ptr is not None:
        COUNT: tl.constexpr = D // BLOCK
        k_scale = _scales(k_sf_ptr, _row(page, entry, head, k_sf_strides), there, COUNT, SF_ALIGNED, FORMAT)
        v_scale = _scales(v_sf_ptr, _row(page, entry, head, v_sf_strides), there, COUNT, SF_ALIGNED, FORMAT)
    k = _keys(k_words, k_scale, PER, RUN, FORMAT, DTYPE)
    s = _dot(k, q, tl.zeros((BN, q.shape[1]), tl.float32)) * factor
    if CAP:
        s = cap - 2.0 * cap / (tl.exp2(s) + 1.0)  # cap * tanh
    s = tl.where(_in_row_order(there)[:, None], s, -float("inf"))
    most = tl.maximum(m, tl.max(s, 0))
    base = tl.where(most == -float("inf"), 0.0, most)
    weights = tl.exp2(s - base[None, :])
    rescale = tl.exp2(m - base)
    total = total * rescale[None, :] + weights
    v = _values(v_words, v_scale, PER, RUN, FORMAT, DTYPE)
    acc = _dot(v, _paired(p.round_to(weights, DTYPE), RUN), acc * rescale[None, :])
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
    max_pages,
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
    ALIGNED: tl.constexpr,  # bytes by which rows of the caches are aligned, the unit of their strides
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
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)  # neighbours read what lies side by side
    split = pid // heads % SPLITS
    sequence = (pid // heads // SPLITS).to(tl.int64)

    end = tl.minimum(tl.load(length_ptr + sequence), max_pages * PAGE_SIZE).to(tl.int32)
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
    summand = _value_of_summand(tl.arange(0, D), D // PER, PER, RUN)
    q = pairs.load_16_bits(q_start[None, :] + summand[:, None], (row < GROUP)[None, :])
    table_ptr += sequence * table_row
    m = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((BN, ROWS), tl.float32)
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
        place = out_row[None, :] * D + value_of_column(column, D // PER, PER)[:, None]
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
    target = out_ptr + row * D + value_of_column(column, D // PER, PER)
    tl.store(target, p.round_to(out, out_ptr.dtype.element_ty))
