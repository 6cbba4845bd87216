"""What tests of Triton kernels share, and those of FlashInfer's adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from torch_fp4ops import probe
from torch_fp4ops.ops import _flashinfer

from ..interpreter import Interpreter, checks_of, gpu_cases, name_of, test_in_the_interpreter, test_on_a_gpu
from .flashinfer_stand_ins import stand_in


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The checks of the module that imports a test of ``interpreter``."""
    if metafunc.function in (test_in_the_interpreter, test_on_a_gpu):
        checks = checks_of(vars(metafunc.module))
        if metafunc.function is test_on_a_gpu:
            metafunc.parametrize("check", gpu_cases(checks))
        else:
            metafunc.parametrize("check", checks, ids=name_of)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture
def pretend(monkeypatch) -> Iterator[Callable[..., list[tuple[str, dict[str, Any]]]]]:
    """``pretend(100)``: from now on the CPU is a GPU of that capability, with everything built and stand-ins for
    FlashInfer's functions; returns the calls made."""
    calls: list[tuple[str, dict[str, Any]]] = []
    real = _flashinfer.function

    def as_capability(capability: int, packages: tuple[str, ...] = ("cutlass", "cudnn", "flashinfer_cubin")) -> list:
        monkeypatch.setattr(_flashinfer, "on_nvidia", lambda kind: None)
        monkeypatch.setattr(_flashinfer, "_capability", lambda index: capability)
        monkeypatch.setattr(_flashinfer, "has_package", lambda name: name in packages)
        monkeypatch.setattr(_flashinfer, "_is_built", lambda name: True)
        # The real one raises ImportError where this version has none.
        monkeypatch.setattr(_flashinfer, "function", lambda name: stand_in(name, real(name), calls))
        monkeypatch.setattr(probe, "_verdicts", {})
        monkeypatch.setattr(probe, "_built", set())
        forget()
        return calls

    def forget() -> None:
        for cached in (_flashinfer.why_not, _flashinfer._parameters, _flashinfer.choices):
            cached.cache_clear()

    yield as_capability
    monkeypatch.undo()
    forget()
