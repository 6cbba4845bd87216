"""The rows of a run: as a CSV file, as tables, and against the rows of an earlier run."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import TextIO

from .timing import Ceilings

SLOWER = 1.10
"""A row of which the new time is this many times the old one is a regression."""

CEILING = "ceiling"
"""The ``op`` of the rows that hold what the machine reaches: cases ``copy``, ``matmul`` and ``graph node``."""


@dataclass(frozen=True)
class Row:
    """One backend on one case; ``us`` and the figures derived from it are NaN where nothing was timed."""

    op: str
    case: str
    backend: str
    m: int = 0
    n: int = 0
    k: int = 0
    dtype: str = ""
    us: float = math.nan
    gbps: float = math.nan
    tflops: float = math.nan
    fraction: float = math.nan
    status: str = "ok"
    gpu: str = ""
    torch: str = ""
    triton: str = ""
    command: str = ""

    @property
    def timed(self) -> bool:
        return self.status.startswith("ok") and self.us > 0

    @property
    def family(self) -> str:
        return self.case.split(" ")[0]

    @property
    def bytes(self) -> float:
        return self.gbps * self.us * 1e3

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.case, self.backend


COLUMNS = tuple(f.name for f in fields(Row))


class Writer:
    """Writes each row as soon as it is there, so that a run that is cut short keeps what it has."""

    def __init__(self, path: str | None):
        self.file: TextIO | None = None
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "w", newline="")  # noqa: SIM115  (closed by close)
            csv.writer(self.file).writerow(COLUMNS)

    def add(self, row: Row) -> None:
        if self.file:
            values = (f"{v:.6g}" if isinstance(v, float) else v for v in astuple(row))
            csv.writer(self.file).writerow("" if v == "nan" else v for v in values)
            self.file.flush()

    def close(self) -> None:
        if self.file:
            self.file.close()


def read_csv(path: str | Path) -> list[Row]:
    """Rows of a file that Writer wrote. ValueError if it is another kind of file."""
    kinds = {f.name: f.type for f in fields(Row)}
    rows = []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, not {list(COLUMNS)}")
        for entry in reader:
            values = {}
            for name, text in entry.items():
                kind = kinds[name]
                values[name] = int(text) if kind == "int" else float(text or "nan") if kind == "float" else text
            rows.append(Row(**values))
    return rows


def ceiling_rows(ceilings: Ceilings, template: Row) -> list[Row]:
    base = replace(template, op=CEILING)
    return [
        replace(base, case="copy", backend="elementwise kernel", gbps=ceilings.copy_gbps),
        replace(base, case="matmul", backend="torch.mm", tflops=ceilings.matmul_tflops),
        replace(base, case="graph node", backend="one-element add_", us=ceilings.node_us),
    ]


def ceilings_of(rows: Iterable[Row]) -> Ceilings | None:
    found = {row.case: row for row in rows if row.op == CEILING}
    if not {"copy", "matmul", "graph node"} <= found.keys():
        return None
    return Ceilings(found["copy"].gbps, found["matmul"].tflops, found["graph node"].us)


def print_tables(rows: Sequence[Row]) -> None:
    """One table an op, each case's backends together; then what went wrong in full."""
    for op_name in dict.fromkeys(row.op for row in rows if row.op != CEILING):
        shown = [row for row in rows if row.op == op_name]
        width = max(len(row.case) for row in shown)
        print(f"\n{op_name}")
        titles = f"{'us':>10} {'GB/s':>8} {'TFLOP/s':>8} {'of ceiling':>10} {'x ref.':>7}  status"
        print(f"  {'case':{width}}  {'backend':17} {titles}")
        reference = {row.case: row.us for row in shown if row.backend == "reference" and row.timed}
        last = ""
        for row in shown:
            case, last = ("" if row.case == last else row.case), row.case
            speed_up = reference.get(row.case, math.nan) / row.us
            fraction = f"{row.fraction:10.1%}" if row.timed else f"{'':10}"
            figures = f"{_number(row.us, 10)} {_number(row.gbps, 8)} {_number(row.tflops or math.nan, 8)}"
            print(
                f"  {case:{width}}  {row.backend:17} {figures} {fraction} {_number(speed_up, 7)}  "
                f"{_shortened(row.status, 60)}"
            )
    failed: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status.startswith(("wrong", "error")):
            failed.setdefault((row.op, row.backend, row.status), []).append(row.case)
    if failed:
        print("\nnot timed, because it failed or its output is not the reference's:")
    for (op_name, backend, status), found in failed.items():
        print(f"  {op_name}, {backend}, {found[0]}{f' and {len(found) - 1} more' if found[1:] else ''}: {status}")


def _number(value: float, width: int) -> str:
    return " " * width if math.isnan(value) else f"{value:{width}.{1 if value >= 10 else 3}f}"


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def compare(old: Sequence[Row], new: Sequence[Row]) -> int:
    """Print old time / new time for every row that both have; returns 1 if any is slower by more than 10%.

    A row that was timed once and fails now counts as slower; one that was not asked for now counts for nothing.
    """
    before = {row.key: row for row in old if row.timed and row.op != CEILING}
    gpus = ["/".join(sorted({row.gpu for row in rows if row.gpu})) for rows in (old, new)]
    if gpus[0] != gpus[1]:
        print(f"\nNote: the old figures are from {gpus[0]}, the new ones from {gpus[1]}.")
    print("\nold time / new time (above 1 is faster now):")
    ratios, worse = [], []
    for row in new:
        earlier = before.get(row.key)
        if earlier is None:
            continue
        if not row.timed:
            worse.append(row)
            print(f"  {'':6}  {row.op}, {row.case}, {row.backend}: was {earlier.us:.2f} us, now {row.status}")
            continue
        ratio = earlier.us / row.us
        ratios.append(ratio)
        slower = row.us > SLOWER * earlier.us
        worse += [row] * slower
        times = f"{earlier.us:.2f} -> {row.us:.2f} us"
        print(f"  {ratio:6.3f}  {row.op}, {row.case}, {row.backend}: {times}{'  SLOWER' if slower else ''}")
    if not ratios:
        print("  no row in common")
    else:
        mean = geometric_mean(ratios)
        print(f"geometric mean {mean:.3f} over {len(ratios)} rows; {len(worse)} slower by more than 10% or failing now")
    sys.stdout.flush()
    return int(bool(worse))


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
