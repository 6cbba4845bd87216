"""Which program of a Hopper product works on which part of which tile, and the sum of a tile's parts.

Work is counted in trips, steps of 256 (times ``KW``) along K, through the tiles in order. A program has whole tiles
(``STREAM`` off), or an equal share of all trips wherever that begins and ends. Then parts of a tile go to a workspace,
and ``sum_parts_kernel`` adds them in the order of K, so that the result depends on nothing but the arguments. A kernel
of its own is quicker than what its two alternatives, counters and waiting, cost, and needs no state between calls. Or
the programs of a cluster have a part of one tile each (``CLUSTER``), and add them up among themselves.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ._gluon import run_asm

__all__ = [
    "first_strip",
    "let_next_start",
    "piece",
    "share",
    "sum_parts_kernel",
    "tile_at",
    "wait_for_previous",
]


@gluon.jit
def wait_for_previous():
    """As ``_triton_prims.wait_for_previous``, to which there is more, for each warp group that touches memory."""
    run_asm("griddepcontrol.wait; // $0")


@gluon.jit
def let_next_start():
    run_asm("griddepcontrol.launch_dependents; // $0")


@gluon.jit
def first_strip(N, S: gl.constexpr):
    """Of a program with S strips of 16 weight rows.

    The last program's are moved back to end with the weight: two programs may store the same values.
    """
    return min(gl.program_id(0) * S, N // 16 - S)


@gluon.jit
def tile_at(t, tiles_m, tiles_n, BAND: gl.constexpr):
    """Rows of x and of the weight of tile t: bands of BAND rows of tiles, column by column."""
    # A division takes some 120 cycles, before anything is loaded, so there are as few as can be.
    pm = t * 0
    pn = t
    if tiles_m > 1:
        first = t * 0
        if tiles_m > BAND:
            first = _quotient(t, BAND * tiles_n) * BAND
        rows = min(BAND, tiles_m - first)
        rest = t - first * tiles_n
        pn = _quotient(rest, rows)
        pm = first + rest - pn * rows
    return pm, pn


@gluon.jit
def _quotient(x, y):
    """Of numbers that are not negative: two thirds of the instructions."""
    return (x.to(gl.uint32) // y.to(gl.uint32)).to(gl.int32)


@gluon.jit
def share(tiles, each, more, C: gl.constexpr):
    """The positions where this program's work begins and ends: trips, or without STREAM tiles."""
    i = gl.program_id(0)
    if C.CLUSTER > 1:
        return i // C.CLUSTER, i // C.CLUSTER + 1
    elif C.STREAM:
        return i * each + min(i, more), (i + 1) * each + min(i + 1, more)
    else:
        return i, tiles


@gluon.jit
def piece(p, end, TRIPS, C: gl.constexpr):
    """The tile at position p, the trips of it that are this program's, and the position after them."""
    if C.CLUSTER > 1:
        rank = gl.program_id(0) % C.CLUSTER
        return p, TRIPS * rank // C.CLUSTER, TRIPS * (rank + 1) // C.CLUSTER, p + 1
    elif C.STREAM:
        t = _quotient(p, TRIPS)
        k0 = p - t * TRIPS
        k1 = min(TRIPS, k0 + end - p)
        return t, k0, k1, p + k1 - k0
    else:
        return p, p * 0, TRIPS, p + gl.num_programs(0)


@gluon.jit
def _program_at(position, each, more):
    """Which program a position of the stream belongs to."""
    longer = more * (each + 1)
    in_longer = position < longer
    of = _quotient(gl.where(in_longer, position, position - longer), gl.where(in_longer, each + 1, each))
    return gl.where(in_longer, of, more + of)


@gluon.jit(do_not_specialize=["M", "tiles_m", "tiles_n", "TRIPS", "each", "more"])
def sum_parts_kernel(
    sums, out, alpha, M, N, tiles_m, tiles_n, TRIPS, each, more,
    BM: gl.constexpr, SUBS: gl.constexpr, BAND: gl.constexpr, ALPHA: gl.constexpr, FACTOR: gl.constexpr,
    ROWS: gl.constexpr, PARTS: gl.constexpr, ALIKE: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Add the parts, at most PARTS, of each tile that several programs of ``matmul_kernel`` shared.

    A program is for 64 weight rows and ROWS of x. ALIKE: every tile has PARTS. EARLY: there is a multiprocessor for
    each, and they come while the product still runs. Then each takes more than half of the shared memory, as all would
    start on the few multiprocessors that the product left free, where 64 rows of 4096 x 4096 took 1.4 us longer.
    """
    WARPS: gl.constexpr = gl.num_warps()
    if EARLY:
        let_next_start()
        # 115 of the 227 KB, of which something has to be used.
        room = gl.allocate_shared_memory(gl.int32, [230, 1, 128], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        room.index(0).store(gl.zeros([1, 128], gl.int32, gl.BlockedLayout([1, 1], [1, 32], [1, WARPS], [1, 0])))
    L: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [WARPS, 1], [1, 0])
    t = gl.program_id(0) // SUBS
    sub = gl.program_id(0) % SUBS
    if ALIKE:
        first = t * PARTS
        last = first + (PARTS - 1)
    else:
        first = _program_at(t * TRIPS, each, more)
        last = _program_at((t + 1) * TRIPS - 1, each, more)
    pm, pn = tile_at(t, tiles_m, tiles_n, BAND)
    wait_for_previous()
    let_next_start()
    row = gl.program_id(1) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, L))
    m = pm * BM + row
    col = gl.arange(0, 64, gl.SliceLayout(0, L))
    if last > first:
        at = sub * (64 * BM) + row[:, None] * 64 + col[None, :]
        valid = (m < M)[:, None]
        if BM % ROWS > 0:
            valid = valid & (row < BM)[:, None]
        place = SUBS * 64 * BM
        value = gl.load(sums + (first * 2 + 1) * place + at, mask=valid, other=0.0)
        for i in gl.static_range(1, PARTS):
            there = valid & (first + i <= last)
            value += gl.load(sums + (first * 2 + 2 * i) * place + at, mask=there, other=0.0)
        if ALPHA == 0:
            value = value * FACTOR
        elif ALPHA == 1:
            value = value * (gl.load(alpha) * FACTOR)
        else:
            value = value * (gl.load(alpha + m, mask=m < M, other=0.0) * FACTOR)[:, None]
        n = (pn * SUBS + sub) * 64 + col
        gl.store(out + (m.to(gl.int64) * N)[:, None] + n[None, :], value.to(out.dtype.element_ty), mask=valid)
