"""What the Hopper kernels of strips are compiled for, and the sizes that follow; without Gluon, as ``_hopper_plan``."""

from __future__ import annotations

import math
from typing import NamedTuple

from ._hopper_plan import GROUPS

__all__ = ["AtOncePlan", "StripPlan"]


def _planes(fmt: str) -> int:
    """Pieces of 512 bytes that hold a strip's codes of a step."""
    return 2 if fmt == "mxfp8" else 1


def _scale_words(fmt: str) -> int:
    """Words of scales for a strip and a step."""
    return 8 * (2 if fmt == "nvfp4" else 1)


def _unit_words(fmt: str) -> int:
    """Words of codes for 16 elements of x."""
    return 4 if fmt == "mxfp8" else 2


def _row_scales(fmt: str) -> int:
    """Scales of a row of x for a step, which are loaded as one word."""
    return 4 if fmt == "nvfp4" else 2


class StripPlan(NamedTuple):
    """A kernel of ``_hopper_strips``, whose programs have strips of 16 weight rows."""

    FMT: str
    HALF: bool
    """x is float16, not bfloat16."""
    BM: int
    """Rows of x, 8 or 16."""
    S: int
    """Strips a program."""
    KS: int
    """Steps of 64 along K a stage, a multiple of 4."""
    STAGES: int
    """Without OWN an even number: then each is always the same group's, which a wait for a parity needs."""
    OWN: int
    """Warp groups that have strips of their own, and every stage; 0: two have all strips, and every second stage."""
    X_LAYOUT: int
    """0 where x has 16 bits; where it is quantised as the weight is, the code of its scales' layout."""
    ALPHA: int
    FACTOR: float

    @property
    def GROUPS(self) -> int:
        """Warp groups that multiply."""
        return self.OWN or GROUPS

    @property
    def REGISTERS(self) -> int:
        """A thread of the warp groups that multiply, of the 65536 of a multiprocessor."""
        return 192 if self.X_LAYOUT else 152 if self.GROUPS == 3 else 232

    @property
    def LOADER_REGISTERS(self) -> int:
        """A thread of the warp that loads, which has more places to remember than with tiles."""
        return 48 if self.X_LAYOUT else 40

    @property
    def DECODER_REGISTERS(self) -> int:
        """A thread of the warp group that decodes x, if it is quantised."""
        return 80

    @property
    def TURNS(self) -> int:
        """Every how many stages are a warp group's."""
        return 1 if self.OWN else GROUPS

    @property
    def SUMS(self) -> int:
        """Warps that share a strip's K, whose sums meet in shared memory."""
        return 4 * self.TURNS

    @property
    def LEAST_STAGES(self) -> int:
        """With fewer, sums have no room where codes were."""
        return -(-self.SUM_BYTES // (self.KS * self.PLANES * 512))

    @property
    def SUM_BYTES(self) -> int:
        """Of a strip's sums."""
        return self.SUMS * 16 * self.BM * 4

    @property
    def PLACES(self) -> int:
        """Strips whose sums are as large as the ring's codes, in whose place they then are; 0 if none are.

        Triton 3.8 takes shared memory for something else only as a whole.
        """
        places, rest = divmod(self.STAGES * self.KS * self.S * self.PLANES * 512, self.SUM_BYTES)
        return 0 if rest else places

    @property
    def BOX(self) -> int:
        """Strips a TMA load: neighbours in memory, so of one half of a block of 128 rows."""
        return math.gcd(self.S, 4)

    @property
    def BOXES(self) -> int:
        return self.S // self.BOX

    @property
    def PLANES(self) -> int:
        return _planes(self.FMT)

    @property
    def SCALE_WORDS(self) -> int:
        return _scale_words(self.FMT)

    @property
    def UNIT_WORDS(self) -> int:
        return _unit_words(self.FMT)

    @property
    def ROW_SCALES(self) -> int:
        return _row_scales(self.FMT)

    @property
    def ROW_WARPS(self) -> int:
        """Those that decode x, if it is quantised."""
        return 4

    @property
    def ROWS(self) -> int:
        """Rows of x that they decode at a time."""
        return self.BM

    @property
    def ROWS_AHEAD(self) -> int:
        """Stages whose rows of x are read ahead of being decoded: as many as there are registers for."""
        return 512 // (self.KS * self.BM * self.UNIT_WORDS)

    @property
    def ROWS_BYTES(self) -> int:
        """Rows of x of a stage."""
        return self.KS * self.BM * 128

    @property
    def WEIGHT_BYTES(self) -> int:
        """The weight's part of a stage."""
        return self.KS * self.S * (self.PLANES * 512 + self.SCALE_WORDS * 4)

    @property
    def STAGE_BYTES(self) -> int:
        return self.ROWS_BYTES + self.WEIGHT_BYTES

    @property
    def SHARED_BYTES(self) -> int:
        """But for barriers."""
        return self.STAGES * self.STAGE_BYTES + (0 if self.PLACES else self.S * self.SUM_BYTES)


class AtOncePlan(NamedTuple):
    """A kernel of ``_hopper_at_once``, whose programs have strips of 16 weight rows and ask for all of them at once."""

    FMT: str
    HALF: bool
    """x is float16, not bfloat16."""
    BM: int
    """Rows of x, 8 or 16."""
    S: int
    """Strips a program."""
    STEPS: int
    """Steps of 64 along K."""
    X_LAYOUT: int
    """As ``StripPlan``'s."""
    ALPHA: int
    FACTOR: float

    @property
    def WARPS(self) -> int:
        """Those of a program, which share K; twice as many have twice as many sums to add up, and take longer."""
        return 8

    @property
    def TURNS(self) -> int:
        """Steps of a warp: each has every WARPS-th."""
        return -(-self.STEPS // self.WARPS)

    @property
    def BY_WARP(self) -> bool:
        """x is in shared memory as codes, and each warp decodes what it multiplies, when it does.

        All BM rows, whether there are or not: with one strip of a short K, and with FP4, decoding before is quicker.
        """
        return self.X_LAYOUT > 0 and self.FMT == "mxfp8" and (self.S > 1 or self.STEPS > 80)

    @property
    def TURNED(self) -> bool:
        """Programs begin with different turns; for a few of FP4 that is not worth its instructions."""
        return self.TURNS >= 8 or self.FMT == "mxfp8"

    @property
    def KS(self) -> int:
        """Steps as a power of two, which tensors are of; with FP4 rows all of them are decoded at a time."""
        return self.WARPS * (1 << (self.TURNS - 1).bit_length())

    @property
    def ROWS(self) -> int:
        """Rows of x that are decoded at a time: for a thread 16 elements, or more."""
        return max(1, 8 * self.WARPS // self.KS)

    @property
    def PLANES(self) -> int:
        return _planes(self.FMT)

    @property
    def SCALE_WORDS(self) -> int:
        return _scale_words(self.FMT)

    @property
    def UNIT_WORDS(self) -> int:
        return _unit_words(self.FMT)

    @property
    def ROW_SCALES(self) -> int:
        return _row_scales(self.FMT)

    @property
    def ROW_WARPS(self) -> int:
        """Those that decode x, if it is quantised."""
        return self.WARPS

    @property
    def SHARED_BYTES(self) -> int:
        steps = self.TURNS * self.WARPS
        weights = steps * self.S * self.PLANES * 512 + self.S * self.KS * self.SCALE_WORDS * 4
        if self.BY_WARP:
            return weights + self.BM * (steps * 64 + self.KS * 4)
        return weights + self.BM * (self.KS * 144 if self.X_LAYOUT else steps * 128)
