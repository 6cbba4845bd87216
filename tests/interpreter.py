"""Where checks of Triton kernels run: on a GPU, or in a process whose Triton interprets kernels on the CPU.

Whether Triton interprets is settled when a kernel's module is imported, so one process can't do both.

A module of tests that imports :func:`test_in_the_interpreter` and :func:`test_on_a_gpu` has both for each of its
``check_*`` functions; ``pytest_generate_tests`` of ``tests/ops`` hands them over.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

_SHARDS = int(os.environ.get("PROPERTY_SHARDS", "1"))


def few(examples: int = 40, nightly: int = 2000) -> settings:
    """Settings of a property of a kernel: conftest's profiles are not loaded in the interpreter's process, and only a
    GPU takes thousands of examples."""
    on_a_gpu = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
    return settings(
        max_examples=-(-nightly // _SHARDS) if on_a_gpu else examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


def _start() -> None:
    assert "triton" not in sys.modules, "too late to make Triton interpret"
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)


def _call(module: str, name: str, *args: Any) -> Any:
    return getattr(importlib.import_module(module), name)(*args)


class Interpreter:
    """Calls functions of test modules by their names; what they raise is raised here."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_start)

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        # By name, because pickle can't follow the wrappers of Hypothesis.
        return self._pool.submit(_call, function.__module__, function.__name__, *args).result()

    def close(self) -> None:
        self._pool.shutdown()


def checks_of(module: dict[str, Any]) -> list[Callable[[str], None]]:
    """The functions ``check_*`` of a module, which take the device to check on."""
    return [check for name, check in sorted(module.items()) if name.startswith("check_")]


def name_of(check: Callable[[str], None]) -> str:
    return check.__name__.removeprefix("check_")


def gpu_cases(checks: Sequence[Callable[[str], None]]) -> list[Any]:
    """The checks as parameters of a test on a GPU. Properties come in PROPERTY_SHARDS copies, each with examples of its
    own, so that processes can share the work."""
    cases = []
    for check in checks:
        name = name_of(check)
        for shard in range(_SHARDS if is_hypothesis_test(check) else 1):
            cases.append(pytest.param(check, id=f"{name}-{shard}" if shard else name))
    return cases


def test_in_the_interpreter(interpreter: Interpreter, check: Callable[[str], None]) -> None:
    interpreter(check, "cpu")


@pytest.mark.gpu
def test_on_a_gpu(check: Callable[[str], None]) -> None:
    check("cuda")
