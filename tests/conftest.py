"""A GPU of any kind that is not there: capability is pretended, tensors are fake."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_fp4ops import OPS, probe
from torch_fp4ops.ops import _flashinfer


@pytest.fixture
def pretend_gpu(monkeypatch):
    """``pretend_gpu((9, 0))``: from now on the GPU is of that capability, and new tensors are fake."""
    # Imported before: what a module makes at import must be real.
    for op in OPS.values():
        op.backend_names()
    with contextlib.suppress(ImportError):
        importlib.import_module("flashinfer")
    caches = [_flashinfer.why_not, _flashinfer._capability]
    with contextlib.suppress(ImportError):
        caches.append(importlib.import_module("torch_fp4ops.ops._triton_launch")._why_not_on)
    modes = contextlib.ExitStack()

    def forget() -> None:
        modes.close()
        for cache in caches:
            cache.cache_clear()
        for op in OPS.values():
            op._preferences_on.clear()

    def as_capability(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        # Of CUDA builds, torch 2.10 would make a real tensor before the first fake one.
        monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(probe, "_verdicts", {})
        forget()
        modes.enter_context(FakeTensorMode())

    yield as_capability
    monkeypatch.undo()
    forget()
