"""The loading warp of a Hopper product in tiles: x and the weight by TMA, into a ring of stages."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ._gluon import async_load
from ._hopper_cluster import arrive, wait_for_boxes
from ._hopper_schedule import let_next_start, piece, share, tile_at, wait_for_previous

__all__ = ["after", "load_first", "loader"]


@gluon.constexpr_function
def _bytes(C, pieces):
    """Of a stage with so many pieces of each of its tiles of x."""
    return C.STAGE_BYTES - C.KS * (C.BM - pieces * C.X_ROWS) * 128


@gluon.jit
def after(st, phase, INDEX: gl.constexpr, BY: gl.constexpr, FIRST: gl.constexpr, C: gl.constexpr):
    """The stage BY further than ``st``, and its phase; INDEX: how many of a trip's stages by BY lie before ``st``.

    Where rings are whole trips only a trip's last stage can be the ring's last, so that within a trip all addresses are
    constants beside the first one.
    """
    st += BY
    if INDEX == C.TRIP_STAGES // BY - 1 or not C.WHOLE_TRIPS:
        st = gl.where(st >= C.STAGES, FIRST, st)
        phase = phase ^ (st == FIRST).to(gl.int32)
    return st, phase


@gluon.jit
def _load_stage(d, s, st, pm, pn, k, KT, M, C: gl.constexpr):
    """Load stage ``st``: KS steps from step k on."""
    KS: gl.constexpr = C.KS
    LOADS: gl.constexpr = C.LOADS
    ROWS: gl.constexpr = C.X_ROWS
    PIECES: gl.constexpr = C.BM // ROWS
    # Rows beyond the last one that are loaded all the same, as zeros, take longer than others.
    pieces = gl.cdiv(min(M - pm * C.BM, C.BM), ROWS)
    for i in gl.static_range(PIECES):
        mbarrier.expect(s[3].index(st), _bytes(C, i + 1), pred=True if PIECES == 1 else pieces == i + 1)
    for i in gl.static_range(LOADS):
        if C.SUBS == 1:
            row = (pn // 2 * KT + k + i) * 2 + pn % 2
        else:
            row = ((pn * LOADS + i) * KT + k) * 2
        async_load(d[1], [row * C.CODE_ROWS, 0], s[3].index(st), s[1].index(st * LOADS + i))
        async_load(d[2], [row, 0], s[3].index(st), s[2].index(st * LOADS + i))
    for j in gl.static_range(KS):
        for i in gl.static_range(PIECES):
            if i * ROWS < C.TOP:
                to = s[0].index(st * KS + j).slice(i * ROWS, ROWS, dim=0)
            else:
                to = s[5].index(st * KS + j).slice(i * ROWS - C.TOP, ROWS, dim=0)
            wanted = True if i == 0 else i < pieces
            async_load(d[0], [pm * C.BM + i * ROWS, (k + j) * 64], s[3].index(st), to, pred=wanted)


@gluon.jit
def load_first(d, s, M, tiles_m, tiles_n, TRIPS, C: gl.constexpr):
    """The first stages, before warps have their roles, which takes 0.45 us: they may as well be on their way then."""
    STAGES: gl.constexpr = C.FIRST_STAGES
    if STAGES > 0:
        STEPS: gl.constexpr = 4 * C.KW
        p, end = share(tiles_m * tiles_n, 0, 0, C)
        t, k0, _, _ = piece(p, end, TRIPS, C)
        pm, pn = tile_at(t, tiles_m, tiles_n, C.BAND)
        wait_for_previous()
        for i in gl.static_range(STAGES):
            _load_stage(d, s, i, pm, pn, k0 * STEPS + i * C.KS, TRIPS * STEPS, M, C)


@gluon.jit
def loader(d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, each, more, C: gl.constexpr):
    if C.CLUSTER > 1:
        arrive()
    beg, end = share(tiles_m * tiles_n, each, more, C)
    KW: gl.constexpr = C.KW
    STEPS: gl.constexpr = 4 * KW
    STAGES: gl.constexpr = C.TRIP_STAGES
    EXTRA: gl.constexpr = C.EXTRA_STAGES
    KT = TRIPS * STEPS
    p = beg
    st = 0
    phase = 1
    t, k0, k1, after_p = piece(p, end, TRIPS, C)
    pm, pn = tile_at(t, tiles_m, tiles_n, C.BAND)
    wait_for_previous()
    if not C.STREAM:  # else what is next adds parts up
        let_next_start()
    while p < end:
        for k in range(k0, k1):
            for i in gl.static_range(STAGES):
                if i >= C.FIRST_STAGES or (p > beg) | (k > k0):
                    mbarrier.wait(s[4].index(st), phase)
                    _load_stage(d, s, st, pm, pn, k * STEPS + i * C.KS, KT, M, C)
                st, phase = after(st, phase, i, 1, 0, C)
        p = after_p
        t, k0, k1, after_p = piece(p, end, TRIPS, C)
        pm, pn = tile_at(t, tiles_m, tiles_n, C.BAND)
    if C.SUM_EARLY:
        let_next_start()
    if not C.MMA:
        # Warp groups fetch ahead: each waits for some stages more than it multiplies, whatever is in them.
        for i in gl.static_range(EXTRA):
            mbarrier.wait(s[4].index(st), phase)
            mbarrier.expect(s[3].index(st), 0)
            st, phase = after(st, phase, i, 1, 0, C)
    if C.CLUSTER > 1:
        wait_for_boxes()
