"""The rows of ``gemm_table.py``: as a CSV file, as tables, and as geometric means."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from . import peers, probing
from .report import geometric_mean

BASELINE = "cublas-bf16"
RIVAL = "marlin"
PARITY = 1.0
FEW_ROWS = 64
"""Up to here the bytes of the weights decide, above it the arithmetic."""


@dataclass(frozen=True)
class Row:
    """A product of one backend; times in microseconds, NaN where nothing was timed."""

    op: str
    format: str
    m: int
    n: int
    k: int
    weight: str
    """The layer of a model that has this weight."""
    backend: str
    us: float = math.nan
    floor_us: float = math.nan
    cublas_us: float = math.nan
    """Of cuBLAS in bf16, the mean of its times before and after this row."""
    status: str = "ok"
    gpu: str = ""
    torch: str = ""
    command: str = ""

    @property
    def timed(self) -> bool:
        return self.us > 0

    @property
    def own(self) -> bool:
        return self.backend not in peers.NAMES

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        return self.op, self.format, self.m, self.n, self.k

    @property
    def family(self) -> str:
        return self.format

    @property
    def group(self) -> tuple[str, str]:
        return self.op, self.format


COLUMNS = tuple(f.name for f in fields(Row))
RATIOS = ("over_floor", "vs_cublas", "vs_marlin")


def write_csv(path: str | Path, rows: Sequence[Row]) -> None:
    """All rows with their ratios, which :func:`read_csv` computes anew."""
    found = ratios(rows)
    lines = []
    for row in rows:
        values = (*astuple(row), *(found[name].get(row, math.nan) for name in RATIOS))
        texts = (f"{v:.6g}" if isinstance(v, float) else v for v in values)
        lines.append(dict(zip((*COLUMNS, *RATIOS), ("" if v == "nan" else v for v in texts), strict=True)))
    probing.write_csv(Path(path), lines)


def read_csv(path: str | Path) -> list[Row]:
    """Rows of a file of :func:`write_csv`. ValueError if it is another kind of file."""
    kinds = {f.name: f.type for f in fields(Row)}
    convert: dict[Any, Callable[[str], Any]] = {"int": int, "float": lambda text: float(text or "nan"), "str": str}
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != (*COLUMNS, *RATIOS):
            raise ValueError(f"{path} has the columns {reader.fieldnames}, not {[*COLUMNS, *RATIOS]}")
        return [Row(**{name: convert[kinds[name]](entry[name]) for name in COLUMNS}) for entry in reader]


def ratios(rows: Sequence[Row]) -> dict[str, dict[Row, float]]:
    """By name: a row's time over the floor, and how many times faster it is than cuBLAS and than Marlin.

    Marlin's product is ``mm_bf16_fp4`` of NVFP4; other ops and formats have none to compare with.
    """
    rival = {row.key: row.us for row in rows if row.backend == RIVAL and row.timed}
    timed = [row for row in rows if row.timed]
    return {
        "over_floor": {row: row.us / row.floor_us for row in timed},
        "vs_cublas": {row: row.cublas_us / row.us for row in timed},
        "vs_marlin": {row: rival[row.key] / row.us for row in timed if row.key in rival},
    }


def print_tables(rows: Sequence[Row]) -> None:
    """A table for each op, format and weight; then the reasons of what was not timed."""
    found = ratios(rows)
    for op_name, fmt in dict.fromkeys(row.group for row in rows):
        print(f"\n{op_name}, {fmt}")
        print(f"  {'N x K':15}{'M':>6}  {'backend':15}{'us':>10}{'x floor':>9}{'vs cuBLAS':>11}{'vs Marlin':>11}")
        last: tuple[int, int, int] | None = None
        for row in rows:
            if row.group != (op_name, fmt) or not row.timed:
                continue
            place = row.n, row.k, row.m
            title = f"{f'{row.n} x {row.k}':15}{row.m:6}" if place != last else " " * 21
            last = place
            line = f"  {title}  {row.backend:15}{row.us:10.{1 if row.us >= 100 else 2}f}"
            for name, width in zip(RATIOS, (9, 11, 11), strict=True):
                value = found[name].get(row)
                line += " " * width if value is None else f"{value:{width}.2f}"
            print(line)
    failed: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if not row.timed:
            failed.setdefault((*row.group, row.backend, row.status), []).append(row)
    if failed:
        print("\nwithout a time:")
    for (op_name, fmt, backend, status), several in failed.items():
        print(f"  {op_name}, {fmt}, {backend} ({len(several)} products): {status}")


def print_means(rows: Sequence[Row]) -> None:
    """Geometric means over the weights and M of each own backend, and how many products are at parity or better."""
    found = ratios(rows)
    print(f"\ngeometric means; parity is {PARITY:.2f}, and in brackets is how many products reach it")
    print(f"  {'op':14}{'format':8}{'backend':10}{'M':>13}{'x floor':>9}{'vs cuBLAS':>18}{'vs Marlin':>18}")
    ranges = ((1, FEW_ROWS), (FEW_ROWS + 1, max((row.m for row in rows), default=FEW_ROWS)))
    for group, backend in dict.fromkeys((row.group, row.backend) for row in rows if row.own and row.timed):
        for low, high in ranges:
            mine = [
                row
                for row in rows
                if row.group == group and row.backend == backend and row.timed and low <= row.m <= high
            ]
            if not mine:
                continue
            line = f"  {group[0]:14}{group[1]:8}{backend:10}{f'{low} to {high}':>13}"
            line += f"{geometric_mean([found['over_floor'][row] for row in mine]):9.2f}"
            for name in ("vs_cublas", "vs_marlin"):
                values = [found[name][row] for row in mine if row in found[name]]
                met = sum(value >= PARITY for value in values)
                text = f"{geometric_mean(values):.2f} ({met}/{len(values)})" if values else ""
                line += f"{text:>18}"
            print(line)
