"""Launches the Hopper products of ``_hopper_gemm``, ``_hopper_strips`` and ``_hopper_at_once``, also offline.

Gluon is imported where a kernel is needed, not with this module, so that a Triton whose Gluon does not fit keeps the
backends in plain Triton, which ask ``unavailable`` first.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import scale_layouts
from ..formats import BlockFormat
from ._hopper_kernels import (
    REGISTERS,
    at_once_plan,
    blocks,
    shared_layout,
    strip_blocks,
    strip_plan,
    sum_threads,
    tile_plan,
)
from ._hopper_ways import AtOnce, Cut, Strips, Way, choose, decodes
from ._triton_dequantize import decoded
from ._triton_gemm_launch import Operand, aligned
from ._triton_launch import (
    INTERPRETED,
    LAUNCHES_CLUSTERS,
    LAYOUT_CODES,
    global_scale_form,
    launch,
    processors,
    rows_of_units,
)

__all__ = ["multiply", "product", "unavailable"]

_CAPABILITY = (9, 0)


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why these kernels can't run on a device; None if they can."""
    if INTERPRETED:
        return "Gluon kernels do not run in Triton's interpreter"
    if device.type != "cuda" or torch.version.hip is not None:
        return "these Gluon kernels are for NVIDIA GPUs of compute capability 9.0"
    capability = torch.cuda.get_device_capability(device)
    if capability != _CAPABILITY:
        return f"these Gluon kernels are for compute capability 9.0, not {capability[0]}.{capability[1]}"
    try:
        from . import _hopper_at_once, _hopper_gemm, _hopper_strips  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"this Triton's Gluon lacks what the kernels need: {error}"
    return None


def product(a: Operand, weight: Tensor, scale: Tensor, fmt: BlockFormat, out: Tensor, alpha: Tensor | None) -> None:
    """``out = (a @ w.T) * alpha``, accumulated in fp32 and rounded once.

    Args:
        a: ``[m, k]``, bfloat16, or float16 for NVFP4, or quantised to ``fmt`` with swizzled scales.
        weight, scale: bytes of the layout "hopper", ``[n, K / elements a byte]`` and ``[n, K / block_size]`` or flat,
            with n a multiple of 128 and K, k rounded up to 256.
        out: bfloat16, float16 or float32 ``[m, n]``, contiguous.
        alpha: float32, one element or one a row, or None.
    """
    n = out.shape[1]
    k = weight.shape[1] * fmt.elements_per_byte
    if not a.k:
        out.zero_()
    elif out.numel():
        scale = scale.view(n, k // fmt.block_size)
        cut = choose(
            out.shape[0], n, k, processors(out.device), out.dtype, a.k % 64 == 0, fmt.name, LAUNCHES_CLUSTERS,
            a.scales is not None,
        )  # fmt: skip
        multiply(a, aligned(weight), aligned(scale), fmt, out, alpha, cut)


class _Product(NamedTuple):
    """What the launchers below take."""

    a: Operand
    weight: Tensor
    scale: Tensor
    fmt: BlockFormat
    out: Tensor
    alpha: Any
    alpha_form: int
    cut: Cut
    second: bool
    """Behind a kernel of the same call, which decoded the activations."""


def multiply(
    a: Operand, weight: Tensor, scale: Tensor, fmt: BlockFormat, out: Tensor, alpha: Tensor | None, cut: Cut
) -> None:
    """``product``, cut up in a given way."""
    alpha, alpha_form = global_scale_form(alpha)
    second = a.scales is not None and not decodes(cut.way, fmt.name, a.k, out.shape[0])
    if second:
        a = Operand(decoded(a, torch.bfloat16))
    given = _Product(a, weight, scale, fmt, out, alpha, alpha_form, cut, second)
    if isinstance(cut.way, AtOnce):
        _multiply_at_once(given)
    elif isinstance(cut.way, Strips):
        _multiply_strips(given)
    else:
        _multiply_tiles(given)


def _multiply_tiles(given: _Product) -> None:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ._hopper_gemm import matmul_kernel
    from ._hopper_schedule import sum_parts_kernel

    a, weight, scale, fmt, out, alpha, alpha_form, cut, second = given
    x, _ = _whole_rows(a.elements)
    way = cut.way
    assert isinstance(way, Way)
    m, n = out.shape
    tiles = cut.tiles_m * cut.tiles_n
    one_tile = tiles == cut.programs
    plan = tile_plan(way, fmt.name, x.dtype, out.dtype, alpha_form, m, one_tile)
    plan = plan._replace(STREAM=cut.parts > 1, SUM_EARLY=cut.sum_early)
    rows, words = shared_layout(128, 16, 2), shared_layout(0, 32, 2)
    x_desc = TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [plan.X_ROWS, 64], rows)
    weight_descs = []
    for data, block in zip((weight, scale), blocks(plan), strict=True):
        view = data.view(torch.int32).view(-1, block[1])
        weight_descs.append(TensorDescriptor(view, list(view.shape), [block[1], 1], block, words))
    out_desc = TensorDescriptor(out, [m, n], [n, 1], [plan.OUT_ROWS, 64], rows) if plan.TMA_STORE else None
    sums = None
    if cut.parts > 1:
        sums = torch.empty(2 * cut.programs * way.rows * way.BM, dtype=torch.float32, device=out.device)
    each, more = divmod(tiles * cut.trips, cut.programs)
    sizes = (m, n, cut.tiles_m, cut.tiles_n, cut.trips, each, more)
    args = (x_desc, *weight_descs, out_desc, out, sums, alpha, *sizes)
    how: dict[str, Any] = {"max_registers": REGISTERS[way.RESIDENT][0], "second": second}
    how |= {"cluster": plan.CLUSTER, "cluster_bytes": plan.CLUSTER_BYTES}
    launch(matmul_kernel, (cut.programs,), 128, out.device, *args, **how, **plan._asdict())
    if sums is not None:
        grid = (tiles * plan.SUBS, triton.cdiv(min(way.BM, m), cut.sum_rows))
        shared: dict[str, Any] = {"BM": plan.BM, "BAND": plan.BAND, "ALPHA": plan.ALPHA, "FACTOR": plan.FACTOR}
        shared |= {"SUBS": plan.SUBS, "ROWS": cut.sum_rows, "PARTS": cut.parts, "EARLY": cut.sum_early}
        shared["ALIKE"] = not more and cut.trips == each * cut.parts
        args = (sums, out, alpha, *sizes)
        launch(sum_parts_kernel, grid, sum_threads(cut.sum_rows), out.device, *args, second=True, **shared)


def _multiply_strips(given: _Product) -> None:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ._hopper_strips import strips_kernel

    a, weight, scale, fmt, out, alpha, alpha_form, cut, second = given
    way = cut.way
    assert isinstance(way, Strips)
    m, n = out.shape
    x, x_units = _whole_rows(a.elements)
    rows: tuple[Any, ...] = ()
    x_layout = 0
    if a.scales is not None:
        words, x_scales, x_layout, x_cols = _quantized_words(x, a, m, fmt)
        rows = (None, words, x_scales, x_units, x_cols)
    plan = strip_plan(way, fmt.name, x.dtype, x_layout, alpha_form)
    x_block, *weight_blocks = strip_blocks(plan)
    if a.scales is None:
        shape, strides = [a.k // 64, m, 64], [64, x.stride(0), 1]
        rows = (TensorDescriptor(x, shape, strides, x_block, shared_layout(128, 16, 3)), None, None, 0, 0)
    steps = n // 128 * cut.trips
    codes = weight.view(torch.int32).view(steps, 2 * plan.PLANES, 4, 128)
    scales = scale.view(torch.int32).view(steps, 8, plan.SCALE_WORDS)
    weight_descs = [
        TensorDescriptor(words, list(words.shape), list(words.stride()), block, shared_layout(0, 32, words.dim()))
        for words, block in zip((codes, scales), weight_blocks, strict=True)
    ]
    args = (rows[0], *weight_descs, *rows[1:], out, alpha, m, n, a.k // 64, cut.trips)
    launch(strips_kernel, (cut.programs,), 128, out.device, *args, second=second, **plan._asdict())


def _multiply_at_once(given: _Product) -> None:
    from ._hopper_at_once import at_once_kernel

    a, weight, scale, fmt, out, alpha, alpha_form, cut, second = given
    way = cut.way
    assert isinstance(way, AtOnce)
    m, n = out.shape
    x, x_units = _whole_rows(a.elements)
    x_scales, x_layout, x_cols = None, 0, 0
    if a.scales is not None:
        x, x_scales, x_layout, x_cols = _quantized_words(x, a, m, fmt)
    plan = at_once_plan(way, fmt.name, x.dtype, cut.trips, x_layout, alpha_form)
    if plan.BY_WARP:
        x = x.view(torch.int16)
    words = (data.view(torch.int32) for data in (weight, scale))
    args = (x, x_scales, x_units, x_cols, *words, out, alpha, m, n, a.k // 64)
    launch(at_once_kernel, (cut.programs,), 32 * plan.WARPS, out.device, *args, second=second, **plan._asdict())


def _quantized_words(x: Tensor, a: Operand, m: int, fmt: BlockFormat) -> tuple[Tensor, Tensor, int, int]:
    """Rows as words, their scales as words, the code of the scales' layout, and scales a padded row."""
    assert a.scales is not None
    cols = scale_layouts.scale_shape(m, a.k // fmt.block_size, a.layout)[1]
    return x.view(torch.int32), a.scales.view(-1).view(torch.int32), LAYOUT_CODES[a.layout], cols


def _whole_rows(x: Tensor) -> tuple[Tensor, int]:
    """As :func:`rows_of_units`; one row alone may have any stride, which neither TMA nor a view as words takes.

    Nor is TMA given rows that are all the same one.
    """
    rows, units = rows_of_units(x)
    if not units:
        rows, units = rows_of_units(x.contiguous())
    return rows.as_strided(rows.shape, (16 * units // rows.element_size(), 1)), units
