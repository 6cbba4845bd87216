"""Runs functions in a process whose Triton interprets kernels on the CPU.

Whether Triton interprets is settled when a kernel's module is imported, so one process can't do both.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


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
