#!/usr/bin/env python
"""Tokens per second of a Llama-style model, prompts and decoding, as whole CUDA graphs: bf16 beside NVFP4 W4A16.

    python benchmarks/end_to_end.py --csv end_to_end.csv --plot plots/

The model is ``decoder.py``'s with Llama 3 8B's sizes, 8 layers and random weights. ``decode`` is one token of each
sequence in the middle of its cache, ``prefill`` a prompt of each. Layers are compiled by torch, all together once for
each kind of step; then the whole step is one graph. A step whose logits differ from the eager model's has no time.
"""

from __future__ import annotations

import argparse
import gc
import math
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if str(Path(__file__).parent.parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from benchmarks import decoder, plots
from benchmarks.decode_step import SIZES, WEIGHTS, kernel_time, make_model, step_inputs, time_step
from benchmarks.probing import write_csv
from torch_fp4ops import set_backend

PHASES = ("decode", "prefill")
_WRONG = 0.05
"""A relative error of logits; bf16 roundings in another order reach about 0.01."""


@dataclass(frozen=True)
class Row:
    """A step; times are microseconds."""

    phase: str
    weights: str
    batch: int
    tokens: int = 0
    """In the step, of all sequences."""
    us: float = math.nan
    kernel_us: float = math.nan
    tokens_per_s: float = math.nan
    speed_up: float = math.nan
    """Over bf16."""
    status: str = "ok"
    backend: str = ""
    gpu: str = ""
    torch: str = ""
    command: str = ""


def prompts(batch: int, length: int, shape: decoder.Shape, device: str) -> tuple[Tensor, Tensor]:
    tokens = torch.arange(batch * length, device=device).view(batch, length) % shape.vocabulary
    return tokens, torch.arange(length, device=device).expand(batch, length).contiguous()


def captured(model: decoder.Decoder, given: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    """The step as one graph, checked against what the model gives eagerly; without a GPU, the compiled step."""
    with torch.compiler.set_stance("force_eager"):
        wanted = model(*given).float()
    for _ in range(2):
        model(*given)

    def step() -> Tensor:
        return model(*given)

    if given[0].is_cuda:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(*given)

        def step() -> Tensor:
            graph.replay()
            return out

    error = float((step().float() - wanted).norm() / wanted.norm())
    if not error <= _WRONG:
        raise AssertionError(f"the relative error of the logits is {error:.2g}")
    return step


def measure(weights: str, shape: decoder.Shape, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of a model; a step that fails has its reason for a status, and the others go on."""
    model = make_model(weights, shape, options.device)
    for layer in model.layers:  # of one class, so that the first one's code serves all
        layer.compile(fullgraph=True, dynamic=True)
    for phase in options.phases:
        for batch in options.batches:
            if phase == "decode":
                given = step_inputs(batch, shape, options.device)
            else:
                given = prompts(batch, options.prompt, shape, options.device)
            row = Row(phase, weights, batch, tokens=given[0].numel())
            try:
                step = captured(model, given)
                us = time_step(step, loops=3, budget_s=0.05)
                rate = row.tokens / us * 1e6
                yield replace(row, us=us, kernel_us=kernel_time(step, calls=2), tokens_per_s=rate)
            except Exception as error:
                message = str(error).splitlines() or [""]
                yield replace(row, status=f"{type(error).__name__}: {message[0][:200]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; exit status 1 if a step failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(argv)
    sizes = {name: value for name, value in vars(options).items() if name in SIZES and value is not None}
    shape = replace(decoder.Shape(), batch=max(options.batches), **sizes)
    if "prefill" in options.phases and options.prompt > shape.length:
        raise SystemExit(f"--prompt is {options.prompt}; allowed: up to --length, {shape.length}")
    facts: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "command": shlex.join(["benchmarks/end_to_end.py", *argv]),
    }
    rows: list[Row] = []
    bf16: dict[tuple[str, int], float] = {}
    print(
        f"{'phase':9}{'weights':13}{'batch':>6}{'tokens':>8}{'us a step':>12}{'kernels us':>12}{'tokens/s':>11}", end=""
    )
    print(f"{'x bf16':>8}")
    with torch.no_grad(), warnings.catch_warnings(), set_backend(options.backend):
        warnings.simplefilter("ignore")
        for weights in options.weights:
            for row in measure(weights, shape, options):
                place = row.phase, row.batch
                if weights == "bf16":
                    bf16[place] = row.us
                else:
                    row = replace(row, backend=options.backend)
                row = replace(row, speed_up=bf16.get(place, math.nan) / row.us, **facts)
                rows.append(row)
                _print(row)
                if options.csv:
                    write_csv(Path(options.csv), [_texts(each) for each in rows])
            torch._dynamo.reset()  # what it compiled holds the model
            gc.collect()
    if options.plot:
        print(f"wrote {plots.plot_tokens_per_second(rows, Path(options.plot))}")
    return int(any(row.status != "ok" for row in rows))


def _print(row: Row) -> None:
    line = f"{row.phase:9}{row.weights:13}{row.batch:6}{row.tokens:8}"
    if row.status == "ok":
        line += f"{row.us:12.1f}{row.kernel_us:12.1f}{row.tokens_per_s:11.0f}{row.speed_up:8.2f}"
    else:
        line += f"  {row.status}"
    print(line, flush=True)


def _texts(row: Row) -> dict[str, Any]:
    texts = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
    return {k: "" if v == "nan" else v for k, v in texts.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", metavar="FILE", help="write the rows, each as soon as it is there")
    parser.add_argument("--plot", metavar="DIR", help="draw tokens per second by batch (needs matplotlib)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256], help="sequences in a step")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each sequence in prefill (default: 128)")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--backend", default="auto", help="of the NVFP4 model's ops (default: auto)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, type=int, metavar="N")
    return parser


if __name__ == "__main__":
    sys.exit(main())
