"""Paged FP4 caches to draw, for the tests of the ops that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from torch_fp4ops.ops.nvfp4_kv_dequantize_paged.samples import paged


@dataclass(frozen=True)
class Case:
    """Arguments of ``paged``."""

    seed: int
    lengths: tuple[int, ...]
    heads: int
    dim: int
    page: int
    layout: str
    fmt: str
    stacked: bool

    def arguments(self) -> tuple[Any, ...]:
        return paged(**self.__dict__)


def cases(
    formats: tuple[str, ...] = ("nvfp4", "mxfp4", "blockfp4"), dims: tuple[int, ...] = (64, 96), longest: int = 40
) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        seed=st.integers(0, 2**31),
        lengths=st.lists(st.integers(0, longest), max_size=4).map(tuple),
        heads=st.integers(1, 3),
        dim=st.sampled_from(dims),
        page=st.sampled_from([1, 4, 16]),
        layout=st.sampled_from(["NHD", "HND"]),
        fmt=st.sampled_from(formats),
        stacked=st.booleans(),
    )
