"""Compile every Triton and Gluon kernel that ships for every target, without a GPU: ``python -m compile_tests.offline``.

The Triton wheel has the assemblers, so this goes down to cubin and hsaco and can ask how many registers were used and
spilled. What is compiled for all targets, a module lists in ``aot_cases()``; products have configurations by
architecture, and instructions that these are to have.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton

from torch_fp4ops.ops._hopper_plan import Plan
from torch_fp4ops.ops._hopper_strip_plan import StripPlan

from .compiler import TARGETS, Compiled, compile_apart

__all__ = ["TARGETS", "Wanted", "aot_cases", "compile_apart", "faults", "hopper_cases", "matmul_cases"]

MATRIX = re.compile(r"\b(tcgen05\.mma(?!\.ws)[\w.:]*|mma\.sync[\w.:]*|wgmma\.mma_async[\w.:]*|v_mfma_\w+)")
# Denormals count in the reference, and the kernels' inputs reach into them. Two have no other form: the first guess of
# a reciprocal, of which nothing is denormal, and powers of two, where a softmax can do without weights of 2^-126.
FLUSHES = re.compile(r"(?<!div\.approx)(?<!ex2\.approx)\.ftz\b")
# From compute capability 9.0 on a kernel waits for the one before it, each warp group that touches memory for itself;
# what it has fetched into the L2 cache before may still be written there.
WAIT = "griddepcontrol.wait"
TOUCHES_MEMORY = re.compile(r"(?:ld|st|atom|red)\.\S*global|cp\.async|prefetch(?!\.global\.L2)")

# Bytes that Triton 3.7 to 3.9 spill at most where 3.6, with which these kernels were measured, spills none; by case and
# target.
SPILLED_LATER = {
    ("hopper-nvfp4-bf16-bf16-256x128-stream-4x1-1", "sm_90"): 208,
    ("hopper-nvfp4-bf16-bf16-64x128-stream-4x2-2", "sm_90"): 56,
    ("hopper-mxfp8-bf16-bf16-64x128-once-rows-3x2-2-by32", "sm_90"): 8,
    ("moe-mxfp8-mxfp4-128x4-sm90-16x64x64", "sm_90"): 8,
    **dict.fromkeys((("moe-mxfp8-mxfp4-128x4-sm100-16x64x64", f"sm_{cc}") for cc in (100, 103)), 12),
    **dict.fromkeys((("moe-route-32", f"sm_{cc}") for cc in (90, 100, 103)), 4),
    **dict.fromkeys((("moe-nvfp4-nvfp4-128x4-sm80-128x128x64-ragged", f"sm_{cc}") for cc in (80, 86, 89)), 36),
    **dict.fromkeys((("moe-mxfp8-mxfp4-128x4-sm80-128x128x64-ragged", f"sm_{cc}") for cc in (80, 86, 89)), 60),
    **dict.fromkeys((("moe-mxfp8-mxfp4-128x4-sm120-128x128x64-ragged", f"sm_{cc}") for cc in (120, 121)), 40),
    ("kv_attend-nvfp4-bf16-D256-group16-options-16", "sm_80"): 8,
    ("kv_attend-plain-bf16-D128-group4-16", "sm_80"): 4,
    ("kv_combine-D256-64", "gfx942"): 260,
    ("kv_combine-D256-64", "gfx950"): 260,
}
if triton.__version__.startswith("3.6."):
    SPILLED_LATER.clear()


class Wanted(NamedTuple):
    """A case, the targets that it ships for, and what their assembly has and has not, as patterns."""

    case: Any
    targets: tuple[str, ...]
    has: tuple[str, ...] = ()
    has_not: tuple[str, ...] = ()


def aot_cases() -> Iterator[Any]:
    """The cases of every module below ``torch_fp4ops.ops`` that is a Triton backend or belongs to one."""
    import torch_fp4ops.ops as package

    for module in sorted(pkgutil.walk_packages(package.__path__, f"{package.__name__}."), key=lambda m: m.name):
        name = module.name.rpartition(".")[2]
        if name == "triton" or name.startswith("_triton"):
            yield from getattr(importlib.import_module(module.name), "aot_cases", tuple)()


def matmul_cases() -> Iterator[Wanted]:
    for op in ("mm_bf16_fp4", "mm_fp4", "mm_mxfp8", "cutlass_fused_moe"):
        for case in importlib.import_module(f"torch_fp4ops.ops.{op}.triton").offline_cases():
            yield Wanted(case.case, case.targets, (case.instruction,), (r"\.ftz\b",))


def hopper_cases() -> Iterator[Wanted]:
    """Narrow tiles with mma, others with wgmma."""
    from torch_fp4ops.ops._hopper_offline import offline_cases

    for case in offline_cases():
        has: tuple[str, ...] = ()
        has_not: tuple[str, ...] = ()
        if "HALF" in case.constants:
            kind = "f16" if case.constants["HALF"] else "bf16"
            mma = rf"mma\.sync\.aligned\.m16n8k16.*\.f32\.{kind}\.{kind}\.f32"
            wgmma = rf"wgmma\.mma_async.*\.f32\.{kind}\.{kind}"
            one, other = (mma, wgmma) if case.constants["BM"] <= 16 else (wgmma, mma)
            copies = r"cp\.async\.cg" if "STEPS" in case.constants else r"cp\.async\.bulk\.tensor"
            has, has_not = (one, copies), (other, r"\.ftz\b")
            if case.constants.get("CLUSTER", 1) > 1:
                has += (r"st\.async\.weak\.shared::cluster",)
                has_not += (r"(?s)%tid\.x.*%tid\.x.*%tid\.x",)  # see _hopper_cluster._threads
                has_not += (r"cluster\.arrive\.release",)  # which waits for writes
            if case.constants.get("KW", 1) > 1:
                has += (r"st\.shared\.v4",)  # sums of a warp group, without bank conflicts
        yield Wanted(case, ("sm_90",), has, has_not)


def all_cases() -> list[Wanted]:
    return [*(Wanted(case, tuple(TARGETS)) for case in aot_cases()), *matmul_cases(), *hopper_cases()]


def faults(wanted: Wanted, target: str, got: Compiled) -> str:
    """What is wrong with a compilation; empty if nothing is."""
    if got.error:
        return got.error
    found = []
    if got.spilled_bytes > SPILLED_LATER.get((wanted.case.name, target), 0):
        found.append(f"{got.spilled_bytes} bytes spilled")
    if not 0 < got.registers <= 255:
        found.append(f"{got.registers} registers")
    if target == "sm_90" and got.shared_bytes > 227 * 1024:
        found.append(f"{got.shared_bytes} bytes of shared memory")
    found += [f"no {pattern}" for pattern in wanted.has if not re.search(pattern, got.assembly)]
    found += [f"has {pattern}" for pattern in wanted.has_not if re.search(pattern, got.assembly)]
    if TARGETS[target][0] == "cuda" and int(TARGETS[target][1]) >= 90:
        waits = 1  # or one for each kind of warps: groups that multiply, some that decode activations, one that loads
        if "setmaxnreg" in got.assembly:
            constants = wanted.case.constants
            kind: Any = StripPlan if "OWN" in constants else Plan
            plan = kind(**{name: constants[name] for name in kind._fields})
            waits = plan.GROUPS + (2 if constants.get("X_LAYOUT") else 1)
            waits += not constants.get("STREAM")  # before the first stage, which all warps ask for
        early = TOUCHES_MEMORY.search(got.assembly.partition(WAIT)[0])
        if got.assembly.count(WAIT) != waits or early:
            found.append(f"touches memory before it waits: {early and early[0]}")
    # Once the first copies of its own have come, a warp waits for no other one.
    between = got.assembly.split("cp.async.wait_group")[2:-1]
    if wanted.case.name.startswith("hopper-at-once") and any("bar.sync" in part for part in between):
        found.append("a barrier of all warps between waits for copies")
    found += [f"flushes denormals: {flush}" for flush in sorted(set(FLUSHES.findall(got.assembly)))]
    return ", ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--target", choices=TARGETS, help="one target only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--count", action="store_true", help="count instructions, by NVIDIA's disassembler on its GPUs")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="put each case's PTX or AMD assembly there")
    arguments = parser.parse_args()
    listed = [
        (wanted, [target for target in wanted.targets if target in TARGETS and arguments.target in (None, target)])
        for wanted in all_cases()
        if arguments.only in wanted.case.name
    ]
    start = time.perf_counter()
    print(f"triton {triton.__version__}")
    header = f"{'case':56} {'target':7} {'registers':>9} {'spilled':>7} {'shared':>6} {'seconds':>7}"
    print(header, f"{'instructions':>12}" * arguments.count, " matrix instructions", flush=True)

    def compile_all(case: Any, targets: list[str]) -> list[Compiled]:
        return [compile_apart(case, target, listing=arguments.count) for target in targets]

    count = bad = 0
    seconds = 0.0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for (wanted, targets), results in zip(
            listed, pool.map(lambda item: compile_all(item[0].case, item[1]), listed), strict=True
        ):
            for target, got in zip(targets, results, strict=True):
                count += 1
                seconds += got.seconds
                wrong = faults(wanted, target, got)
                bad += bool(wrong)
                numbers = f"{got.registers:9} {got.spilled_bytes:7} {got.shared_bytes:6} {got.seconds:7.2f}"
                counted = f" {got.instructions.total():12}" * arguments.count
                matrix = ", ".join(Counter(MATRIX.findall(got.assembly)))
                print(f"{wanted.case.name:56} {target:7} {numbers}{counted}  {matrix}", f"BAD: {wrong}" * bool(wrong))
                if arguments.write and got.assembly:
                    arguments.write.mkdir(parents=True, exist_ok=True)
                    (arguments.write / f"{wanted.case.name}.{target}.s").write_text(got.assembly)
            sys.stdout.flush()
    print(f"{count} compilations, {bad} bad; {time.perf_counter() - start:.0f} s, {seconds:.0f} s of processor time")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
