"""Sums of a tile's parts among the programs of a thread block cluster, each of which has a part of K.

Each of them adds up an equal share of the tile's rows of x. A thread sends what other programs add up to the same
thread of theirs: by ``st.async``, into a box in their shared memory that has a barrier for so many bytes. So nothing
goes through memory and no kernel comes after. They may wait for each other, as a cluster's programs run at one time.

Gluon has neither such stores nor addresses in shared memory, so this is PTX. Boxes are what a launch adds to the shared
memory that Triton asks for (``_triton_launch.launch``): the end of it.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ._gluon import run_asm

__all__ = ["add_parts", "arrive", "arrive_and_wait", "open_boxes", "wait_for_boxes"]


@gluon.constexpr_function
def _open_asm(C):
    lines = [
        ".reg .pred first;",
        ".reg .u32 at, bytes;",
        "mov.u32 at, %tid.x;",
        "setp.eq.u32 first, at, 0;",
        "mov.u32 at, global_smem;",
        "mov.u32 bytes, %dynamic_smem_size;",
        "add.u32 at, at, bytes;",
    ]
    for box in C.BOXES:
        full = f"[at + {box.full - C.CLUSTER_BYTES}]"
        lines += [
            f"@first mbarrier.init.shared::cta.b64 {full}, 1;",
            f"@first mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, {full}, {box.size};",
        ]
    lines += [
        "@first fence.mbarrier_init.release.cluster;",
        "barrier.cluster.arrive.relaxed.aligned;",
        "mov.u32 $0, 0;",
    ]
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.jit
def open_boxes(C: gl.constexpr):
    """By the warps that a program starts with, before it has others."""
    run_asm(_open_asm(C))


@gluon.jit
def arrive():
    """By each other warp: a cluster's boxes are there once all warps of its programs have come.

    What they have written so far is nobody's concern, and to wait for it takes half a microsecond.
    """
    run_asm("barrier.cluster.arrive.relaxed.aligned; mov.u32 $0, 0;")


@gluon.jit
def wait_for_boxes():
    """By each warp that has arrived, before it sends anything or ends."""
    run_asm("barrier.cluster.wait.acquire.aligned; mov.u32 $0, 0;")


@gluon.jit
def arrive_and_wait():
    arrive()
    wait_for_boxes()


@gluon.constexpr_function
def _add_asm(C, INDEX):
    """$0 and so on are the sums, behind them the parts: for the cluster's first program, its second one and so on."""
    box, programs = C.BOXES[INDEX], C.CLUSTER
    each = box.numbers
    chunks = range(0, each, 4)
    slot = 128 * 4 * each  # of another program

    def part(program, at):
        return "{" + ", ".join(f"${each * (1 + program) + at + i}" for i in range(4)) + "}"

    lines = [
        ".reg .pred is, done;",
        ".reg .u32 rank, box, full, mine, to, bar;",
        ".reg .f32 v0, v1, v2, v3;",
        "mov.u32 rank, %cluster_ctarank;",
        "mov.u32 full, global_smem;",
        "mov.u32 mine, %dynamic_smem_size;",
        "add.u32 full, full, mine;",
        f"mad.lo.u32 mine, ${each * (1 + programs)}, 16, full;",
        f"add.u32 mine, mine, {box.at - C.CLUSTER_BYTES};",
        f"add.u32 full, full, {box.full - C.CLUSTER_BYTES};",
    ]
    for other in range(programs):
        # What comes from programs before and behind the other one; itself it sends nothing.
        lines += [
            f"setp.gt.u32 is, rank, {other};",
            "selp.u32 box, 1, 0, is;",
            "sub.u32 box, rank, box;",
            f"mad.lo.u32 box, box, {slot}, mine;",
            f"mapa.shared::cluster.u32 to, box, {other};",
            f"mapa.shared::cluster.u32 bar, full, {other};",
            f"setp.ne.u32 is, rank, {other};",
        ]
        lines += [
            "@is st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
            f"[to + {512 * at}], {part(other, at)}, [bar];"
            for at in chunks
        ]
        if other == 0:
            lines += [f"mov.f32 ${i}, ${each + i};" for i in range(each)]
        else:
            lines += [f"@!is mov.f32 ${i}, ${each * (1 + other) + i};" for i in range(each)]
    lines += [
        "again:",
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [full], 0;",
        "@!done bra.uni again;",
    ]
    for other in range(programs - 1):
        for at in chunks:
            lines.append(f"ld.shared.v4.f32 {{v0, v1, v2, v3}}, [mine + {slot * other + 512 * at}];")
            lines += [f"add.f32 ${at + i}, ${at + i}, v{i};" for i in range(4)]
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def _constraints(C, INDEX):
    each = C.BOXES[INDEX].numbers
    return ",".join(["=&f"] * each + ["f"] * (each * C.CLUSTER) + ["r"] * each)


@gluon.jit
def _halves(x):
    """Of the columns, which are rows of x."""
    return x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1)).split()


@gluon.jit
def _threads(x):
    """For each number of a wgmma's result which thread of the warp group has it.

    Where PTX asks for %tid itself, ptxas no longer sees that addresses of the main loop are the same for a whole warp.
    """
    L: gl.constexpr = x.type.layout
    row = gl.arange(0, x.shape[0], gl.SliceLayout(1, L))
    col = gl.arange(0, x.shape[1], gl.SliceLayout(0, L))
    return (row // 16 * 32 + row % 8 * 4)[:, None] + (col % 8 // 2)[None, :]


@gluon.jit
def add_parts(acc, INDEX: gl.constexpr, C: gl.constexpr):
    """The sum of all parts for this program's share of the rows of x, [64, rows / CLUSTER], by box INDEX."""
    parts = _halves(acc)
    if C.CLUSTER == 4:
        parts = _halves(parts[0]) + _halves(parts[1])
    ASM: gl.constexpr = _add_asm(C, INDEX)
    CONSTRAINTS: gl.constexpr = _constraints(C, INDEX)
    EACH: gl.constexpr = C.BOXES[INDEX].numbers
    args = parts + (_threads(parts[0]),)  # noqa: RUF005
    return gl.inline_asm_elementwise(ASM, CONSTRAINTS, args, dtype=gl.float32, is_pure=False, pack=EACH)
