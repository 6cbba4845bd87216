"""Valid calls of each op: its edges, layouts and dtypes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..contracts import broken_promise
from ..registry import Op
from .numerics import assert_nearly_same, assert_same_bytes

__all__ = ["Sample", "assert_right", "comparable", "samples", "values"]


@dataclass(frozen=True)
class Sample:
    """One valid call: ``op(*sample.args, **sample.kwargs)``."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Sample:
        return Sample(self.name, *tree_map_only(Tensor, function, (self.args, self.kwargs)))

    def clone(self) -> Sample:
        """The same call on tensors of its own, strides kept: for ops that write into their arguments."""
        return self.map_tensors(_clone_strided)

    def __str__(self) -> str:
        return self.name


def samples(op: Op, device: str | torch.device = "cpu") -> list[Sample]:
    """The samples in the op's folder (``ops/<op>/samples.py``), the same data on every device, whatever torch's
    default dtype and device are: probes come where the user's first call does."""
    module = _samples_module(op)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            entries = list(module.samples())
    finally:
        torch.set_default_dtype(before)
    return [Sample(*entry).map_tensors(lambda t: _clone_strided(t, device)) for entry in entries]


def assert_right(op: Op, sample: Sample, backend: str) -> None:
    """Run a backend on a copy of the sample and check what it gives, or writes, against the op's contract and the
    reference on the CPU.

    A backend that is not exact is held to :func:`assert_nearly_same`, with the share of differing bytes that its probe
    allows, and not asked about NaN and infinities: see :func:`comparable`. For the others the
    ``assert_close(out, *args, **kwargs)`` of the op's samples module decides, if it has one (GEMMs: an error bound
    against a float64 oracle); everything else must equal the reference byte for byte.

    Raises AssertionError if the result is wrong, and whatever the op raises.
    """
    given = sample.clone()
    call = op.check(*given.args, **given.kwargs)
    promised = op.contract(call)
    out = op.run_backend(backend, *given.args, **{**given.kwargs, "backend": backend})
    wrong = broken_promise(out, promised, call.device)
    assert wrong is None, f"{op.name}, backend {backend!r}, {wrong}"
    on_cpu = sample.map_tensors(_to_cpu)
    assert_close = getattr(_samples_module(op), "assert_close", None)
    found = op.find_backend(backend, "assert_right")
    if assert_close is not None and found.exact:
        assert_close(_to_cpu(out), *on_cpu.args, **on_cpu.kwargs)
        return
    wanted = op.run_backend("reference", *on_cpu.args, **on_cpu.kwargs)
    # Inputs too: ops that write give nothing back, and no op may write elsewhere.
    results, references = tree_leaves((out, given.args)), tree_leaves((wanted, on_cpu.args))
    for i, (a, b) in enumerate(zip(results, references, strict=True)):
        if isinstance(a, Tensor):
            what = f"tensor {i} of outputs and arguments"
            if found.exact:
                assert_same_bytes(_to_cpu(a), b, what)
            else:
                assert_nearly_same(_to_cpu(a), b, what, getattr(found.trust, "differing", 0.01))


def comparable(op: Op, sample: Sample, backend: str) -> bool:
    """Whether the reference says what a backend should make of the sample: a backend that is not exact may have its
    own way with NaN and infinities."""
    floats = [t for t in tree_leaves((sample.args, sample.kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
    return op.find_backend(backend, "comparable").exact or all(bool(t.float().isfinite().all()) for t in floats)


def _to_cpu(t: Tensor) -> Tensor:
    return _clone_strided(t, "cpu")


def _samples_module(op: Op) -> ModuleType:
    return importlib.import_module(f"{op.__module__}.samples")


def values(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """Normal values of a fixed seed, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def _clone_strided(t: Tensor, device: str | torch.device | None = None) -> Tensor:
    out = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device or t.device)
    return out.copy_(t)
