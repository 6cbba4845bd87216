"""What only a GPU can show of every op and backend: no synchronisation, and capture into CUDA graphs."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torch_fp4ops import OPS
from torch_fp4ops.selection import choose
from torch_fp4ops.testing import Sample, assert_same_bytes, samples

pytestmark = pytest.mark.gpu

CASES = [pytest.param(name, i, id=f"{name}-{s}") for name in OPS for i, s in enumerate(samples(OPS[name]))]


@functools.cache
def gpu_samples(name: str) -> list[Sample]:
    return samples(OPS[name], "cuda")


def able(name: str, sample: Sample) -> list[str]:
    op = OPS[name]
    call = op.check(*sample.args, **sample.kwargs)
    return [b for b in op.backend_names() if op.why_not(b, call, launch=True) is None]


def call(name: str, sample: Sample, backend: str) -> list[Tensor]:
    """The outputs, or what an op that writes has written into."""
    out = OPS[name].default(*sample.args, **{**sample.kwargs, "backend": backend})
    return [t for t in tree_leaves(sample.args if out is None else out) if isinstance(t, Tensor)]


@pytest.mark.parametrize(("name", "i"), CASES)
def test_nothing_synchronises(name, i):
    sample = gpu_samples(name)[i].clone()
    for backend in able(name, sample):
        call(name, sample, backend)  # first-time work may
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):  # worked out, and replayed
                call(name, sample, backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("name", "i"), CASES)
def test_a_graph_replays_with_new_inputs(name, i):
    """Captured on blank inputs, replayed on the sample's: equal to eager, byte for byte."""
    sample = gpu_samples(name)[i]
    for backend in able(name, sample):
        wanted = call(name, sample.clone(), backend)
        call(name, sample.clone(), backend)  # the second of its kind: the captured call is replayed
        static = sample.clone().map_tensors(lambda t: t.zero_() if t.dtype.is_floating_point else t)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(name, static, backend)
        inputs = (tree_leaves((s.args, s.kwargs)) for s in (static, sample))
        for target, source in zip(*inputs, strict=True):
            if isinstance(target, Tensor):
                target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, wanted, strict=True):
            assert_same_bytes(a, b, backend)


@pytest.mark.parametrize("name", OPS)
def test_auto_takes_our_own_kernels(name):
    """Gluon's where they read the call's weights, else Triton's; FlashInfer is preferred from 10.0 on only."""
    if torch.cuda.get_device_capability() >= (10, 0):
        pytest.skip("FlashInfer may be preferred here")
    op = OPS[name]
    own = [b for b in ("gluon", "triton") if b in op.backend_names()]
    chosen = []
    for sample in gpu_samples(name):
        call = op.check(*sample.args, **sample.kwargs)
        chosen.append(choose(op, call).backend)
        assert chosen[-1] == next((b for b in own if op.why_not(b, call) is None), "reference")
    assert len(chosen) - chosen.count("reference") > len(chosen) // 2
