"""Which program of a Hopper product has which part of which tile: every part is one program's, in the order of K."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_fp4ops.ops import _hopper_schedule as schedule

sizes = st.integers(1, 40)


@pytest.fixture(autouse=True)
def plain_python(monkeypatch):
    """The kernels' functions as Python's, on tensors of one number."""
    stub: Any = SimpleNamespace(uint32=torch.int64, int32=torch.int64, where=torch.where)
    monkeypatch.setattr(schedule, "gl", stub)
    for name in ("_quotient", "tile_at", "share", "piece", "_program_at"):
        monkeypatch.setattr(schedule, name, getattr(schedule, name).fn)


def number(value: int) -> Any:
    return torch.tensor(value)


def pieces_of(
    program: int, programs: int, tiles: int, trips: int, stream: bool, cluster: int = 1
) -> list[tuple[int, int, int]]:
    plan = SimpleNamespace(STREAM=stream, CLUSTER=cluster)
    schedule.gl.program_id = lambda axis: number(program)
    schedule.gl.num_programs = lambda axis: number(programs)
    each, more = divmod(tiles * trips, programs)
    p, end = schedule.share(number(tiles), number(each), number(more), plan)
    found = []
    while p < end:
        t, k0, k1, p = schedule.piece(p, end, number(trips), plan)
        found.append((int(t), int(k0), int(k1)))
    return found


@settings(max_examples=60, deadline=None)
@given(tiles=sizes, trips=st.integers(1, 9), programs=st.integers(1, 60), stream=st.booleans())
def test_every_trip_is_one_programs(tiles, trips, programs, stream):
    programs = min(programs, tiles * trips if stream else tiles)
    seen: list[tuple[int, int]] = []
    for program in range(programs):
        mine = pieces_of(program, programs, tiles, trips, stream)
        assert mine
        for t, k0, k1 in mine:
            seen += [(t, k) for k in range(k0, k1)]
    assert sorted(seen) == list(itertools.product(range(tiles), range(trips)))


@settings(max_examples=60, deadline=None)
@given(tiles=sizes, trips=st.integers(4, 20), cluster=st.sampled_from([2, 4]))
def test_programs_of_a_cluster_share_a_tile(tiles, trips, cluster):
    programs = tiles * cluster
    mine = [pieces_of(program, programs, tiles, trips, False, cluster) for program in range(programs)]
    assert all(len(pieces) == 1 and pieces[0][0] == i // cluster for i, pieces in enumerate(mine))
    for t in range(tiles):
        of_tile = [pieces[0] for pieces in mine[t * cluster : (t + 1) * cluster]]
        assert [k for _, k0, k1 in of_tile for k in range(k0, k1)] == list(range(trips))
        lengths = {k1 - k0 for _, k0, k1 in of_tile}
        assert max(lengths) - min(lengths) <= 1 and max(lengths) == -(-trips // cluster)


@settings(max_examples=60, deadline=None)
@given(tiles=sizes, trips=st.integers(1, 9), programs=st.integers(1, 60))
def test_sums_find_the_programs_of_a_tile(tiles, trips, programs):
    programs = min(programs, tiles * trips)
    each, more = (number(v) for v in divmod(tiles * trips, programs))
    of = {t: [] for t in range(tiles)}
    for program in range(programs):
        for t, _, _ in pieces_of(program, programs, tiles, trips, True):
            of[t].append(program)
    for t, wanted in of.items():
        first = schedule._program_at(number(t * trips), each, more)
        last = schedule._program_at(number((t + 1) * trips - 1), each, more)
        assert list(range(int(first), int(last) + 1)) == wanted


@settings(max_examples=60, deadline=None)
@given(tiles_m=sizes, tiles_n=sizes, band=st.sampled_from([1, 4, 8]))
def test_every_tile_has_a_number_and_bands_come_one_after_the_other(tiles_m, tiles_n, band):
    places = [
        schedule.tile_at(number(t), number(tiles_m), number(tiles_n), number(band)) for t in range(tiles_m * tiles_n)
    ]
    pairs = [(int(pm), int(pn)) for pm, pn in places]
    assert sorted(pairs) == list(itertools.product(range(tiles_m), range(tiles_n)))
    assert pairs == sorted(pairs, key=lambda pair: (pair[0] // band, pair[1], pair[0]))
