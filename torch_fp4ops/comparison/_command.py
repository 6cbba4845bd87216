"""``python -m torch_fp4ops compare``."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..check import device, devices, output_file
from ..demo import machine
from ..formats import FORMATS
from ..nn import quantize_
from ..nn._block_scaled import why_not_quantizable
from ..selection import BackendUnavailable, parse_overrides
from ._models import Loaded, demo_encoder, from_config
from ._runs import compare

__all__ = ["main"]

_EPILOG = """\
examples:
  compare                                        the demo's encoder in NVFP4 against bfloat16
  compare --model llama --backends reference,triton
  compare --backends reference,auto+mm_fp4=mine  one op by another backend, the rest as usual

The exit status is 1 where a NaN came up or a cosine is below --min-cosine, and 2 where an argument is wrong.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m torch_fp4ops compare",
        description="Run a quantised model in several ways and show, layer by layer, how far they drift apart.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="demo", help="demo, a type of transformers (llama) or a config.json; random weights then")
    add("--size", choices=("reduced", "full"), default="reduced", help="of a transformers model (default: reduced)")
    add("--format", choices=sorted(FORMATS), default="nvfp4", help="of the weights (default: nvfp4)")
    add("--activations", choices=("same", "bf16"), default="same", help="quantised, too, or in 16 bits (default: same)")
    add("--backends", help="one for each run, separated by commas; a+op=b is b for one op (default: auto)")
    add(
        "--baseline", choices=("bf16", "none"), help="a first run that is not quantised (default: bf16 for one backend)"
    )
    add("--layers", choices=("quantized", "leaves"), default="quantized", help="which to compare (default: quantized)")
    add("--no-local", action="store_true", help="don't run layers alone on what they got in the first run")
    add("--batch", type=int, default=4, help="default: 4")
    add("--tokens", type=int, default=32, help="of a sequence, for a transformers model (default: 32)")
    add("--seed", type=int, default=0, help="of the weights and tokens of a transformers model (default: 0)")
    add("--device", type=device, default=devices()[-1], help="cpu or cuda (default: cuda if there is a GPU)")
    add("--warmup", type=int, default=1, help="calls before time is taken (default: 1)")
    add("--repeats", type=int, default=5, help="timed calls (default: 5)")
    add("--min-cosine", type=float, help="fail below it: every layer and the output, accumulated and alone")
    add("--json", type=output_file, metavar="FILE", help="write everything to a file")
    add("--plot", type=output_file, metavar="FILE", help="draw the relative distances; needs matplotlib")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        backends = [_overrides(text) for text in (options.backends or "auto").split(",")]
    except ValueError as error:
        parser.error(str(error))
    baseline = options.baseline or ("bf16" if len(backends) == 1 else "none")
    if options.min_cosine is not None and not -1 <= options.min_cosine <= 1:
        parser.error(f"--min-cosine is {options.min_cosine}; allowed: -1 to 1")
    if min(options.batch, options.tokens) < 1:
        parser.error("--batch and --tokens are 1 or more")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'torch-fp4ops[bench]'")
    if options.plot:
        from matplotlib.backend_bases import FigureCanvasBase

        kinds = sorted(FigureCanvasBase.get_supported_filetypes())
        if options.plot.rpartition(".")[2] not in kinds:
            parser.error(f"--plot is {options.plot!r}; allowed: a file that ends in .{', .'.join(kinds)}")
    where = torch.device(options.device)
    try:
        loaded = _load(options, where)
        quantized, skipped = _quantized(loaded.model, options)
        _require_runs(quantized, loaded, options)
        print(f"{loaded.what}; {options.format}, activations {options.activations}")
        print(machine(where))
        for line in skipped:
            print(f"not quantised: {line}")
        found = compare(
            quantized,
            loaded.inputs,
            backends,
            baseline=loaded.model if baseline == "bf16" else None,
            baseline_name=baseline,
            layers=options.layers,
            local=not options.no_local,
            warmup=options.warmup,
            repeats=options.repeats,
        )
    except ModuleNotFoundError as error:
        print(f"compare needs the package {error.name}: pip install 'torch-fp4ops[demo]'", file=sys.stderr)
        return 2
    except (ValueError, BackendUnavailable) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\n{found}")
    if options.json:
        found.save_json(options.json)
    if options.plot:
        found.plot(options.plot)
    failures = found.failures(options.min_cosine)
    for line in failures:
        print(f"MISSED {line}")
    return int(bool(failures))


def _overrides(text: str) -> str | Mapping[str, str]:
    """``"auto+mm_fp4=mine"`` as :func:`compare` takes it."""
    by_op = parse_overrides(text.replace("+", ","), "--backends")
    return by_op if by_op.keys() - {"*"} else by_op.get("*", text)


def _load(options: argparse.Namespace, where: torch.device) -> Loaded:
    if options.model == "demo":
        return demo_encoder(where, options.batch)
    full_size = options.size == "full"
    return from_config(options.model, where, options.batch, options.tokens, options.seed, full_size)


def _quantized(model: nn.Module, options: argparse.Namespace) -> tuple[nn.Module, list[str]]:
    """A quantised copy, and what of it can't be quantised."""
    skipped: list[str] = []
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()

    def can_be(linear: nn.Module, name: str) -> bool:
        assert isinstance(linear, nn.Linear)
        reason = why_not_quantizable(linear, FORMATS[options.format])
        if name.rpartition(".")[2] in kept:
            reason = "transformers keeps it in fp32, and its parent reads its weight's dtype"
        if reason is not None:
            skipped.append(f"{name}: {reason}")
        return reason is None

    return quantize_(copy.deepcopy(model), options.format, options.activations, can_be), skipped


def _require_runs(quantized: nn.Module, loaded: Loaded, options: argparse.Namespace) -> None:
    try:
        with torch.no_grad():
            quantized(**loaded.inputs)
    except Exception as error:  # of any kind, where a parent computes with a layer's weight as if it were one of bf16
        raise ValueError(
            f"--model {options.model}: once quantised it can't run, as where a module reads the weight of another "
            f"one instead of calling it: {error}"
        ) from error
