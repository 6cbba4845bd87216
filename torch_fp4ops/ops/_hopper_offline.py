"""The Hopper products as they are compiled offline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

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
from ._hopper_ways import AT_ONCE, STRIPS, WAYS, AtOnce, Strips, Way, decodes, float32_ways
from ._triton_launch import AotCase

__all__ = ["offline_cases"]

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def offline_cases() -> Iterator[AotCase]:
    """Every way for NVFP4, those with the largest and the smallest tiles otherwise, and sums of parts; for sm_90."""
    from ._hopper_schedule import sum_parts_kernel

    tiles = {}
    for way in WAYS:
        # A narrow way that streams does not where each program's share is a whole tile; one is another way then.
        for stream in (True, False) if way.STREAM and way.BM < 64 else (way.STREAM,):
            for one_tile in (False, True):
                case = _offline_case(way, "nvfp4", stream=stream, one_tile=one_tile and not stream)
                tiles[case.name] = case
    yield from tiles.values()
    once = next(way for way in WAYS if way.ONCE)
    alone = {(way.BM, way.rows, way.STREAM): way for way in WAYS if way.RESIDENT == way.CLUSTER == 1}
    shared, tall, most = alone[128, 64, False], alone[192, 128, False], alone[256, 128, False]
    wide, wide_stream = alone[128, 256, False], alone[128, 256, True]
    for way in (shared, once, tall, most):
        yield _offline_case(way, "nvfp4", m=1)
    yield _offline_case(once, "mxfp8", m=1)
    for way in (alone[128, 128, False], tall, most):
        yield _offline_case(way, "mxfp8", one_tile=True)
    for way in (WAYS[0], WAYS[2], shared, wide_stream, wide, tall, most):
        yield _offline_case(way, "mxfp4")
        yield _offline_case(way, "mxfp8")
    for way in (WAYS[0], wide, tall, most):
        yield _offline_case(way, "nvfp4", torch.float16, torch.float16)
    clustered = [way for way in WAYS if way.CLUSTER > 1]
    for way in clustered[::3]:
        yield _offline_case(way, "mxfp8")
    for way in (alone[96, 128, False], alone[128, 128, False], float32_ways(clustered)[-1]):
        yield _offline_case(way, "nvfp4", out_dtype=torch.float32, alpha_form=2)
    ints = dict.fromkeys(("M", "N", "tiles_m", "tiles_n", "TRIPS", "each", "more"), "i32")
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
            "ALIKE": rows != 16,
            "EARLY": rows != 16,
        }
        name = f"hopper-sum-{bm}x{parts}-{rows}"
        yield AotCase(name, sum_parts_kernel, signature, constants, sum_threads(rows), ("N",))
    for fmt in ("nvfp4", "mxfp8"):
        for strips in STRIPS[fmt]:
            if decodes(strips, fmt, 256, 1):
                yield _offline_strips(strips, fmt, x_layout=1)
            if fmt == "nvfp4" or not decodes(strips, fmt, 1 << 16, 1):
                yield _offline_strips(strips, fmt)
    first, *_, last = STRIPS["mxfp4"]
    for strips in (first, last):
        yield _offline_strips(strips, "mxfp4")
    yield _offline_strips(first, "mxfp4", x_layout=1)
    yield _offline_strips(first, "nvfp4", x_layout=2)
    yield _offline_strips(last, "nvfp4", torch.float16, torch.float32, alpha_form=2)
    for each in AT_ONCE:
        steps = 100 // (each.S + each.BM // 8)  # about as many as there is room for
        yield _offline_at_once(each, "nvfp4", steps)
        for fmt in ("mxfp4", "mxfp8"):
            yield _offline_at_once(each, fmt, steps // (2 if fmt == "mxfp8" else 1), x_layout=1)
    yield _offline_at_once(AT_ONCE[0], "nvfp4", 64, x_layout=2)
    yield _offline_at_once(AT_ONCE[0], "mxfp8", 64)
    for each, steps in ((AtOnce(8, 1), 112), (AtOnce(8, 4), 32), (AtOnce(16, 2), 64)):  # rows decoded by each warp
        yield _offline_at_once(each, "mxfp8", steps, x_layout=1)
    yield _offline_at_once(AT_ONCE[-1], "nvfp4", 12, torch.float16, torch.float32, alpha_form=2)


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

    plan = tile_plan(way, fmt, dtype, out_dtype, alpha_form, m, one_tile)
    plan = plan._replace(STREAM=plan.STREAM and stream, SUM_EARLY=plan.STREAM and stream)
    constants: dict[str, Any] = plan._asdict()
    layouts, weight_blocks = (shared_layout(128, 16, 2), shared_layout(0, 32, 2)), blocks(plan)
    signature = {
        "x_desc": f"tensordesc<{_TYPES[dtype]}[{plan.X_ROWS}, 64],{layouts[0]!r}>",
        "codes_desc": f"tensordesc<i32{weight_blocks[0]},{layouts[1]!r}>",
        "scales_desc": f"tensordesc<i32{weight_blocks[1]},{layouts[1]!r}>",
        "out": f"*{_TYPES[out_dtype]}",
        "alpha": "*fp32",
        **dict.fromkeys(("M", "N", "tiles_m", "tiles_n", "TRIPS", "each", "more"), "i32"),
    }
    if plan.TMA_STORE:
        signature["out_desc"] = f"tensordesc<{_TYPES[out_dtype]}[{plan.OUT_ROWS}, 64],{layouts[0]!r}>"
    if plan.STREAM:
        signature["sums"] = "*fp32"
    for name in ("out_desc", "sums"):
        if name not in signature:
            constants[name] = None
    kind = f"{fmt}-{_TYPES[dtype]}-{_TYPES[out_dtype]}"
    tile = f"{way.BM}x{way.rows}{f'-kw{way.KW}' * (way.KW > 1)}{'-stream' * plan.STREAM}"
    tile += f"{f'-cluster{plan.CLUSTER}' * (plan.CLUSTER > 1)}{'-once' * plan.ONCE}{('', '-rows', '-tma')[plan.STORE]}"
    tile += f"-{plan.STAGES}x{plan.KS}-{way.RESIDENT}{f'-by{plan.X_ROWS}' * (plan.X_ROWS < way.BM)}"
    most = REGISTERS[way.RESIDENT][0]
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

    plan = strip_plan(way, fmt, dtype, x_layout, alpha_form)
    constants: dict[str, Any] = plan._asdict()
    x_block, codes_block, scales_block = strip_blocks(plan)
    rows = {"x_desc": f"tensordesc<{_TYPES[dtype]}{x_block},{shared_layout(128, 16, 3)!r}>"}
    if x_layout:
        rows = {"x": "*i32", "x_scales": "*i32"}
    constants |= dict.fromkeys({"x_desc", "x", "x_scales"} - rows.keys())
    signature = {
        **rows,
        "codes_desc": f"tensordesc<i32{codes_block},{shared_layout(0, 32, 4)!r}>",
        "scales_desc": f"tensordesc<i32{scales_block},{shared_layout(0, 32, 3)!r}>",
        "out": f"*{_TYPES[out_dtype]}",
        "alpha": "*fp32",
        **dict.fromkeys(("x_units", "x_cols", "M", "N", "K_STEPS", "STEPS"), "i32"),
    }
    given = f"x{x_layout}" if x_layout else _TYPES[dtype]
    name = f"hopper-strips-{fmt}-{given}-{_TYPES[out_dtype]}-{way.BM}x{way.S}x{way.KS}"
    return AotCase(name, strips_kernel, signature, constants, 128, ("N",))


def _offline_at_once(
    way: AtOnce,
    fmt: str,
    steps: int,
    dtype: torch.dtype = torch.bfloat16,
    out_dtype: torch.dtype = torch.bfloat16,
    x_layout: int = 0,
    alpha_form: int = 1,
) -> AotCase:
    from ._hopper_at_once import at_once_kernel

    plan = at_once_plan(way, fmt, dtype, steps, x_layout, alpha_form)
    constants: dict[str, Any] = plan._asdict()
    rows = {"x": f"*{_TYPES[dtype]}"}
    if x_layout:
        rows = {"x": "*i16" if plan.BY_WARP else "*i32", "x_scales": "*i32"}
    else:
        constants["x_scales"] = None
    signature = {
        **rows,
        **{"codes": "*i32", "scales": "*i32", "out": f"*{_TYPES[out_dtype]}", "alpha": "*fp32"},
        **dict.fromkeys(("x_units", "x_cols", "M", "N", "K_STEPS"), "i32"),
    }
    given = f"x{x_layout}" if x_layout else _TYPES[dtype]
    name = f"hopper-at-once-{fmt}-{given}-{_TYPES[out_dtype]}-{way.BM}x{way.S}x{steps}"
    return AotCase(name, at_once_kernel, signature, constants, 32 * plan.WARPS, ("N",))
