"""What a comparison of two runs of a model found: distances, tables, JSON and a plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tables import aligned

__all__ = ["OUTPUT", "Comparison", "Distance", "Row", "distance"]

OUTPUT = "output"
"""The layer name of the row that compares what the whole model gives."""


@dataclass(frozen=True)
class Distance:
    """How far one output lies from another: cosine, ``|a - b| / |b|`` (Frobenius), and the largest ``|a - b|``.

    All three are NaN where an output holds a NaN, or an infinity that the other has not.
    """

    cosine: float
    relative_l2: float
    max_abs: float


@dataclass(frozen=True)
class Row:
    """One call of one layer in one run, against the same call in the first run."""

    run: str
    layer: str
    """Qualified name; :data:`OUTPUT` for the whole model."""
    kind: str
    """Class of the layer in the last run."""
    call: int
    """0 for a layer's first call, and so on."""
    accumulated: Distance
    """Each run fed by itself: what the layers before did is in it."""
    local: Distance | None
    """This layer alone, fed what it got in the first run; None for the whole model and with ``local=False``."""


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; ``print`` it for tables."""

    runs: tuple[str, ...]
    """The first is what the others are compared with."""
    rows: tuple[Row, ...]
    times: Mapping[str, tuple[float, ...]]
    """Seconds of each timed call of each run."""
    backends: Mapping[str, Mapping[str, Sequence[str]]]
    """By run and op: the backends that were taken."""
    unmatched: tuple[str, ...]
    """Calls that one run did not make, or not with this shape; say, of experts that other tokens were routed to."""

    def of(self, run: str) -> list[Row]:
        """The rows of one run, in the order of the calls; the last is the whole model's. ValueError: no such run."""
        if run not in self.runs[1:]:
            raise ValueError(f"Comparison: run is {run!r}; allowed: {', '.join(map(repr, self.runs[1:]))}")
        return [row for row in self.rows if row.run == run]

    def output(self, run: str | None = None) -> Distance:
        """Of what the whole model gives; of the last run if none is named."""
        return self.of(self.runs[-1] if run is None else run)[-1].accumulated

    def failures(self, min_cosine: float | None = None) -> list[str]:
        """A line for each NaN (see :class:`Distance`) and each cosine below ``min_cosine``, accumulated or alone.

        ValueError if ``min_cosine`` is not -1 to 1.
        """
        if min_cosine is not None and not -1 <= min_cosine <= 1:
            raise ValueError(f"failures: min_cosine is {min_cosine}; allowed: -1 to 1")
        lines = []
        for row in self.rows:
            for what, found in (("", row.accumulated), (" alone", row.local)):
                if found is None:
                    continue
                where = f"{row.run}, {_title(row)}{what}"
                if math.isnan(found.cosine):
                    lines.append(f"{where}: NaN, or an infinity that {self.runs[0]} has not")
                elif min_cosine is not None and found.cosine < min_cosine:
                    lines.append(f"{where}: cosine {found.cosine:.6f}, less than {min_cosine:g}")
        return lines

    def save_json(self, path: str | Path) -> None:
        """Everything as JSON; what is not finite as the strings ``"nan"``, ``"inf"`` and ``"-inf"``."""
        Path(path).write_text(json.dumps(_jsonable(asdict(self)), indent=1, allow_nan=False))

    def plot(self, path: str | Path) -> None:
        """Relative L2 of every call, accumulated and alone, as an image. ImportError without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Comparison.plot needs matplotlib: pip install 'torch-fp4ops[bench]'") from error
        figure = Figure(figsize=(10, 5), layout="constrained")
        axes = figure.subplots()
        for number, run in enumerate(self.runs[1:]):
            rows = self.of(run)
            accumulated, alone = [row.accumulated for row in rows], [row.local for row in rows]
            for what, style, distances in (("accumulated", "-o", accumulated), ("alone", "--x", alone)):
                found = [(i, d.relative_l2) for i, d in enumerate(distances) if d is not None]
                # A logarithm has no place for zeros, nor for NaN.
                points = [(i, y) for i, y in found if 0 < y < math.inf]
                if points:
                    x, y = zip(*points, strict=True)
                    axes.plot(x, y, style, color=f"C{number}", markersize=3, label=f"{run}, {what}")
        rows = self.of(self.runs[1])
        ticks = range(0, len(rows), max(1, len(rows) // 30))
        axes.set_xticks(ticks, [_title(rows[i]) for i in ticks], rotation=90, fontsize=6)
        axes.set_ylabel(f"relative L2 distance from {self.runs[0]}")
        if axes.lines:
            axes.set_yscale("log")
            axes.legend()
        figure.savefig(path, dpi=150)

    def __str__(self) -> str:
        parts = [f"{self._table(run)}\n" for run in self.runs[1:]]
        for run, seconds in self.times.items():
            median, n = statistics.median(seconds) * 1e3, len(seconds)
            spread = f"{min(seconds) * 1e3:.2f} to {max(seconds) * 1e3:.2f}"
            parts.append(f"{run}: {median:.2f} ms a call (median of {n}, {spread})")
        for run, taken in self.backends.items():
            if taken:
                parts.append(f"{run} ran " + ", ".join(f"{op} by {' and '.join(b)}" for op, b in taken.items()))
        return "\n".join([*parts, *(f"not compared: {line}" for line in self.unmatched)])

    def _table(self, run: str) -> str:
        rows = self.of(run)
        titles = ["layer", "kind", "cosine", "rel L2", "max abs"]
        has_local = any(row.local is not None for row in rows)
        lines = [titles + (["alone: cosine", "rel L2", "max abs"] if has_local else [])]
        for row in rows:
            cells = [_title(row), row.kind, *_cells(row.accumulated)]
            lines.append(cells + (_cells(row.local) if has_local else []))
        return f"{run} against {self.runs[0]}\n\n{aligned(lines, left=2)}"


def _title(row: Row) -> str:
    return row.layer + (f" (call {row.call + 1})" if row.call else "")


def _cells(found: Distance | None) -> list[str]:
    if found is None:
        return ["", "", ""]
    return [f"{found.cosine:.6f}", f"{found.relative_l2:.3e}", f"{found.max_abs:.3e}"]


def _jsonable(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _jsonable(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_jsonable(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def distance(given: Tensor | Sequence[Tensor], wanted: Tensor | Sequence[Tensor]) -> Distance:
    """Of ``given`` from ``wanted``, computed in float64. Several tensors count as one, their elements put together.

    Equal values are exactly 1, 0 and 0 apart; where only ``wanted`` is all zeros, the relative distance is infinite
    and the cosine 0.

    Raises:
        ValueError: numbers or shapes of tensors differ.
    """
    given, wanted = ([t] if isinstance(t, Tensor) else list(t) for t in (given, wanted))
    shapes = tuple([list(t.shape) for t in side] for side in (given, wanted))
    if shapes[0] != shapes[1]:
        raise ValueError(f"distance: given is of shapes {shapes[0]}; allowed: those of wanted, {shapes[1]}")
    empty = torch.zeros(0, dtype=torch.float64)
    a, b = (torch.cat([empty, *(_real(t).detach().double().flatten().cpu() for t in side)]) for side in (given, wanted))
    if torch.equal(a, b):
        return Distance(1.0, 0.0, 0.0)
    both_infinite = a.isinf() & (a == b)
    a, b = (t.masked_fill(both_infinite, 0) for t in (a, b))
    difference = a - b
    lengths = (_length(a), _length(b))
    if 0.0 in lengths:
        cosine = 0.0
    else:
        cosine = max(-1.0, min(1.0, float((a / lengths[0]).dot(b / lengths[1]))))
    relative = _length(difference) / lengths[1] if lengths[1] else math.inf
    if not (math.isfinite(lengths[0]) and math.isfinite(lengths[1])):
        return Distance(math.nan, math.nan, math.nan)
    return Distance(cosine, relative, float(difference.abs().max()))


def _length(t: Tensor) -> float:
    """The norm, also where squares would be too large or too small for float64."""
    largest = float(t.abs().max())
    return largest * float((t / largest).norm()) if 0.0 < largest < math.inf else largest
