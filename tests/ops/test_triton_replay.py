"""A replayed call does what its backend would do, with other data in the arguments.

The check runs twice, as those of ``test_triton_quantize``.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torch_fp4ops import OPS
from torch_fp4ops.registry import Op
from torch_fp4ops.replay import Plan
from torch_fp4ops.testing import Sample, assert_same_bytes, samples

from ..interpreter import test_in_the_interpreter, test_on_a_gpu  # noqa: F401

pytest.importorskip("triton", reason="needs Triton")


def with_other_data(sample: Sample) -> Sample:
    def reverse(t: Tensor) -> None:
        if t.dim():
            t.copy_(t.flip(0).clone())

    other = sample.clone()
    for t in tree_leaves((other.args, other.kwargs)):
        if isinstance(t, Tensor):
            reverse(t.view(torch.uint8) if t.dtype.itemsize == 1 else t)
    return other


def outcome(op: Op, sample: Sample, out: object) -> list[Tensor]:
    tensors = [t for t in tree_leaves((out, sample.args)) if isinstance(t, Tensor)]
    written = [a.name for a in op.default._schema.arguments if a.is_write]
    return tensors if written else [t for t in tree_leaves(out) if isinstance(t, Tensor)]


def how_often(op: Op, backend: str, device: str) -> Counter[str]:
    """Replay every sample that a backend takes; how many were by a plan, how many by the backend."""
    counts: Counter[str] = Counter()
    every = 1 if device == "cuda" else 5  # the interpreter takes its time
    for sample in samples(op, device)[every // 2 :: every]:
        kwargs = {**sample.kwargs, "backend": backend}
        if op.why_not(backend, op.check(*sample.args, **kwargs)) is not None:
            continue
        op.forget()
        for _ in range(2):
            op.default(*sample.clone().args, **kwargs)
        ((run, _),) = op._known.values()
        other, fresh = with_other_data(sample), with_other_data(sample)
        version = [t._version for t in tree_leaves(other.args) if isinstance(t, Tensor)]
        replayed = outcome(op, other, op.default(*other.args, **kwargs))
        wanted = outcome(op, fresh, op.run_backend(backend, *fresh.args, **kwargs))
        for a, b in zip(replayed, wanted, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            assert_same_bytes(a, b, f"{op.name} {backend} {sample.name}")
        now = [t._version for t in tree_leaves(other.args) if isinstance(t, Tensor)]
        assert any(a != b for a, b in zip(version, now, strict=True)) == bool(op._mutates)
        counts["plan" if type(run) is Plan else "backend"] += 1
    return counts


def check_replays(device: str) -> None:
    for op in OPS.values():
        seen = 0
        for backend in op.backend_names():
            if op.find_backend(backend, "test").replayable:
                counts = how_often(op, backend, device)
                # Those that aren't: empty ones.
                assert not counts or counts["plan"] > counts["backend"], (op.name, backend, counts)
                seen += counts["plan"]
        assert seen, op.name
