"""What becomes of a tile's sums in a Hopper product: added between warp groups, stored rounded, or left as parts."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ._gluon import async_store, reinterpret, warp_group_barrier
from ._hopper_load import after

__all__ = ["add_shared", "free_place", "give_shared", "row_factors", "store", "store_part"]


@gluon.jit
def free_place(s, ahead, phase, SUB: gl.constexpr, C: gl.constexpr):
    """Where, among buffers of their own or the ring's, the results of 64 weight rows may be put in rows."""
    if C.STORE == 0 or not C.ONCE:
        return SUB
    # Nothing is loaded any more into the stages after the last one that was looked at. Each is free once the loading
    # warp would find it so, since the other warp group may be multiplying what was there before.
    for i in gl.static_range(SUB + C.KW):
        ahead, phase = after(ahead, phase, C.EXTRA_STAGES - C.KW + i, 1, 0, C)
    mbarrier.wait(s[4].index(ahead), phase ^ 1)
    return ahead * C.KS


@gluon.jit
def store(
    acc, first, row, place, d, s, out, alpha, factor, M, N,
    IN: gl.constexpr, RING: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """Multiply sums of 64 weight rows from ``row`` on and rows of x from ``first`` on by the factor or by each row's,
    round once and store them transposed, but for STORE 0 by way of ``place`` in buffers IN, with ONCE the RING's."""
    ROWS: gl.constexpr = acc.shape[1]
    ACC: gl.constexpr = acc.type.layout
    m = first + gl.arange(0, ROWS, gl.SliceLayout(0, ACC))
    if C.ALPHA == 2:
        acc = acc * (gl.load(alpha + m, mask=m < M, other=0.0) * C.FACTOR)[None, :]
    else:
        acc = acc * factor
    value = acc.to(out.dtype.element_ty)
    if C.STORE == 0:
        n = row + gl.arange(0, 64, gl.SliceLayout(1, ACC))
        gl.store(out + (m.to(gl.int64) * N)[None, :] + n[:, None], value, mask=(m < M)[None, :])
    else:
        if C.ONCE:
            # As a whole, and then a part of it: Triton 3.8 takes nothing else.
            buffer = reinterpret(s[RING].index(place), out.dtype.element_ty, [s[RING].shape[1], 64], d[0].layout)
            buffer = buffer.slice(0, ROWS, dim=0)
        else:
            buffer = s[IN].index(place)
        buffer.permute((1, 0)).store(value)
        if C.TMA_STORE:
            EACH: gl.constexpr = C.OUT_ROWS
            fence_async_shared()
            for i in gl.static_range(ROWS // EACH):
                async_store(d[3], [first + i * EACH, row], buffer.slice(i * EACH, EACH, dim=0))
        else:
            BY_ROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
            m = first + gl.arange(0, ROWS, gl.SliceLayout(1, BY_ROW))
            n = row + gl.arange(0, 64, gl.SliceLayout(0, BY_ROW))
            at = out + (m.to(gl.int64) * N)[:, None] + n[None, :]
            gl.store(at, buffer.load(BY_ROW), mask=(m < M)[:, None])


@gluon.jit
def store_part(to, acc, ROWS: gl.constexpr, ACC: gl.constexpr):
    m = gl.arange(0, ROWS, gl.SliceLayout(0, ACC))[None, :]
    n = gl.arange(0, 64, gl.SliceLayout(1, ACC))[:, None]
    gl.store(to + (m * 64 + n), acc)


@gluon.jit
def _by_thread(acc):
    """Sums of a warp group as [columns / 8, 512], fours of a thread in a row.

    Shared memory takes those without bank conflicts. Rows and columns as they are have eight rows in the same banks.
    """
    COLS: gl.constexpr = acc.shape[1]
    parts = acc.reshape([4, 2, 8, COLS // 8, 4, 2])  # warp, upper or lower, g | column / 8, t, of pair
    return parts.permute((3, 0, 2, 4, 1, 5)).reshape([COLS // 8, 512])


@gluon.jit
def _with_part(acc, part):
    """The sum of a warp group's and what another one stored ``_by_thread``."""
    mine = _by_thread(acc)
    ACC: gl.constexpr = acc.type.layout
    THREAD: gl.constexpr = mine.type.layout
    both = (mine + part.load(THREAD)).reshape([acc.shape[1] // 8, 4, 8, 4, 2, 2])
    return gl.convert_layout(both.permute((1, 4, 2, 0, 3, 5)).reshape(acc.shape), ACC, assert_trivial=True)


@gluon.jit
def give_shared(acc0, acc1, s, turn, PART: gl.constexpr, SUB: gl.constexpr, C: gl.constexpr):
    """Sums of a warp group that shares a tile and is not the first, to that one."""
    AT: gl.constexpr = C.FIRST_SHARED
    mbarrier.wait(s[AT + 2].index(SUB), turn ^ 1)
    s[AT].index(SUB * (C.KW - 1) + PART - 1).store(_by_thread(acc0))
    if C.REST:
        s[AT + 3].index(SUB * (C.KW - 1) + PART - 1).store(_by_thread(acc1))
    warp_group_barrier()
    mbarrier.arrive(s[AT + 1].index(SUB))


@gluon.jit
def add_shared(acc0, acc1, s, turn, SUB: gl.constexpr, C: gl.constexpr):
    """What the others give, added to the first one's."""
    AT: gl.constexpr = C.FIRST_SHARED
    OTHERS: gl.constexpr = C.KW - 1
    mbarrier.wait(s[AT + 1].index(SUB), turn)
    for i in gl.static_range(OTHERS):
        acc0 = _with_part(acc0, s[AT].index(SUB * OTHERS + i))
        if C.REST:
            acc1 = _with_part(acc1, s[AT + 3].index(SUB * OTHERS + i))
    warp_group_barrier()
    mbarrier.arrive(s[AT + 2].index(SUB))
    return acc0, acc1


@gluon.jit
def row_factors(m, alpha, M, C: gl.constexpr):
    """What sums of rows ``m`` of x are multiplied by."""
    if C.ALPHA == 0:
        return gl.full(m.shape, C.FACTOR, gl.float32, m.type.layout)
    elif C.ALPHA == 1:
        return gl.full(m.shape, C.FACTOR, gl.float32, m.type.layout) * gl.load(alpha)
    else:
        return gl.load(alpha + m, mask=m < M, other=0.0) * C.FACTOR
