"""Every configuration of the matrix products compiles for the targets it ships for, with their matrix instructions.

Unlike the other kernels', these configurations belong to an architecture each. ``python -m
compile_tests.test_triton_gemm_offline [part of a case's name]`` prints a table.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")

from .offline import compile_apart  # noqa: E402

OPS = ("mm_bf16_fp4", "mm_fp4", "mm_mxfp8", "cutlass_fused_moe")
MATRIX = re.compile(r"\b(tcgen05\.mma(?!\.ws)[\w.:]*|mma\.sync[\w.:]*|wgmma\.mma_async[\w.:]*|v_mfma_\w+)")


def all_cases():
    for name in OPS:
        yield from importlib.import_module(f"torch_fp4ops.ops.{name}.triton").offline_cases()


CASES = [] if triton.knobs.runtime.interpret else list(all_cases())
# All of them take six minutes on two cores; these are the targets on which every kind of configuration differs.
TARGETS = None if os.environ.get("OFFLINE_TARGETS") == "all" else {"sm_86", "sm_90", "sm_100"}
PAIRS = [
    pytest.param(case, target, id=f"{case.case.name}-{target}")
    for case in CASES
    for target in case.targets
    if TARGETS is None or target in TARGETS
]


@pytest.mark.parametrize(("case", "target"), PAIRS)
def test_compiles_to_matrix_instructions_without_spills(case, target):
    compiled = compile_apart(case.case, target)
    assert not compiled.error
    assert compiled.spilled_bytes == 0, f"{compiled.registers} registers"
    assert re.search(case.instruction, compiled.assembly), Counter(MATRIX.findall(compiled.assembly))
    assert not re.search(r"\.ftz\b", compiled.assembly)  # subnormals count


def test_names_are_unique():
    names = [case.case.name for case in CASES]
    assert len(names) == len(set(names))


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    pairs = [(case, target) for case in CASES for target in case.targets if wanted in case.case.name]
    bad = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda pair: compile_apart(pair[0].case, pair[1]), pairs)
        for (case, target), got in zip(pairs, results, strict=True):
            found = bool(re.search(case.instruction, got.assembly))
            fine = not got.error and found and got.spilled_bytes == 0
            bad += not fine
            matrix = ", ".join(Counter(MATRIX.findall(got.assembly)))
            numbers = f"{got.registers:4} registers {got.spilled_bytes:4} spilled {got.shared_bytes:6} shared  {matrix}"
            print(f"{'ok ' if fine else 'BAD'} {case.case.name:56} {target:7} {got.error or numbers}", flush=True)
    print(f"{len(pairs)} compilations, {bad} bad")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
