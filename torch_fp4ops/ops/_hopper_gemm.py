"""Matrix products of 16-bit rows and block-scaled weights on Hopper, in Gluon.

``out[m, n] = alpha * sum_k x[m, k] * w[n, k]``, computed as ``w @ x.T``: the weights are the left operand, decoded in
registers (``_hopper_decode``), and x the right one, in shared memory. One warp loads both by TMA into a ring of
stages; two warp groups decode and multiply. Up to 16 rows they use ``mma``, which is quicker than ``wgmma`` on so
narrow a right operand; above, ``wgmma``, and the next step is decoded while the tensor cores work on this one.

A program is persistent and works through the tiles as ``_hopper_schedule`` says.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    mma_v2,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._gluon import async_load, async_store, warp_group_barrier
from ._hopper_decode import decode
from ._hopper_plan import Plan
from ._hopper_schedule import let_next_start, piece, share, tile_at, wait_for_previous

__all__ = ["matmul_kernel"]


@gluon.constexpr_function
def _plan(FMT, HALF, BM, R, KW, KS, STAGES, STREAM, TMA_STORE, BAND, ALPHA, FACTOR, REGISTERS):
    return Plan(FMT, HALF, BM, R, KW, KS, STAGES, STREAM, TMA_STORE, BAND, ALPHA, FACTOR, REGISTERS)


@gluon.constexpr_function
def _accumulator(BM, MMA):
    if MMA:
        return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8])
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])


# The loading warp


@gluon.jit
def _load_stage(d, s, st, pm, pn, k, KT, C: gl.constexpr):
    """Load stage ``st``: KS steps from step k on."""
    KS: gl.constexpr = C.KS
    BLOCKS: gl.constexpr = C.BLOCKS
    BYTES: gl.constexpr = C.STAGE_BYTES
    mbarrier.expect(s[3].index(st), BYTES)
    for j in gl.static_range(KS):
        slot = st * KS + j
        for b in gl.static_range(BLOCKS):
            if C.SUBS == 1:
                row = (pn // 2 * KT + k + j) * 2 + pn % 2
            else:
                row = (pn * BLOCKS + b) * KT + k + j
            async_load(d[1], [row * (C.CODE_ROWS * C.HALVES), 0], s[3].index(st), s[1].index(slot * BLOCKS + b))
            async_load(d[2], [row * C.HALVES, 0], s[3].index(st), s[2].index(slot * BLOCKS + b))
        async_load(d[0], [pm * C.BM, (k + j) * 64], s[3].index(st), s[0].index(slot))


@gluon.jit
def _loader(d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, C: gl.constexpr):
    wait_for_previous()
    if not C.STREAM:  # the programs that add the parts up would take room from those that still multiply
        let_next_start()
    beg, end = share(tiles_m * tiles_n, TRIPS, C.STREAM)
    KW: gl.constexpr = C.KW
    STEPS: gl.constexpr = 4 * KW
    KT = TRIPS * STEPS
    p = beg
    st = 0
    phase = 1
    while p < end:
        t, k0, k1 = piece(p, end, TRIPS, C.STREAM)
        pm, pn = tile_at(t, tiles_m, tiles_n, C.BAND)
        for k in range(STEPS // C.KS * k0, STEPS // C.KS * k1):
            mbarrier.wait(s[4].index(st), phase)
            _load_stage(d, s, st, pm, pn, k * C.KS, KT, C)
            st = (st + 1) % C.STAGES
            phase = phase ^ (st == 0).to(gl.int32)
        p += k1 - k0
    if not C.MMA and beg < end:
        # Warp groups decode a step ahead: each waits for one stage more than it multiplies, whatever is in it.
        for _ in gl.static_range(KW):
            mbarrier.wait(s[4].index(st), phase)
            mbarrier.expect(s[3].index(st), 0)
            st = (st + 1) % C.STAGES
            phase = phase ^ (st == 0).to(gl.int32)


# The multiplying warp groups


@gluon.jit
def _weights(s, slot, SUB: gl.constexpr, OPERAND: gl.constexpr, C: gl.constexpr):
    FMT: gl.constexpr = C.FMT
    HALF: gl.constexpr = C.HALF
    ROWS: gl.constexpr = C.CODE_ROWS
    at = slot * C.BLOCKS + SUB // 2
    codes = s[1].index(at).slice((SUB % 2) * ROWS, ROWS, dim=0)
    return decode(codes, s[2].index(at).slice(SUB % 2, 1, dim=0), OPERAND, FMT, HALF)


@gluon.jit
def _store(acc, row, pm, d, s, out, alpha, factor, M, N, SUB: gl.constexpr, ACC: gl.constexpr, C: gl.constexpr):
    """Multiply the sums of 64 weight rows from ``row`` on by the factor or by each row's, round once and store them
    transposed."""
    BM: gl.constexpr = C.BM
    m = pm * BM + gl.arange(0, BM, gl.SliceLayout(0, ACC))
    if C.ALPHA == 2:
        acc = acc * (gl.load(alpha + m, mask=m < M, other=0.0) * C.FACTOR)[None, :]
    else:
        acc = acc * factor
    value = acc.to(out.dtype.element_ty)
    if C.TMA_STORE:
        buffer = s[5].index(SUB)
        buffer.permute((1, 0)).store(value)
        fence_async_shared()
        async_store(d[3], [pm * BM, row], buffer)
    else:
        n = row + gl.arange(0, 64, gl.SliceLayout(1, ACC))
        gl.store(out + (m.to(gl.int64) * N)[None, :] + n[:, None], value, mask=(m < M)[None, :])


@gluon.jit
def _store_part(to, acc, BM: gl.constexpr, ACC: gl.constexpr):
    m = gl.arange(0, BM, gl.SliceLayout(0, ACC))[None, :]
    n = gl.arange(0, 64, gl.SliceLayout(1, ACC))[:, None]
    gl.store(to + (m * 64 + n), acc)


@gluon.jit
def _multiply(d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, C: gl.constexpr, GROUP: gl.constexpr):
    BM: gl.constexpr = C.BM
    KS: gl.constexpr = C.KS
    KW: gl.constexpr = C.KW
    ACC: gl.constexpr = _accumulator(BM, C.MMA)
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=ACC, k_width=2)
    PART: gl.constexpr = GROUP % KW  # its stages: PART and every KW-th from there
    SUB: gl.constexpr = GROUP // KW * C.R
    LAST: gl.constexpr = SUB + C.R - 1
    full = s[3]
    empty = s[4]
    wait_for_previous()
    if C.ALPHA == 1:
        factor = gl.load(alpha) * C.FACTOR  # loaded now, for at the end it would be waited for
    else:
        factor = C.FACTOR
    tiles = tiles_m * tiles_n
    beg, end = share(tiles, TRIPS, C.STREAM)
    p = beg
    st = PART
    phase = 0
    turn = 0
    if not C.MMA:
        a = gl.zeros([64, 64], s[0].dtype, LEFT)
        if p < end:
            mbarrier.wait(full.index(PART), 0)
            a = _weights(s, PART * KS, SUB, LEFT, C)
    while p < end:
        t, k0, k1 = piece(p, end, TRIPS, C.STREAM)
        pm, pn = tile_at(t, tiles_m, tiles_n, C.BAND)
        acc0 = gl.zeros([64, BM], gl.float32, ACC)
        if C.R == 2:
            acc1 = gl.zeros([64, BM], gl.float32, ACC)
        else:
            acc1 = 0
        if C.MMA:
            for k in range(4 // KS * k0, 4 // KS * k1):
                mbarrier.wait(full.index(st), phase)
                for j in gl.static_range(KS):
                    w = _weights(s, st * KS + j, SUB, LEFT, C)
                    x = s[0].index(st * KS + j).permute((1, 0)).load(RIGHT)
                    acc0 = mma_v2(w, x, acc0)
                # A stage is given back one stage late: its loads have been multiplied by then, not only issued.
                before = (st + C.STAGES - KW) % C.STAGES
                mbarrier.arrive(empty.index(before), pred=(p > beg) | (k > 4 // KS * k0))
                st = (st + KW) % C.STAGES
                phase = phase ^ (st == PART).to(gl.int32)
        else:
            for _ in range(k0, k1):
                done = st
                for j in gl.static_range(4):
                    slot = st * KS + j % KS
                    x = s[0].index(slot).permute((1, 0))
                    acc0 = warpgroup_mma(a, x, acc0, is_async=True)
                    if C.R == 2:
                        b = _weights(s, slot, LAST, LEFT, C)
                        if j > 0:
                            acc0, acc1, b = warpgroup_mma_wait(1, deps=[acc0, acc1, b])
                            if j % KS == 0:
                                mbarrier.arrive(empty.index(done))
                        acc1 = warpgroup_mma(b, x, acc1, is_async=True)
                    elif j > 0:
                        acc0 = warpgroup_mma_wait(1, deps=[acc0])
                        if j % KS == 0:
                            mbarrier.arrive(empty.index(done))
                    # The next step's weights, also across tiles, are decoded under these products.
                    if j % KS == KS - 1:
                        done = st
                        st = (st + KW) % C.STAGES
                        phase = phase ^ (st == PART).to(gl.int32)
                        mbarrier.wait(full.index(st), phase)
                        a = _weights(s, st * KS, SUB, LEFT, C)
                    else:
                        a = _weights(s, slot + 1, SUB, LEFT, C)
                    if C.R == 2 and j < 3:
                        acc0, acc1, a = warpgroup_mma_wait(1, deps=[acc0, acc1, a])
                # Nothing stays in flight over the loop's end: ptxas would serialise all of it.
                if C.R == 2:
                    acc0, acc1, a = warpgroup_mma_wait(0, deps=[acc0, acc1, a])
                else:
                    acc0, a = warpgroup_mma_wait(0, deps=[acc0, a])
                mbarrier.arrive(empty.index(done))
        if KW > 1:
            sums_at = s[C.FIRST_SHARED]
            given = s[C.FIRST_SHARED + 1].index(SUB)
            taken = s[C.FIRST_SHARED + 2].index(SUB)
            if PART > 0:
                mbarrier.wait(taken, turn ^ 1)
                sums_at.index(SUB * (KW - 1) + PART - 1).store(acc0)
                warp_group_barrier()
                mbarrier.arrive(given)
            else:
                mbarrier.wait(given, turn)
                for i in gl.static_range(KW - 1):
                    acc0 += sums_at.index(SUB * (KW - 1) + i).load(ACC)
                warp_group_barrier()
                mbarrier.arrive(taken)
            turn = turn ^ 1
        if PART > 0:
            pass
        elif C.STREAM and k1 - k0 < TRIPS:
            # Place 1 of this program is for a tile's first part (at most one), place 0 for any later one (likewise).
            place = gl.program_id(0) * 2 + (k0 == 0).to(gl.int32)
            to = sums + (place * C.SUBS + SUB) * (64 * BM)
            _store_part(to, acc0, BM, ACC)
            if C.R == 2:
                _store_part(to + 64 * BM, acc1, BM, ACC)
        else:
            row = (pn * C.SUBS + SUB) * 64
            if C.TMA_STORE:
                tma.store_wait(0)
            _store(acc0, row, pm, d, s, out, alpha, factor, M, N, SUB, ACC, C)
            if C.R == 2:
                _store(acc1, row + 64, pm, d, s, out, alpha, factor, M, N, LAST, ACC, C)
        p += k1 - k0
    if C.TMA_STORE:
        tma.store_wait(0)


@gluon.jit
def _group0(d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, C: gl.constexpr):
    _multiply(d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, C, 0)


@gluon.jit
def _group1(d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, C: gl.constexpr):
    _multiply(d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, C, 1)


@gluon.jit(do_not_specialize=["M", "tiles_m", "tiles_n", "TRIPS"])
def matmul_kernel(
    x_desc, codes_desc, scales_desc, out_desc, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS,
    FMT: gl.constexpr, HALF: gl.constexpr, BM: gl.constexpr, R: gl.constexpr, KW: gl.constexpr,
    KS: gl.constexpr, STAGES: gl.constexpr, STREAM: gl.constexpr, TMA_STORE: gl.constexpr, BAND: gl.constexpr,
    ALPHA: gl.constexpr, FACTOR: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """``out = (x @ w.T) * alpha``; N is a multiple of 128, TRIPS times KW times 256 the padded K.

    Descriptors have the blocks of ``_hopper_launch``; ``sums`` is ``[programs, 2, SUBS, BM, 64]`` float32 with STREAM.
    """
    C: gl.constexpr = _plan(FMT, HALF, BM, R, KW, KS, STAGES, STREAM, TMA_STORE, BAND, ALPHA, FACTOR, REGISTERS)
    SUBS: gl.constexpr = C.SUBS
    BLOCKS: gl.constexpr = STAGES * KS * C.BLOCKS
    HALVES: gl.constexpr = C.HALVES
    CODE_ROWS: gl.constexpr = C.HALVES * C.CODE_ROWS
    SCALE_WORDS: gl.constexpr = C.SCALE_WORDS
    SLOTS: gl.constexpr = STAGES * KS
    xs = gl.allocate_shared_memory(gl.float16 if HALF else gl.bfloat16, [SLOTS, BM, 64], x_desc.layout)
    codes = gl.allocate_shared_memory(gl.int32, [BLOCKS, CODE_ROWS, 64], codes_desc.layout)
    scales = gl.allocate_shared_memory(gl.int32, [BLOCKS, HALVES, SCALE_WORDS], scales_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2 // KW)
    d = (x_desc, codes_desc, scales_desc)
    s = (xs, codes, scales, full, empty)
    if TMA_STORE:
        result = gl.allocate_shared_memory(out.dtype.element_ty, [SUBS, BM, 64], out_desc.layout)
        d = d + (out_desc,)  # type: ignore[assignment]  # noqa: RUF005
        s = s + (result,)  # type: ignore[assignment]  # noqa: RUF005
    if KW > 1:
        SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(2, 1, 4, [1, 0])
        parts = gl.allocate_shared_memory(gl.float32, [SUBS * (KW - 1), 64, BM], SWIZZLED)
        given = gl.allocate_shared_memory(gl.int64, [SUBS, 1], mbarrier.MBarrierLayout())
        taken = gl.allocate_shared_memory(gl.int64, [SUBS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(SUBS):
            mbarrier.init(given.index(i), count=KW - 1)
            mbarrier.init(taken.index(i), count=1)
        s = s + (parts, given, taken)  # type: ignore[assignment]  # noqa: RUF005
    fence_async_shared()
    gl.warp_specialize([
        (_group0, (d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, C)),
        (_group1, (d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, C)),
        (_loader, (d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, C)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
