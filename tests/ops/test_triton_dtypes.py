"""Whatever dtypes a call may have, its kernels are compiled with them offline: the interpreter takes conversions that
the compiler refuses."""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from torch_fp4ops import OPS
from torch_fp4ops.registry import Op
from torch_fp4ops.testing import Sample, samples

pytest.importorskip("triton", reason="needs Triton")

from compile_tests.offline import aot_cases, matmul_cases

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INDICES = (torch.int32, torch.int64)
TRITON_NAMES = {
    **{torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"},
    **{torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"},
}
Dtypes = dict[tuple[str, str], set[str]]
"""By kernel and parameter."""


def with_other_dtypes(op: Op, sample: Sample) -> Iterator[Sample]:
    """The sample with each tensor of floats or indices, and each dtype that is asked for, replaced by another one, as
    far as the op takes it."""
    leaves, tree = tree_flatten((sample.args, sample.kwargs))
    for i, leaf in enumerate(leaves):
        dtype = leaf.dtype if isinstance(leaf, Tensor) else leaf
        for other in next((kind for kind in (FLOATS, INDICES) if dtype in kind), ()):
            changed = [*leaves[:i], leaf.to(other) if isinstance(leaf, Tensor) else other, *leaves[i + 1 :]]
            new = Sample(sample.name, *tree_unflatten(changed, tree))
            try:
                call = op.check(*new.args, **new.kwargs)
            except ValueError:
                continue
            if op.find_backend("triton", "the test").unsupported(call) is None:
                yield new


def launched() -> Dtypes:
    """With which pointers the backends launch their kernels; in Triton's interpreter, where none of them runs."""
    from torch_fp4ops.ops import _triton_launch

    found: Dtypes = defaultdict(set)

    def record(kernel: Any, grid: Any, threads: int, device: Any, *args: Any, **_: Any) -> None:
        for name, value in zip(kernel.arg_names, args, strict=False):
            if isinstance(value, Tensor):
                found[kernel.fn.__name__, name].add(f"*{TRITON_NAMES[value.dtype]}")

    for op in OPS.values():
        op.backend_names()
    modules = [m for m in sys.modules.values() if getattr(m, "launch", None) is _triton_launch.launch]
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "launch", record)
        for op in OPS.values():
            for sample in itertools.chain.from_iterable(with_other_dtypes(op, s) for s in samples(op)):
                op.run_backend("triton", *sample.clone().args, **sample.kwargs)
    return dict(found)


def test_dtypes_that_are_launched_are_compiled_offline(interpreter):
    compiled: Dtypes = defaultdict(set)
    for case in (*aot_cases(), *(wanted.case for wanted in matmul_cases())):
        for name, dtype in case.signature.items():
            compiled[case.kernel.fn.__name__, name].add(dtype)
    missing = {
        f"{kernel}({name})": sorted(dtypes - compiled[kernel, name])
        for (kernel, name), dtypes in interpreter(launched).items()
        if not dtypes <= compiled[kernel, name]
    }
    assert not missing
