"""Hypothesis strategies that draw *(shape, seed, exponent range, edits)* and fill tensors from them.

Drawing a seed instead of the elements keeps examples small to shrink and fast to make; the edits put the special
values in. Needs Hypothesis.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["SPECIAL_VALUES", "matrices", "row_counts"]

# Signed zeros and NaN, infinities, the ends of E2M1 and E4M3, the smallest E4M3 and fp32 values, the ties of E2M1.
SPECIAL_VALUES = (
    *(0.0, -0.0, float("nan"), float("inf"), -float("inf")),
    *(6.0, -6.0, 448.0, 2.0**-9, 1e-45, 3.4e38, -3.4e38),
    *(0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0),
)


def row_counts(largest: int = 260) -> st.SearchStrategy[int]:
    """Numbers of rows: empty, single, and around the tiles of the scale layouts."""
    edges = [m for m in (0, 1, 7, 8, 9, 127, 128, 129, 256, 257) if m <= largest]
    return st.sampled_from(edges) | st.integers(0, min(largest, 70))


@st.composite
def matrices(
    draw: st.DrawFn,
    rows: st.SearchStrategy[int] | None = None,
    block: int = 16,
    max_blocks: int = 9,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32),
    special: bool = True,
) -> Tensor:
    """A matrix ``[rows, blocks * block]`` of one of the dtypes.

    Magnitudes spread over a drawn range of binary exponents, so that blocks differ in scale; a drawn share of the
    values are small halves and integers, which make ties. ``special`` plants some of SPECIAL_VALUES.
    """
    m = draw(rows if rows is not None else row_counts())
    k = draw(st.integers(1, max_blocks)) * block
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    low = draw(st.integers(-40, 10))
    spread = draw(st.integers(0, 30))
    x = torch.randn(m, k, generator=generator)
    exponents = torch.randint(low, low + spread + 1, (m, k // block, 1), generator=generator)
    x = x * exponents.float().exp2().expand(m, k // block, block).reshape(m, k)
    ties = torch.randint(-24, 25, (m, k), generator=generator) / 4
    x = torch.where(torch.rand(m, k, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0])), ties, x)
    x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    if special and m:
        edits = draw(st.lists(st.tuples(st.integers(0, m * k - 1), st.sampled_from(SPECIAL_VALUES)), max_size=6))
        for index, value in edits:
            x.view(-1)[index] = value
    return x.to(dtype)
