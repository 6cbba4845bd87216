"""Every Triton kernel that ships compiles for every target, without spilling. Needs no GPU; see ``offline.py``."""

from __future__ import annotations

import os
import threading
import time

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")

from . import compiler  # noqa: E402
from .compiler import compile_apart, compile_case  # noqa: E402
from .offline import TARGETS, Wanted, aot_cases, faults, matmul_cases  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("nothing is compiled in Triton's interpreter", allow_module_level=True)

CASES = list(aot_cases())
PAIRS = [pytest.param(case, target, id=f"{case.name}-{target}") for case in CASES for target in TARGETS]


@pytest.mark.parametrize(("case", "target"), PAIRS)
def test_compiles_without_spills(case, target):
    assert not faults(Wanted(case, (target,)), target, compile_apart(case, target))


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


def _steps(case):
    return case.constants.get("STEPS", 1) * case.constants.get("ITERS", 1)


# The last of the shortest of each kernel.
SHORTEST = {case.kernel: case for case in sorted(CASES, key=_steps, reverse=True)}.values()


# By the targets that come one after another: whether the second shares what the first one's compilation gave.
@pytest.mark.parametrize(("first", "second"), [("sm_80", "sm_90"), ("sm_86", "sm_100"), ("sm_103", "sm_120")])
@pytest.mark.parametrize("case", SHORTEST, ids=lambda case: case.name)
def test_targets_share_llvm_ir_without_a_difference(case, first, second):
    _compare_shared(case, first, second)


@pytest.mark.parametrize(("first", "second"), [("sm_80", "sm_89"), ("sm_100", "sm_103")])
def test_targets_share_llvm_ir_of_products_without_a_difference(first, second):
    _compare_shared(next(wanted.case for wanted in matmul_cases() if first in wanted.targets), first, second)


def _compare_shared(case, first, second):
    compile_apart(case, first)
    shared = compile_apart(case, second)
    whole = compile_apart(case, second, share=False)
    assert not shared.error
    assert shared.assembly == whole.assembly
    assert shared.registers == whole.registers


@pytest.fixture
def kernel(monkeypatch):
    """A case to be compiled in a process of its own, a fork of this one, which has what a test patches here."""
    monkeypatch.setattr(compiler, "_own", threading.local())
    yield next(case for case in CASES if case.kernel.__name__ == "sum_splits_kernel")
    compiler._own.process.stop()


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (os.abort, "the compiler ended the process (exit code -6)"),
        (lambda: time.sleep(60), "took more than 2 s"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_case_that_ends_the_compiler_fails_alone(kernel, monkeypatch, end, reason):
    def compile_or_end(case, *arguments):
        return end() if case.name == "bad" else compile_case(case, *arguments)

    monkeypatch.setattr(compiler, "compile_case", compile_or_end)
    assert not compile_apart(kernel, "sm_80").error
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "TIMEOUT_S", 2)
        assert compile_apart(kernel._replace(name="bad"), "sm_80").error == reason
    assert not compile_apart(kernel, "sm_80").error
