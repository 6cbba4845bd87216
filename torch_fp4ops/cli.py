"""The command line: ``python -m torch_fp4ops env | explain | check | compare | demo | bench``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import inspect
import platform
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, check
from .capture import describe
from .registry import OPS, Op
from .selection import ENVIRONMENT_VARIABLE, explain


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # These parse their own options, and need packages that the others don't.
    if argv[:1] == ["demo"]:
        from .demo import main as run_demo

        return run_demo(argv[1:])
    if argv[:1] == ["compare"]:
        from .comparison._command import main as run_compare

        return run_compare(argv[1:])
    if argv[:1] == ["bench"]:
        return _bench(argv[1:])
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command == "env":
        return _env()
    if options.command == "explain":
        return _explain(options, parser)
    names = options.ops or sorted(OPS)
    unknown = set(names) - set(OPS)
    if unknown:
        parser.error(f"there is no op {', '.join(sorted(unknown))}; the ops are {', '.join(sorted(OPS))}")
    where = [options.device] if options.device else check.devices()
    return check.run(names, where, options.backend, options.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m torch_fp4ops", description="NVFP4, MXFP4 and MXFP8 operators")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="what is installed, and which backends each op has here")
    sizes = [f"  {name} {' '.join(f'[{s}]' for s in _example_sizes(name))}" for name in sorted(OPS)]
    explaining = commands.add_parser(
        "explain",
        help="which backend an op would take, and why not the others",
        epilog="\n".join(["ops and their sizes:", *sizes]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explaining.add_argument("op", nargs="?", choices=sorted(OPS), metavar="op", help="(default: every op)")
    explaining.add_argument("shape", nargs="*", type=_size, help="sizes, in the order given below (default: typical)")
    explaining.add_argument("--backend", default="auto", help="the backend= of the call (default: auto)")
    last = check.devices()[-1]
    explaining.add_argument("--device", type=check.device, default=last, help=f"cpu or cuda (default: {last})")
    checking = commands.add_parser("check", help="run every op on every backend here and compare with the reference")
    checking.add_argument("ops", nargs="*", help="ops to check (default: all)")
    checking.add_argument("--device", type=check.device, help="cpu or cuda (default: all that this machine has)")
    checking.add_argument("--backend", help="only this one (default: all)")
    checking.add_argument("--json", type=check.output_file, metavar="FILE", help="write every result to a file")
    commands.add_parser("compare", help="how far backends, or formats, drift apart in a model (--help for its options)")
    commands.add_parser("demo", help="quantise a real model and compare its embeddings (--help for its options)")
    commands.add_parser("bench", help="benchmarks, from a checkout of the repository (--help for its options)")
    return parser


def _env() -> int:
    print(f"torch_fp4ops {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(f"  {'torch':18} {torch.__version__}")
    for name in ("triton", "flashinfer-python", "transformers"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"  {name:18} {version}")
    cuda = torch.version.cuda or torch.version.hip
    print(f"  {'GPU runtime':18} {cuda or 'none in this torch build'}")
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        print(f"  {f'GPU {i}':18} {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}")
    if not torch.cuda.is_available():
        print(f"  {'GPU':18} none: ops run on the CPU")
    print(f"  {ENVIRONMENT_VARIABLE:18} {_environment_text()}")
    print("backends (explain says which one a call takes):")
    for name, op in sorted(OPS.items()):
        usable = [b for b in op.backend_names() if b not in op.unimportable]
        print(f"  {name:26} {', '.join(usable)}")
        for backend, reason in op.unimportable.items():
            print(f"  {'':26} not {backend}: {reason}")
    return 0


def _environment_text() -> str:
    from .selection import _environment

    return ", ".join(f"{op}={backend}" for op, backend in _environment.items()) or "not set"


def _size(text: str) -> int:
    size = int(text)
    if size < 0:
        raise argparse.ArgumentTypeError(f"{size}; allowed: 0 or more")
    return size


def _explain(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    names = [options.op] if options.op else sorted(OPS)
    status = 0
    for i, name in enumerate(names):
        if i:
            print()
        status = max(status, _explain_one(OPS[name], options, parser))
    return status


def _explain_one(op: Op, options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    sizes = _example_sizes(op.name)
    if len(options.shape) > len(sizes):
        parser.error(f"{op.name} has the sizes {', '.join(sizes)}")
    given = {**sizes, **dict(zip(sizes, options.shape, strict=False))}
    try:
        arguments = _example(op.name)(torch.device(options.device), **given)
        text = explain(op, *arguments, backend=options.backend)
        sizes_text = ", ".join(f"{name}={size}" for name, size in given.items())
        print(f"{sizes_text}: {describe(op.check(*arguments))}", text, sep="\n")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _example(op_name: str) -> Callable[..., tuple[Any, ...]]:
    """The function in the op's samples that makes arguments of given sizes."""
    function: Callable[..., tuple[Any, ...]] = importlib.import_module(f"{OPS[op_name].__module__}.samples").example
    return function


def _example_sizes(op_name: str) -> dict[str, int]:
    """Names and defaults of those sizes."""
    return {p.name: p.default for p in list(inspect.signature(_example(op_name)).parameters.values())[1:]}


def _bench(argv: list[str]) -> int:
    path = Path(__file__).parent.parent / "benchmarks" / "run.py"
    if not path.exists():
        print(f"the benchmarks are in a checkout of the repository, not in the package: no {path}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(path.parent.parent))
    status: int = runpy.run_path(str(path))["main"](argv)
    return status
