"""Runs Gluon kernels of this package on the CPU, which Triton's interpreter can't.

:func:`launch` takes the place of ``_triton_launch.launch``. Kernels are Python once Gluon's names mean something else:
tensors are torch's, PTX that computes is evaluated, warp groups take turns, copies and products are done at a time of
their own, and what is wrong about any of that is an error: a deadlock, bytes or arrivals that a barrier does not
expect, sums or shared memory used too early, memory beyond a tensor, or before the kernel in front is waited for.

Not followed: layouts, and with them which warp has what, so neither barriers of a warp group nor warps that wait for
their own copies; fences; the PTX by which programs of a cluster send each other parts. ``make offline`` compiles those,
and tests on a GPU run them.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import math
import textwrap
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.language.nvidia import ampere, hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import ConstexprFunction, JITFunction

from torch_fp4ops import scale_layouts
from torch_fp4ops.block_quantization import dequantize_blocks
from torch_fp4ops.formats import FORMATS, MXFP8
from torch_fp4ops.ops import _gluon, _hopper_cluster, _hopper_launch

from .language import Gluon, Program
from .memory import Descriptor, Pointer, Value
from .tasks import Deadlock, Scheduler

__all__ = ["Deadlock", "decoded_by_reference", "interpreted", "launch"]


class _CallsOfTo(ast.NodeTransformer):
    """Numbers that Python knows are Python's, and have no method ``to``."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            return ast.Call(ast.Name("_to", ast.Load()), [node.func.value, *node.args], [])
        return node


@functools.cache
def _code(function: Any) -> Any:
    """A function's definition, without its decorators."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    tree.body.insert(0, *ast.parse("from __future__ import annotations").body)
    return compile(ast.fix_missing_locations(_CallsOfTo().visit(tree)), inspect.getfile(function), "exec")


def _to(value: Any, kind: Any) -> Value:
    return (value if isinstance(value, Value) else Value(torch.tensor(int(value), dtype=torch.int32))).to(kind)


class _Translation:
    """Functions of kernels as Python's, each with the names of its module."""

    def __init__(self, gluon: Gluon):
        self._gluon = gluon
        self._modules: dict[str, dict[str, Any]] = {}
        self._instead = {
            id(name): value
            for name, value in (
                (gl, gluon.gl),
                (hopper.mbarrier, gluon.mbarrier),
                (hopper.tma, gluon.tma),
                (ampere.async_copy, gluon.async_copy),
                (ampere.mma_v2, gluon.mma_v2),
                (hopper.warpgroup_mma, gluon.warpgroup_mma),
                (hopper.warpgroup_mma_wait, gluon.warpgroup_mma_wait),
                (hopper.fence_async_shared, lambda: None),
                (_gluon.warp_group_barrier, lambda: None),
                (_gluon.async_load, gluon.async_load),
                (_gluon.async_store, gluon.async_store),
                (_gluon.copy_async, gluon.copy_async),
                (_gluon.reinterpret, lambda shared, *args: shared.reinterpret(*args)),
                (_hopper_cluster.arrive, gluon.arrive_at_cluster),
                (_hopper_cluster.open_boxes, gluon.arrive_at_cluster),
                (_hopper_cluster.wait_for_boxes, gluon.wait_for_cluster),
                (_hopper_cluster.arrive_and_wait, gluon.arrive_and_wait_for_cluster),
                (_hopper_cluster.add_parts, gluon.add_parts),
            )
        }

    def function(self, kernel: Any) -> Any:
        return self._names(kernel.fn.__module__)[kernel.fn.__name__]

    def _names(self, module: str) -> dict[str, Any]:
        if module in self._modules:
            return self._modules[module]
        names = self._modules[module] = {"_to": _to, "__name__": module}
        for name, value in vars(importlib.import_module(module)).items():
            if id(value) in self._instead:
                names[name] = self._instead[id(value)]
            elif isinstance(value, (JITFunction, ConstexprFunction)):
                if value.fn.__module__ == module:
                    exec(_code(value.fn), names)
                else:
                    names[name] = self.function(value)
            elif not name.startswith("__"):
                names[name] = value.value if isinstance(value, gl.constexpr) else value
        return names


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    threads: int,
    device: torch.device,
    *args: Any,
    max_registers: int | None = None,
    second: bool = False,
    cluster: int = 1,
    cluster_bytes: int = 0,
    seed: int = 0,
    **constants: Any,
) -> None:
    """As ``_triton_launch.launch``, on CPU tensors; ``seed`` is for the order of what may come in any order."""
    gluon = Gluon(threads // 32)
    function = _Translation(gluon).function(kernel)
    values = [_value(arg) for arg in args]
    for first in range(0, math.prod(grid), cluster):
        gluon.scheduler = scheduler = Scheduler(seed + first)
        programs: list[Program] = []
        parts: dict[Any, Any] = {}
        for rank in range(cluster):
            programs.append(Program(first + rank, grid, rank, programs, parts))
        scheduler.run([(f"program {p.place}", functools.partial(function, *values, **constants), p) for p in programs])
        assert not parts, "parts are sent that nobody takes"
        for task in scheduler.tasks:
            assert not task.stores and not task.products and not any(task.copies), f"{task.name} leaves work behind"


def _value(arg: Any) -> Any:
    if isinstance(arg, TensorDescriptor):
        return Descriptor(arg)
    return Pointer.to(arg) if isinstance(arg, Tensor) else arg


@contextlib.contextmanager
def interpreted(seed: int = 0) -> Iterator[None]:
    """Hopper products of CPU tensors run here, behind activations that the reference decodes."""
    with (
        mock.patch.object(_hopper_launch, "launch", functools.partial(launch, seed=seed)),
        mock.patch.object(_hopper_launch, "decoded", decoded_by_reference),
    ):
        yield


def decoded_by_reference(a: Any, dtype: torch.dtype) -> Tensor:
    """As ``_triton_dequantize.decoded``."""
    fmt, (rows, width) = FORMATS[a.format], a.elements.shape
    codes = a.elements.view(torch.float8_e4m3fn) if fmt is MXFP8 else a.elements
    scales = scale_layouts.unswizzle(a.scales, rows, width * fmt.elements_per_byte // fmt.block_size, a.layout)
    return dequantize_blocks(codes, scales, fmt).to(dtype)
