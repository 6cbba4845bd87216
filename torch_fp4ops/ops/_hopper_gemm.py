"""Matrix products of 16-bit rows and block-scaled weights on Hopper, in Gluon.

``out[m, n] = alpha * sum_k x[m, k] * w[n, k]``, computed as ``w @ x.T``: the weights are the left operand, decoded in
registers (``_hopper_decode``), and x the right one, in shared memory. One warp loads both by TMA into a ring of
stages; two warp groups decode and multiply. Up to 16 rows they use ``mma``, which is quicker than ``wgmma`` on so
narrow a right operand; above, ``wgmma``, and the next step is decoded while the tensor cores work on this one. Tiles
of 96 and 192 rows of x have two accumulators, as a tensor's sizes are powers of two.

A program is persistent and works through the tiles as ``_hopper_schedule`` says, or it has a part of one tile, whose
other parts are those of its cluster (``_hopper_cluster``).
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

from ._hopper_cluster import add_parts, arrive, arrive_and_wait, open_boxes, wait_for_boxes
from ._hopper_decode import decode, fetch
from ._hopper_load import after, load_first, loader
from ._hopper_plan import Plan
from ._hopper_schedule import piece, share, tile_at, wait_for_previous
from ._hopper_store import add_shared, free_place, give_shared, store, store_part

__all__ = ["matmul_kernel"]


@gluon.constexpr_function
def _plan(
    FMT, HALF, BM, X_ROWS, R, KW, KS, STAGES, AHEAD, STREAM, CLUSTER, SUM_EARLY, ONCE, STORE, BAND, ALPHA, FACTOR,
    REGISTERS,
):  # fmt: skip
    return Plan(
        FMT, HALF, BM, X_ROWS, R, KW, KS, STAGES, AHEAD, STREAM, CLUSTER, SUM_EARLY, ONCE, STORE, BAND, ALPHA,
        FACTOR, REGISTERS,
    )  # fmt: skip


@gluon.constexpr_function
def _accumulator(BM, MMA):
    if MMA:
        return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8])
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])


@gluon.jit
def _fetch(s, st, J: gl.constexpr, SUB: gl.constexpr, C: gl.constexpr):
    """The words of codes and scales of 64 weight rows and a stage's J-th step."""
    FMT: gl.constexpr = C.FMT
    ROWS: gl.constexpr = C.CODE_ROWS
    if C.SUBS == 1:
        codes = s[1].index(st * C.LOADS + J)
        scales = s[2].index(st * C.LOADS + J)
    else:
        at = st * C.LOADS + SUB // 2
        HALF_BLOCK: gl.constexpr = J * 2 + SUB % 2
        codes = s[1].index(at).slice(HALF_BLOCK * ROWS, ROWS, dim=0)
        scales = s[2].index(at).slice(HALF_BLOCK, 1, dim=0)
    return fetch(codes, scales, FMT)


@gluon.jit
def _weights(s, st, J: gl.constexpr, SUB: gl.constexpr, OPERAND: gl.constexpr, C: gl.constexpr):
    FMT: gl.constexpr = C.FMT
    HALF: gl.constexpr = C.HALF
    codes, scales = _fetch(s, st, J, SUB, C)
    return decode(codes, scales, OPERAND, FMT, HALF)


@gluon.jit
def _multiply(d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, each, more, C: gl.constexpr, GROUP: gl.constexpr):
    BM: gl.constexpr = C.BM
    TOP: gl.constexpr = C.TOP
    REST: gl.constexpr = C.REST
    KS: gl.constexpr = C.KS
    KW: gl.constexpr = C.KW
    ACC: gl.constexpr = _accumulator(TOP, C.MMA)
    ACC1: gl.constexpr = _accumulator(REST, C.MMA) if REST else ACC
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    LEFT1: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC1, k_width=2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=ACC, k_width=2)
    PART: gl.constexpr = GROUP % KW  # its stages: PART and every KW-th from there
    SUB: gl.constexpr = GROUP // KW * C.R
    LAST: gl.constexpr = SUB + C.R - 1
    FMT: gl.constexpr = C.FMT
    HALF: gl.constexpr = C.HALF
    full = s[3]
    empty = s[4]
    wait_for_previous()
    if C.ALPHA == 1:
        factor = gl.load(alpha) * C.FACTOR  # loaded now, for at the end it would be waited for
    else:
        factor = C.FACTOR
    tiles = tiles_m * tiles_n
    beg, end = share(tiles, each, more, C)
    p = beg
    st = PART
    phase = 0
    turn = 0
    ahead = st
    if not C.MMA:
        mbarrier.wait(full.index(st), phase)
        a = _weights(s, st, 0, SUB, LEFT, C)
        if C.R == 2:
            codes, scales = _fetch(s, st, 0, LAST, C)
        elif C.AHEAD == 2:
            if KS == 1:
                ahead, phase = after(ahead, phase, 0, KW, PART, C)
                mbarrier.wait(full.index(ahead), phase)
            codes, scales = _fetch(s, ahead, 1 % KS, SUB, C)
    while p < end:
        t, k0, k1, after_p = piece(p, end, TRIPS, C)
        pm, pn = tile_at(t, tiles_m, tiles_n, C.BAND)
        acc0 = gl.zeros([64, TOP], gl.float32, ACC)
        if C.R == 2:  # sums of other weight rows
            acc1 = gl.zeros([64, BM], gl.float32, ACC)
        elif REST:  # of other rows of x
            acc1 = gl.zeros([64, REST], gl.float32, ACC1)
        else:
            acc1 = 0
        if C.MMA:
            for k in range(k0, k1):
                for i in gl.static_range(4 // KS):
                    mbarrier.wait(full.index(st), phase)
                    for j in gl.static_range(KS):
                        w = _weights(s, st, j, SUB, LEFT, C)
                        x = s[0].index(st * KS + j).permute((1, 0)).load(RIGHT)
                        acc0 = mma_v2(w, x, acc0)
                    # A stage is given back one stage late: its loads have been multiplied by then, not only issued.
                    before = (st + C.STAGES - KW) % C.STAGES
                    mbarrier.arrive(empty.index(before), pred=(p > beg) | (k + i > k0))
                    st, phase = after(st, phase, i, KW, PART, C)
        else:
            for _ in range(k0, k1):
                done = st
                # What the next products need, also across tiles, is fetched and decoded under these.
                for j in gl.static_range(4):
                    x = s[0].index(st * KS + j % KS).permute((1, 0))
                    acc0 = warpgroup_mma(a, x, acc0, is_async=True)
                    if C.R == 2:
                        b = decode(codes, scales, LEFT, FMT, HALF)
                        if j > 0:
                            acc0, acc1, b = warpgroup_mma_wait(1, deps=[acc0, acc1, b])
                    elif REST:
                        rest = s[5].index(st * KS + j % KS).permute((1, 0))
                        again = gl.convert_layout(a, LEFT1, assert_trivial=True)
                        acc1 = warpgroup_mma(again, rest, acc1, is_async=True)
                        if j > 0:
                            acc0, acc1 = warpgroup_mma_wait(2, deps=[acc0, acc1])
                    elif j > 0:
                        acc0 = warpgroup_mma_wait(1, deps=[acc0])
                    if j > 0 and j % KS == 0:
                        mbarrier.arrive(empty.index(done))
                    if C.R == 2:
                        acc1 = warpgroup_mma(b, x, acc1, is_async=True)
                    if (j + C.AHEAD) % KS == 0:
                        ahead, phase = after(ahead, phase, (j + C.AHEAD - 1) % 4 // KS, KW, PART, C)
                        mbarrier.wait(full.index(ahead), phase)
                    if C.AHEAD == 2:
                        next_codes, next_scales = _fetch(s, ahead, (j + 2) % KS, SUB, C)
                        a = decode(codes, scales, LEFT, FMT, HALF)
                        codes, scales = next_codes, next_scales
                    else:
                        a = _weights(s, ahead, (j + 1) % KS, SUB, LEFT, C)
                    if C.R == 2:
                        codes, scales = _fetch(s, ahead, (j + 1) % KS, LAST, C)
                        if j < 3:
                            acc0, acc1, a = warpgroup_mma_wait(1, deps=[acc0, acc1, a])
                    if (j + 1) % KS == 0:
                        done = st
                        st, _ = after(st, phase, j // KS, KW, PART, C)
                # Nothing stays in flight over the loop's end: ptxas would serialise all of it.
                if C.R == 2 or REST:
                    acc0, acc1, a = warpgroup_mma_wait(0, deps=[acc0, acc1, a])
                else:
                    acc0, a = warpgroup_mma_wait(0, deps=[acc0, a])
                mbarrier.arrive(empty.index(done))
        if KW > 1:
            if PART > 0:
                give_shared(acc0, acc1, s, turn, PART, SUB, C)
            else:
                acc0, acc1 = add_shared(acc0, acc1, s, turn, SUB, C)
            turn = turn ^ 1
        if C.CLUSTER > 1:
            wait_for_boxes()
        if PART > 0:
            pass
        elif C.STREAM and k1 - k0 < TRIPS:
            # Place 1 of this program is for a tile's first part (at most one), place 0 for any later one (likewise).
            place = gl.program_id(0) * 2 + (k0 == 0).to(gl.int32)
            to = sums + (place * C.SUBS + SUB) * (64 * BM)
            store_part(to, acc0, TOP, ACC)
            if C.R == 2 or REST:
                store_part(to + 64 * TOP, acc1, REST or TOP, ACC1)
        else:
            first = pm * BM
            first1 = first + TOP
            row = (pn * C.SUBS + SUB) * 64
            if C.CLUSTER > 1:
                rank = gl.program_id(0) % C.CLUSTER
                acc0 = add_parts(acc0, SUB * C.ACCUMULATORS, C)
                first += rank * (TOP // C.CLUSTER)
                if REST:
                    acc1 = add_parts(acc1, SUB * C.ACCUMULATORS + 1, C)
                    first1 += rank * (REST // C.CLUSTER)
            if C.TMA_STORE:
                tma.store_wait(0)
            place = free_place(s, ahead, phase, SUB, C)
            AT: gl.constexpr = C.FIRST_RESULT
            store(acc0, first, row, place, d, s, out, alpha, factor, M, N, AT, 0, C)
            if C.R == 2:
                store(acc1, first, row + 64, LAST, d, s, out, alpha, factor, M, N, AT, 0, C)
            elif REST:
                store(acc1, first1, row, place, d, s, out, alpha, factor, M, N, AT + 1, 5, C)
        p = after_p
    if C.TMA_STORE:
        tma.store_wait(0)


@gluon.jit
def _group0(d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, each, more, C: gl.constexpr):
    _multiply(d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, each, more, C, 0)


@gluon.jit
def _group1(d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, each, more, C: gl.constexpr):
    if C.CLUSTER > 1:
        arrive()
    _multiply(d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, each, more, C, 1)


@gluon.jit(do_not_specialize=["M", "tiles_m", "tiles_n", "TRIPS", "each", "more"])
def matmul_kernel(
    x_desc, codes_desc, scales_desc, out_desc, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, each, more,
    FMT: gl.constexpr, HALF: gl.constexpr, BM: gl.constexpr, X_ROWS: gl.constexpr, R: gl.constexpr,
    KW: gl.constexpr, KS: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr, STREAM: gl.constexpr,
    CLUSTER: gl.constexpr, SUM_EARLY: gl.constexpr, ONCE: gl.constexpr, STORE: gl.constexpr, BAND: gl.constexpr,
    ALPHA: gl.constexpr, FACTOR: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """``out = (x @ w.T) * alpha``; N is a multiple of 128, TRIPS times KW times 256 the padded K.

    Descriptors have the blocks of ``_hopper_launch``; ``sums`` is ``[programs, 2, SUBS, BM, 64]`` float32 with STREAM.
    """
    C: gl.constexpr = _plan(
        FMT, HALF, BM, X_ROWS, R, KW, KS, STAGES, AHEAD, STREAM, CLUSTER, SUM_EARLY, ONCE, STORE, BAND, ALPHA,
        FACTOR, REGISTERS,
    )  # fmt: skip
    SUBS: gl.constexpr = C.SUBS
    LOADS: gl.constexpr = STAGES * C.LOADS
    HALVES: gl.constexpr = C.LOAD_HALVES
    CODE_ROWS: gl.constexpr = HALVES * C.CODE_ROWS
    SCALE_WORDS: gl.constexpr = C.SCALE_WORDS
    SLOTS: gl.constexpr = STAGES * KS
    TOP: gl.constexpr = C.TOP
    REST: gl.constexpr = C.REST
    TYPE: gl.constexpr = gl.float16 if HALF else gl.bfloat16
    xs = gl.allocate_shared_memory(TYPE, [SLOTS, TOP, 64], x_desc.layout)
    codes = gl.allocate_shared_memory(gl.int32, [LOADS, CODE_ROWS, 64], codes_desc.layout)
    scales = gl.allocate_shared_memory(gl.int32, [LOADS, HALVES, SCALE_WORDS], scales_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2 // KW)
    # Behind these five come x of second accumulators, results, and what KW needs, those that there are.
    s = (xs, codes, scales, full, empty)
    d = (x_desc, codes_desc, scales_desc)
    if C.TMA_STORE:
        d = d + (out_desc,)  # type: ignore[assignment]  # noqa: RUF005
    if REST:
        xs1 = gl.allocate_shared_memory(TYPE, [SLOTS, REST, 64], x_desc.layout)
        s = s + (xs1,)  # type: ignore[assignment]  # noqa: RUF005
    if C.RESULTS_APART:
        result = gl.allocate_shared_memory(out.dtype.element_ty, [SUBS, TOP, 64], x_desc.layout)
        s = s + (result,)  # type: ignore[assignment]  # noqa: RUF005
        if REST:
            result1 = gl.allocate_shared_memory(out.dtype.element_ty, [SUBS, REST, 64], x_desc.layout)
            s = s + (result1,)  # type: ignore[assignment]  # noqa: RUF005
    if KW > 1:
        IN_ORDER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        parts = gl.allocate_shared_memory(gl.float32, [SUBS * (KW - 1), TOP // 8, 512], IN_ORDER)
        given = gl.allocate_shared_memory(gl.int64, [SUBS, 1], mbarrier.MBarrierLayout())
        taken = gl.allocate_shared_memory(gl.int64, [SUBS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(SUBS):
            mbarrier.init(given.index(i), count=KW - 1)
            mbarrier.init(taken.index(i), count=1)
        s = s + (parts, given, taken)  # type: ignore[assignment]  # noqa: RUF005
        if REST:
            parts1 = gl.allocate_shared_memory(gl.float32, [SUBS * (KW - 1), REST // 8, 512], IN_ORDER)
            s = s + (parts1,)  # type: ignore[assignment]  # noqa: RUF005
    fence_async_shared()
    load_first(d, s, M, tiles_m, tiles_n, TRIPS, C)
    if CLUSTER > 1:
        open_boxes(C)
        # All warps have to arrive, also those that fill the loading one's group.
        gl.warp_specialize([
            (_group0, (d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, each, more, C)),
            (_group1, (d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, each, more, C)),
            (loader, (d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, each, more, C)),
            (arrive_and_wait, ()),
            (arrive_and_wait, ()),
        ], [4, 1, 2, 1], [REGISTERS, 24, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_group0, (d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, each, more, C)),
            (_group1, (d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, each, more, C)),
            (loader, (d, s, out, sums, alpha, M, N, tiles_m, tiles_n, TRIPS, each, more, C)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
