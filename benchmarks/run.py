#!/usr/bin/env python
"""Measures the ops: ``python benchmarks/run.py --help``, or ``python -m torch_fp4ops bench``."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if str(Path(__file__).parent.parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent.parent))  # as a script, the first entry is benchmarks/ itself

import torch

from benchmarks import cases, inputs, peers, plots, report, timing, verify
from benchmarks.cases import Case
from benchmarks.report import Row
from torch_fp4ops.registry import OPS
from torch_fp4ops.testing import Sample

Prepared = tuple[str, timing.Calls]
"""What is to be said of a right output, and the calls to time."""


class WrongOutput(Exception):
    """What is wrong with a backend's output."""


class DeviceLost(Exception):
    """The GPU takes no more work in this process, so nothing after this can be measured."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit status.

    1: slower than ``--compare``'s rows, or an own backend is wrong. 2: nothing to measure. 3: the GPU was lost.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(argv)
    status = 0
    try:
        old = report.read_csv(options.compare) if options.compare else None
        given = report.read_csv(options.rows_from) if options.rows_from else None
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if given is not None:
        rows = given
    else:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            parser.error("torch sees no GPU; --device cpu compares the references on the CPU")
        selected = _select(options, device, parser)
        if not selected:
            print("no case is left by --ops and --cases", file=sys.stderr)
            return 2
        if options.list:
            for case in selected:
                print(f"{case.op}: {case.name} ({case.bytes / 1e6:.3g} MB, {case.flops / 1e9:.3g} GFLOP)")
            return 0
        if device.type == "cpu":
            why = "" if torch.cuda.is_available() else " (torch sees no GPU)"
            print(f"on the CPU{why}: only what PyTorch makes of the reference bodies, on small shapes")
        rows, status = _measure_all(selected, options, device, shlex.join(["benchmarks/run.py", *argv]))
    report.print_tables(rows)
    if options.plot:
        for path in plots.plot_all(rows, Path(options.plot)):
            print(f"wrote {path}")
    if any(row.status.startswith("wrong") and row.backend not in peers.NAMES for row in rows):
        print("\na backend of this package gives wrong results", file=sys.stderr)
        status = status or 1
    if old is not None:
        status = report.compare(old, rows) or status
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks/run.py", description="times every backend of the ops, and their peers")
    known = ", ".join(sorted(OPS))
    parser.add_argument("--ops", metavar="OP,OP", help=f"only these ops, of {known}")
    parser.add_argument("--backends", metavar="NAME,NAME", help=f"only these backends or peers, e.g. {peers.NAMES[0]}")
    parser.add_argument("--cases", metavar="REGEX", help="only cases whose name matches, e.g. '^nvfp4-128x4 8192x'")
    parser.add_argument("--quick", action="store_true", help="a few shapes of every op")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--csv", metavar="FILE", help="write the rows, each as soon as it is there")
    parser.add_argument("--plot", metavar="DIR", help="draw times and speed-ups (needs matplotlib)")
    parser.add_argument("--compare", metavar="FILE", help="an earlier --csv; exit status 1 if a row got slower by 10%%")
    parser.add_argument(
        "--from", dest="rows_from", metavar="FILE", help="measure nothing, take the rows of an earlier --csv"
    )
    return parser


def _names(text: str | None) -> set[str]:
    return {part.strip() for part in (text or "").split(",") if part.strip()}


def _select(options: argparse.Namespace, device: torch.device, parser: argparse.ArgumentParser) -> list[Case]:
    unknown = _names(options.ops) - set(OPS)
    if unknown:
        parser.error(f"there is no op {', '.join(sorted(unknown))}; the ops are {', '.join(sorted(OPS))}")
    if device.type == "cpu":
        found = cases.cpu_cases(options.quick)
    else:
        found = cases.quick_cases() if options.quick else cases.all_cases()
    wanted = _names(options.ops) or set(OPS)
    return [c for c in found if c.op in wanted and (not options.cases or re.search(options.cases, c.name))]


def _measure_all(
    selected: Sequence[Case], options: argparse.Namespace, device: torch.device, command: str
) -> tuple[list[Row], int]:
    started = time.monotonic()
    triton = _version("triton")
    template = Row("", "", "", gpu=_device_name(device), torch=torch.__version__, triton=triton, command=command)
    print(f"{template.gpu}, torch {template.torch}, triton {template.triton or 'none'}")
    ceilings = timing.measure_ceilings(device)
    print(
        f"ceilings: copy {ceilings.copy_gbps:.0f} GB/s, matmul {ceilings.matmul_tflops:.3g} TFLOP/s, "
        f"{'graph node' if device.type == 'cuda' else 'one-element add_'} {ceilings.node_us:.2f} us",
        flush=True,
    )
    rows = report.ceiling_rows(ceilings, template)
    writer = report.Writer(options.csv)
    status = 0
    try:
        for row in rows:
            writer.add(row)
        for case in _with_progress(selected):
            base = replace(template, op=case.op, case=case.name, m=case.m, n=case.n, k=case.k, dtype=case.dtype)
            for row in measure_case(case, base, _names(options.backends), device, ceilings):
                rows.append(row)
                writer.add(row)
                if row.status.startswith("error") and not timing.works(device):
                    raise DeviceLost(f"{row.op}, {row.case}, {row.backend} took the GPU with it: {row.status}")
            timing.free_memory(device)
    except DeviceLost as lost:
        print(f"\nstopped: {lost}", file=sys.stderr)
        status = 3
    finally:
        writer.close()
    print(f"{len(rows)} rows in {time.monotonic() - started:.0f} s")
    return rows, status


def measure_case(
    case: Case, base: Row, wanted: set[str], device: torch.device, ceilings: timing.Ceilings
) -> Iterator[Row]:
    """A row for each backend of the case's op and each peer that is wanted (an empty set wants all)."""
    op = OPS[case.op]
    candidates = [n for n in op.backend_names() if not wanted or n in wanted]
    rivals = [p for p in peers.PEERS if p.takes(case.op, device) and (not wanted or p.name in wanted)]
    if not candidates and not rivals:
        return
    count = timing.sets_for(case.bytes, timing.l2_bytes(device)) if device.type == "cuda" else 2
    try:
        samples = case.sets(device, count)
        # An op that writes must not find in the check what the timing of another backend wrote.
        pristine = samples[0].clone() if op.default._schema.is_mutable else samples[0]
        expected = verify.Expected(case, pristine)
        op.check(*samples[0].args, **samples[0].kwargs)
    except Exception as error:  # out of memory, most likely
        yield replace(base, backend="inputs", status=_failure(error))
        return
    for name in candidates:
        try:
            mine = [inputs.for_backend(case.op, name, s) for s in samples]
            reason = op.why_not(name, op.check(*mine[0].args, **mine[0].kwargs))
        except ValueError as error:  # a weight that can't be prepared
            reason = _one_line(error)
        if reason is not None:
            yield replace(base, backend=name, status=f"refused: {reason}")
            continue

        def prepare(name: str = name, mine: Sequence[Sample] = mine) -> Prepared:
            return _own(op, name, mine, expected)

        yield _timed_row(replace(base, backend=name), prepare, case, device, ceilings)
    for peer in rivals:

        def prepare_peer(peer: peers.Peer = peer) -> Prepared:
            return _rival(peer, case, samples, expected)

        row = _timed_row(replace(base, backend=peer.name), prepare_peer, case, device, ceilings)
        if not row.status.startswith("unsuitable"):
            yield row


def _own(op: Any, name: str, samples: Sequence[Sample], expected: verify.Expected) -> Prepared:
    copy = inputs.for_backend(op.name, name, expected.sample.clone())
    with verify.poisoned_memory():
        out = op(*copy.args, **copy.kwargs, backend=name)
    try:
        expected.check(out, copy)
    except AssertionError as error:
        raise WrongOutput(_one_line(error)) from error
    return "", [lambda s=s: op(*s.args, **s.kwargs, backend=name) for s in samples]


def _rival(peer: peers.Peer, case: Case, samples: Sequence[Sample], expected: verify.Expected) -> Prepared:
    prepared = peer.prepare(case, samples, expected)
    with verify.poisoned_memory() if prepared.poison else contextlib.nullcontext():
        out = prepared.runs[0]()
    try:
        note = (prepared.expected or expected).check_peer(prepared.compare(out))
    except AssertionError as error:
        raise WrongOutput(_one_line(error)) from error
    return note, prepared.runs


def _timed_row(
    base: Row,
    prepare: Callable[[], Prepared],
    case: Case,
    device: torch.device,
    ceilings: timing.Ceilings,
) -> Row:
    """Check, then time; whatever fails becomes the row's status."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a reference that says that it is slow, a compiler's hints
            note, runs = prepare()
            measured = timing.time_calls(runs, device)
    except peers.Unsuitable as error:
        return replace(base, status=f"unsuitable: {error}")
    except WrongOutput as error:
        return replace(base, status=f"wrong output: {error}")
    except Exception as error:  # any failure of a backend is a finding, not the end of the run
        return replace(base, status=_failure(error))
    remarks = [note] * bool(note) + ["not captured in a CUDA graph"] * (measured.how == "events")
    return replace(
        base,
        us=measured.us,
        gbps=timing.gbps(case.bytes, measured.us),
        tflops=timing.tflops(case.flops, measured.us),
        fraction=ceilings.fraction(measured.us, case.bytes, case.flops),
        status="; ".join(["ok", *remarks]),
    )


def _failure(error: Exception) -> str:
    return f"error: {type(error).__name__}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _with_progress(selected: Sequence[Case]) -> Iterable[Case]:
    try:
        from tqdm import tqdm
    except ImportError:
        return selected
    bar = tqdm(selected, file=sys.stderr, unit="case", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def named() -> Iterator[Case]:
        for case in bar:
            bar.set_postfix_str(f"{case.op} {case.name}"[:60])
            yield case

    return named()


if __name__ == "__main__":
    sys.exit(main())
