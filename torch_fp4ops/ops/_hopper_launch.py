"""Launches the Hopper products of ``_hopper_gemm`` and ``_hopper_strips``: descriptors, workspace, offline cases.

Gluon is imported where a kernel is needed, not with this module, so that a Triton whose Gluon does not fit keeps the
backends in plain Triton, which ask ``unavailable`` first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from .. import scale_layouts
from ..formats import BlockFormat
from ._hopper_plan import Plan, StripPlan, power_of_two_within
from ._hopper_ways import STRIPS, WAYS, Cut, Strips, Way, choose, decodes
from ._triton_dequantize import decoded
from ._triton_gemm_launch import Operand
from ._triton_launch import INTERPRETED, LAYOUT_CODES, AotCase, global_scale_form, launch, processors, rows_of_units

__all__ = ["multiply", "product", "unavailable"]

_CAPABILITY = (9, 0)

_REGISTERS = {1: (None, 240), 2: (80, 104)}
"""By resident programs, for tiles: the registers a thread that a program starts with, and those of its warp groups."""
_SHARED_BYTES = 227 * 1024
_BARRIER_BYTES = 3072  # generously


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
        from . import _hopper_gemm, _hopper_strips  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"this Triton's Gluon lacks what the kernels need: {error}"
    return None


def product(a: Operand, weight: Tensor, scale: Tensor, fmt: BlockFormat, out: Tensor, alpha: Tensor | None) -> None:
    """``out = (a @ w.T) * alpha``, accumulated in fp32 and rounded once.

    Args:
        a: ``[m, k]``, bfloat16, or float16 for NVFP4, or quantised to ``fmt`` with swizzled scales.
        weight, scale: bytes of the layout "hopper", ``[n, K / elements a byte]`` and ``[n, K / block_size]``, with n a
            multiple of 128 and K, k rounded up to 256.
        out: bfloat16, float16 or float32 ``[m, n]``, contiguous.
        alpha: float32, one element or one a row, or None.
    """
    n = out.shape[1]
    k = weight.shape[1] * fmt.elements_per_byte
    if out.numel():
        cut = choose(out.shape[0], n, k, processors(out.device), out.dtype, a.k % 64 == 0, fmt.name)
        multiply(a, weight, scale, fmt, out, alpha, cut)


def multiply(
    a: Operand, weight: Tensor, scale: Tensor, fmt: BlockFormat, out: Tensor, alpha: Tensor | None, cut: Cut
) -> None:
    """``product``, cut up in a given way."""
    alpha, alpha_form = global_scale_form(alpha)
    if a.scales is not None and not decodes(cut.way, fmt.name, a.k):
        a = Operand(decoded(a, torch.bfloat16))
    if isinstance(cut.way, Strips):
        _multiply_strips(a, weight, scale, fmt, out, alpha, alpha_form, cut)
    else:
        _multiply_tiles(a.elements, weight, scale, fmt, out, alpha, alpha_form, cut)


def _multiply_tiles(
    x: Tensor, weight: Tensor, scale: Tensor, fmt: BlockFormat, out: Tensor, alpha: Any, alpha_form: int, cut: Cut
) -> None:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ._hopper_gemm import matmul_kernel
    from ._hopper_schedule import sum_parts_kernel

    x, _ = _whole_rows(x)
    way = cut.way
    assert isinstance(way, Way)
    m, n = out.shape
    one_tile = cut.tiles_m * cut.tiles_n == cut.programs
    plan = _plan(way, fmt.name, x.dtype, out.dtype, alpha_form, m, one_tile)
    plan = plan._replace(STREAM=cut.parts > 1, SUM_EARLY=cut.sum_early)
    rows, words = _layout(128, 16, 2), _layout(0, 32, 2)
    x_desc = TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [plan.X_ROWS, 64], rows)
    weight_descs = []
    for data, block in zip((weight, scale), _blocks(plan), strict=True):
        view = data.view(torch.int32).view(-1, block[1])
        weight_descs.append(TensorDescriptor(view, list(view.shape), [block[1], 1], block, words))
    out_desc = TensorDescriptor(out, [m, n], [n, 1], [plan.OUT_ROWS, 64], rows) if plan.TMA_STORE else None
    sums = None
    if cut.parts > 1:
        sums = torch.empty(2 * cut.programs * way.rows * way.BM, dtype=torch.float32, device=out.device)
    sizes = (m, n, cut.tiles_m, cut.tiles_n, cut.trips)
    args = (x_desc, *weight_descs, out_desc, out, sums, alpha, *sizes)
    most = _REGISTERS[way.RESIDENT][0]
    launch(matmul_kernel, (cut.programs,), 128, out.device, *args, max_registers=most, **plan._asdict())
    if sums is not None:
        grid = (cut.tiles_m * cut.tiles_n * plan.SUBS, triton.cdiv(min(way.BM, m), cut.sum_rows))
        shared: dict[str, Any] = {"BM": plan.BM, "BAND": plan.BAND, "ALPHA": plan.ALPHA, "FACTOR": plan.FACTOR}
        shared |= {"SUBS": plan.SUBS, "ROWS": cut.sum_rows, "PARTS": cut.parts, "EARLY": cut.sum_early}
        args = (sums, out, alpha, *sizes, cut.programs)
        launch(sum_parts_kernel, grid, _sum_threads(cut.sum_rows), out.device, *args, **shared)


def _sum_threads(rows: int) -> int:
    """Of a program that adds parts of so many rows up."""
    return max(8 * rows, 128)


def _multiply_strips(
    a: Operand, weight: Tensor, scale: Tensor, fmt: BlockFormat, out: Tensor, alpha: Any, alpha_form: int, cut: Cut
) -> None:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ._hopper_strips import strips_kernel

    way = cut.way
    assert isinstance(way, Strips)
    m, n = out.shape
    x, x_units = _whole_rows(a.elements)
    x_layout = 0 if a.scales is None else LAYOUT_CODES[a.layout]
    plan = _strip_plan(way, fmt.name, x.dtype, x_layout, alpha_form)
    x_block, *weight_blocks = _strip_blocks(plan)
    rows: tuple[Any, ...]
    if a.scales is None:
        shape, strides = [a.k // 64, m, 64], [64, x.stride(0), 1]
        rows = (TensorDescriptor(x, shape, strides, x_block, _layout(128, 16, 3)), None, None, 0, 0)
    else:
        x_cols = scale_layouts.scale_shape(m, a.k // fmt.block_size, a.layout)[1]
        rows = (None, x.view(torch.int32), a.scales.view(-1).view(torch.int32), x_units, x_cols)
    steps = n // 128 * cut.trips
    codes = weight.view(torch.int32).view(steps, 2 * plan.PLANES, 4, 128)
    scales = scale.view(torch.int32).view(steps, 8, plan.SCALE_WORDS)
    weight_descs = [
        TensorDescriptor(words, list(words.shape), list(words.stride()), block, _layout(0, 32, words.dim()))
        for words, block in zip((codes, scales), weight_blocks, strict=True)
    ]
    args = (rows[0], *weight_descs, *rows[1:], out, alpha, m, n, a.k // 64, cut.trips)
    launch(strips_kernel, (cut.programs,), 128, out.device, *args, **plan._asdict())


def _whole_rows(x: Tensor) -> tuple[Tensor, int]:
    """As :func:`rows_of_units`; one row alone may have any stride, which neither TMA nor a view as words takes."""
    rows, units = rows_of_units(x)
    return rows.as_strided(rows.shape, (16 * units // rows.element_size(), 1)), units


@functools.cache
def _layout(swizzle: int, bits: int, rank: int) -> Any:
    """Shared memory that TMA fills."""
    import triton.experimental.gluon.language as gl

    return gl.NVMMASharedLayout(swizzle, bits, rank=rank)


def _rows_at_once(tile: int, m: int) -> int:
    """Rows of x a TMA load, given those of a tile: fewer where a large part of the last tile lies beyond m.

    Zeros for rows beyond take longer than rows (192 rows of 4096 x 4096: 24 instead of 16 us), as do many small loads.
    """
    if m % tile == 0 or tile < 64:
        return tile & -tile  # which divides both accumulators' rows
    if tile == 64:
        return 32 if m % tile <= 32 else 64
    return power_of_two_within(tile // 4)


def _blocks(plan: Plan) -> tuple[list[int], list[int]]:
    """What a TMA load takes of codes and of scales, in words."""
    return [plan.LOAD_HALVES * plan.CODE_ROWS, 64], [plan.LOAD_HALVES, plan.SCALE_WORDS]


def _strip_blocks(plan: StripPlan) -> tuple[list[int], list[int], list[int]]:
    """What a TMA load takes of x, and, in words, of codes and of scales."""
    return [plan.KS, plan.BM, 64], [plan.KS, plan.PLANES, plan.BOX, 128], [plan.KS, plan.BOX, plan.SCALE_WORDS]


def _plan(
    way: Way,
    fmt: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    alpha_form: int,
    m: int = 0,
    one_tile: bool = False,
) -> Plan:
    """``one_tile``: each program has one."""
    from ._hopper_decode import FACTORS

    plan = Plan(
        FMT=fmt,
        HALF=dtype == torch.float16,
        BM=way.BM,
        X_ROWS=_rows_at_once(way.BM, m),
        R=way.R,
        KW=way.KW,
        KS=way.KS,
        STAGES=way.STAGES,
        AHEAD=way.AHEAD,
        STREAM=way.STREAM,
        SUM_EARLY=False,
        ONCE=way.ONCE,
        # The others are stored by threads: narrow tiles and shared ones gain little, and float32 has no room.
        TMA_STORE=way.BM >= 64 and (way.R == 2 or not way.STREAM) and out_dtype != torch.float32,
        BAND=way.BAND,
        ALPHA=alpha_form,
        FACTOR=FACTORS[fmt],
        REGISTERS=_REGISTERS[way.RESIDENT][1],
    )
    if fmt == "mxfp8":
        # Weights are twice as large: as many stages as have room, which results of a program's one tile share.
        once = way.ONCE or (one_tile and plan.TMA_STORE and plan.SUBS == 2)
        plan = plan._replace(KS=min(way.KS, 2), ONCE=once)
        room = _SHARED_BYTES // way.RESIDENT - _BARRIER_BYTES - plan.RESULT_BYTES
        most = room // plan.STAGE_BYTES // way.KW * way.KW
        plan = plan._replace(STAGES=min(way.STAGES * way.KS // plan.KS, most))
    assert plan.STAGES >= plan.LEAST_STAGES, plan
    return plan


def _strip_plan(way: Strips, fmt: str, dtype: torch.dtype, x_layout: int, alpha_form: int) -> StripPlan:
    from ._hopper_decode import FACTORS

    plan = StripPlan(
        FMT=fmt,
        HALF=dtype == torch.float16,
        BM=way.BM,
        S=way.S,
        KS=way.KS,
        STAGES=way.STAGES,
        OWN=way.OWN,
        X_LAYOUT=x_layout,
        ALPHA=alpha_form,
        FACTOR=FACTORS[fmt] ** (2 if x_layout else 1),
    )
    assert plan.STAGES >= plan.LEAST_STAGES and plan.STAGES % plan.TURNS == 0, plan
    assert plan.STAGES * plan.STAGE_BYTES + _BARRIER_BYTES <= _SHARED_BYTES, plan
    return plan


# What is compiled offline

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def offline_cases() -> Iterator[AotCase]:
    """Every way for NVFP4, those with the largest and the smallest tiles otherwise, and sums of parts; for sm_90."""
    from ._hopper_schedule import sum_parts_kernel

    tiles = {}
    for way in WAYS:
        # A narrow way that streams does not where each program's share is a whole tile; one is another way then.
        for stream in (True, False) if way.STREAM and way.BM < 64 else (way.STREAM,):
            case = _offline_case(way, "nvfp4", stream=stream)
            tiles[case.name] = case
    yield from tiles.values()
    once = next(way for way in WAYS if way.ONCE)
    alone = {(way.BM, way.rows, way.STREAM): way for way in WAYS if way.RESIDENT == 1}
    shared, tall, most = alone[128, 64, False], alone[192, 128, False], alone[256, 128, False]
    wide, wide_stream = alone[128, 256, False], alone[128, 256, True]
    for way in (shared, once, tall, most):
        yield _offline_case(way, "nvfp4", m=way.BM // 4)
    yield _offline_case(once, "mxfp8", m=once.BM // 4)
    for way in (alone[128, 128, False], tall, most):
        yield _offline_case(way, "mxfp8", one_tile=True)
    for way in (WAYS[0], WAYS[2], shared, wide_stream, wide, tall, most):
        yield _offline_case(way, "mxfp4")
        yield _offline_case(way, "mxfp8")
    for way in (WAYS[0], wide, tall, most):
        yield _offline_case(way, "nvfp4", torch.float16, torch.float16)
    for way in (alone[96, 128, False], alone[128, 128, False]):
        yield _offline_case(way, "nvfp4", out_dtype=torch.float32, alpha_form=2)
    ints = dict.fromkeys(("M", "N", "tiles_m", "tiles_n", "TRIPS", "programs"), "i32")
    signature = {"sums": "*fp32", "out": "*bf16", "alpha": "*fp32", **ints}
    summed = ((8, 2, 2, 8), (64, 2, 1, 16), (64, 4, 2, 32), (96, 4, 2, 64), (256, 9, 2, 64), (256, 9, 2, 16))
    for bm, parts, subs, rows in summed:
        constants = {
            "BM": bm,
            "SUBS": subs,
            "BAND": 8,
            "ALPHA": 1,
            "FACTOR": 128.0,
            "ROWS": rows,
            "PARTS": parts,
            "EARLY": rows != 16,
        }
        name = f"hopper-sum-{bm}x{parts}-{rows}"
        yield AotCase(name, sum_parts_kernel, signature, constants, _sum_threads(rows), ("N",))
    for fmt in ("nvfp4", "mxfp8"):
        for strips in STRIPS[fmt]:
            if decodes(strips, fmt, 256):
                yield _offline_strips(strips, fmt, x_layout=1)
            if fmt == "nvfp4" or not decodes(strips, fmt, 1 << 16):
                yield _offline_strips(strips, fmt)
    first, *_, last = STRIPS["mxfp4"]
    for strips in (first, last):
        yield _offline_strips(strips, "mxfp4")
    yield _offline_strips(first, "mxfp4", x_layout=1)
    yield _offline_strips(first, "nvfp4", x_layout=2)
    yield _offline_strips(last, "nvfp4", torch.float16, torch.float32, alpha_form=2)


def _offline_case(
    way: Way,
    fmt: str,
    dtype: torch.dtype = torch.bfloat16,
    out_dtype: torch.dtype = torch.bfloat16,
    alpha_form: int = 1,
    stream: bool = True,
    m: int = 0,
    one_tile: bool = False,
) -> AotCase:
    from ._hopper_gemm import matmul_kernel

    plan = _plan(way, fmt, dtype, out_dtype, alpha_form, m, one_tile)
    plan = plan._replace(STREAM=plan.STREAM and stream, SUM_EARLY=plan.STREAM and stream)
    constants: dict[str, Any] = plan._asdict()
    layouts, blocks = (_layout(128, 16, 2), _layout(0, 32, 2)), _blocks(plan)
    signature = {
        "x_desc": f"tensordesc<{_TYPES[dtype]}[{plan.X_ROWS}, 64],{layouts[0]!r}>",
        "codes_desc": f"tensordesc<i32{blocks[0]},{layouts[1]!r}>",
        "scales_desc": f"tensordesc<i32{blocks[1]},{layouts[1]!r}>",
        "out": f"*{_TYPES[out_dtype]}",
        "alpha": "*fp32",
        **dict.fromkeys(("M", "N", "tiles_m", "tiles_n", "TRIPS"), "i32"),
    }
    if plan.TMA_STORE:
        signature["out_desc"] = f"tensordesc<{_TYPES[out_dtype]}[{plan.OUT_ROWS}, 64],{layouts[0]!r}>"
    if plan.STREAM:
        signature["sums"] = "*fp32"
    for name in ("out_desc", "sums"):
        if name not in signature:
            constants[name] = None
    kind = f"{fmt}-{_TYPES[dtype]}-{_TYPES[out_dtype]}"
    tile = f"{way.BM}x{way.rows}{f'-kw{way.KW}' * (way.KW > 1)}{'-stream' * plan.STREAM}{'-once' * plan.ONCE}"
    tile += f"-{plan.STAGES}x{plan.KS}-{way.RESIDENT}{f'-rows{plan.X_ROWS}' * (plan.X_ROWS < way.BM)}"
    most = _REGISTERS[way.RESIDENT][0]
    return AotCase(f"hopper-{kind}-{tile}", matmul_kernel, signature, constants, 128, ("N",), most)


def _offline_strips(
    way: Strips,
    fmt: str,
    dtype: torch.dtype = torch.bfloat16,
    out_dtype: torch.dtype = torch.bfloat16,
    x_layout: int = 0,
    alpha_form: int = 1,
) -> AotCase:
    from ._hopper_strips import strips_kernel

    plan = _strip_plan(way, fmt, dtype, x_layout, alpha_form)
    constants: dict[str, Any] = plan._asdict()
    x_block, codes_block, scales_block = _strip_blocks(plan)
    rows = {"x_desc": f"tensordesc<{_TYPES[dtype]}{x_block},{_layout(128, 16, 3)!r}>"}
    if x_layout:
        rows = {"x": "*i32", "x_scales": "*i32"}
    constants |= dict.fromkeys({"x_desc", "x", "x_scales"} - rows.keys())
    signature = {
        **rows,
        "codes_desc": f"tensordesc<i32{codes_block},{_layout(0, 32, 4)!r}>",
        "scales_desc": f"tensordesc<i32{scales_block},{_layout(0, 32, 3)!r}>",
        "out": f"*{_TYPES[out_dtype]}",
        "alpha": "*fp32",
        **dict.fromkeys(("x_units", "x_cols", "M", "N", "K_STEPS", "STEPS"), "i32"),
    }
    given = f"x{x_layout}" if x_layout else _TYPES[dtype]
    name = f"hopper-strips-{fmt}-{given}-{_TYPES[out_dtype]}-{way.BM}x{way.S}x{way.KS}"
    return AotCase(name, strips_kernel, signature, constants, 128, ("N",))
