"""The Hopper products in Gluon compile for sm_90 as they are meant to: narrow tiles with mma, others with wgmma, no spills."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")

from .offline import compile_apart  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("Gluon does not run in Triton's interpreter", allow_module_level=True)

from torch_fp4ops.ops._hopper_launch import offline_cases  # noqa: E402

CASES = list(offline_cases())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_to_matrix_instructions_without_spills(case):
    compiled = compile_apart(case, "sm_90")
    assert not compiled.error
    assert compiled.spilled_bytes == 0, f"{compiled.registers} registers"
    assert compiled.shared_bytes <= 227 * 1024
    if "sum" in case.name:
        return
    narrow = case.constants["BM"] <= 16
    kind = "f16" if case.constants["HALF"] else "bf16"
    assert bool(re.search(rf"mma\.sync\.aligned\.m16n8k16.*\.f32\.{kind}\.{kind}\.f32", compiled.assembly)) == narrow
    assert bool(re.search(rf"wgmma\.mma_async.*\.f32\.{kind}\.{kind}", compiled.assembly)) != narrow
    assert "cp.async.bulk.tensor" in compiled.assembly
    assert not re.search(r"\.ftz\b", compiled.assembly)  # codes are subnormal before their scale is applied


def test_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)
