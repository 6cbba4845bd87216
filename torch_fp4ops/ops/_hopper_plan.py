"""What the Hopper kernel of tiles is compiled for, and what follows; without Gluon, which launchers import late."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["GROUPS", "SHARED_BYTES", "Plan", "power_of_two_within"]

SHARED_BYTES = 227 * 1024
"""Of a multiprocessor, for the programs on it."""
GROUPS = 2
"""Warp groups that multiply, unless strips' are more."""


def power_of_two_within(rows: int) -> int:
    """The largest power of two that is at most ``rows``, which are one or more."""
    return 1 << rows.bit_length() - 1


class Box(NamedTuple):
    """Shared memory for the parts that come from the other programs of a cluster."""

    at: int
    full: int
    """Where its barrier is."""
    size: int
    numbers: int
    """Of a thread, from each other program."""


class Plan(NamedTuple):
    """A kernel of ``_hopper_gemm``, whose programs have tiles of weight rows."""

    FMT: str
    HALF: bool
    """x is float16, not bfloat16."""
    BM: int
    """Rows of x a tile, a power of two or the sum of two."""
    X_ROWS: int
    """Rows of x a TMA load."""
    R: int
    """Tiles of 64 weight rows a warp group; 2 only without KW."""
    KW: int
    """How many warp groups share a tile of 64 rows, every KW-th stage each; their sums meet in shared memory."""
    KS: int
    """Steps of 64 along K a stage."""
    STAGES: int
    AHEAD: int
    """How many steps before its product a tile of codes is fetched from shared memory: 1, or 2 if not R == 2."""
    STREAM: bool
    CLUSTER: int
    """Programs of a thread block cluster, which have one tile's parts and add them up; 1 where there are none."""
    SUM_EARLY: bool
    """What adds parts up, so only with STREAM, may start once the last load is issued."""
    ONCE: bool
    """Each program has one tile, so that results can be where stages were."""
    STORE: int
    """0: threads store results as they have them; else from shared memory, by rows: 1 threads, 2 TMA."""
    BAND: int
    """Tiles of BM rows that are worked on beside each other, for the L2 cache."""
    ALPHA: int
    FACTOR: float
    REGISTERS: int

    @property
    def MMA(self) -> bool:
        return self.BM <= 16

    @property
    def GROUPS(self) -> int:
        """Warp groups that multiply."""
        return GROUPS

    @property
    def TOP(self) -> int:
        """Rows of x of a tile's first accumulator: a tensor's are a power of two."""
        return power_of_two_within(self.BM)

    @property
    def REST(self) -> int:
        """Rows of x of its second accumulator, if there is one; only without MMA, and not with R == 2."""
        return self.BM - self.TOP

    @property
    def ACCUMULATORS(self) -> int:
        """Of a tile of 64 weight rows."""
        return 2 if self.REST else 1

    @property
    def TMA_STORE(self) -> bool:
        return self.STORE == 2

    @property
    def OUT_ROWS(self) -> int:
        """Rows of results a TMA store."""
        return (self.REST or self.BM) // self.CLUSTER

    @property
    def SUBS(self) -> int:
        """Tiles of 64 weight rows a program."""
        return self.GROUPS * self.R // self.KW

    @property
    def LOADS(self) -> int:
        """TMA loads of codes a stage: of all steps of a block of 128 rows each, or of one step of half a block."""
        return self.KS if self.SUBS == 1 else self.SUBS // 2

    @property
    def LOAD_HALVES(self) -> int:
        """Halves of a block's steps, tiles of 64 x 64, a TMA load."""
        return 1 if self.SUBS == 1 else 2 * self.KS

    @property
    def CODE_ROWS(self) -> int:
        """Rows of 64 words that hold the codes of a 64 x 64 tile."""
        return 16 if self.FMT == "mxfp8" else 8

    @property
    def SCALE_WORDS(self) -> int:
        """Words of scales for a 64 x 64 tile."""
        return 32 * (2 if self.FMT == "nvfp4" else 1)

    @property
    def TRIP_STAGES(self) -> int:
        return 4 * self.KW // self.KS

    @property
    def FIRST_STAGES(self) -> int:
        """Stages that are asked for before warps have their roles."""
        if self.STREAM:
            return 0  # the roles are given while the kernel before still adds parts up
        if self.CLUSTER > 1 and self.KW == 1:
            return 1  # others wait for this program to say that it is there
        return min(2, self.TRIP_STAGES)

    @property
    def EXTRA_STAGES(self) -> int:
        """Stages that warp groups look at beyond what they multiply."""
        return self.KW * -(-self.AHEAD // self.KS)

    @property
    def LEAST_STAGES(self) -> int:
        """With fewer, warp groups and the loading warp would wait for each other for ever."""
        own = self.AHEAD + 1 if self.KS == 1 else 2
        return max(self.KW * own, (self.EXTRA_STAGES + self.SUBS) * self.ONCE)

    @property
    def WHOLE_TRIPS(self) -> bool:
        """The ring of stages is a whole number of trips."""
        return self.STAGES % self.TRIP_STAGES == 0

    @property
    def RESULTS_APART(self) -> bool:
        """Results have shared memory of their own."""
        return self.STORE > 0 and not self.ONCE

    @property
    def FIRST_RESULT(self) -> int:
        """Where results of their own begin among the buffers in shared memory."""
        return 6 if self.REST else 5

    @property
    def FIRST_SHARED(self) -> int:
        """Where what KW needs begins there."""
        return self.FIRST_RESULT + self.RESULTS_APART * (2 if self.REST else 1)

    @property
    def STAGE_BYTES(self) -> int:
        weights = self.SUBS * (self.CODE_ROWS * 256 + self.SCALE_WORDS * 4)
        return self.KS * (self.BM * 128 + weights)

    @property
    def BOXES(self) -> list[Box]:
        """For what programs of a cluster send each other, of each tile of 64 weight rows and accumulator."""
        sizes = [64 * rows // self.CLUSTER for _ in range(self.SUBS) for rows in (self.TOP, self.REST) if rows]
        others = 4 * (self.CLUSTER - 1)
        barriers = others * sum(sizes)
        return [
            Box(others * sum(sizes[:i]), barriers + 8 * i, others * size, size // 128) for i, size in enumerate(sizes)
        ]

    @property
    def CLUSTER_BYTES(self) -> int:
        """Shared memory for boxes."""
        return 0 if self.CLUSTER == 1 else self.BOXES[-1].full + 16 & -16

    @property
    def RESULT_BYTES(self) -> int:
        """Shared memory beside the stages: for results, and for sums of groups and of programs that share a tile."""
        beside = 2 * self.RESULTS_APART + 4 * (self.KW - 1)
        return self.SUBS * 64 * self.BM * beside + self.CLUSTER_BYTES
