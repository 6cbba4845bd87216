"""Every configuration of the matrix products compiles for the targets it ships for, with their matrix instructions.

Unlike the other kernels', these configurations belong to an architecture each.
"""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")

from .offline import TARGETS, compile_apart, faults, hopper_cases, matmul_cases  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("nothing is compiled in Triton's interpreter", allow_module_level=True)

CASES = [*matmul_cases(), *hopper_cases()]
# Each kind of configuration differs on these; the targets beside them take as long again, in `make offline`.
HERE = {"sm_86", "sm_90", "sm_100", "sm_121"}
PAIRS = [
    pytest.param(wanted, target, id=f"{wanted.case.name}-{target}")
    for wanted in CASES
    for target in wanted.targets
    if target in TARGETS and target in HERE
]


@pytest.mark.parametrize(("wanted", "target"), PAIRS)
def test_compiles_to_matrix_instructions_without_spills(wanted, target):
    assert not faults(wanted, target, compile_apart(wanted.case, target))


def test_names_are_unique():
    names = [wanted.case.name for wanted in CASES]
    assert len(names) == len(set(names))
