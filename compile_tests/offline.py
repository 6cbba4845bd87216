"""Compile every Triton kernel that ships for every target, without a GPU: ``python compile_tests/offline.py``.

The Triton wheel has the assemblers, so this goes down to cubin and hsaco and can ask how many registers were used and
spilled. A module takes part by having ``aot_cases()``. Every compilation runs in a process of its own, because MLIR
and LLVM abort on some failures.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

TARGETS: dict[str, tuple[str, int | str, int]] = {
    **{f"sm_{cc}": ("cuda", cc, 32) for cc in (80, 86, 89, 90, 100, 103, 120)},
    **{arch: ("hip", arch, 64) for arch in ("gfx942", "gfx950")},
}
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
    TARGETS["sm_121"] = ("cuda", 121, 32)

TIMEOUT_S = 120


@dataclass
class Compiled:
    """What a compilation gave; ``error`` is empty if it went well."""

    error: str = ""
    registers: int = -1
    spilled_bytes: int = -1
    shared_bytes: int = -1
    instructions: Counter[str] = field(default_factory=Counter)
    assembly: str = ""


def aot_cases() -> Iterator[Any]:
    """The cases of every module below ``torch_fp4ops.ops`` that is a Triton backend or belongs to one."""
    import torch_fp4ops.ops as package

    for module in sorted(pkgutil.walk_packages(package.__path__, f"{package.__name__}."), key=lambda m: m.name):
        name = module.name.rpartition(".")[2]
        if name == "triton" or name.startswith("_triton"):
            yield from getattr(importlib.import_module(module.name), "aot_cases", tuple)()


def compile_case(case: Any, target: str, listing: bool = False) -> Compiled:
    """Compile in this process; raises what Triton raises. Instructions are counted where a ``listing`` is asked for."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    from torch_fp4ops.ops._triton_launch import LAUNCH_OPTIONS

    gpu = GPUTarget(*TARGETS[target])
    if gpu.backend == "hip" and case.on_hip is not None:
        constants, threads = case.on_hip
        case = case._replace(constants=constants, threads=threads)
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    whole = [signature[name].startswith("*") or name in case.multiples_of_16 for name in names]
    aligned = {(i,): [["tt.divisibility", 16]] for i, is_whole in enumerate(whole) if is_whole}
    options = {**LAUNCH_OPTIONS, "num_warps": max(1, case.threads // gpu.warp_size)}
    if case.max_registers is not None:
        options["maxnreg"] = case.max_registers
    source_type = GluonASTSource if isinstance(case.kernel, GluonJITFunction) else ASTSource
    source = source_type(case.kernel, signature, case.constants, aligned)
    kernel = triton.compile(source, target=gpu, options=options)
    if gpu.backend == "cuda":
        return _nvidia(kernel, listing)
    return _amd(kernel)


def _nvidia(kernel: Any, listing: bool) -> Compiled:
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = kernel.asm["ptx"]
    arch = re.search(r"\.target (\w+)", ptx)[1]
    # Triton's own choice, which its environment variables and importing FlashInfer change, and so the PTX's version.
    assembler = get_ptxas(int(re.search(r"\d+", arch)[0])).path
    with tempfile.TemporaryDirectory() as scratch:
        source, binary = Path(scratch, "kernel.ptx"), Path(scratch, "kernel.cubin")
        source.write_text(ptx)
        binary.write_bytes(kernel.asm["cubin"])
        # What Triton reports as spills mixes in arrays, and needs a device.
        verbose = [assembler, "-v", f"--gpu-name={arch}", source, "-o", Path(scratch, "again.cubin")]
        assembled = subprocess.run(verbose, capture_output=True, text=True)
        report = assembled.stderr
        if assembled.returncode:
            return Compiled(error=f"{assembler}: {report.strip() or f'exit code {assembled.returncode}'}")
        sass = ""
        if listing:
            disassembler = triton.knobs.nvidia.cuobjdump.path
            sass = subprocess.run([disassembler, "-sass", binary], capture_output=True, text=True).stdout
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass)
    return Compiled(
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spilled_bytes=int(re.search(r"(\d+) bytes spill stores", report)[1]),
        shared_bytes=kernel.metadata.shared,
        instructions=Counter(opcodes),
        assembly=ptx,
    )


def _amd(kernel: Any) -> Compiled:
    assembly = kernel.asm["amdgcn"]
    if not kernel.asm["hsaco"]:
        return Compiled(error="an empty hsaco")

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    return Compiled(
        registers=number("vgpr_count"),
        spilled_bytes=4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
        + number("private_segment_fixed_size"),
        shared_bytes=kernel.metadata.shared,
        instructions=Counter(re.findall(r"^\s+([vs]_\w+|global_\w+|buffer_\w+|ds_\w+)", assembly, re.M)),
        assembly=assembly,
    )


def compile_apart(case: Any, target: str, listing: bool = False) -> Compiled:
    """Compile in a process of its own."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    # fork: Triton and torch are imported already, and nothing here has touched a GPU.
    process = multiprocessing.get_context("fork").Process(target=_child, args=(case, target, listing, sender))
    process.start()
    sender.close()
    try:
        result = receiver.recv() if receiver.poll(TIMEOUT_S) else Compiled(error=f"took more than {TIMEOUT_S} s")
    except EOFError:
        process.join()
        result = Compiled(error=f"the compiler ended the process (exit code {process.exitcode})")
    process.kill()
    process.join()
    return result


def _child(case: Any, target: str, listing: bool, sender: Any) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)  # MLIR dumps whole modules when it fails
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        sender.send(compile_case(case, target, listing))
    except BaseException as error:
        last = (str(error).strip().splitlines() or [""])[-1]
        sender.send(Compiled(error=f"{type(error).__name__}: {last[:200]}"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--target", choices=TARGETS, help="one target only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="put each case's PTX or AMD assembly there")
    arguments = parser.parse_args()
    cases = [case for case in aot_cases() if arguments.only in case.name]
    targets = [arguments.target] if arguments.target else list(TARGETS)
    pairs = [(case, target) for case in cases for target in targets]
    failures = 0
    print(f"triton {triton.__version__}, {len(cases)} cases, {len(targets)} targets", flush=True)
    print(f"{'case':52} {'target':8} {'registers':>9} {'spilled':>7} {'shared':>6} {'instructions':>12}")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for (case, target), got in zip(
            pairs, pool.map(lambda pair: compile_apart(*pair, listing=True), pairs), strict=True
        ):
            failures += bool(got.error) or got.spilled_bytes > 0
            numbers = f"{got.registers:9} {got.spilled_bytes:7} {got.shared_bytes:6} {got.instructions.total():12}"
            print(f"{case.name:52} {target:8} {got.error or numbers}", flush=True)
            if arguments.write and got.assembly:
                arguments.write.mkdir(parents=True, exist_ok=True)
                (arguments.write / f"{case.name}.{target}.s").write_text(got.assembly)
    return failures > 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main())
