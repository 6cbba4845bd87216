"""Leaves of the Triton kernels: which thread has which block, and how it loads, stores and finds its scale."""

# mypy: disable-error-code="assignment, var-annotated"
# Kernels grow tuples and rebind names to other types, which Triton's compiler unrolls.

import triton
import triton.language as tl

from . import _triton_prims as p

# constexpr names of the scale layouts and of the forms a global scale comes in
LINEAR: tl.constexpr = tl.constexpr(0)
SWIZZLED_128X4: tl.constexpr = tl.constexpr(1)
SWIZZLED_8X4: tl.constexpr = tl.constexpr(2)


@triton.jit
def position(pid, col_tiles, i, LAYOUT: tl.constexpr, R: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr, ITERS):
    """Row, block and part of a block of each thread in step i of a program; from step to step the row grows by
    :func:`row_step`, and nothing else changes."""
    pid = pid.to(tl.uint32)  # unsigned, so that powers of two divide by shifts
    col_tiles = col_tiles.to(tl.uint32)
    n = tl.arange(0, R * C * SPLIT)
    part = n % SPLIT
    n = n // SPLIT
    # Eight neighbours along K, then the R rows: what a warp loads and stores stays in long runs.
    W: tl.constexpr = min(8, C)
    col = (pid % col_tiles) * C + n % W + n // (W * R) * W
    strip = n // W % R
    step = pid // col_tiles * ITERS + i
    if LAYOUT == SWIZZLED_128X4:
        S: tl.constexpr = 128 // R
        tl.static_assert(S % ITERS == 0, "the steps of a program have neighbouring rows")
        row = step // S * 128 + step % S + strip * S
    else:
        row = step * R + strip
    return row.to(tl.int32), col.to(tl.int32), part


@triton.jit
def first_row(pid, col_tiles, LAYOUT: tl.constexpr, R: tl.constexpr, ITERS):
    """The first of the rows that :func:`position` gives to a program."""
    step = pid.to(tl.uint32) // col_tiles.to(tl.uint32) * ITERS
    if LAYOUT == SWIZZLED_128X4:
        S: tl.constexpr = 128 // R
        row = step // S * 128 + step % S
    else:
        row = step * R
    return row.to(tl.int32)


@triton.constexpr_function
def row_step(LAYOUT, R):
    """How many rows lie between the steps of a program."""
    return 1 if LAYOUT == SWIZZLED_128X4 else R


@triton.jit
def scale_offset(row, col, padded_cols, LAYOUT: tl.constexpr):
    """Where the scale of (row, col) lies in its layout (see ``scale_layouts``), int64."""
    if LAYOUT == LINEAR:
        return row.to(tl.int64) * padded_cols + col
    elif LAYOUT == SWIZZLED_128X4:
        tile = (row >> 7).to(tl.int64) * (padded_cols * 128)
        return tile + ((col >> 2) * 512 + (row & 31) * 16 + ((row >> 5) & 3) * 4 + (col & 3))
    else:
        tile = (row >> 3).to(tl.int64) * (padded_cols * 8)
        return tile + ((col >> 2) * 32 + (row & 7) * 4 + (col & 3))


@triton.jit
def scale_offset_ahead(offset, row, col, padded_cols, i, LAYOUT: tl.constexpr, R: tl.constexpr):
    """:func:`scale_offset` in step i of a program, given what it is in the first one."""
    if i == 0:
        return offset
    elif LAYOUT == LINEAR:
        return offset + padded_cols.to(tl.int64) * (i * R)
    elif LAYOUT == SWIZZLED_128X4:
        return offset + 16 * i
    else:
        return scale_offset(row + i * R, col, padded_cols, LAYOUT)


@triton.jit
def unit_pointers(ptr, offset):
    """To the four words of 16-byte units, ``[N, 4]``; ``offset`` ``[N]`` counts units. ``ptr`` is 16-byte aligned."""
    # A pointer's divisibility by 16 and that of the offset are what lets these be one 128-bit access.
    return ptr.to(tl.pointer_type(tl.uint32)) + offset[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def load_units(pointers, mask, UNITS: tl.constexpr):
    """UNITS consecutive units a thread from :func:`unit_pointers` on, as words ``[N, 4 * UNITS]``.

    No value is defined where the mask is off; None is on everywhere.
    """
    units = ()
    for i in tl.static_range(UNITS):
        if mask is None:
            units += (tl.load(pointers + 4 * i),)
        else:
            units += (tl.load(pointers + 4 * i, mask=mask[:, None]),)
    return p.concat(units, 0, UNITS)


@triton.jit
def load_narrow(ptr, offset, mask, BYTES: tl.constexpr):
    """BYTES (2, 4 or 8) a thread, as ``[N, 1]`` or ``[N, 2]`` words; ``offset`` ``[N]`` counts such groups."""
    if BYTES == 8:
        pair = ptr.to(tl.pointer_type(tl.uint32)) + offset[:, None] * 2 + tl.arange(0, 2)[None, :]
        return tl.load(pair, mask=mask[:, None], other=0)
    elif BYTES == 4:
        return tl.expand_dims(tl.load(ptr.to(tl.pointer_type(tl.uint32)) + offset, mask=mask, other=0), 1)
    else:
        half = tl.load(ptr.to(tl.pointer_type(tl.uint16)) + offset, mask=mask, other=0)
        return tl.expand_dims(half.to(tl.uint32), 1)


@triton.jit
def _store(pointers, values, mask):
    """``[N, W]`` values under a mask ``[N]``, or everywhere."""
    if mask is None:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=mask[:, None])


@triton.jit
def word_pointers(ptr, offset, W: tl.constexpr):
    """Where :func:`store_words` puts W words a thread; ``offset`` ``[N]`` counts groups of W."""
    return ptr.to(tl.pointer_type(tl.uint32)) + offset[:, None] * W + tl.arange(0, min(W, 4))[None, :]


@triton.jit
def store_words(pointers, words, mask):
    """``[N, W]`` words, in stores as wide as they can be: W is 1, 2, 4 or 8."""
    if words.shape[1] == 8:
        front, back = p.front_back(words, 4)
        _store(pointers, front, mask)
        _store(pointers + 4, back, mask)
    else:
        _store(pointers, words, mask)


@triton.jit
def store_eight_bytes(ptr, offset, words, mask, STORE: tl.constexpr):
    """``[N, 2]`` words, in stores of STORE (8, 4 or 1) bytes; ``offset`` ``[N]`` counts those."""
    word0, word1 = tl.split(words)
    if STORE == 8:
        store_words(word_pointers(ptr, offset, 2), words, mask)
    elif STORE == 4:
        start = ptr.to(tl.pointer_type(tl.uint32)) + offset
        tl.store(start, word0, mask=mask)
        tl.store(start + 1, word1, mask=mask)
    else:
        for i in tl.static_range(4):
            tl.store(ptr + offset + i, (word0 >> (8 * i)).to(tl.uint8), mask=mask)
            tl.store(ptr + offset + 4 + i, (word1 >> (8 * i)).to(tl.uint8), mask=mask)
