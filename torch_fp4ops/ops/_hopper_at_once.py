"""Matrix products of up to 16 rows and small block-scaled weights on Hopper, all asked for at once, in Gluon.

A launch of such a product takes as long as its bytes. Here it does as little as can be before the first of them are
under way, and nothing between: no roles for warps, no ring of stages, no barriers in shared memory. A program has all
of its strips of 16 weight rows, and x, in shared memory; each warp has every eighth step of 64 along K, one a turn,
copies what it needs of that by itself, and waits for no one else before the sums are added up, in the order of the
warps.

That is for weights of which a multiprocessor's part has room. ``_hopper_strips`` has rings for those beyond.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ._gluon import copy_async, run_asm, warp_group_barrier
from ._hopper_decode import decode_strip, warp_bases
from ._hopper_rows import decode_pairs, decode_rows, load_rows, scale_place
from ._hopper_schedule import first_strip, let_next_start, wait_for_previous
from ._hopper_store import row_factors
from ._hopper_strip_plan import AtOncePlan

__all__ = ["at_once_kernel"]


@gluon.constexpr_function
def _plan(FMT, HALF, BM, S, STEPS, X_LAYOUT, ALPHA, FACTOR):
    return AtOncePlan(FMT, HALF, BM, S, STEPS, X_LAYOUT, ALPHA, FACTOR)


@gluon.constexpr_function
def _wait_asm(later):
    # Gluon's wait makes Triton put a barrier of all warps before what is read next.
    return f"cp.async.wait_group {later}; bar.warp.sync -1; // $0"


@gluon.jit
def _wait_for_own(LATER: gl.constexpr):
    """For what the threads of this warp have asked for, but for the last ``LATER`` groups."""
    run_asm(_wait_asm(LATER))


@gluon.jit
def _keep_in_order():
    """So that ptxas moves no load behind the copies that follow."""
    run_asm("bar.warp.sync -1; // $0")


@gluon.constexpr_function
def _scales_layout(turns, warps, words):
    """``[warps * turns, 1, words]``: 16 bytes a thread, and each warp its own steps."""
    quarters = [[0, 0, 4 << i] for i in range((words // 4).bit_length() - 1)]
    steps = [[warps << i, 0, 0] for i in range(turns.bit_length() - 1)]
    lanes = [*quarters, *steps, *[[0, 0, 0]] * 5]
    registers = [[0, 0, 1], [0, 0, 2], *lanes[5 : len(quarters) + len(steps)]]
    return gl.DistributedLinearLayout(registers, lanes[:5], warp_bases(warps, 3), [], [warps * turns, 1, words])


@gluon.jit
def _strip(first, i, PER_BLOCK: gl.constexpr, PER_HALF: gl.constexpr, PER_STRIP: gl.constexpr, C: gl.constexpr):
    """Where the i-th strip begins, of one, two or four in a half of a block, or three anywhere.

    Those beside each other take one address, and so are asked for sooner. That is no gain where all programs then ask
    for the same 16 rows of x at a time.
    """
    if C.S == 3 or (C.BM == 16 and not C.TURNED):
        strip = first + i
        beside = 0
    else:
        strip = first
        beside = i
    return (strip >> 3) * PER_BLOCK + (strip >> 2 & 1) * PER_HALF + (strip & 3) * PER_STRIP + beside * PER_STRIP


@gluon.jit
def _first_turn(C: gl.constexpr):
    """A program's; x comes from the L2, and its lines are slower to come if all programs ask for the same at a time."""
    if C.TURNED:
        return gl.program_id(0) % C.TURNS
    else:
        return 0


@gluon.jit
def _turn(t, C: gl.constexpr):
    """The t-th turn of a program."""
    if not C.TURNED:
        return t
    turn = t + _first_turn(C)
    return gl.where(turn >= C.TURNS, turn - C.TURNS, turn)


@gluon.jit
def _step(at, C: gl.constexpr):
    """The step that has the place ``at`` in shared memory, by turn and warp."""
    turn = at // C.WARPS
    return gl.where(turn < C.TURNS, _turn(turn, C), turn) * C.WARPS + at % C.WARPS


@gluon.jit
def _copy_scales(scales, first, i, C: gl.constexpr):
    """Those of a strip."""
    W: gl.constexpr = C.SCALE_WORDS
    STEPS: gl.constexpr = C.KS
    L: gl.constexpr = _scales_layout(STEPS // C.WARPS, C.WARPS, W)
    step = _step(gl.arange(0, STEPS, gl.SliceLayout(1, gl.SliceLayout(2, L))), C)[:, None, None]
    word = gl.arange(0, W, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    to = gl.allocate_shared_memory(gl.int32, [STEPS, 1, W], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    at = scales + _strip(first, i, C.STEPS * 8 * W, 4 * W, W, C)
    there, at = gl.broadcast(step < C.STEPS, at + (step * (8 * W) + word))
    copy_async(to, at, mask=there)
    return to


@gluon.jit
def _copy_codes(codes, first, i, turn, C: gl.constexpr):
    """Those of a strip and a step for each warp, of which each thread copies what it reads."""
    P: gl.constexpr = C.PLANES
    WARPS: gl.constexpr = C.WARPS
    L: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 1, 1, 32], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    S2: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, L))
    step = gl.arange(0, WARPS, gl.SliceLayout(1, S2))[:, None, None, None]
    plane = gl.arange(0, P, gl.SliceLayout(0, S2))[None, :, None, None]
    word = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))[None, None, None, :]
    to = gl.allocate_shared_memory(gl.int32, [WARPS, P, 1, 128], gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]))
    at = codes + _strip(first, i, C.STEPS * 1024 * P, 512 * P, 128, C)
    at = at + (step * (1024 * P) + plane * 512 + word) + turn * (WARPS * 1024 * P)
    if C.STEPS % WARPS == 0:
        copy_async(to, at)
    else:
        there, at = gl.broadcast(step < C.STEPS - turn * WARPS, at)
        copy_async(to, at, mask=there)
    return to


@gluon.jit
def _copy_rows(x, x_units, M, K_STEPS, turn, C: gl.constexpr):
    """Rows of x, a step for each warp; zeros beyond."""
    WARPS: gl.constexpr = C.WARPS
    L: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4, 8], [WARPS, 1, 1], [2, 1, 0])
    step = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    row = gl.arange(0, C.BM, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    element = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    TYPE: gl.constexpr = gl.float16 if C.HALF else gl.bfloat16
    to = gl.allocate_shared_memory(TYPE, [WARPS, C.BM, 64], gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0]))
    there = (step + turn * WARPS < K_STEPS) & (row < M)
    at = x + turn * WARPS * 64 + (row.to(gl.int64) * (x_units * 8) + step * 64 + element)
    there, at = gl.broadcast(there, at)
    copy_async(to, at, mask=there)
    return to


@gluon.jit
def _copy_row_codes(x, x_units, M, K_STEPS, turn, C: gl.constexpr):
    """As ``_copy_rows``, of codes, two of which are an element."""
    WARPS: gl.constexpr = C.WARPS
    L: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])
    step = turn * WARPS + gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    row = gl.arange(0, C.BM, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    pair = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    to = gl.allocate_shared_memory(gl.int16, [WARPS, C.BM, 32], gl.SwizzledSharedLayout(8, 2, 4, [2, 1, 0]))
    there, at = gl.broadcast((step < K_STEPS) & (row < M), x + (row * (x_units * 8) + step * 32 + pair))
    copy_async(to, at, mask=there)
    return to


@gluon.constexpr_function
def _row_scales_layout(turns, warps, rows):
    """``[warps * turns, rows]``: a word a thread, and each warp its own steps."""
    bases = [[0, 1 << i] for i in range(rows.bit_length() - 1)]
    bases += [[warps << i, 0] for i in range(turns.bit_length() - 1)]
    lanes = [*bases, *[[0, 0]] * 5][:5]
    return gl.DistributedLinearLayout(bases[5:], lanes, warp_bases(warps, 2), [], [warps * turns, rows])


@gluon.jit
def _copy_row_scales(x_scales, x_cols, M, K_STEPS, C: gl.constexpr):
    """For each step, by the warp whose it is, and each row the word that has its scales."""
    L: gl.constexpr = _row_scales_layout(C.KS // C.WARPS, C.WARPS, C.BM)
    step = _step(gl.arange(0, C.KS, gl.SliceLayout(1, L)), C)[:, None]
    row = gl.arange(0, C.BM, gl.SliceLayout(0, L))[None, :]
    to = gl.allocate_shared_memory(gl.int32, [C.KS, C.BM], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    there, place = gl.broadcast((step < K_STEPS) & (row < M), scale_place(row, step, x_cols, C))
    copy_async(to, x_scales + place, mask=there)
    return to


@gluon.constexpr_function
def _pairs_layout(warps, rows):
    """``[warps, 32, rows]`` pairs along K as the right side of ``mma`` has them."""
    registers = [[0, 4, 0], [0, 8, 0], [0, 16, 0]] + [[0, 0, 8]] * (rows == 16)
    lanes = [[0, 1, 0], [0, 2, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases(warps, 3), [], [warps, 32, rows])


@gluon.jit
def _decoded_rows(codes, words, turn: gl.constexpr, RIGHT: gl.constexpr, C: gl.constexpr):
    """Of codes and words of scales that were copied, the right side of a turn's products."""
    L: gl.constexpr = _pairs_layout(C.WARPS, C.BM)
    S: gl.constexpr = gl.SliceLayout(1, L)
    word = words.slice(turn * C.WARPS, C.WARPS, dim=0).load(S)
    step = gl.arange(0, C.WARPS, gl.SliceLayout(1, S))[:, None]
    return decode_pairs(codes.permute((0, 2, 1)).load(L), word >> (step % 2 * 16), RIGHT)


@gluon.jit
def _load_all_rows(x, x_scales, x_units, x_cols, M, K_STEPS, C: gl.constexpr):
    """Rows of x that come quantised, all steps of them, some rows at a time: there may be one only."""
    ROWS: gl.constexpr = C.ROWS
    BM: gl.constexpr = C.BM
    held = ()
    for i in gl.static_range(0, BM, ROWS):
        at = _first_turn(C) * C.WARPS
        loaded = load_rows(x, x_scales, x_units, x_cols, M, K_STEPS, at, i, C, C.TURNS * C.WARPS)
        held = held + (loaded,)  # type: ignore[assignment]  # noqa: RUF005
    return held


@gluon.jit
def _decode_all_rows(held, M, C: gl.constexpr):
    ROWS: gl.constexpr = C.ROWS
    BM: gl.constexpr = C.BM
    # Not swizzled, for a row is to be stored by itself; rows beyond are what they are, as no result depends on them.
    PADDED: gl.constexpr = gl.PaddedSharedLayout.with_identity_for([[64, 8]], [C.KS, BM, 64], [2, 1, 0])
    place = gl.allocate_shared_memory(gl.bfloat16, [C.KS, BM, 64], PADDED)
    for i in gl.static_range(0, BM, ROWS):
        if i < M:
            place.slice(i, ROWS, dim=1).store(decode_rows(held[i // ROWS], C))
    warp_group_barrier()
    return place


@gluon.jit(do_not_specialize=["x_units", "x_cols", "M", "K_STEPS"])
def at_once_kernel(
    x, x_scales, x_units, x_cols, codes, scales, out, alpha, M, N, K_STEPS,
    FMT: gl.constexpr, HALF: gl.constexpr, BM: gl.constexpr, S: gl.constexpr, STEPS: gl.constexpr,
    X_LAYOUT: gl.constexpr, ALPHA: gl.constexpr, FACTOR: gl.constexpr,
):  # fmt: skip
    """``out = (x @ w.T) * alpha`` for M up to BM; N is a multiple of 128, 64 times STEPS the padded K.

    ``codes`` and ``scales`` are int32. ``x`` has K_STEPS steps and ``x_units`` of 16 bytes from row to row; with
    ``X_LAYOUT`` it is words of codes, or with ``BY_WARP`` two codes each, and ``x_scales`` words of four scales,
    ``x_cols`` scales a padded row.
    """
    C: gl.constexpr = _plan(FMT, HALF, BM, S, STEPS, X_LAYOUT, ALPHA, FACTOR)
    WARPS: gl.constexpr = C.WARPS
    TURNS: gl.constexpr = C.TURNS
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=ACC, k_width=2)
    wait_for_previous()
    let_next_start()
    first = first_strip(N, S)
    # What goes to registers comes first: behind the copies it would arrive with the last of them, 1.5 us later.
    SUM: gl.constexpr = gl.BlockedLayout([WARPS, 1, BM // 8], [1, 4, 8], [1, WARPS, 1], [2, 1, 0])
    m = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(0, SUM)))
    factor = row_factors(m, alpha, M, C)
    held = ()
    if X_LAYOUT > 0 and not C.BY_WARP:
        held = _load_all_rows(x, x_scales, x_units, x_cols, M, K_STEPS, C)
    _keep_in_order()
    scales_of = ()
    for i in gl.static_range(S):
        scales_of = scales_of + (_copy_scales(scales, first, i, C),)  # type: ignore[assignment]  # noqa: RUF005
    if C.BY_WARP:
        row_scales = _copy_row_scales(x_scales, x_cols, M, K_STEPS, C)
    rows = ()
    codes_of = ()
    for t in gl.static_range(TURNS):
        if X_LAYOUT == 0:
            place = _copy_rows(x, x_units, M, K_STEPS, _turn(t, C), C).permute((0, 2, 1))
            rows = rows + (place,)  # type: ignore[assignment]  # noqa: RUF005
        elif C.BY_WARP:
            rows = rows + (_copy_row_codes(x, x_units, M, K_STEPS, _turn(t, C), C),)  # type: ignore[assignment]  # noqa: RUF005
        for i in gl.static_range(S):
            codes_of = codes_of + (_copy_codes(codes, first, i, _turn(t, C), C),)  # type: ignore[assignment]  # noqa: RUF005
            async_copy.commit_group()
    if X_LAYOUT > 0 and not C.BY_WARP:
        place = _decode_all_rows(held, M, C).permute((0, 2, 1))
        for t in gl.static_range(TURNS):
            rows = rows + (place.slice(t * WARPS, WARPS, dim=0),)  # type: ignore[assignment]  # noqa: RUF005
    accs = ()
    for _ in gl.static_range(S):
        accs = accs + (gl.zeros([WARPS, 16, BM], gl.float32, ACC),)  # type: ignore[assignment]  # noqa: RUF005
    for t in gl.static_range(TURNS):
        sums = ()
        for i in gl.static_range(S):
            _wait_for_own(S * (TURNS - t) - i - 1)
            if i == 0:
                if C.BY_WARP:
                    right = _decoded_rows(rows[t], row_scales, t, RIGHT, C)
                else:
                    right = rows[t].load(RIGHT)
            w = decode_strip(codes_of[t * S + i], scales_of[i].slice(t * WARPS, WARPS, dim=0), LEFT, FMT, HALF)
            sums = sums + (mma_v2(w, right, accs[i]),)  # noqa: RUF005
        accs = sums
    # Two strips at a time, if there are: that is one barrier for both.
    TOGETHER: gl.constexpr = 2 - S % 2
    row = first * 16 + gl.arange(0, 16 * TOGETHER, gl.SliceLayout(1, gl.SliceLayout(0, SUM)))
    to = out + m[None, :] * N + row[:, None]
    parts = ()
    for i in gl.static_range(0, S, TOGETHER):
        part = gl.allocate_shared_memory(
            gl.float32, [WARPS, 16 * TOGETHER, BM], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
        )
        if TOGETHER == 2:
            part.store(gl.join(accs[i], accs[i + 1]).permute((0, 3, 1, 2)).reshape([WARPS, 32, BM]))
        else:
            part.store(accs[i])
        parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005
    for i in gl.static_range(S // TOGETHER):
        value = gl.sum(parts[i].load(SUM), axis=0) * factor[None, :]
        gl.store(to + i * (16 * TOGETHER), value.to(out.dtype.element_ty), mask=(m < M)[None, :])
