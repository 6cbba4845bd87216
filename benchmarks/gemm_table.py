#!/usr/bin/env python
"""The table of GEMMs: own backends beside cuBLAS in bf16, Marlin and gemlite, over M and the weights of models.

    python benchmarks/gemm_table.py --csv gemm_table.csv --plot plots/
    python benchmarks/gemm_table.py --from gemm_table.csv --plot plots/     # measure nothing

cuBLAS is measured before and after each row, and the ratio to it is against the mean of the two. The floor is the time
that the bytes take at ``--tbps`` or the FLOPs at ``--tflops``, whichever is longer; the defaults are an H200's.
A few rows of every output are compared with a float64 product first, and the whole of it is searched for values that
were not written; what is wrong has no time. Figures are as in PROTOCOL.md, with fewer replays.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

if str(Path(__file__).parent.parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from benchmarks import cases, inputs, peers, plots, shapes, table, timing, verify
from benchmarks.inputs import Weight
from benchmarks.table import BASELINE, Row
from torch_fp4ops import OPS, BackendUnavailable
from torch_fp4ops.testing import assert_matmul_close

FORMATS = {"mm_bf16_fp4": ("nvfp4", "mxfp4"), "mm_fp4": ("nvfp4", "mxfp4"), "mm_mxfp8": ("mxfp8",)}
BACKENDS = ("triton", "gluon")
_CHECKED_ROWS = 4
_MOST_ACTIVATIONS = 4
_WEIGHT_BYTES = 340 << 20

Product = Callable[[tuple[Tensor, ...]], Tensor]
"""Of activations as the op takes them (a peer takes bf16) with one weight."""
Timer = Callable[[timing.Calls], Callable[[], float]]


class Failed(Exception):
    """Why a contender has no time."""


@dataclass(frozen=True)
class Contender:
    name: str
    load: Callable[[Weight, Tensor | None], Product]
    takes_bf16: bool
    """Peers take bf16 activations, own backends what the op takes."""
    exact: bool
    """Held to the derived bound of a product; peers to 1% of relative error."""


def contenders(op_name: str, wanted: Sequence[str]) -> list[Contender]:
    """Own backends of the op, then peers, of those that are ``wanted``."""
    own = [
        Contender(name, functools.partial(_own, op_name, name), takes_bf16=False, exact=True)
        for name in wanted
        if name not in peers.NAMES
    ]
    rivals = peers.WEIGHT_ONLY if op_name == "mm_bf16_fp4" else ()
    return own + [
        Contender(rival.name, functools.partial(_rival, rival), takes_bf16=True, exact=False)
        for rival in rivals
        if rival.name in wanted
    ]


def _own(op_name: str, backend: str, weight: Weight, alpha: Tensor | None) -> Product:
    op = OPS[op_name]
    if backend not in op.backend_names():
        raise Failed(f"{op_name} has no such backend")
    layout = inputs.PREPARED_FOR.get(backend)
    try:
        mine = weight if layout is None else weight.prepared(layout)
    except ValueError as error:
        raise Failed(f"refused: {error}") from error

    def product(a: tuple[Tensor, ...]) -> Tensor:
        sample = inputs.gemm(op_name, a, mine, alpha)
        return op.default(*sample.args, **sample.kwargs, backend=backend)

    return product


def _rival(rival: peers.WeightPeer, weight: Weight, alpha: Tensor | None) -> Product:
    try:
        multiply = rival.load(weight, alpha)
    except peers.Unsuitable as error:
        raise Failed(str(error)) from error
    return lambda a: multiply(a[0])


@dataclass
class Loaded:
    """A contender with every copy of a weight, or why it has none."""

    contender: Contender
    products: list[Product]
    failure: str = ""


def measure(
    op_name: str,
    fmt: str,
    weight_shape: tuple[int, int, str],
    ms: Sequence[int],
    wanted: Sequence[str],
    device: torch.device,
    timer: Timer,
    floor: timing.Ceilings,
) -> Iterator[Row]:
    """The rows of one op, format and weight; ``ms`` are its numbers of activations."""
    n, k, model = weight_shape
    g = torch.Generator(device).manual_seed(0)
    nbytes = inputs.packed_bytes(fmt, n, k, "128x4")
    weights = [Weight.random(g, fmt, n, k) for _ in range(max(2, math.ceil(_WEIGHT_BYTES / nbytes)))]
    alpha = inputs.alpha_of(fmt, device)
    exact = verify.weight_values(weights[0])
    bf16 = exact.bfloat16()  # codes times block scales have few significant bits
    copies = [bf16, *(bf16.clone() for _ in range(max(1, math.ceil(_WEIGHT_BYTES / bf16.nbytes) - 1)))]
    exact = exact.double()
    loaded = [_load(contender, weights, alpha) for contender in contenders(op_name, wanted)]
    for m in ms:
        case = cases.gemm(op_name, fmt, m, n, k)
        base = Row(op_name, fmt, m, n, k, model, "", floor_us=floor.floor_us(case.bytes, case.flops))
        given = [inputs.activations(g, op_name, fmt, m, k) for _ in range(min(_MOST_ACTIVATIONS, len(weights)))]
        values = [verify.activation_values(op_name, inputs.gemm(op_name, a, weights[0], alpha)) for a in given]
        rounded = [a.bfloat16() for a in values]
        rows = torch.linspace(0, m - 1, min(m, _CHECKED_ROWS), device=device).long()
        few = values[0][rows].double()
        del values
        cublas = timer(_cublas_calls(rounded, copies))
        before = cublas()
        seen = [before]
        for each in loaded:
            row = replace(base, backend=each.contender.name)
            arguments = [(a,) for a in rounded] if each.contender.takes_bf16 else given
            try:
                us = _timed(each, arguments, rows, few, exact, alpha, timer)
            except Failed as error:
                yield replace(row, status=str(error))
                continue
            after = cublas()
            seen.append(after)
            yield replace(row, us=us, cublas_us=(before + after) / 2)
            before = after
        mean = sum(seen) / len(seen)
        yield replace(base, backend=BASELINE, us=mean, cublas_us=mean)


def _cublas_calls(a: Sequence[Tensor], weights: Sequence[Tensor]) -> timing.Calls:
    return [lambda i=i, w=w: torch.mm(a[i % len(a)], w.T) for i, w in enumerate(weights)]


def _load(contender: Contender, weights: Sequence[Weight], alpha: Tensor | None) -> Loaded:
    try:
        return Loaded(contender, [contender.load(w, alpha) for w in weights])
    except Failed as error:
        return Loaded(contender, [], str(error))
    except Exception as error:  # whatever a peer raises is a finding
        return Loaded(contender, [], f"error: {_one_line(error)}")


def _timed(
    loaded: Loaded,
    given: Sequence[tuple[Tensor, ...]],
    rows: Tensor,
    few: Tensor,
    exact: Tensor,
    alpha: Tensor | None,
    timer: Timer,
) -> float:
    """Check the first product, then time all; whatever fails becomes the reason."""
    if loaded.failure:
        raise Failed(loaded.failure)
    try:
        with verify.poisoned_memory():
            out = loaded.products[0](given[0])
        check(out, rows, few, exact, alpha, loaded.contender.exact)
        calls = [lambda i=i, f=f: f(given[i % len(given)]) for i, f in enumerate(loaded.products)]
        return timer(calls)()
    except AssertionError as error:
        raise Failed(f"wrong output: {_one_line(error)}") from error
    except (BackendUnavailable, ValueError) as error:
        raise Failed(f"refused: {_one_line(error)}") from error
    except Exception as error:
        # Compiling what can't be compiled takes long, so this weight is not tried at other M.
        loaded.failure = f"error: {_one_line(error)}"
        raise Failed(loaded.failure) from error


def check(out: Tensor, rows: Tensor, few: Tensor, exact: Tensor, alpha: Tensor | None, derived: bool) -> None:
    """Raise AssertionError unless ``out[rows]`` is ``few @ exact.T * alpha`` and all of ``out`` is written."""
    assert bool(out.isfinite().all()), "values that are not finite, as what is left unwritten is"
    if derived:
        assert_matmul_close(out[rows], few, exact, alpha)
        return
    wanted = few @ exact.T * (1.0 if alpha is None else alpha)
    error = float((out[rows].double() - wanted).norm() / wanted.norm())
    assert error <= verify.PEER_ERROR, f"relative error {error:.2g}"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; exit status 1 if an own backend is wrong, 2 without a GPU."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(argv)
    if options.rows_from:
        rows = table.read_csv(options.rows_from)
    elif not torch.cuda.is_available():
        print("torch sees no GPU, and these are times of GPU kernels; --from draws the rows of a file", file=sys.stderr)
        return 2
    else:
        rows = _measure_all(options, shlex.join(["benchmarks/gemm_table.py", *argv]))
    table.print_tables(rows)
    table.print_means(rows)
    if options.plot:
        for path in plots.plot_gemm_table(rows, Path(options.plot)):
            print(f"wrote {path}")
    wrong = [row for row in rows if row.status.startswith("wrong") and row.backend not in peers.NAMES]
    return int(bool(wrong))


def _timer(options: argparse.Namespace, device: torch.device) -> Timer:
    effort = replace(timing.QUICK, replay_us=options.replay_us)
    if not options.neighbour:

        def of_calls(calls: timing.Calls) -> Callable[[], float]:
            measured = timing.timer_of(calls, device, effort)
            return lambda: measured().us

        return of_calls
    one = torch.zeros(1, device=device)
    alone = timing.time_calls([lambda: one.add_(1.0)] * timing.MOST_CALLS, device).us

    def of_pairs(calls: timing.Calls) -> Callable[[], float]:
        pairs = [each for call in calls for each in (call, lambda: one.add_(1.0))]
        both = timing.timer_of(pairs, device, effort)
        return lambda: 2 * both().us - alone

    return of_pairs


def _measure_all(options: argparse.Namespace, command: str) -> list[Row]:
    started = time.monotonic()
    device = torch.device("cuda")
    if options.plain:
        from torch_fp4ops.ops._triton_launch import EARLY_START_VARIABLE

        os.environ[EARLY_START_VARIABLE] = "within"
    floor = timing.Ceilings(options.tbps * 1e3, options.tflops, 0.0)
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "command": command}
    timer = _timer(options, device)
    chosen = [s for s in shapes.GEMM_TABLE if not options.weights or f"{s[0]}x{s[1]}" in options.weights]
    for rival in peers.WEIGHT_ONLY:
        print(f"{rival.name}: {rival.what}")
    rows: list[Row] = []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for op_name in options.ops:
            for fmt in FORMATS[op_name]:
                if fmt not in options.formats:
                    continue
                for shape in chosen:
                    wanted = [*options.backends, *options.peers]
                    for row in measure(op_name, fmt, shape, options.m, wanted, device, timer, floor):
                        rows.append(replace(row, **facts))
                        if options.csv:
                            table.write_csv(options.csv, rows)
                    timing.free_memory(device)
                    print(f"{time.monotonic() - started:5.0f} s: {op_name}, {fmt}, {shape[0]} x {shape[1]}", flush=True)
    return rows


def _listed(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [part.strip() for part in text.split(",") if part.strip()]
        unknown = [name for name in names if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; allowed: {', '.join(allowed)}")
        return names

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ops, rivals = tuple(FORMATS), [rival.name for rival in peers.WEIGHT_ONLY]
    known = [f"{n}x{k}" for n, k, _ in shapes.GEMM_TABLE]
    own = sorted({name for op_name in ops for name in OPS[op_name].backend_names()} | set(BACKENDS))
    parser.add_argument("--ops", type=_listed(ops), default=list(ops), metavar="OP,OP", help=", ".join(ops))
    parser.add_argument("--formats", type=_listed(("nvfp4", "mxfp4", "mxfp8")), default=["nvfp4", "mxfp8"])
    parser.add_argument("--weights", type=_listed(known), metavar="NxK,NxK", help=f"of {', '.join(known)}")
    parser.add_argument(
        "--m",
        type=lambda text: [int(part) for part in text.split(",")],
        default=list(shapes.GEMM_TABLE_ROWS),
        metavar="M,M",
    )
    parser.add_argument("--backends", type=_listed(own), default=list(BACKENDS), help=f"own ones, of {', '.join(own)}")
    parser.add_argument("--peers", type=_listed(rivals), default=["marlin", "gemlite"], help=f"of {', '.join(rivals)}")
    parser.add_argument("--tbps", type=float, default=4.2, help="TB/s of the floor (default: 4.2)")
    parser.add_argument("--tflops", type=float, default=790.0, help="TFLOP/s of the floor (default: 790)")
    parser.add_argument("--replay-us", type=float, default=timing.QUICK.replay_us, help="of one replay of a short call")
    neighbour = "put a plain kernel of one element between calls, and take its time alone off"
    parser.add_argument("--neighbour", action="store_true", help=neighbour)
    parser.add_argument(
        "--plain", action="store_true", help="no call starts before the one in front has ended: plain graph nodes"
    )
    parser.add_argument("--csv", metavar="FILE", help="write the rows, each as soon as it is there")
    parser.add_argument("--plot", metavar="DIR", help="draw maps of the speed-ups (needs matplotlib)")
    parser.add_argument("--from", dest="rows_from", metavar="FILE", help="take the rows of an earlier --csv")
    return parser


if __name__ == "__main__":
    sys.exit(main())
