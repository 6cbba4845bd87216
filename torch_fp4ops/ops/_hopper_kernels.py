"""What the Hopper kernels are compiled for, given the ways that products are cut up in."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ._hopper_plan import SHARED_BYTES, Plan, power_of_two_within
from ._hopper_strip_plan import AtOncePlan, StripPlan
from ._hopper_ways import AtOnce, Strips, Way

__all__ = [
    "BARRIER_BYTES",
    "REGISTERS",
    "at_once_plan",
    "blocks",
    "rows_at_once",
    "shared_layout",
    "strip_blocks",
    "strip_plan",
    "sum_threads",
    "tile_plan",
]

REGISTERS = {1: (None, 240), 2: (80, 104)}
"""By resident programs, for tiles: the registers a thread that a program starts with, and those of its warp groups."""
BARRIER_BYTES = 3072  # generously


@functools.cache
def shared_layout(swizzle: int, bits: int, rank: int) -> Any:
    """Shared memory that TMA fills."""
    import triton.experimental.gluon.language as gl

    return gl.NVMMASharedLayout(swizzle, bits, rank=rank)


def rows_at_once(tile: int, m: int) -> int:
    """Rows of x a TMA load, given those of a tile: fewer where a large part of the last tile lies beyond m.

    Zeros for rows beyond take longer than rows (192 rows of 4096 x 4096: 24 instead of 16 us), as do many small loads:
    of those that leave out as many rows as quarters of a tile (halves of 64 rows) do, the largest.
    """
    whole = tile & -tile  # which divides both accumulators' rows
    last = m % tile
    if last == 0 or tile < 64:
        return whole
    least = 32 if tile == 64 else power_of_two_within(tile // 4)

    def loaded(rows: int) -> int:
        return -(-last // rows) * rows

    return next(rows for rows in (whole, whole // 2, least) if loaded(rows) == loaded(least))


def blocks(plan: Plan) -> tuple[list[int], list[int]]:
    """What a TMA load takes of codes and of scales, in words."""
    return [plan.LOAD_HALVES * plan.CODE_ROWS, 64], [plan.LOAD_HALVES, plan.SCALE_WORDS]


def strip_blocks(plan: StripPlan) -> tuple[list[int], list[int], list[int]]:
    """What a TMA load takes of x, and, in words, of codes and of scales."""
    return [plan.KS, plan.BM, 64], [plan.KS, plan.PLANES, plan.BOX, 128], [plan.KS, plan.BOX, plan.SCALE_WORDS]


def tile_plan(
    way: Way,
    fmt: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    alpha_form: int,
    m: int = 0,
    one_tile: bool = False,
) -> Plan:
    """``one_tile``: each program has one."""
    from ._hopper_decode import FACTORS

    plan = Plan(
        FMT=fmt,
        HALF=dtype == torch.float16,
        BM=way.BM,
        X_ROWS=rows_at_once(way.BM, m),
        R=way.R,
        KW=way.KW,
        KS=way.KS,
        STAGES=way.STAGES,
        AHEAD=way.AHEAD,
        STREAM=way.STREAM,
        CLUSTER=way.CLUSTER,
        SUM_EARLY=False,
        ONCE=way.ONCE or way.CLUSTER > 1,
        STORE=0,
        BAND=way.BAND,
        ALPHA=alpha_form,
        FACTOR=FACTORS[fmt],
        REGISTERS=REGISTERS[way.RESIDENT][1],
    )
    # Few rows and tiles in parts gain little by shared memory, and float32 has no room.
    if (way.BM >= 64 or way.CLUSTER > 1) and (way.R == 2 or not way.STREAM) and out_dtype != torch.float32:
        # A program's last results wait for TMA longer than threads need for them, the others for nobody.
        plan = plan._replace(STORE=1 if plan.ONCE or one_tile else 2)
    if fmt == "mxfp8":
        # Weights are twice as large: as many stages as have room, which results of a program's one tile share.
        once = plan.ONCE or (one_tile and plan.STORE > 0 and plan.SUBS == 2)
        plan = plan._replace(KS=min(way.KS, 2), ONCE=once)
        room = SHARED_BYTES // way.RESIDENT - BARRIER_BYTES - plan.RESULT_BYTES
        most = room // plan.STAGE_BYTES // way.KW * way.KW
        plan = plan._replace(STAGES=min(way.STAGES * way.KS // plan.KS, most))
    assert plan.STAGES >= plan.LEAST_STAGES, plan
    return plan


def strip_plan(way: Strips, fmt: str, dtype: torch.dtype, x_layout: int, alpha_form: int) -> StripPlan:
    from ._hopper_decode import FACTORS

    plan = StripPlan(
        FMT=fmt,
        HALF=dtype == torch.float16,
        BM=way.BM,
        S=way.S,
        KS=way.KS,
        STAGES=way.STAGES,
        OWN=min(way.OWN, 2) if x_layout else way.OWN,  # the group that decodes x has the third one's registers
        X_LAYOUT=x_layout,
        ALPHA=alpha_form,
        FACTOR=FACTORS[fmt] ** (2 if x_layout else 1),
    )
    assert plan.STAGES >= plan.LEAST_STAGES and plan.STAGES % plan.TURNS == 0, plan
    assert plan.SHARED_BYTES + BARRIER_BYTES <= SHARED_BYTES, plan
    return plan


def at_once_plan(way: AtOnce, fmt: str, dtype: torch.dtype, steps: int, x_layout: int, alpha_form: int) -> AtOncePlan:
    from ._hopper_decode import FACTORS

    return AtOncePlan(
        FMT=fmt,
        HALF=dtype == torch.float16,
        BM=way.BM,
        S=way.S,
        STEPS=steps,
        X_LAYOUT=x_layout,
        ALPHA=alpha_form,
        FACTOR=FACTORS[fmt] ** (2 if x_layout else 1),
    )


def sum_threads(rows: int) -> int:
    """Of a program that adds parts of so many rows up."""
    return max(8 * rows, 128)
