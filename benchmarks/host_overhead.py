#!/usr/bin/env python
"""Host microseconds of an op, of its backend and of the launches: ``python benchmarks/host_overhead.py``."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

if str(Path(__file__).parent.parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from benchmarks import cases
from torch_fp4ops.contracts import Call, Out
from torch_fp4ops.registry import OPS, Op, op
from torch_fp4ops.testing import Sample, samples

_serial = itertools.count()

BOUND_US = 6.0
CALLS = 5000
RUNS = 7

MODES: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def us_per_call(function: Callable[[], Any], calls: int = CALLS, runs: int = RUNS) -> float:
    """Median over runs of the mean over calls; on a GPU the queue is drained before and after, outside the time."""
    times = []
    for _ in range(max(1, calls // 10)):
        function()
    for _ in range(runs):
        _drain()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls * 1e6)
    _drain()
    return median(times)


def _drain() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def probe_op() -> Iterator[Op]:
    """An op that does next to nothing, registered like any other and taken out of OPS again."""

    def _overhead_probe(x: Tensor, scale: Tensor | None = None, block: int = 16, *, backend: str = "auto") -> Tensor:
        """Negate."""
        return torch.neg(x)

    def contract(call: Call) -> Out:
        call.require_rank("x", 2)
        call.require_dtype("x", (torch.float32, torch.bfloat16))
        return Out(call.x.shape, call.x.dtype)

    _overhead_probe.__name__ += f"_{next(_serial)}"  # torch keeps a name for the life of the process
    # Annotations are strings here, and the schema is inferred from types.
    _overhead_probe.__annotations__ = inspect.get_annotations(_overhead_probe, eval_str=True)
    probe = op(contract=contract)(_overhead_probe)
    try:
        yield probe
    finally:
        OPS.pop(probe.name, None)


def registration_overhead(calls: int = CALLS, runs: int = RUNS) -> float:
    """Print a table for the trivial op on the CPU; returns the largest overhead of ``torch.ops.fp4.<op>``."""
    x = torch.zeros(2, 16)
    worst = 0.0
    with probe_op() as probe:
        direct = probe.__wrapped__
        packet = getattr(torch.ops.fp4, probe.name)
        custom = torch.library.custom_op(f"torch_fp4ops_benchmarks::{probe.name}", direct, mutates_args=())
        ways: dict[str, Callable[[], Any]] = {
            "the implementation itself": lambda: direct(x),
            "torch.ops.fp4.<op>": lambda: packet(x),
            "torch_fp4ops.<op>": lambda: probe(x),
            "torch.library.custom_op": lambda: custom(x),
        }
        print(f"a trivial op on the CPU: us a call (what it adds), median of {runs} runs of {calls} calls")
        print(f"  {'':28}" + "".join(f"{mode:>18}" for mode in MODES))
        base: dict[str, float] = {}
        for way, function in ways.items():
            line = f"  {way:28}"
            for mode, context in MODES.items():
                with context():
                    us = us_per_call(function, calls, runs)
                added = us - base.setdefault(mode, us)
                line += f"{us:8.2f} ({added:+7.2f})"
                if way == "torch.ops.fp4.<op>":
                    worst = max(worst, added)
            print(line, flush=True)
    return worst


class Overhead(NamedTuple):
    """Microseconds of a call: of the launches by Triton that it makes, of the backend itself, and through the op."""

    op: str
    backend: str
    launches: int
    launch_us: float
    direct_us: float
    op_us: float

    @property
    def added_us(self) -> float:
        """What the op costs more than its launches, or than its backend where that is no Triton kernel's."""
        return self.op_us - (self.launch_us if self.launches else self.direct_us)


def backend_overheads(calls: int = 2000, runs: int = 5, device: str = "cuda") -> Iterator[Overhead]:
    """Every op on each backend but the reference: its smallest benchmark case, or a sample where that isn't taken."""
    smallest: dict[str, cases.Case] = {}
    for case in cases.cpu_cases():
        if case.op not in smallest or case.bytes < smallest[case.op].bytes:
            smallest[case.op] = case
    for name, measured in OPS.items():
        candidates = [smallest[name].sample(device)] if name in smallest else []
        candidates += reversed(samples(measured, device))
        for backend in measured.backend_names():
            able = (s for s in candidates if measured.why_not(backend, measured.check(*s.args, **s.kwargs)) is None)
            sample = next(able, None)
            if backend != "reference" and sample is not None:
                yield _overhead(measured, backend, sample, calls, runs)


def print_backend_overheads() -> list[Overhead]:
    """The table of :func:`backend_overheads` on the GPU, and what it holds."""
    print("\nevery backend on the GPU, without grad: us a call, median of runs of many calls")
    print(f"  {'op':26} {'backend':14} {'launches':>8} {'by Triton':>10} {'backend':>9} {'the op':>8} {'added':>7}")
    rows = []
    for row in backend_overheads():
        times = f"{row.launch_us:10.2f} {row.direct_us:9.2f} {row.op_us:8.2f} {row.added_us:7.2f}"
        print(f"  {row.op:26} {row.backend:14} {row.launches:8} {times}", flush=True)
        rows.append(row)
    return rows


def _overhead(op: Op, backend: str, sample: Sample, calls: int, runs: int) -> Overhead:
    run, through = op.find_backend(backend, "benchmark").run, getattr(torch.ops.fp4, op.name)
    args, kwargs = sample.args, sample.kwargs
    with torch.no_grad():
        with triton_launches() as launches:
            run(*args, **kwargs)

        def launch() -> None:
            for again in launches:
                again()

        launch_us = us_per_call(launch, calls, runs) if launches else 0.0
        direct_us = us_per_call(lambda: run(*args, **kwargs), calls, runs)
        op_us = us_per_call(lambda: through(*args, **kwargs, backend=backend), calls, runs)
    return Overhead(op.name, backend, len(launches), launch_us, direct_us, op_us)


@contextlib.contextmanager
def triton_launches() -> Iterator[list[Callable[[], Any]]]:
    """The launches inside, to be made again as they were: by ``kernel[grid](...)``."""
    from triton.runtime.jit import JITFunction

    launches: list[Callable[[], Any]] = []
    run = JITFunction.run

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(functools.partial(run, self, *args, **kwargs))
        return run(self, *args, **kwargs)

    JITFunction.run = recording
    try:
        yield launches
    finally:
        JITFunction.run = run


def main() -> int:
    """Print the tables; 1 if a registered op adds more than the bound."""
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, {threads} threads")
    worst = registration_overhead()
    verdict = "within" if worst <= BOUND_US else "ABOVE"
    print(f"torch.ops.fp4.<op> adds at most {worst:.2f} us, {verdict} the bound of {BOUND_US:g} us")
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print_backend_overheads()
    else:
        print("torch sees no GPU, so the backends' own launches are not measured")
    return int(worst > BOUND_US)


if __name__ == "__main__":
    sys.exit(main())
