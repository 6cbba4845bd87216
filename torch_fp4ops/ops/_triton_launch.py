"""What the launchers of the Triton kernels share: which calls they can take, and how tensors are handed over."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import replay, scale_layouts
from ..capture import refuse_first_use
from ..contracts import Call

__all__ = [
    "INTERPRETED",
    "LAUNCHES_CLUSTERS",
    "LAUNCH_OPTIONS",
    "LAYOUT_CODES",
    "AotCase",
    "Tiling",
    "cut_anew",
    "device_guard",
    "global_scale_form",
    "launch",
    "processors",
    "rows_of_units",
    "why_not",
]

INTERPRETED = bool(triton.knobs.runtime.interpret)
replay.ON_CPU = INTERPRETED

LAYOUT_CODES = {scale_layouts.LINEAR: 0, scale_layouts.SWIZZLED_128X4: 1, scale_layouts.SWIZZLED_8X4: 2}
"""The constants of ``_triton_tiles`` that stand for the scale layouts."""

_OLDEST_CAPABILITY = (8, 0)
EARLY_START_VARIABLE = "TORCH_FP4OPS_EARLY_START"
EARLY_STARTS = {"1": (True, True), "within": (False, True), "0": (False, False)}
"""What it may be: whether a call's first kernel starts early, and whether others do."""

# What CompiledKernel.run takes, which Triton's own launch spends 2 us on collecting, was the same from 3.6 to 3.9, and
# packed_metadata: warps, programs of a cluster, bytes of shared memory.
_KNOWN_TO_RUN = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)

_LONGEST_ROW = 1 << 27

_FARTHEST = 1 << 27
"""Bytes from row to row: 16 of them, the most rows of a tile that is not addressed in 64 bits, span 2 GiB."""

LAUNCHES_CLUSTERS = _KNOWN_TO_RUN
"""Whether :func:`launch` can have thread block clusters, given a GPU that has them."""

LAUNCH_OPTIONS = {
    # Contraction of products and sums into FMAs would change bits; where one is wanted the kernels say fma.
    "enable_fp_fusion": False,
}


class Tiling(NamedTuple):
    """How a matrix of blocks is cut up: R rows by C blocks a step, SPLIT threads a block, ITERS steps a program, each
    loaded AHEAD steps before it is worked on."""

    R: int
    C: int
    ITERS: int = 1
    SPLIT: int = 1
    AHEAD: int = 1

    @property
    def threads(self) -> int:
        return self.R * self.C * self.SPLIT


class AotCase(NamedTuple):
    """A kernel in a configuration that ships, for compilation without a GPU; ``aot_cases()`` of a module lists its own.

    ``signature`` has Triton's types of the arguments that are no constants; pointers are 16-byte aligned, and the
    integers named in ``multiples_of_16`` what that says.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    threads: int
    multiples_of_16: tuple[str, ...] = ()
    max_registers: int | None = None
    on_hip: tuple[dict[str, Any], int] | None = None
    """Constants and threads on ROCm, where those differ."""


def why_not(call: Call) -> str | None:
    """Why Triton can't run the call, for any kernel here."""
    x = call.__dict__.get("input")
    if x is not None and x.dim() and x.shape[-1] >= _LONGEST_ROW:
        return f"input has {x.shape[-1]} columns; kernels find scales of less than {_LONGEST_ROW} in 32 bits"
    return _why_not_on(call.device.type, call.device.index)


@functools.cache
def _why_not_on(device_type: str, index: int | None) -> str | None:
    if INTERPRETED and device_type in ("cpu", "cuda"):
        return None
    if device_type == "cpu":
        return "Triton kernels run on a GPU, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1)"
    if device_type != "cuda":
        return f"Triton kernels run on CUDA and ROCm GPUs, not on {device_type}"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(index)
        if capability < _OLDEST_CAPABILITY:
            return f"Triton kernels need compute capability 8.0 or later, not {capability[0]}.{capability[1]}"
    return None


@functools.cache
def processors(device: torch.device, on_cpu: int = 1) -> int:
    """How many multiprocessors a GPU has; where kernels are interpreted, a number to cut work up by."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else on_cpu


@functools.cache
def _starts_early(device: torch.device, second: bool) -> bool:
    said = os.environ.get(EARLY_START_VARIABLE, "1")
    if said not in EARLY_STARTS:
        raise ValueError(f"{EARLY_START_VARIABLE} is {said!r}; allowed: {', '.join(map(repr, EARLY_STARTS))}")
    if torch.version.hip is not None or device.type != "cuda" or not EARLY_STARTS[said][second]:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _warp_size(device: torch.device) -> int:
    if torch.version.hip is None or device.type == "cpu":
        return 32
    return torch.cuda.get_device_properties(device).warp_size


def _refuse_to_compile_in_capture(before: Callable[..., bool | None] | None) -> Callable[..., bool | None]:
    """A hook that Triton calls where it has no kernel for a specialisation yet, and at no other launch."""

    def hook(**compilation: Any) -> bool | None:
        fn = compilation["fn"]
        if fn.module.startswith("torch_fp4ops."):
            refuse_first_use(f"Triton kernel {fn.name} would be compiled or loaded")
        return before(**compilation) if before is not None else None

    return hook


triton.knobs.runtime.jit_cache_hook = _refuse_to_compile_in_capture(triton.knobs.runtime.jit_cache_hook)


def device_guard(device: torch.device) -> Any:
    """A context in which a device is the current one."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


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
    **constants: Any,
) -> None:
    """Launch a grid of programs of so many threads on a device, which need not be the current one.

    Every launch of a replayable backend is one of this function's. From compute capability 9.0 on it is a programmatic
    dependent one, unless ``TORCH_FP4OPS_EARLY_START`` says otherwise (``EARLY_STARTS``): each kernel is set up while
    the one before it ends, and waits for that (``wait_for_previous``) before it touches memory.

    Args:
        second: what is launched before this on the stream is a kernel of the same call.
        cluster: programs of a thread block cluster, which the grid is a multiple of. The kernel is compiled as one
            without clusters, and what its programs have of each other is its own affair.
        cluster_bytes: shared memory for that, at the end of a program's.
    """
    options: dict[str, Any] = dict(LAUNCH_OPTIONS, num_warps=max(1, threads // _warp_size(device)))
    if _starts_early(device, second):
        options["launch_pdl"] = True
    if max_registers is not None:
        options["maxnreg"] = max_registers
    trace = replay.tracing()
    with device_guard(device), trace.pause() if trace is not None else contextlib.nullcontext():
        if cluster == 1:
            compiled = kernel[grid](*args, **constants, **options)
        else:
            compiled = kernel.run(*args, grid=grid, warmup=True, **constants, **options)
            shared = triton.cdiv(compiled.metadata.shared, 16) * 16 + cluster_bytes
            compiled.packed_metadata = (compiled.packed_metadata[0], cluster, shared)
            grid = (grid[0] // cluster, *grid[1:])  # Triton's are of clusters
            _launcher(compiled, grid, device.index)(*_all_values(kernel, args, constants))
    if trace is not None:
        again = kernel[grid] if INTERPRETED else _launcher(compiled, grid, device.index)
        trace.launched(again, _all_values(kernel, args, constants), addresses=not INTERPRETED)


def _all_values(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> list[Any]:
    values = dict(zip(kernel.arg_names, args, strict=False), **constants)
    return [values[name] for name in kernel.arg_names]


def _launcher(compiled: Any, grid: tuple[int, ...], device: int) -> Callable[..., None]:
    """Launches a compiled kernel on a device's current stream, given values of all parameters."""
    x, y, z = (*grid, 1, 1)[:3]
    by_triton = compiled[x, y, z]
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    current_stream = triton.runtime.driver.active.get_current_stream
    hooks = triton.knobs.runtime

    def launch_again(*values: Any) -> None:
        if _KNOWN_TO_RUN and not hooks.launch_enter_hook.calls and not hooks.launch_exit_hook.calls:
            run(x, y, z, current_stream(device), function, metadata, None, None, None, *values)
        else:
            by_triton(*values, stream=current_stream(device))

    return launch_again


def rows_of_units(x: Tensor, unit: int = 16) -> tuple[Tensor, int]:
    """``x`` as rows whose 16-byte units can be loaded whole, and the distance of two rows in units.

    Flattens all but the last dimension; copies where a view can't have that (strided or unaligned elements), and rows
    that are so far apart that kernels could not index a tile of them in 32 bits.
    """
    rows = x.flatten(0, -2) if x.dim() > 2 else x
    size = x.element_size()
    stride = (rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]) * size
    too_far = stride > max(rows.shape[1] * size, _FARTHEST)
    if rows.stride(1) != 1 or stride % unit or rows.data_ptr() % 16 or too_far:
        rows = rows.clone(memory_format=torch.contiguous_format)
        stride = rows.shape[1] * size
    return rows, stride // unit


def cut_anew(rows: int, blocks: int, columns: int) -> tuple[int, int]:
    """Rows and blocks a row of a contiguous matrix as a program likes them, whose tile has ``columns`` columns.

    A cache's heads have 8 blocks a row; a tile of 128 would leave most of its threads without work.
    """
    count = rows * blocks
    if count % columns == 0:
        return count // columns, columns
    return (1, count) if count < 1 << 24 else (rows, blocks)  # kernels index within a row in 32 bits


def global_scale_form(global_scale: Tensor | None) -> tuple[Tensor | None, int]:
    """A global scale that a kernel can index by row, and the kernels' GLOBAL: 0 none, 1 for all rows, 2 one a row."""
    if global_scale is None:
        return None, 0
    return global_scale.contiguous(), 1 if global_scale.numel() == 1 else 2
