#!/usr/bin/env python
"""Where the time of a decoding step goes: eager, compiled, and with CUDA graphs; bf16 beside NVFP4 W4A16.

    python benchmarks/decode_step.py --out decode_step.csv

One step of a Llama-style decoder (``decoder.py``; Llama 3 8B's sizes with 8 layers, random weights), and what each op
adds to calling its backend directly (``host_overhead.py``). The modes differ in who launches the kernels:

* ``eager``: Python, one after the other;
* ``compiled``: the code that ``torch_fp4ops.cuda_graphs.piecewise`` compiled, run without its graphs;
* ``piecewise``: the same code, as CUDA graphs between the attention ops;
* ``piecewise-direct``: a compilation of its own, replayed without Inductor's CUDA graph trees (``replay="direct"``);
* ``bare``: the launches of ``piecewise-direct``, graphs and attention, by nothing but their own calls, and always
  with the first step's arguments: as quick as pieces can be;
* ``graph``: the code of ``compiled``, captured as a whole by ``torch.cuda.graph``.

A step's time is the mean over a loop that is synchronised before and after, the median of several loops. The kernels'
own time is CUPTI's, of a profiled loop; ``outside`` is the rest of the step as a fraction, what launching costs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

if str(Path(__file__).parent.parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from benchmarks import attention, decoder, host_overhead
from benchmarks.probing import write_csv
from torch_fp4ops import set_backend
from torch_fp4ops._partition_graphs import PartitionGraphs
from torch_fp4ops.cuda_graphs import piecewise, warmup
from torch_fp4ops.nn import quantize_

MODES = ("eager", "piecewise", "piecewise-direct", "bare", "compiled", "graph")
_NO_GRAPHS = {"triton.cudagraph_capture_sizes": ()}
SIZES = ("hidden", "layers", "heads", "kv_heads", "intermediate", "vocabulary", "length")
WEIGHTS = ("bf16", "nvfp4-w4a16")


@dataclass(frozen=True)
class Row:
    """A line of the CSV: a decoding step (``op`` is empty) or an eager call of an op."""

    weights: str = ""
    mode: str = ""
    batch: int = 0
    op: str = ""
    backend: str = ""
    us: float = 0.0
    """Of the step, or of the call through the op."""
    direct_us: float = 0.0
    """Of the op's backend, called directly."""
    launch_us: float = 0.0
    """Of the launches that Triton makes for it, each by ``kernel[grid](...)``."""
    launches: int = 0
    kernel_us: float = 0.0
    outside: float = 0.0
    tokens_per_s: float = 0.0
    status: str = "ok"
    gpu: str = ""
    versions: str = ""
    command: str = ""


def time_step(step: Callable[[], Any], loops: int = 5, budget_s: float = 0.15) -> float:
    """Median microseconds of a step over loops of equal length."""
    _synchronize()
    start = time.perf_counter()
    step()
    _synchronize()
    calls = max(3, min(200, int(budget_s / max(time.perf_counter() - start, 1e-6))))
    times = []
    for _ in range(loops):
        _synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        _synchronize()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return median(times)


def kernel_time(step: Callable[[], Any], calls: int = 5) -> float:
    """Microseconds that a step's kernels and copies take on the GPU, added up; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            step()
        _synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / calls


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_inputs(batch: int, shape: decoder.Shape, device: str) -> tuple[Tensor, Tensor]:
    tokens = torch.arange(batch, device=device) % shape.vocabulary
    # In the middle of the caches, where attention has something to read.
    return tokens, torch.full_like(tokens, shape.length // 2)


def make_model(weights: str, shape: decoder.Shape, device: str) -> decoder.Decoder:
    """With random weights of a fixed seed. Whatever times a model takes it from here, so what brings its weights into
    the layout of a backend belongs here, too."""
    torch.manual_seed(0)
    model = decoder.Decoder(shape, device=device).eval()
    if weights != "bf16":
        quantize_(model, "nvfp4", "bf16", lambda module, name: name != "head")
    return model


def measure(weights: str, shape: decoder.Shape, batches: list[int], device: str) -> Iterator[Row]:
    """The rows of a model; a mode that fails has its reason for a status, and the others go on."""
    model = make_model(weights, shape, device)
    pieces, direct = (
        piecewise(model, batches, split=[decoder.ATTENTION], replay=replay) for replay in ("inductor", "direct")
    )
    for batch in batches:
        given = step_inputs(batch, shape, device)
        decoder.mark_batch(*given)
        for mode in MODES if device != "cpu" else MODES[:2]:
            # Inductor reads this at every call, so it is set around the loops and costs them nothing.
            no_graphs = mode in ("compiled", "graph")
            graphs = inductor_config.patch(_NO_GRAPHS) if no_graphs else contextlib.nullcontext()
            called = direct if mode == "piecewise-direct" else pieces
            try:
                with graphs:
                    yield _timed(Row(weights, mode, batch), _step(mode, model, called, given))
            except Exception as error:
                yield Row(weights, mode, batch, status=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")


def _step(mode: str, model: decoder.Decoder, pieces: Any, given: tuple[Tensor, Tensor]) -> Callable[[], Any]:
    if mode == "eager":
        warmup(model, [given])
        return lambda: model(*given)
    if mode == "bare":
        return _bare(piecewise(model, [given[0].shape[0]], split=[decoder.ATTENTION], replay="direct"), given)
    warmup(pieces, [given])
    if mode != "graph":
        return lambda: pieces(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pieces(*given)
    return graph.replay


def _bare(pieces: Any, given: tuple[Tensor, Tensor]) -> Callable[[], Any]:
    """What a step of ``pieces`` launches, noted while it is captured and run once."""
    launched: list[Callable[[], Any]] = []
    capture, attend = PartitionGraphs._capture, attention.launch

    def noted_capture(self: Any, *args: Any) -> Any:
        replay, out = capture(self, *args)

        def noted_replay() -> None:
            launched.append(replay)
            replay()

        return noted_replay, out

    def noted_attend(*args: Any) -> None:
        launched.append(functools.partial(attend, *args))
        attend(*args)

    with mock.patch.object(PartitionGraphs, "_capture", noted_capture):
        warmup(pieces, [given])
    launched.clear()
    with mock.patch.object(attention, "launch", noted_attend):
        pieces(*given)
    launches = tuple(launched)

    def step() -> Any:  # keeps what owns the graphs' memory
        for launch in launches:
            launch()
        return pieces

    return step


def _timed(row: Row, step: Callable[[], Any]) -> Row:
    us = time_step(step)
    kernel_us = kernel_time(step)
    outside = max(0.0, 1 - kernel_us / us) if kernel_us else 0.0
    return replace(row, us=us, kernel_us=kernel_us, outside=outside, tokens_per_s=row.batch / us * 1e6)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; exit status 1 if a mode failed."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    shape = replace(decoder.Shape(), **{n: v for n, v in vars(options).items() if n in SIZES and v is not None})
    shape = replace(shape, batch=max(options.batches))
    facts = {
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "versions": f"torch {torch.__version__}",
        "command": shlex.join(["benchmarks/decode_step.py", *argv]),
    }
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(replace(row, **facts))
        if options.out:
            write_csv(Path(options.out), [_rounded(row) for row in rows])

    with torch.no_grad(), warnings.catch_warnings(), set_backend(options.backend):
        warnings.simplefilter("ignore")
        print(f"{'weights':13}{'mode':17}{'batch':>6}{'us a step':>11}{'tokens/s':>10}{'kernels us':>12}{'outside':>9}")
        for weights in options.weights:
            for row in measure(weights, shape, options.batches, options.device):
                backend = "" if weights == "bf16" else options.backend
                add(replace(row, backend=backend))
                _print(row)
            torch._dynamo.reset()  # its graphs hold the model's memory
            gc.collect()
        if options.device == "cuda" and not options.no_ops:
            for each in host_overhead.print_backend_overheads():
                times = {"us": each.op_us, "direct_us": each.direct_us, "launch_us": each.launch_us}
                add(Row(mode="eager", op=each.op, backend=each.backend, launches=each.launches, **times))
    return int(any(row.status != "ok" for row in rows))


def _print(row: Row) -> None:
    line = f"{row.weights:13}{row.mode:17}{row.batch:6}"
    if row.status == "ok":
        line += f"{row.us:11.1f}{row.tokens_per_s:10.0f}{row.kernel_us:12.1f}{row.outside:9.1%}"
    else:
        line += f"  {row.status}"
    print(line, flush=True)


def _rounded(row: Row) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(row).items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE", help="write the rows as CSV, each as soon as it is there")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="sequences in a step")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--backend", default="auto", help="of the NVFP4 model's ops (default: auto)")
    parser.add_argument("--no-ops", action="store_true", help="leave out the eager calls of each op")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, type=int, metavar="N")
    return parser


if __name__ == "__main__":
    sys.exit(main())
