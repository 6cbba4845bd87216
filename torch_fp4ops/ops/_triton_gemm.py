"""One Triton kernel for every matrix product here: ``a @ b.T`` with operands in 16 bits, NVFP4, MXFP4 or MXFP8.

Block-scaled operands are decoded to a type of the tensor cores in which ``element * scale`` is exact, so that every
product is exact and only the fp32 accumulation rounds:

* bfloat16 has the exponents of fp32, so NVFP4 and MXFP4 are exact at every scale: 2^-128 is a subnormal of it, and what
  overflows it overflows fp32, too. So is MXFP8 from a scale of 2^-124 up; below that, values lose what lies under
  bfloat16's smallest subnormal, 2^-133.
* float16 holds every NVFP4 value (2^-10 to 2688). It does not hold MXFP4's, so those meet float16 activations as TF32,
  which has float16's mantissa and fp32's exponents.

A NaN scale makes its whole block NaN. Where the GPU multiplies block-scaled operands itself (compute capability 10
and later) the kernel hands codes and scales to ``tl.dot_scaled`` instead.

Operands are loaded as 32-bit words along K, eight E2M1 codes or four E4M3 bytes each; four neighbouring scales are a
word in both swizzled layouts. Triton's interpreter has no bfloat16 arithmetic: there operands are fp32.
"""

# mypy: disable-error-code="assignment, var-annotated, misc"
# Kernels grow tuples and rebind names to other types, which Triton's compiler unrolls.

from __future__ import annotations

import triton
import triton.language as tl

from . import _triton_pairs as pairs
from . import _triton_prims as p
from . import _triton_tiles as t

__all__ = ["matmul_kernel", "sum_splits_kernel"]


# Leaves


@triton.jit
def _words(rows, first, per_row, W: tl.constexpr, EVEN_K: tl.constexpr):
    """W words along K of each row; ``rows`` ``[R, 1]`` point to the rows' first words."""
    cols = first + tl.arange(0, W)[None, :]
    if EVEN_K:
        return tl.load(rows + cols)
    else:
        return tl.load(rows + cols, mask=cols < per_row, other=0)


@triton.jit
def _scales(ptr, starts, i, blocks, LAYOUT: tl.constexpr, COUNT: tl.constexpr, WORDS: tl.constexpr, EVEN_K):
    """Scale bytes ``[R, COUNT]``, in uint32, of K-tile i; ``starts`` ``[R]`` say where the rows' scales start.

    Blocks past the end get byte 0, whatever the padding holds: codes there are 0, and NaN must not meet them.
    """
    R: tl.constexpr = starts.shape[0]
    cols = i * COUNT + tl.arange(0, COUNT)[None, :]
    if WORDS:
        # From one word of a row to the next, in words.
        STEP: tl.constexpr = 128 if LAYOUT == t.SWIZZLED_128X4 else (8 if LAYOUT == t.SWIZZLED_8X4 else 1)
        first = ptr.to(tl.pointer_type(tl.uint32)) + (starts >> 2)
        if COUNT >= 4:
            word_cols = i * (COUNT // 4) + tl.arange(0, COUNT // 4)[None, :]
            if EVEN_K:
                w = tl.load(first[:, None] + word_cols * STEP)
            else:
                w = tl.load(first[:, None] + word_cols * STEP, mask=word_cols * 4 < blocks, other=0)
            even = tl.join(w & 0xFF, (w >> 16) & 0xFF)
            odd = tl.join((w >> 8) & 0xFF, w >> 24)
            byte = tl.reshape(tl.join(even, odd), (R, COUNT))
        else:
            w = tl.load(first + i * COUNT // 4 * STEP) >> (i * COUNT % 4 * 8).to(tl.uint32)
            if COUNT == 2:
                byte = tl.join(w & 0xFF, (w >> 8) & 0xFF)
            else:
                byte = tl.expand_dims(w & 0xFF, 1)
        if EVEN_K:
            return byte
        else:
            return tl.where(cols < blocks, byte, 0).to(tl.uint32)
    else:
        tl.static_assert(LAYOUT == t.LINEAR)
        return tl.load(ptr + starts[:, None] + cols, mask=cols < blocks, other=0).to(tl.uint32)


@triton.jit
def _spread(scale, W: tl.constexpr):
    """Scales ``[R, C]`` to the words they belong to, ``[R, W]``."""
    R: tl.constexpr = scale.shape[0]
    C: tl.constexpr = scale.shape[1]
    return tl.reshape(tl.broadcast_to(tl.expand_dims(scale, 2), (R, C, W // C)), (R, W))


@triton.jit
def _decode_e2m1(words, scale, DTYPE: tl.constexpr):
    """Codes times scale: words ``[R, W]`` and scales ``[R, W]`` to DTYPE ``[R, 8W]``."""
    R: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    UNIT: tl.constexpr = 2.0**14 if DTYPE == tl.float16 else 2.0**126
    quads = ()
    for i in tl.static_range(4):
        lo, hi = pairs.halves(pairs.e2m1_pair(words, i, DTYPE), DTYPE)
        quads += (tl.join(lo * UNIT * scale, hi * UNIT * scale),)
    even, odd = tl.join(quads[0], quads[2]), tl.join(quads[1], quads[3])
    return tl.reshape(tl.join(even, odd), (R, 8 * W))


@triton.jit
def _decode_e4m3(words, scale, DTYPE: tl.constexpr):
    """E4M3 bytes times scale: words ``[R, W]`` and scales ``[R, W]`` to bfloat16 or fp32 ``[R, 4W]``."""
    R: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    tl.static_assert(DTYPE != tl.float16)
    both = ()
    for i in tl.static_range(2):
        lo, hi = pairs.halves(pairs.e4m3_pair(words, i), DTYPE)
        both += (tl.join(lo * 2.0**120 * scale, hi * 2.0**120 * scale),)
    return tl.reshape(tl.join(both[0], both[1]), (R, 4 * W))


@triton.jit
def _decoded(words, byte, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """A tile ``[R, K]`` in what tl.dot multiplies."""
    if FORMAT == "nvfp4":
        scale = p.decode_e4m3(byte)
    else:
        scale = p.decode_ue8m0(byte)
    if not (p.INTERPRETED and DTYPE == tl.bfloat16):
        scale = scale.to(DTYPE)  # exact
    scale = _spread(scale, words.shape[1])
    if FORMAT == "mxfp8":
        return _decode_e4m3(words, scale, DTYPE)
    else:
        return _decode_e2m1(words, scale, DTYPE)


@triton.jit
def _plain(rows, first, K, BK: tl.constexpr, DTYPE: tl.constexpr, EVEN_K: tl.constexpr):
    """A tile ``[R, BK]`` of 16-bit values as DTYPE; ``rows`` ``[R, 1]`` point to the rows."""
    if p.INTERPRETED and rows.dtype.element_ty == tl.bfloat16:
        halves = _words(rows.to(tl.pointer_type(tl.uint16), bitcast=True), first, K, BK, EVEN_K)
        return p.from_bits(halves.to(tl.uint32) << 16)
    else:
        return _words(rows, first, K, BK, EVEN_K).to(DTYPE)


@triton.jit
def _row_starts(ptr, rows, k_bytes, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """Pointers ``[R, 1]`` to the rows, of the type that is loaded: words, bytes for NATIVE, or the values."""
    if FORMAT == "plain":
        return (ptr + rows * k_bytes)[:, None]
    elif NATIVE:
        return (ptr + rows * k_bytes)[:, None]
    else:
        return (ptr.to(tl.pointer_type(tl.uint32)) + rows * (k_bytes // 4))[:, None]


@triton.jit
def _tile(
    rows, scales_ptr, starts, i, K, BK: tl.constexpr, FORMAT: tl.constexpr, LAYOUT: tl.constexpr,
    WORDS: tl.constexpr, DTYPE: tl.constexpr, EVEN_K: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """K-tile i of an operand: decoded (and a placeholder); or, for NATIVE, its bytes and its scales."""
    if FORMAT == "plain":
        return _plain(rows, i * BK, K, BK, DTYPE, EVEN_K), i
    else:
        BLOCK: tl.constexpr = 16 if FORMAT == "nvfp4" else 32
        byte = _scales(scales_ptr, starts, i, K // BLOCK, LAYOUT, BK // BLOCK, WORDS, EVEN_K)
        if NATIVE:
            PACK: tl.constexpr = 1 if FORMAT == "mxfp8" else 2
            elements = _words(rows, i * (BK // PACK), K // PACK, BK // PACK, EVEN_K)
            byte = byte.to(tl.uint8)
            if FORMAT == "nvfp4":
                byte = byte.to(tl.float8e4nv, bitcast=True)
            if FORMAT == "mxfp8":
                elements = elements.to(tl.float8e4nv, bitcast=True)
            return elements, byte
        else:
            PER_WORD: tl.constexpr = 4 if FORMAT == "mxfp8" else 8
            words = _words(rows, i * (BK // PER_WORD), K // PER_WORD, BK // PER_WORD, EVEN_K)
            return _decoded(words, byte, FORMAT, DTYPE), i


@triton.jit
def _step(
    acc, i, K, a_start, a_scales_ptr, a_scale_starts, b_start, b_scales_ptr, b_scale_starts,
    A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr, A_LAYOUT: tl.constexpr, B_LAYOUT: tl.constexpr,
    A_WORDS: tl.constexpr, B_WORDS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The sums with K-tile i added."""
    a, a_scale = _tile(
        a_start, a_scales_ptr, a_scale_starts, i, K, BK, A_FORMAT, A_LAYOUT, A_WORDS, DTYPE, EVEN_K, NATIVE
    )
    b, b_scale = _tile(
        b_start, b_scales_ptr, b_scale_starts, i, K, BK, B_FORMAT, B_LAYOUT, B_WORDS, DTYPE, EVEN_K, NATIVE
    )
    if NATIVE:
        A_TYPE: tl.constexpr = "e4m3" if A_FORMAT == "mxfp8" else "e2m1"
        B_TYPE: tl.constexpr = "e4m3" if B_FORMAT == "mxfp8" else "e2m1"
        return tl.dot_scaled(a, a_scale, A_TYPE, tl.trans(b), b_scale, B_TYPE, acc)
    else:
        if SWAP:
            a, b = b, a
        if p.INTERPRETED:  # its products of bfloat16 are garbage
            return acc + tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), input_precision="ieee")
        else:
            return tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)


# Kernels


@triton.jit(do_not_specialize=["M", "n_units", "K", "a_row_units", "a_scale_cols", "b_scale_cols"])
def matmul_kernel(
    a_ptr,
    a_scales_ptr,
    b_ptr,
    b_scales_ptr,
    alpha_ptr,
    bias_ptr,
    out_ptr,
    schedule_ptr,  # for each tile of rows: its expert (below 0: none), its first place in `order` and the one past it
    order_ptr,  # rows of the output, grouped by expert
    M,
    n_units,
    K,
    a_row_units,  # from one row of a to the next: elements of a plain a, else bytes, in units of A_UNIT
    a_scale_cols,
    b_scale_cols,
    A_FORMAT: tl.constexpr,  # plain, nvfp4, mxfp4 or mxfp8
    B_FORMAT: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    B_LAYOUT: tl.constexpr,
    A_WORDS: tl.constexpr,  # four neighbouring scales are an aligned word
    B_WORDS: tl.constexpr,
    ALPHA: tl.constexpr,  # 0 none, 1 for all rows, 2 one a row, 3 one an expert
    DTYPE: tl.constexpr,  # what tl.dot multiplies
    PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,  # grouped by expert: b, its scales and the bias have a leading dimension
    A_SHARE: tl.constexpr,  # so many rows of the output share a row of a
    A_UNIT: tl.constexpr,
    N_UNIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    SWAP: tl.constexpr,  # compute b @ a.T: weights take the tensor cores' wide side
    NATIVE: tl.constexpr,
):
    BLOCKED_A: tl.constexpr = A_FORMAT != "plain"
    BLOCKED_B: tl.constexpr = B_FORMAT != "plain"
    # Products with constants tell the compiler how rows are aligned, and so how wide it may load and store.
    N = n_units * N_UNIT
    tiles_n = tl.cdiv(N, BN)
    p.wait_for_previous()
    pid = tl.program_id(0)
    if EXPERTS:
        # Rows of tiles one after the other: those of an expert follow each other and share its weights.
        tile_m, tile_n = pid // tiles_n, pid % tiles_n
        expert = tl.load(schedule_ptr + tile_m * 3)
        if expert < 0:
            return
        start = tl.load(schedule_ptr + tile_m * 3 + 1)
        end = tl.load(schedule_ptr + tile_m * 3 + 2)
        place = start + tl.arange(0, BM)
        there = place < end
        out_rows = tl.load(order_ptr + tl.minimum(place, end - 1)).to(tl.int64)
        a_rows = out_rows // A_SHARE
    else:
        tiles_m = tl.cdiv(M, BM)
        band = pid // (GROUP * tiles_n)
        height = tl.minimum(tiles_m - band * GROUP, GROUP)
        tile_m = band * GROUP + pid % (GROUP * tiles_n) % height
        tile_n = pid % (GROUP * tiles_n) // height
        place = tile_m * BM + tl.arange(0, BM)
        there = place < M
        # Rows past the end are others once more: in bounds, and never stored.
        out_rows = tl.minimum(place, M - 1).to(tl.int64)
        a_rows = out_rows
        expert = 0
    n = tile_n * BN + tl.arange(0, BN)
    b_rows = tl.minimum(n, N - 1).to(tl.int64)
    if EXPERTS:
        b_rows += expert.to(tl.int64) * N

    a_start = _row_starts(a_ptr, a_rows, a_row_units * A_UNIT, A_FORMAT, NATIVE)
    PACK_B: tl.constexpr = 2 if B_FORMAT == "nvfp4" or B_FORMAT == "mxfp4" else 1
    K_UNIT: tl.constexpr = BK if EVEN_K else 16
    b_start = _row_starts(b_ptr, b_rows, K // K_UNIT * (K_UNIT // PACK_B), B_FORMAT, NATIVE)
    a_scale_starts, b_scale_starts = a_rows, b_rows
    if BLOCKED_A:
        a_scale_starts = t.scale_offset(a_rows, 0, a_scale_cols, A_LAYOUT)
    if BLOCKED_B:
        if EXPERTS and B_LAYOUT == t.SWIZZLED_128X4:  # each expert's scales are padded to whole tiles
            b_scale_starts = t.scale_offset(b_rows - expert.to(tl.int64) * N, 0, b_scale_cols, B_LAYOUT)
            b_scale_starts += expert.to(tl.int64) * (tl.cdiv(N, 128) * 128) * b_scale_cols
        else:
            b_scale_starts = t.scale_offset(b_rows, 0, b_scale_cols, B_LAYOUT)

    tiles_k = tl.cdiv(K, BK)
    split = tl.program_id(1)
    per_split = tl.cdiv(tiles_k, SPLITS)
    first_tile = split * per_split
    if SWAP:
        acc = tl.zeros((BN, BM), tl.float32)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    last_tile = tl.minimum(first_tile + per_split, tiles_k)
    if p.INTERPRETED:  # it takes no range of tensors
        i = first_tile
        while i < last_tile:
            acc = _step(
                acc, i, K, a_start, a_scales_ptr, a_scale_starts, b_start, b_scales_ptr, b_scale_starts,
                A_FORMAT, B_FORMAT, A_LAYOUT, B_LAYOUT, A_WORDS, B_WORDS, DTYPE, PRECISION, EVEN_K, BK, SWAP, NATIVE,
            )  # fmt: skip
            i += 1
    else:
        for i in tl.range(first_tile, last_tile, num_stages=STAGES):
            acc = _step(
                acc, i, K, a_start, a_scales_ptr, a_scale_starts, b_start, b_scales_ptr, b_scale_starts,
                A_FORMAT, B_FORMAT, A_LAYOUT, B_LAYOUT, A_WORDS, B_WORDS, DTYPE, PRECISION, EVEN_K, BK, SWAP, NATIVE,
            )  # fmt: skip
    if SWAP:
        acc = tl.trans(acc)

    if SPLITS == 1:
        acc = _finish(acc, alpha_ptr, bias_ptr, out_rows, n, N, expert, ALPHA)
        out_rows = out_rows * N
    else:
        out_rows = (out_rows + split.to(tl.int64) * M) * N
    out = p.round_to(acc, out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_rows[:, None] + n[None, :], out, mask=there[:, None] & (n < N)[None, :])


@triton.jit
def _finish(acc, alpha_ptr, bias_ptr, rows, n, N, expert, ALPHA: tl.constexpr):
    """Alpha times the fp32 sums, plus the bias."""
    if ALPHA == 1:
        acc = acc * tl.load(alpha_ptr)
    elif ALPHA == 2:
        acc = acc * tl.load(alpha_ptr + rows)[:, None]
    elif ALPHA == 3:
        acc = acc * tl.load(alpha_ptr + expert)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + tl.cast(expert, tl.int64) * N + n, mask=n < N, other=0.0)
        acc = acc + bias.to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["M", "n_units"])
def sum_splits_kernel(
    partial_ptr,
    alpha_ptr,
    out_ptr,
    M,
    n_units,
    N_UNIT: tl.constexpr,
    SPLITS: tl.constexpr,
    ALPHA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the splits, always in the same order, times alpha."""
    p.wait_for_previous()
    N = n_units * N_UNIT
    size = M.to(tl.int64) * N
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = offset < size
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + s * size + offset, mask=there, other=0.0)
    if ALPHA == 1:
        total = total * tl.load(alpha_ptr)
    elif ALPHA == 2:
        total = total * tl.load(alpha_ptr + offset // N, mask=there, other=0.0)
    tl.store(out_ptr + offset, p.round_to(total, out_ptr.dtype.element_ty), mask=there)
