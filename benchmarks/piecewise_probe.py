#!/usr/bin/env python
"""Where a piecewise decoding step spends host time, by setting: ``python benchmarks/piecewise_probe.py``.

One step of ``decoder.py``'s model, split at attention, under each of ``SETTINGS`` (pick by ``--settings``), next to a
graph of the whole step with the same attention. A table says what a step takes in a loop, what the host alone takes
(until the call returns, with the GPU idle before), what the kernels take, and how many launches a step has.
``--profile`` adds cProfile's and torch.profiler's tables of each setting; ``--out`` writes the rows as CSV.

A developer's tool: some settings are unsafe and stand here to show what they would save. Each compiles the model, which
takes some ten seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import gc
import pstats
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

if str(Path(__file__).parent.parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from benchmarks import decoder, probe_attention
from benchmarks.decode_step import WEIGHTS, kernel_time, make_model, step_inputs, time_step
from benchmarks.probing import write_csv
from torch_fp4ops import set_backend
from torch_fp4ops.cuda_graphs import piecewise, warmup

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Setting:
    """One way to run the step; the defaults are what ``cuda_graphs.piecewise`` and ``decoder.py`` do."""

    attention: str = "triton-out"
    """A key of ``probe_attention.VARIANTS``."""
    runner: str = "trees"
    """"trees": Inductor's CUDA graph trees; "direct": ``replay="direct"``; "graph": one graph of the whole step."""
    static_arguments: bool = False
    """The step's arguments are marked as being at fixed addresses, so trees copy none of them."""
    skip_guards: bool = False
    """Dynamo's guards are not evaluated (torch's ``skip_guard_eval_unsafe``)."""
    inductor: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """More options of torch.compile; "guard_filter_fn" names a function of ``torch.compiler``."""
    dynamo: dict[str, Any] = field(default_factory=dict)
    inference_mode: bool = False


_NO_ASSERTS = {"size_asserts": False, "alignment_asserts": False}
_NO_MODULE_GUARDS = {"guard_filter_fn": "skip_guard_on_all_nn_modules_unsafe"}

SETTINGS = {
    "now": Setting(),
    "custom-op": Setting(attention="custom-op"),
    "library-op": Setting(attention="library"),
    "grouped": Setting(attention="grouped"),
    "grouped-out": Setting(attention="grouped-out"),
    "triton": Setting(attention="triton"),
    "no-asserts": Setting(inductor=_NO_ASSERTS),
    "static-arguments": Setting(static_arguments=True),
    "inference-mode": Setting(inference_mode=True),
    "modules-not-inlined": Setting(dynamo={"inline_inbuilt_nn_modules": False}),
    "no-module-guards": Setting(options=_NO_MODULE_GUARDS),
    "no-guards": Setting(skip_guards=True),
    "direct": Setting(runner="direct"),
    "direct-custom-op": Setting(attention="custom-op", runner="direct"),
    "direct-no-module-guards": Setting(runner="direct", options=_NO_MODULE_GUARDS),
    "direct-no-guards": Setting(runner="direct", skip_guards=True),
}
_WRONG = 0.05  # bf16 roundings in another order reach about 0.01
_GRAPH_LAUNCH = "cudaGraphLaunch"
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaMemcpyAsync")


@dataclass(frozen=True)
class Row:
    """A line of the table; times are microseconds a step."""

    setting: str
    weights: str
    batch: int
    attention: str
    us: float = 0.0
    host_us: float = 0.0
    kernel_us: float = 0.0
    graph_launches: float = 0.0
    kernel_launches: float = 0.0
    attention_host_us: float = 0.0
    """Of one eager call of the attention op, until it returns."""
    over_graph: float = 0.0
    """The step's time over that of the whole graph with the same attention."""
    error: float = 0.0
    """Relative, of the logits against those of the eager model."""
    status: str = "ok"


def host_time(step: Step, calls: int = 40) -> float:
    """Median microseconds until a call returns; the GPU has nothing to do when it starts, so nothing waits for it."""
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return median(times)


def launches(step: Step, calls: int = 5) -> tuple[float, float]:
    """Of graphs, and of single kernels and copies, a step."""
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profile:
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
    counts = {event.key: event.count / calls for event in profile.key_averages()}
    return counts.get(_GRAPH_LAUNCH, 0.0), sum(counts.get(name, 0.0) for name in _LAUNCHES)


@contextlib.contextmanager
def step_of(setting: Setting, model: decoder.Decoder, given: tuple[Tensor, Tensor]) -> Iterator[Step]:
    """The warmed-up and captured step, in the context in which it has to be called."""
    attention = probe_attention.VARIANTS[setting.attention]
    options = dict(setting.options)
    if "guard_filter_fn" in options:
        options["guard_filter_fn"] = getattr(torch.compiler, options["guard_filter_fn"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(decoder, "decode_attention", attention.function))
        stack.enter_context(inductor_config.patch(setting.inductor))
        stack.enter_context(torch._dynamo.config.patch(setting.dynamo))
        stack.enter_context(torch.inference_mode() if setting.inference_mode else torch.no_grad())
        torch._dynamo.reset()
        if setting.static_arguments:
            for t in given:
                torch._dynamo.mark_static_address(t, guard=False)
        decoder.mark_batch(*given)
        size, split = given[0].shape[0], [attention.op]
        if setting.runner == "direct":
            pieces = piecewise(model, [size], split, replay="direct")
            if options and pieces._direct is not None:
                backend = pieces._direct._compile
                pieces._direct._compiled = torch.compile(model, fullgraph=True, backend=backend, options=options)
        else:
            pieces = piecewise(model, [size], split)
            if options:
                pieces._compiled = torch.compile(model, fullgraph=True, options={**_options_of(split), **options})
        if setting.runner == "graph":
            with inductor_config.patch({"triton.cudagraph_capture_sizes": ()}):
                warmup(pieces, [given])
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    out = pieces(*given)

            def step() -> Tensor:
                graph.replay()
                return out

        else:
            warmup(pieces, [given] * 2)

            def step() -> Tensor:
                return pieces(*given)

        if setting.skip_guards:
            stack.enter_context(torch.compiler.set_stance(skip_guard_eval_unsafe=True))
            step()
        yield step


def _options_of(split: list[str]) -> dict[str, Any]:
    return {
        "triton.cudagraphs": True,
        "triton.cudagraph_or_error": True,
        "graph_partition": True,
        "custom_should_partition_ops": split,
    }


def measure(name: str, setting: Setting, weights: str, batch: int, shape: decoder.Shape, profile: bool) -> Row:
    row = Row(name, weights, batch, setting.attention)
    model = make_model(weights, shape, "cuda")
    given = step_inputs(batch, shape, "cuda")
    attention = probe_attention.VARIANTS[setting.attention]
    try:
        with torch.no_grad():
            wanted = model(*given).float()
        with step_of(setting, model, given) as step:
            error = float((step().float() - wanted).norm() / wanted.norm())
            if not error < _WRONG:
                raise ValueError(f"the relative error of the logits is {error:.2g}")
            row = replace(row, error=error, us=time_step(step), host_us=host_time(step), kernel_us=kernel_time(step))
            graphs, kernels = launches(step)
            row = replace(row, graph_launches=graphs, kernel_launches=kernels)
            arguments = probe_attention.arguments(shape, batch, "cuda")
            row = replace(row, attention_host_us=host_time(functools.partial(attention.function, *arguments)))
            if profile:
                print_profiles(name, step)
    except Exception as error:  # a setting that this torch lacks or that fails is a finding
        row = replace(row, status=f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return row


def print_profiles(name: str, step: Step, calls: int = 200) -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        step()
    profiler.disable()
    torch.cuda.synchronize()
    print(f"\n{name}: cProfile of {calls} steps")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(20):
            step()
        torch.cuda.synchronize()
    table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=70)
    print(f"{name}: torch.profiler, 20 steps\n{table}", flush=True)


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    shape = replace(decoder.Shape(), layers=options.layers, batch=max(options.batches))
    rows: list[Row] = []
    print(f"{'setting':22}{'attention':13}{'weights':13}{'batch':>6}{'us':>9}{'/graph':>8}{'host us':>9}", end="")
    print(f"{'kernels':>9}{'graphs':>8}{'launches':>9}{'attention host':>15}")
    with warnings.catch_warnings(), set_backend(options.backend):
        warnings.simplefilter("ignore")
        for weights in options.weights:
            for batch in options.batches:
                whole: dict[str, float] = {}
                for name in options.settings:
                    setting = SETTINGS[name]
                    if setting.attention not in whole:
                        graph = Setting(setting.attention, runner="graph")
                        row = measure("(graph)", graph, weights, batch, shape, False)
                        whole[setting.attention] = row.us
                        rows.append(_shown(row, row.us))
                    row = measure(name, setting, weights, batch, shape, options.profile)
                    rows.append(_shown(row, whole[setting.attention]))
                    if options.out:
                        write_csv(Path(options.out), [_rounded(row) for row in rows])
    return 0


def _shown(row: Row, graph_us: float) -> Row:
    row = replace(row, over_graph=row.us / graph_us if graph_us else 0.0)
    line = f"{row.setting:22}{row.attention:13}{row.weights:13}{row.batch:6}"
    if row.status == "ok":
        line += f"{row.us:9.1f}{row.over_graph:8.3f}{row.host_us:9.1f}{row.kernel_us:9.1f}"
        line += f"{row.graph_launches:8.0f}{row.kernel_launches:9.0f}{row.attention_host_us:15.1f}"
    else:
        line += f"  {row.status}"
    print(line, flush=True)
    return row


def _rounded(row: Row) -> dict[str, Any]:
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in vars(row).items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["nvfp4-w4a16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--backend", default="auto", help="of the NVFP4 model's ops (default: auto)")
    parser.add_argument("--profile", action="store_true", help="print the host's profiles of every setting")
    parser.add_argument("--out", metavar="FILE", help="write the rows as CSV")
    return parser


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("this times CUDA graphs, and torch sees no GPU")
    sys.exit(main())
