"""``python -m torch_fp4ops check``: every op, on every backend that can take it, on every sample, on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .registry import OPS, Op
from .testing import assert_right, comparable, samples


@dataclass(frozen=True)
class Result:
    """How one backend did on one sample: ``right``, ``wrong`` (with the assertion or error) or ``refused`` (why)."""

    device: str
    op: str
    backend: str
    sample: str
    status: str
    detail: str = ""


def devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def device(name: str) -> str:
    """The type of the commands' ``--device``: one that is here."""
    if name in devices():
        return name
    why = "torch sees no GPU here" if name == "cuda" else f"no device {name!r}"
    raise argparse.ArgumentTypeError(f"{why}; allowed: {', '.join(devices())}")


def output_file(path: str) -> str:
    """The type of the commands' options for files that they write: one in a folder that is there."""
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"no folder for the file {path!r}, or a folder itself")
    return path


def check_op(op: Op, device: str, backends: Sequence[str]) -> Iterator[Result]:
    for sample in samples(op, device):
        call = op.check(*sample.args, **sample.kwargs)
        for backend in backends:
            where = (device, op.name, backend, sample.name)
            reason = op.why_not(backend, call, launch=True)
            if reason is None and not comparable(op, sample, backend):
                reason = "the reference does not say what it makes of NaN and infinities"
            if reason is not None:
                yield Result(*where, "refused", reason)
                continue
            try:
                assert_right(op, sample, backend)
            except Exception as error:  # any failure of a backend is a finding, not the end of the check
                yield Result(*where, "wrong", f"{type(error).__name__}: {error}")
            else:
                yield Result(*where, "right")


def run(
    op_names: Sequence[str], device_names: Sequence[str], backend: str | None = None, json_path: str | None = None
) -> int:
    """Check, print a table and what is wrong; returns the exit status, 1 if anything is wrong, 2 for a wrong argument.

    ``backend`` restricts the check to one; None is every backend that each op has.
    """
    known = sorted({b for name in op_names for b in OPS[name].backend_names()})
    if backend is not None and backend not in known:
        print(f"check: --backend is {backend!r}; allowed: {', '.join(known)}", file=sys.stderr)
        return 2
    results = []
    print(f"{'op':26} {'device':7} {'backend':12} {'right':>6} {'wrong':>6} {'refused':>8}")
    for name in op_names:
        backends = [b for b in OPS[name].backend_names() if backend in (None, b)]
        for device in device_names:
            found = list(check_op(OPS[name], device, backends))
            results += found
            for b in backends:
                counts = Counter(r.status for r in found if r.backend == b)
                reasons = {r.detail for r in found if r.backend == b and r.status == "refused"}
                row = f"{name:26} {device:7} {b:12} {counts['right']:6} {counts['wrong']:6} {counts['refused']:8}"
                print(row + (f"  {'; '.join(sorted(reasons))}" if reasons else ""), flush=True)
    wrong = [r for r in results if r.status == "wrong"]
    for r in wrong:
        print(f"WRONG {r.op} on {r.device}, {r.backend}, sample {r.sample}: {r.detail}")
    right = sum(r.status == "right" for r in results)
    print(f"{right} right, {len(wrong)} wrong, {len(results) - right - len(wrong)} refused")
    if json_path:
        Path(json_path).write_text(json.dumps([asdict(r) for r in results], indent=1))
    return int(bool(wrong))
