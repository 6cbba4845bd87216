"""How the Hopper products are cut up: of the ways here, the one whose predicted time is least.

That follows from a product's sizes alone. The prediction adds up steps of 64 along K; what a step takes was measured on
an NVIDIA H200 (``benchmarks/NOTES.md``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from ..hopper_layout import hopper_size
from ._hopper_plan import SHARED_BYTES
from ._hopper_strip_plan import AtOncePlan

__all__ = [
    "AT_ONCE",
    "STRIPS",
    "WAYS",
    "AtOnce",
    "Cut",
    "Strips",
    "Way",
    "choose",
    "cut",
    "decodes",
    "float32_ways",
]


class Way(NamedTuple):
    """A way to cut a product up into tiles; see ``_hopper_plan.Plan`` for the first fields."""

    BM: int
    R: int = 1
    KW: int = 1
    KS: int = 1
    STAGES: int = 4
    AHEAD: int = 1
    STREAM: bool = False
    CLUSTER: int = 1
    """Programs that have a part of K of one tile each."""
    ONCE: bool = False
    RESIDENT: int = 1
    """Programs that a multiprocessor holds."""
    start: float = 4.9
    """What a launch takes beside its steps, in microseconds."""
    step: float = 0.3
    """Microseconds a step of a program."""
    shared_step: float = 0.0
    """The same with RESIDENT programs on a multiprocessor."""
    tile: float = 0.0
    """Microseconds more for each tile of a program but the first."""
    alike: float = 1.0
    """What a step takes of ``step`` where programs have equal parts of tiles, and so the same rows of x at a time."""
    fp8: float = 1.0
    """What a step of MXFP8 takes of one of FP4."""
    BAND: int = 8

    @property
    def rows(self) -> int:
        """Weight rows a tile."""
        return 128 * self.R // self.KW


class Strips(NamedTuple):
    """A way to cut a product up into strips of 16 weight rows; see ``_hopper_strip_plan.StripPlan`` for fields."""

    BM: int
    S: int
    KS: int
    STAGES: int
    OWN: int
    start: float
    """What a launch takes beside its steps, in microseconds."""
    step: float
    """Microseconds a step of 64 along K takes."""
    strip: float
    """Microseconds more for each strip of a program."""


class AtOnce(NamedTuple):
    """A way to cut a product up into strips that fit in shared memory whole; see ``_hopper_strip_plan.AtOncePlan``."""

    BM: int
    S: int


WAYS = (
    Way(8, KS=4, STAGES=6, STREAM=True, start=3.3, step=0.18),
    Way(8, KS=4, STREAM=True, RESIDENT=2, start=4.3, step=0.19, shared_step=0.32),
    Way(8, KW=2, KS=2, STAGES=8, RESIDENT=2, start=3.6, step=0.105, shared_step=0.17),
    Way(16, KS=4, STAGES=6, STREAM=True, start=3.3, step=0.2),
    Way(16, KS=4, STAGES=3, STREAM=True, RESIDENT=2, start=4.3, step=0.25, shared_step=0.385),
    Way(16, KW=2, KS=2, STAGES=8, RESIDENT=2, start=3.6, step=0.12, shared_step=0.2),
    Way(32, KS=2, STAGES=8, AHEAD=2, STREAM=True, start=4.1, step=0.183, tile=0.9, fp8=1.43),
    Way(32, KS=2, STAGES=6, AHEAD=2, STREAM=True, RESIDENT=2, start=3.5, step=0.26, shared_step=0.346, fp8=1.46),
    Way(32, KS=2, STAGES=6, AHEAD=2, RESIDENT=2, start=4.1, step=0.167, shared_step=0.348, fp8=1.3),
    Way(32, KW=2, KS=2, STAGES=12, AHEAD=2, STREAM=True, start=3.1, step=0.094, tile=0.9, fp8=1.42),
    Way(32, KW=2, KS=4, STAGES=8, AHEAD=2, start=3.0, step=0.096, tile=0.4, fp8=1.23),
    Way(32, KW=2, KS=4, RESIDENT=2, start=2.7, step=0.113, shared_step=0.18, tile=1.9, fp8=1.27),
    Way(64, KS=2, STAGES=6, AHEAD=2, STREAM=True, start=3.4, step=0.237, tile=2.0, fp8=1.16),
    Way(64, KS=2, AHEAD=2, STREAM=True, RESIDENT=2, start=2.6, step=0.32, shared_step=0.457, tile=5.0, fp8=1.13),
    Way(64, KS=2, AHEAD=2, ONCE=True, RESIDENT=2, start=3.5, step=0.218, shared_step=0.417, fp8=1.26),
    Way(64, RESIDENT=2, start=3.2, step=0.273, shared_step=0.43, tile=0.1, fp8=1.09),
    Way(64, KW=2, KS=2, STAGES=8, AHEAD=2, STREAM=True, start=3.6, step=0.119, tile=3.7, fp8=1.15),
    Way(64, KW=2, KS=2, STAGES=8, AHEAD=2, start=3.1, step=0.115, tile=0.9, fp8=1.07),
    Way(64, KW=2, STAGES=8, RESIDENT=2, start=3.1, step=0.135, shared_step=0.233, tile=1.1, fp8=1.55),
    Way(96, KW=2, STAGES=8, start=3.3, step=0.17, tile=1.7, fp8=1.09),
    Way(96, KS=2, AHEAD=2, STREAM=True, start=3.1, step=0.335, tile=1.8, alike=0.95, fp8=1.03),
    Way(96, KS=2, AHEAD=2, start=3.2, step=0.297, tile=0.7, fp8=1.05),
    Way(128, KW=2, STAGES=8, start=3.3, step=0.18, tile=0.8, fp8=1.05),
    Way(128, KS=2, AHEAD=2, STREAM=True, start=2.8, step=0.361, tile=2.9, alike=0.925, fp8=1.11),
    Way(128, KS=2, AHEAD=2, start=2.3, step=0.331, tile=0.6, fp8=1.05),
    Way(128, R=2, STAGES=5, STREAM=True, start=3.6, step=0.712, tile=1.0, alike=0.92, fp8=1.05),
    Way(128, R=2, STAGES=5, start=1.1, step=0.667, tile=0.3, fp8=1.01),
    Way(192, STAGES=6, STREAM=True, start=3.2, step=0.544, tile=2.8, alike=0.9, fp8=1.06),
    Way(192, STAGES=5, start=3.1, step=0.468, tile=2.7, fp8=1.03),
    Way(32, KW=2, KS=2, STAGES=12, AHEAD=2, CLUSTER=2, start=3.6, step=0.09, fp8=1.45),
    Way(32, KW=2, KS=2, STAGES=12, AHEAD=2, CLUSTER=4, start=3.0, step=0.092, fp8=1.27),
    Way(64, KW=2, KS=2, STAGES=8, AHEAD=2, CLUSTER=2, start=3.8, step=0.1086, fp8=1.24),
    Way(64, KW=2, KS=2, STAGES=8, AHEAD=2, CLUSTER=4, start=3.5, step=0.1136, fp8=1.18),
    Way(64, KS=2, STAGES=6, AHEAD=2, CLUSTER=2, start=4.6, step=0.196, fp8=1.12),
    Way(64, KS=2, STAGES=6, AHEAD=2, CLUSTER=4, start=4.5, step=0.199, fp8=0.99),
    Way(96, KW=2, STAGES=8, CLUSTER=2, start=3.9, step=0.177, fp8=1.04),
    Way(96, KS=2, AHEAD=2, CLUSTER=2, start=4.6, step=0.287, fp8=1.08),
    Way(128, KW=2, STAGES=8, CLUSTER=2, start=4.3, step=0.176, fp8=1.07),
    Way(128, KS=2, AHEAD=2, CLUSTER=2, start=4.5, step=0.312, fp8=1.21),
    Way(128, KS=2, AHEAD=2, CLUSTER=4, start=5.6, step=0.32, fp8=1.18),
    Way(192, STAGES=5, CLUSTER=2, start=4.8, step=0.458, fp8=1.03),
    Way(256, CLUSTER=2, start=4.4, step=0.648, fp8=1.04),
    Way(256, STREAM=True, start=3.9, step=0.698, tile=4.4, alike=0.89),
    Way(256, start=1.6, step=0.65, fp8=1.01),
)
# No more stages than keep memory busy, some 100 KB: the first one is there sooner then. Eight steps a stage wait less
# often; four are decoded sooner, which counts where K is short. Groups with strips of their own give a stage back
# sooner, which is worth more than fewer barriers where stages are large; the third one hides what two wait for.
_FP4_STRIPS = {
    (1, 8): (6, 0), (1, 4): (10, 0), (2, 8): (6, 0), (2, 4): (6, 0), (3, 8): (4, 0), (3, 4): (6, 0), (4, 8): (4, 0),
    (4, 4): (4, 0), (6, 4): (4, 0), (8, 4): (4, 0), (10, 4): (4, 3), (12, 4): (4, 3), (14, 4): (4, 3),
}  # fmt: skip
_FP8_STRIPS = {
    (1, 8): (6, 0), (1, 4): (10, 0), (2, 8): (3, 2), (2, 4): (6, 0), (3, 4): (4, 0), (4, 4): (4, 0), (6, 4): (3, 2),
    (8, 4): (3, 2), (10, 4): (3, 2), (12, 4): (3, 2), (14, 4): (3, 2),
}  # fmt: skip
"""By strips and steps a stage: stages, and warp groups with strips of their own."""


def _strips(rows: int, table: dict[tuple[int, int], tuple[int, int]], short: tuple[int, ...] = ()) -> list[Strips]:
    """Those in ``short`` are quicker than the same with stages of eight steps, if K is short."""
    start, strip = (0.17, 0.0172) if rows == 8 else (0.2, 0.0195)
    ways = []
    for (S, KS), (stages, own) in table.items():
        is_short = S in short and KS == 4
        fixed, step = 3.6 + start * S - 0.45 * is_short, 0.004 + 0.008 * is_short
        ways.append(Strips(rows, S, KS, stages, own, fixed, step, strip))
    return ways


_FP4 = (*_strips(8, _FP4_STRIPS, (2, 3, 4)), *_strips(16, _FP4_STRIPS, (2, 3, 4)))
_FP8 = (*_strips(8, _FP8_STRIPS), *_strips(16, _FP8_STRIPS | {(2, 8): (4, 0), (3, 4): (6, 0), (4, 4): (4, 2)}))
STRIPS = {"nvfp4": _FP4, "mxfp4": _FP4, "mxfp8": _FP8}
AT_ONCE: tuple[AtOnce, ...] = tuple(AtOnce(rows, S) for rows in (8, 16) for S in (1, 2, 3, 4))
"""Taken wherever they fit, as nothing else is quicker there, if there is no early start; more strips are not."""
_MOST_AT_ONCE = {"nvfp4": 160, "mxfp4": 160, "mxfp8": 128}
"""Strips times steps of a program that takes them at once: more bytes have time to be loaded by stages."""
_NEXT_PASS = 5.0
_SUM_START, _SUM_EARLY_START, _SUM_BYTES_PER_US = 1.2, 0.7, 6e6


def decodes(way: Way | Strips | AtOnce, fmt: str, k: int, m: int) -> bool:
    """Whether a product in this way decodes quantised rows of x of k itself; else a kernel before does.

    That one takes 1 to 1.5 us, as a plain node of a graph 2. In the product each program decodes all rows, which many
    weights of MXFP8 hide; those of FP4 take as much of the same instructions.
    """
    if isinstance(way, AtOnce):
        plan = _at_once(way, hopper_size(0, k)[1] // 64, fmt, 1)
        # For more of x, the other warps of a program wait longer for it to be decoded than a kernel before takes.
        return plan.BY_WARP or (m * k <= 32768 and plan.SHARED_BYTES <= SHARED_BYTES)
    if not isinstance(way, Strips):
        return False
    if fmt == "mxfp8":
        return way.S >= 6 or (way.BM == 8 and (way.S > 1 or k <= 2048))
    return (k <= 8192 or way.S >= 4) if way.BM == 8 else k <= 384 * way.S


class Cut(NamedTuple):
    """A way with the numbers that follow from the sizes."""

    way: Way | Strips | AtOnce
    programs: int
    tiles_m: int
    tiles_n: int
    trips: int
    """Trips along K, for strips steps of 64."""
    parts: int
    """The most programs that share a tile; 1 if every tile has one of its own."""
    us: float
    """Predicted; 0 for those that are taken wherever they fit."""
    sum_rows: int = 0
    """Rows of x that a program of the kernel which adds parts up has, of 64 weight rows."""
    sum_early: bool = False
    """It has a program for each multiprocessor at most, and may come early."""


def cut(
    way: Way | Strips | AtOnce,
    m: int,
    n: int,
    k: int,
    processors: int,
    fmt: str = "nvfp4",
    quantized: bool = False,
) -> Cut | None:
    """A product of m rows and a weight of n x k, padded, cut up in a way; None where that can't be."""
    if isinstance(way, AtOnce):
        return _cut_at_once(way, n, k, processors, fmt, quantized)
    if isinstance(way, Strips):
        return _cut_to_strips(way, n, k, processors)
    trips, rest = divmod(k, 256 * way.KW)
    tiles_n, rest_n = divmod(n, way.rows)
    tiles_m = triton.cdiv(m, way.BM)
    tiles = tiles_m * tiles_n
    slots = processors * way.RESIDENT
    clustered = way.CLUSTER > 1
    if rest or rest_n or (way.ONCE and tiles > slots):
        return None
    if clustered and (trips < way.CLUSTER or tiles > _clusters(way.CLUSTER, processors)):
        return None
    total = tiles * trips
    programs, parts = tiles * way.CLUSTER if clustered else min(tiles, slots), 1
    if way.STREAM:
        # An equal number of whole parts for each tile where there are few, so that no program has two.
        programs = min(slots // tiles, trips) * tiles if tiles <= slots else min(slots, total)
        parts = _most_sharers(tiles, trips, programs)
        if parts == 1 and way.BM >= 64:
            return None  # the ways of whole tiles have room for more
    most_tiles = triton.cdiv(tiles, programs)
    most_trips = triton.cdiv(total, programs) if way.STREAM else most_tiles * triton.cdiv(trips, way.CLUSTER)
    alike = total % programs == 0 and trips % (total // programs) == 0
    step = (way.shared_step if programs > processors else way.step) * (way.alike if alike else 1)
    step *= way.fp8 if fmt == "mxfp8" else 1
    us = way.start + most_trips * 4 * way.KW * step + (most_tiles - 1) * way.tile
    sum_rows, sum_early = 0, False
    if parts > 1:
        shared = programs if alike else min(2 * programs, programs + tiles)
        rows = min(way.BM, m)
        sum_rows, sum_early = _summing(tiles * way.rows // 64, way.BM, rows, processors)
        us += _SUM_EARLY_START if sum_early else _SUM_START
        us += shared * 4 * way.rows * (way.BM + rows) / _SUM_BYTES_PER_US
    return Cut(way, programs, tiles_m, tiles_n, trips, parts, us, sum_rows, sum_early)


def _clusters(size: int, processors: int) -> int:
    """How many clusters run at a time at least.

    Multiprocessors come in pairs, and a cluster's are all of one of 8 groups: of four, each may have two over.
    """
    return processors // 2 if size == 2 else (processors - 16) // 4


def _summing(tiles: int, tile: int, rows: int, processors: int) -> tuple[int, bool]:
    """``sum_rows`` and ``sum_early``, given tiles of 64 weight rows; they have ``rows`` of at most ``tile`` of x."""
    for each in (16, 32, 64):
        if tiles * triton.cdiv(rows, each) <= processors:
            return min(each, tile), True
    return min(16, tile), False


def _cut_to_strips(way: Strips, n: int, k: int, processors: int) -> Cut | None:
    steps = k // 64
    if steps % way.KS or n < 16 * way.S:
        return None
    programs = triton.cdiv(n, 16 * way.S)
    passes = triton.cdiv(programs, processors)
    us = way.start + passes * steps * (way.step + way.S * way.strip) + (passes - 1) * _NEXT_PASS
    return Cut(way, programs, 1, programs, steps, 1, us)


def _cut_at_once(way: AtOnce, n: int, k: int, processors: int, fmt: str, quantized: bool) -> Cut | None:
    steps, programs = k // 64, triton.cdiv(n, 16 * way.S)
    if n < 16 * way.S or programs > processors:
        return None
    plan = _at_once(way, steps, fmt, int(quantized))
    if not plan.BY_WARP:
        plan = plan._replace(X_LAYOUT=0)  # rows may have been decoded before
    most = _MOST_AT_ONCE[fmt]
    if plan.BY_WARP and way.BM == 8 and way.S > 1 and steps > 32:
        most = 80  # beyond, strips with a ring are nearly as quick as plain nodes, and quicker where starts are early
    if way.S * steps > most or plan.SHARED_BYTES > SHARED_BYTES:
        return None
    return Cut(way, programs, 1, programs, steps, 1, 0.0)


def _at_once(way: AtOnce, steps: int, fmt: str, x_layout: int) -> AtOncePlan:
    return AtOncePlan(fmt, False, way.BM, way.S, steps, x_layout, 0, 1.0)


_COUNTED_TILES = 2048


@functools.cache
def _most_sharers(tiles: int, trips: int, programs: int) -> int:
    """The most programs that one tile's trips fall to, or a bound on it where counting would take long."""
    each, more = divmod(tiles * trips, programs)
    if tiles > _COUNTED_TILES:
        return triton.cdiv(trips - 1, each) + 1

    def at(position: int) -> int:
        longer = more * (each + 1)
        return position // (each + 1) if position < longer else more + (position - longer) // max(each, 1)

    return max(at((t + 1) * trips - 1) - at(t * trips) + 1 for t in range(tiles))


def float32_ways(ways: Sequence[Way]) -> list[Way]:
    """Those for float32 results, which threads store: more sums leave them no registers."""
    return [way for way in ways if way.R * way.BM <= 128 and (way.KW == 1 or way.BM <= 16)]


@functools.lru_cache(4096)
def choose(
    m: int,
    n: int,
    k: int,
    processors: int,
    out_dtype: torch.dtype = torch.bfloat16,
    whole_steps: bool = True,
    fmt: str = "nvfp4",
    clusters: bool = True,
    quantized: bool = False,
) -> Cut:
    """The cut of least predicted time for m rows and a weight of n x k, padded.

    Args:
        whole_steps: K is a multiple of 64 without padding too, which strips need.
        clusters: they can be launched.
        quantized: x is, in ``fmt``.
    """
    least = next((bm for bm in (8, 16, 32, 64) if m <= bm), 64)
    most = 4 * least if m > 32 else least
    tiles = [way for way in WAYS if least <= way.BM <= most and (clusters or way.CLUSTER == 1)]
    if whole_steps:
        at_once = (cut(way, m, n, k, processors, fmt, quantized) for way in AT_ONCE if least == way.BM)
        fits = next((each for each in at_once if each is not None), None)
        if fits is not None:
            return fits
    ways: list[Way | Strips] = [*(float32_ways(tiles) if out_dtype == torch.float32 else tiles)]
    if whole_steps:
        ways += [way for way in STRIPS[fmt] if least == way.BM]
    cuts = [cut(way, m, n, k, processors, fmt) for way in ways]
    return min((each for each in cuts if each is not None), key=lambda each: each.us)
