"""Figures from the rows of a run: time against bytes, and maps of speed-ups. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import peers, table
from .report import CEILING, Row, ceilings_of

# One colour and marker a backend in every figure (the palette is Okabe and Ito's, for all kinds of colour vision).
STYLES = {
    "reference": ("#777777", "o"),
    "triton": ("#0072B2", "s"),
    "flashinfer": ("#009E73", "^"),
    "torch.compile": ("#E69F00", "D"),
    "cublas-bf16": ("#D55E00", "v"),
    "flashinfer-direct": ("#CC79A7", "P"),
    "gemlite": ("#56B4E9", "X"),
    "torchao": ("#B8A800", "*"),
    "gluon": ("#882255", "s"),
    "marlin": ("#44AA99", "X"),
    "triton_kernels": ("#999933", "P"),
}
_OTHER = ("#000000", "x")
_DPI = 130
_LEGIBLE_ON_DARK = 0.55
_MOST_COLUMNS = 12
_MOST_PANELS = 4


def plot_all(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Draw a figure of times for every op and family with more than one shape (matrix products by M, the rest by
    bytes), and maps of speed-ups where the shapes make a grid. Returns the files."""
    _use_matplotlib()
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    timed = [row for row in rows if row.timed and row.op != CEILING]
    for op_name, family in dict.fromkeys((row.op, row.family) for row in timed):
        chosen = [row for row in timed if (row.op, row.family) == (op_name, family)]
        stem = f"{op_name}-{family}"
        panels = _panels(chosen)
        if panels:
            written.append(_save(_times_by_m, directory / f"{stem}-time.png", rows, panels))
        elif len({row.case for row in chosen}) > 1:
            written.append(_save(_times, directory / f"{stem}-time.png", rows, chosen))
        for baseline in dict.fromkeys(row.backend for row in chosen):
            if baseline != "reference" and baseline not in peers.NAMES:
                continue  # speed-ups are over what one had before
            grid = speed_ups(chosen, baseline)
            if grid is not None:
                path = directory / f"{stem}-vs-{baseline}.png"
                written.append(_save(_speed_up_map, path, chosen, baseline, grid))
    return written


def plot_gemm_table(rows: Sequence[table.Row], directory: Path) -> list[Path]:
    """Maps of the best own backend's speed-up over cuBLAS and over Marlin, M by N x K, for each op and format."""
    _use_matplotlib()
    directory.mkdir(parents=True, exist_ok=True)
    found = table.ratios(rows)
    written = []
    for group in dict.fromkeys(row.group for row in rows):
        mine = [row for row in rows if row.group == group and row.own and row.timed]
        for baseline, name in ((table.BASELINE, "vs_cublas"), (table.RIVAL, "vs_marlin")):
            grid: Grid = {}
            for row in mine:
                cell = row.m, _column(row)
                if row in found[name]:
                    grid[cell] = max(found[name][row], grid.get(cell, 0.0))
            if grid:
                path = directory / f"{'-'.join(group)}-table-vs-{baseline}.png"
                written.append(_save(_speed_up_map, path, mine, baseline, grid))
    return written


def plot_tokens_per_second(rows: Sequence[Any], directory: Path) -> Path:
    """A panel for each phase of ``end_to_end.py``: tokens per second by batch, with the speed-up over bf16."""
    _use_matplotlib()
    directory.mkdir(parents=True, exist_ok=True)
    return _save(_tokens_per_second, directory / "end-to-end.png", [row for row in rows if row.us > 0])


def _tokens_per_second(rows: Sequence[Any]) -> Any:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    phases = list(dict.fromkeys(row.phase for row in rows))
    figure, grid = plt.subplots(
        1, len(phases), figsize=(1.2 + 4.6 * len(phases), 4.6), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for axes, phase in zip(grid[0], phases, strict=True):
        kinds = list(dict.fromkeys(row.weights for row in rows))
        batches = sorted({row.batch for row in rows if row.phase == phase})
        for i, kind in enumerate(kinds):
            mine = {row.batch: row for row in rows if (row.phase, row.weights) == (phase, kind)}
            x = [j + (i - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for j, b in enumerate(batches) if b in mine]
            y = [mine[b].tokens_per_s for b in batches if b in mine]
            colour = STYLES["cublas-bf16" if kind == "bf16" else "triton"][0]
            handles[kind] = axes.bar(x, y, 0.8 / len(kinds), color=colour)
            for place, height, batch in zip(x, y, [b for b in batches if b in mine], strict=True):
                if kind != "bf16" and mine[batch].speed_up > 0:
                    text = f"{mine[batch].speed_up:.2f}x"
                    axes.annotate(text, (place, height), xytext=(0, 2), textcoords="offset points", ha="center")
        axes.set_xticks(range(len(batches)), [str(b) for b in batches])
        axes.set_yscale("log")
        axes.margins(y=0.12)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(True, axis="y", which="major", alpha=0.35)
        axes.set_title(phase, fontsize=12)
        axes.set_xlabel("sequences", fontsize=11.5)
        axes.set_ylabel("tokens per second", fontsize=11.5)
    gpus = ", ".join(sorted({row.gpu for row in rows}))
    figure.suptitle(f"tokens per second, each step one graph, on {gpus}", fontsize=13)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=10.5, frameon=False)
    return figure


def _use_matplotlib() -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")


def _save(draw: Callable[..., Any], path: Path, *arguments: Any) -> Path:
    import matplotlib.pyplot as plt

    figure = draw(*arguments)
    figure.savefig(path, dpi=_DPI, bbox_inches="tight")
    plt.close(figure)
    return path


def _title(rows: Sequence[Row | table.Row], what: str) -> str:
    gpus = ", ".join(sorted({row.gpu for row in rows if row.gpu}))
    return f"{rows[0].op}, {rows[0].family}\n{what} on {gpus}"


def _times(all_rows: Sequence[Row], rows: Sequence[Row]) -> Any:
    """Microseconds against bytes, log-log, and the line below which no kernel can be."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(figsize=(9, 6))
    for backend in dict.fromkeys(row.backend for row in rows):
        colour, marker = STYLES.get(backend, _OTHER)
        mine = [row for row in rows if row.backend == backend]
        # Points only: one size in bytes stands for many shapes, and a line through those would zigzag.
        x, y = [row.bytes for row in mine], [row.us for row in mine]
        axes.plot(x, y, marker, color=colour, markersize=6, alpha=0.75, markeredgewidth=0, label=backend)
    ceilings = ceilings_of(all_rows)
    if ceilings is not None:
        low, high = min(row.bytes for row in rows) / 1.5, max(row.bytes for row in rows) * 1.5
        xs = [low * (high / low) ** (i / 99) for i in range(100)]
        floor = [max(x / ceilings.copy_gbps / 1e3, ceilings.node_us) for x in xs]
        label = f"floor: copy at {ceilings.copy_gbps:,.0f} GB/s, a launch {ceilings.node_us:.2g} us"
        axes.plot(xs, floor, "--", color="black", linewidth=1.4, label=label)
        if any(row.tflops for row in rows):
            bound = sorted((row.bytes, ceilings.floor_us(row.bytes, row.tflops * row.us * 1e6)) for row in rows)
            label = f"floor, arithmetic too: bf16 matmul at {ceilings.matmul_tflops:,.3g} TFLOP/s"
            axes.plot(*zip(*bound, strict=True), "_", color="black", markersize=11, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes read and written", fontsize=12)
    axes.set_ylabel("time of a call (us)", fontsize=12)
    axes.set_title(_title(rows, "time of a call"), fontsize=13)
    axes.tick_params(labelsize=11)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes_text(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=9))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", alpha=0.35)
    axes.legend(fontsize=10.5, loc="upper left", bbox_to_anchor=(0, -0.13), ncols=2, frameon=False)
    return figure


def _panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of matrix products by N x K, those with three sizes of M or more; the most measured ones."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.tflops > 0:
            found.setdefault(_column(row), []).append(row)
    sizes = {column: len({row.m for row in mine}) for column, mine in found.items()}
    columns = sorted((c for c in found if sizes[c] > 2), key=lambda c: (-sizes[c], _column_order(c)))[:_MOST_PANELS]
    return {column: sorted(found[column], key=lambda row: row.m) for column in sorted(columns, key=_column_order)}


def _times_by_m(all_rows: Sequence[Row], panels: dict[str, list[Row]]) -> Any:
    """Microseconds against M, a panel for each N x K, and the floor that memory or arithmetic sets there."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = (1.5 + 5.2 * columns, 1.6 + 3.6 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    ceilings = ceilings_of(all_rows)
    handles: dict[str, Any] = {}
    for axes, (column, rows) in zip(grid.flat, panels.items(), strict=False):
        for backend in dict.fromkeys(row.backend for row in rows):
            colour, marker = STYLES.get(backend, _OTHER)
            mine = [row for row in rows if row.backend == backend]
            x, y = [row.m for row in mine], [row.us for row in mine]
            (handles[backend],) = axes.plot(x, y, marker=marker, color=colour, linewidth=1.5, markersize=5.5)
        if ceilings is not None:
            floors = {row.m: ceilings.floor_us(row.bytes, row.tflops * row.us * 1e6) for row in rows}
            label = (
                f"floor: copy at {ceilings.copy_gbps:,.0f} GB/s, bf16 matmul at {ceilings.matmul_tflops:,.3g} TFLOP/s"
            )
            (handles[label],) = axes.plot(list(floors), list(floors.values()), "--", color="black", linewidth=1.3)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ms = sorted({row.m for row in rows})
        # A label next to one that is less than a factor of 3 larger would touch it.
        axes.set_xticks(ms, [str(m) if not any(m < other < 3 * m for other in ms) else "" for m in ms])
        axes.yaxis.set_major_locator(LogLocator(numticks=9))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelsize=10.5)
        axes.grid(True, which="major", alpha=0.35)
        axes.set_title(f"N x K = {column}", fontsize=12)
        axes.set_xlabel("M", fontsize=11.5)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("time of a call (us)", fontsize=11.5)
    figure.suptitle(_title(next(iter(panels.values())), "time of a call"), fontsize=13)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=10.5, frameon=False)
    return figure


def _bytes_text(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


Grid = dict[tuple[int, str], float]


def _column(row: Row | table.Row) -> str:
    return f"{row.n} x {row.k}" if row.n else f"{row.k}"


def speed_ups(rows: Sequence[Row], baseline: str) -> Grid | None:
    """Baseline's time over that of the best own backend, by M and column (K, or N x K).

    Only the columns with the most shapes, so that single ones (of a model, ragged) leave no holes. None if that makes
    no grid of two by two.
    """
    own = [r for r in rows if r.backend != baseline and r.backend not in peers.NAMES]
    if any(r.backend != "reference" for r in own):
        own = [r for r in own if r.backend != "reference"]  # its speed is of interest as a baseline only
    best: Grid = {}
    for row in own:
        cell = row.m, _column(row)
        best[cell] = min(row.us, best.get(cell, math.inf))
    grid = {}
    for row in rows:
        cell = row.m, _column(row)
        if row.backend == baseline and cell in best:
            grid[cell] = row.us / best[cell]
    counts: dict[str, int] = {}
    for _, column in grid:
        counts[column] = counts.get(column, 0) + 1
    full = sorted((c for c in counts if counts[c] == max(counts.values())), key=_column_order)[:_MOST_COLUMNS]
    grid = {cell: value for cell, value in grid.items() if cell[1] in full}
    return grid if len(full) > 1 and len({m for m, _ in grid}) > 1 else None


def _column_order(column: str) -> tuple[int, ...]:
    return tuple(int(part) for part in column.split(" x "))


def _speed_up_map(rows: Sequence[Row | table.Row], baseline: str, grid: Grid) -> Any:
    import matplotlib.pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    ms = sorted({m for m, _ in grid})
    columns = sorted({column for _, column in grid}, key=_column_order)
    logs = [[math.log2(grid.get((m, column), math.nan)) for column in columns] for m in ms]
    # White is equally fast, and both ends are as far from it, so that colours compare.
    reach = max(1.0, *(abs(v) for line in logs for v in line if not math.isnan(v)))
    norm = TwoSlopeNorm(0.0, -reach, reach)
    figure, axes = plt.subplots(figsize=(2.6 + 1.15 * len(columns), 2.0 + 0.48 * len(ms)), layout="constrained")
    colours = plt.get_cmap("RdBu").with_extremes(bad="#dddddd")
    image = axes.imshow(logs, cmap=colours, norm=norm, aspect="auto")
    for i, m in enumerate(ms):
        for j, column in enumerate(columns):
            value = grid.get((m, column))
            if value is None:
                text, colour = "not timed", "#555555"
            else:
                text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
                colour = "white" if abs(logs[i][j]) / reach > _LEGIBLE_ON_DARK else "black"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=11 if value else 8)
    axes.set_xticks(
        range(len(columns)),
        columns,
        fontsize=11,
        rotation=30 if rows[0].n else 0,
        ha="right" if rows[0].n else "center",
    )
    axes.set_yticks(range(len(ms)), [str(m) for m in ms], fontsize=11)
    axes.set_xlabel("N x K" if rows[0].n else "K", fontsize=12)
    axes.set_ylabel("M", fontsize=12)
    axes.set_title(_title(rows, f"times faster than {baseline} (best backend)"), fontsize=12)
    bar = figure.colorbar(image, ax=axes)
    ticks = [t for t in range(math.floor(-reach), math.ceil(reach) + 1) if abs(t) <= reach]
    ticks = ticks[:: max(1, len(ticks) // 7)]
    bar.set_ticks(ticks, labels=[f"{2.0**t:g}" for t in ticks])
    bar.ax.tick_params(labelsize=10)
    return figure
