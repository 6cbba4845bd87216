"""Matrix products of up to 16 rows and block-scaled weights on Hopper that sum within a program, in Gluon.

``_hopper_gemm`` has tiles of 64 or 128 weight rows, too few for all multiprocessors unless programs share K and a
second kernel sums. Here a program has strips of 16 weight rows, as many as give each multiprocessor one program, and
all of K. The four warps of a group share K, not rows: of four steps of 64 each has one, and their sums meet in shared
memory, at the end. Groups share K as well, by turns at the stages; or, with many strips, each has strips of its own: a
stage is then free again sooner, and sums are fewer.

A strip's four steps are decoded as the four quarters of a 64 x 64 tile are: the bytes of a thread have the same order.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, mma_v2

from ._gluon import async_load, reinterpret, warp_group_barrier
from ._hopper_decode import decode_strip
from ._hopper_rows import rows_decoder
from ._hopper_schedule import first_strip, let_next_start, wait_for_previous
from ._hopper_store import row_factors
from ._hopper_strip_plan import StripPlan

__all__ = ["strips_kernel"]


@gluon.constexpr_function
def _plan(FMT, HALF, BM, S, KS, STAGES, OWN, X_LAYOUT, ALPHA, FACTOR):
    return StripPlan(FMT, HALF, BM, S, KS, STAGES, OWN, X_LAYOUT, ALPHA, FACTOR)


@gluon.constexpr_function
def _begin(C, group):
    """The first of a warp group's strips."""
    return C.S * group // C.OWN if C.OWN else 0


@gluon.constexpr_function
def _end(C, group):
    return C.S * (group + 1) // C.OWN if C.OWN else C.S


@gluon.jit
def _load_stage(d, s, st, k, N, STEPS, C: gl.constexpr):
    """Load stage ``st``: KS steps from step k on."""
    BOXES: gl.constexpr = C.BOXES
    full = s[3].index(st)
    if C.X_LAYOUT == 0:
        mbarrier.expect(full, C.STAGE_BYTES)
        async_load(d[0], [k, 0, 0], full, s[0].index(st))
    else:
        mbarrier.expect(full, C.WEIGHT_BYTES)
    first = first_strip(N, C.S)
    for b in gl.static_range(BOXES):
        strip = first + b * C.BOX
        row = strip // 8 * STEPS + k
        plane = strip % 8 // 4 * C.PLANES
        async_load(d[1], [row, plane, strip % 4, 0], full, s[1].index(st * BOXES + b))
        async_load(d[2], [row, strip % 8, 0], full, s[2].index(st * BOXES + b))


@gluon.jit
def _loader(d, s, out, alpha, M, N, STEPS, C: gl.constexpr):
    KS: gl.constexpr = C.KS
    wait_for_previous()
    let_next_start()
    st = 1
    phase = 1
    for k in range(KS, STEPS, KS):
        mbarrier.wait(s[4].index(st), phase)
        _load_stage(d, s, st, k, N, STEPS, C)
        st = (st + 1) % C.STAGES
        phase = phase ^ (st == 0).to(gl.int32)


@gluon.jit
def _multiply(d, s, out, alpha, M, N, STEPS, C: gl.constexpr, GROUP: gl.constexpr):
    BM: gl.constexpr = C.BM
    KS: gl.constexpr = C.KS
    BOX: gl.constexpr = C.BOX
    TURNS: gl.constexpr = C.TURNS
    BEGIN: gl.constexpr = _begin(C, GROUP)
    END: gl.constexpr = _end(C, GROUP)
    FMT: gl.constexpr = C.FMT
    HALF: gl.constexpr = C.HALF
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1, 1], instr_shape=[1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=ACC, k_width=2)
    accs = ()
    for _ in gl.static_range(BEGIN, END):
        accs = accs + (gl.zeros([4, 16, BM], gl.float32, ACC),)  # type: ignore[assignment]  # noqa: RUF005
    SUM: gl.constexpr = gl.BlockedLayout([C.SUMS, 1, BM // 8], [1, 4, 8], [1, 4, 1], [2, 1, 0])
    m = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(0, SUM)))
    wait_for_previous()
    factor = row_factors(m, alpha, M, C)  # loaded now, for at the end it would be waited for
    st = GROUP % TURNS
    phase = 0
    for _ in range(GROUP % TURNS * KS, STEPS, TURNS * KS):
        mbarrier.wait(s[3].index(st), phase)
        for q in gl.static_range(0, KS, 4):
            x = s[0].index(st).permute((0, 2, 1)).slice(q, 4, dim=0).load(RIGHT)
            sums = ()
            for i in gl.static_range(BEGIN, END):
                at = st * C.BOXES + i // BOX
                codes = s[1].index(at).slice(q, 4, dim=0).slice(i % BOX, 1, dim=2)
                scales = s[2].index(at).slice(q, 4, dim=0).slice(i % BOX, 1, dim=1)
                w = decode_strip(codes, scales, LEFT, FMT, HALF)
                sums = sums + (mma_v2(w, x, accs[i - BEGIN]),)  # type: ignore[assignment]  # noqa: RUF005
            accs = sums
        # Without it TMA may write before all that was read has arrived in registers.
        fence_async_shared()
        mbarrier.arrive(s[4].index(st))
        st = st + TURNS
        if st >= C.STAGES:
            st = st - C.STAGES
            phase = phase ^ 1
    _store_sums(accs, s, out, m, factor, M, N, SUM, C, GROUP)


@gluon.jit
def _store_sums(accs, s, out, m, factor, M, N, SUM: gl.constexpr, C: gl.constexpr, GROUP: gl.constexpr):
    """Add the warps' sums in the order of the warps, and store a warp group's strips, or every second one."""
    TURNS: gl.constexpr = C.TURNS
    BEGIN: gl.constexpr = _begin(C, GROUP)
    END: gl.constexpr = _end(C, GROUP)
    TURN: gl.constexpr = GROUP % TURNS
    ROWS: gl.constexpr = gl.SliceLayout(0, SUM)
    if C.PLACES > 0:
        # Where codes were: nothing is loaded any more, and all groups are through with what was.
        parts = reinterpret(s[1], gl.float32, [C.PLACES, C.SUMS, 16, C.BM], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    else:
        parts = s[7]
    mbarrier.arrive(s[5])
    mbarrier.wait(s[5], 0)
    for i in gl.static_range(BEGIN, END):
        parts.index(i).slice(4 * TURN, 4, dim=0).store(accs[i - BEGIN])
    warp_group_barrier()
    if TURNS > 1:
        mbarrier.arrive(s[6])
        mbarrier.wait(s[6], 0)
    row = first_strip(N, C.S) * 16 + gl.arange(0, 16, gl.SliceLayout(1, ROWS))
    to = out + m[None, :] * N + row[:, None]
    for i in gl.static_range(BEGIN + TURN, END, TURNS):
        value = gl.sum(parts.index(i).load(SUM), axis=0) * factor[None, :]
        gl.store(to + i * 16, value.to(out.dtype.element_ty), mask=(m < M)[None, :])


@gluon.jit
def _group0(d, s, out, alpha, M, N, STEPS, C: gl.constexpr):
    _multiply(d, s, out, alpha, M, N, STEPS, C, 0)


@gluon.jit
def _group1(d, s, out, alpha, M, N, STEPS, C: gl.constexpr):
    _multiply(d, s, out, alpha, M, N, STEPS, C, 1)


@gluon.jit
def _group2(d, s, out, alpha, M, N, STEPS, C: gl.constexpr):
    _multiply(d, s, out, alpha, M, N, STEPS, C, 2)


@gluon.jit(do_not_specialize=["x_units", "x_cols", "M", "K_STEPS", "STEPS"])
def strips_kernel(
    x_desc, codes_desc, scales_desc, x, x_scales, x_units, x_cols, out, alpha, M, N, K_STEPS, STEPS,
    FMT: gl.constexpr, HALF: gl.constexpr, BM: gl.constexpr, S: gl.constexpr, KS: gl.constexpr,
    STAGES: gl.constexpr, OWN: gl.constexpr, X_LAYOUT: gl.constexpr, ALPHA: gl.constexpr, FACTOR: gl.constexpr,
):  # fmt: skip
    """``out = (x @ w.T) * alpha`` for M up to BM; N is a multiple of 128, STEPS of KS, 64 times STEPS the padded K.

    Descriptors are those of ``_hopper_launch``. Rows of x come by ``x_desc``; or with ``X_LAYOUT`` as words ``x`` of
    codes, ``x_units`` of 16 bytes from row to row, and words ``x_scales`` of four scales, ``x_cols`` scales a padded
    row, for K_STEPS steps.
    """
    C: gl.constexpr = _plan(FMT, HALF, BM, S, KS, STAGES, OWN, X_LAYOUT, ALPHA, FACTOR)
    LOADS: gl.constexpr = STAGES * C.BOXES
    BOX: gl.constexpr = C.BOX
    PLANES: gl.constexpr = C.PLANES
    SCALE_WORDS: gl.constexpr = C.SCALE_WORDS
    ROWS: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    xs = gl.allocate_shared_memory(gl.float16 if HALF else gl.bfloat16, [STAGES, KS, BM, 64], ROWS)
    codes = gl.allocate_shared_memory(gl.int32, [LOADS, KS, PLANES, BOX, 128], codes_desc.layout)
    scales = gl.allocate_shared_memory(gl.int32, [LOADS, KS, BOX, SCALE_WORDS], scales_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    given = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 if X_LAYOUT == 0 else 2)
        mbarrier.init(empty.index(i), count=C.GROUPS // C.TURNS)
    mbarrier.init(done, count=C.GROUPS)
    mbarrier.init(given, count=C.GROUPS)
    fence_async_shared()
    d = (x_desc, codes_desc, scales_desc)
    s = (xs, codes, scales, full, empty, done, given)
    if C.PLACES == 0:
        parts = gl.allocate_shared_memory(gl.float32, [S, C.SUMS, 16, BM], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
        s = s + (parts,)  # type: ignore[assignment]  # noqa: RUF005
    # The first stage is asked for before warps have their roles, which takes 0.45 us.
    wait_for_previous()
    _load_stage(d, s, 0, 0, N, STEPS, C)
    if X_LAYOUT > 0:
        gl.warp_specialize([
            (_group0, (d, s, out, alpha, M, N, STEPS, C)),
            (_group1, (d, s, out, alpha, M, N, STEPS, C)),
            (rows_decoder, (s, x, x_scales, x_units, x_cols, M, K_STEPS, STEPS, C)),
            (_loader, (d, s, out, alpha, M, N, STEPS, C)),
        ], [4, 4, 1], [C.REGISTERS, C.DECODER_REGISTERS, C.LOADER_REGISTERS])  # fmt: skip
    elif C.GROUPS == 3:
        gl.warp_specialize([
            (_group0, (d, s, out, alpha, M, N, STEPS, C)),
            (_group1, (d, s, out, alpha, M, N, STEPS, C)),
            (_group2, (d, s, out, alpha, M, N, STEPS, C)),
            (_loader, (d, s, out, alpha, M, N, STEPS, C)),
        ], [4, 4, 1], [C.REGISTERS, C.REGISTERS, C.LOADER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_group0, (d, s, out, alpha, M, N, STEPS, C)),
            (_group1, (d, s, out, alpha, M, N, STEPS, C)),
            (_loader, (d, s, out, alpha, M, N, STEPS, C)),
        ], [4, 1], [C.REGISTERS, C.LOADER_REGISTERS])  # fmt: skip
