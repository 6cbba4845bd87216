"""Run everything that proves the kernels on a GPU and write what happened as JSON.

    python benchmarks/gpu_report.py --out report.json --tree $(git rev-parse HEAD^{tree})

Steps: the tests that need a GPU with Hypothesis's ``nightly`` profile, thousands of examples of each property, which
``--jobs`` processes share; the other tests; ``python -m torch_fp4ops check``; check and the kernels' GPU tests for the
Triton backend with another ptxas (``--ptxas``); and ``check`` on the GPU under each tool of compute-sanitizer. The
report is rewritten after every step, so a run that is cut short keeps what it has. Exit status 1 if a step failed.

initcheck does not follow what cuBLAS stores through TMA, so torch's kernels that read a product are reported; its step
fails where a kernel of this package reads memory that nothing wrote, and counts both.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if str(Path(__file__).parent.parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.probing import write_whole

SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck")
OWN = ("triton", "gluon")
"""The backends whose kernels are this package's."""
_SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


@dataclass
class Step:
    """A command and what to add to its environment; ``counts`` says where its numbers come from."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    counts: str = ""
    reads: str = ""
    """Where initcheck writes what it finds."""
    timeout: float = 1200.0


def environment_facts(tree: str) -> dict[str, Any]:
    versions = {}
    for name in ("triton", "flashinfer-python", "hypothesis", "pytest"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "tree": tree,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "compute_capability": torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **versions,
    }


def steps(options: argparse.Namespace, scratch: Path) -> list[Step]:
    python = [sys.executable, "-m"]
    jobs = ["-n", str(options.jobs)] if options.jobs > 1 else []
    shared = {"OMP_NUM_THREADS": "1", "PROPERTY_SHARDS": str(options.jobs)}

    def tests(name: str, *selection: str, profile: str = "default", **environment: str) -> Step:
        xml = scratch / f"{name.replace(' ', '-')}.xml"
        command = [*python, "pytest", "-q", "-p", "no:cacheprovider", *jobs, f"--junit-xml={xml}", *selection]
        return Step(name, command, {"HYPOTHESIS_PROFILE": profile, **shared, **environment}, str(xml))

    def check(
        name: str,
        *prefix: str,
        device: str | None = None,
        backend: str | None = None,
        reads: str = "",
        **environment: str,
    ) -> Step:
        path = scratch / f"{name.replace(' ', '-')}.json"
        where = [*(["--device", device] if device else []), *(["--backend", backend] if backend else [])]
        command = [*prefix, *python, "torch_fp4ops", "check", "--json", str(path), *where]
        return Step(name, command, environment, str(path), reads)

    planned = [
        tests("GPU tests", "-m", "gpu", profile=options.profile),
        check("check"),
        tests("other tests", "-m", "not gpu"),
    ]
    if options.ptxas and Path(options.ptxas).exists():
        other = {"TRITON_PTXAS_PATH": options.ptxas, "TRITON_CACHE_DIR": str(scratch / "triton-cache")}
        planned += [
            *(check(f"check of {own} with the other ptxas", device="cuda", backend=own, **other) for own in OWN),
            tests("kernels with the other ptxas", "tests/ops", "-k", "test_on_a_gpu", PROPERTY_SHARDS="1", **other),
        ]
    if options.sanitizer and Path(_SANITIZER).exists():
        for tool in SANITIZER_TOOLS:
            # The reference that results are compared with runs on the CPU, so these are the backend's own kernels, and
            # torch's where it calls them.
            command = [_SANITIZER, "--tool", tool]
            reads = str(scratch / "reads") if tool == "initcheck" else ""
            if reads:
                command += ["--show-backtrace=no", "--print-limit=1000000", f"--log-file={reads}"]
            else:
                command += ["--error-exitcode", "9"]
            # Without torch's caching every tensor is an allocation, so the tools see its bounds and what is unwritten.
            environment = {} if tool == "racecheck" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            planned += [
                check(f"check of {own} under {tool}", *command, device="cuda", backend=own, reads=reads, **environment)
                for own in OWN
            ]
    return [s for s in planned if not options.only or any(o in s.name for o in options.only)]


def read_counts(path: str) -> dict[str, Any]:
    """Counts of a junit XML file, with what failed, or of check's JSON; empty if the step wrote none."""
    if not path or not Path(path).exists():
        return {}
    if path.endswith(".xml"):
        root = ElementTree.parse(path).getroot()
        suites = list(root.iter("testsuite"))
        total = {k: sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "failures", "errors", "skipped")}
        passed = total["tests"] - total["failures"] - total["errors"] - total["skipped"]
        counts: dict[str, Any] = {"passed": passed, "failed": total["failures"] + total["errors"]}
        bad = [c for c in root.iter("testcase") if c.find("failure") is not None or c.find("error") is not None]
        if bad:
            counts["failures"] = [f"{c.get('classname')}::{c.get('name')}" for c in bad]
        return {**counts, "skipped": total["skipped"]}
    statuses = [r["status"] for r in json.loads(Path(path).read_text())]
    return {status: statuses.count(status) for status in ("right", "wrong", "refused")}


def count_unwritten_reads(path: str) -> dict[str, int]:
    """What initcheck found: reads by kernels of this package, which Triton gives a line of Python, and by torch's."""
    places = re.findall(r"^=+ +at (.+)$", Path(path).read_text(), re.M)
    own = sum(bool(re.search(r" in \w+\.py:\d+$", place)) for place in places)
    return {"unwritten_reads": own, "unwritten_reads_of_torch": len(places) - own}


def run(step: Step, log: Path) -> dict[str, Any]:
    start = time.monotonic()
    with log.open("a") as out:
        print(f"== {step.name}: {' '.join(step.command)}", file=out, flush=True)
        try:
            status: int | str = subprocess.run(
                step.command,
                env={**os.environ, **step.environment},
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=step.timeout,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = "timed out"
    counts = read_counts(step.counts)
    if step.reads and Path(step.reads).exists():
        counts |= count_unwritten_reads(step.reads)
        status = status or int(counts["unwritten_reads"] > 0)
    # Neither interpreter nor scratch paths belong in a report that is read elsewhere.
    settings = [f"{name}={value}" for name, value in step.environment.items()]
    words = [c for c in (*settings, *step.command) if "/tmp" not in c and not c.startswith("--junit")]
    words = ["python" if c == sys.executable else Path(c).name if c == _SANITIZER else c for c in words]
    command = " ".join(words)
    return {
        "step": step.name,
        "command": command,
        "exit_status": status,
        "seconds": round(time.monotonic() - start, 1),
        **counts,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="the report; a log lies beside it")
    parser.add_argument("--tree", default="unknown", help="git's hash of the tree that is tested")
    parser.add_argument("--profile", default="nightly", help="Hypothesis profile")
    parser.add_argument("--jobs", type=int, default=1, help="test processes")
    parser.add_argument(
        "--ptxas", default="/usr/local/cuda/bin/ptxas", help="another ptxas to repeat the GPU part with"
    )
    parser.add_argument("--no-sanitizer", dest="sanitizer", action="store_false")
    parser.add_argument("--only", nargs="*", help="only steps whose name contains one of these")
    options = parser.parse_args(argv)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {**environment_facts(options.tree), "steps": []}
    with tempfile.TemporaryDirectory() as scratch:
        for step in steps(options, Path(scratch)):
            result = run(step, options.out.with_suffix(".log"))
            report["steps"].append(result)
            write_whole(options.out, json.dumps(report, indent=1) + "\n")
            print({k: v for k, v in result.items() if k != "command"}, flush=True)
    return int(any(s["exit_status"] != 0 for s in report["steps"]))


if __name__ == "__main__":
    sys.exit(main())
