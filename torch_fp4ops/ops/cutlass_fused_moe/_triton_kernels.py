"""What surrounds the grouped products of cutlass_fused_moe: routing before them, the weighted sum after them."""

# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton_prims as p
from .._triton_launch import AotCase, launch


class Routing(NamedTuple):
    """Routed rows, one for each (token, k), grouped by expert; sizes depend on shapes alone.

    ``order`` holds the rows by local expert; nothing defined stands where foreign experts' would be. ``schedule`` has
    for each tile of rows its expert (-1: none), its first place in ``order`` and the one past its expert's last.
    """

    schedule: Tensor
    order: Tensor


# One program sorts up to so many comparisons of a row with an expert; more are left to torch's parallel sort.
_SORTED_BY_ONE_PROGRAM = 1 << 18
_COMPARED_AT_ONCE = 1 << 12
_ROUTE_THREADS = 512
_UNROLLED = tl.constexpr(32)  # a token's rows whose loads are written out; 256 of them took 70 s to compile
_UNIT = tl.constexpr(16)  # hidden and inter are multiples of it in every mode, and 16-byte accesses need to know


def route(expert_ids: Tensor, first_expert: int, experts: int, rows_a_tile: int) -> Routing:
    """Where each expert's rows are. Nothing here synchronises: there are as many tiles as there could be."""
    rows = expert_ids.numel()
    tiles = triton.cdiv(rows, rows_a_tile) + min(experts, rows)
    columns = triton.next_power_of_2(experts)
    if rows * columns > _SORTED_BY_ONE_PROGRAM:
        return _route_with_torch(expert_ids, first_expert, experts, rows_a_tile, tiles)
    schedule = expert_ids.new_empty((tiles, 3), dtype=torch.int32)
    order = expert_ids.new_empty(rows, dtype=torch.int64)
    constants = {"E": columns, "CHUNK": _chunk(columns)}
    sizes = (rows, first_expert, experts, tiles, rows_a_tile)
    launch(
        route_kernel, (1,), _ROUTE_THREADS, order.device, expert_ids.contiguous(), order, schedule, *sizes, **constants
    )
    return Routing(schedule, order)


def _chunk(columns: int) -> int:
    return max(1, _COMPARED_AT_ONCE // columns)


def _route_with_torch(expert_ids: Tensor, first_expert: int, experts: int, rows_a_tile: int, tiles: int) -> Routing:
    local = expert_ids.reshape(-1).long() - first_expert
    own = (local >= 0) & (local < experts)
    group, order = torch.where(own, local, experts).sort(stable=True)
    device = local.device
    starts = torch.searchsorted(group, torch.arange(experts + 1, device=device))
    tiles_of = (starts.diff() + (rows_a_tile - 1)) // rows_a_tile
    tiles_up_to = tiles_of.cumsum(0)
    tile = torch.arange(tiles, device=device)
    expert = torch.searchsorted(tiles_up_to, tile, right=True)
    some = expert.clamp(max=experts - 1)
    first = starts[some] + (tile - tiles_up_to[some] + tiles_of[some]) * rows_a_tile
    schedule = torch.stack((torch.where(expert < experts, expert, -1), first, starts[some + 1]), 1)
    return Routing(schedule.int(), order)


@triton.jit
def _is_expert(ids_ptr, i, rows, first_expert, experts, E: tl.constexpr):
    """Which local expert each row has, as ones in ``[rows, E]``; foreign ones have none."""
    expert = tl.load(ids_ptr + i, mask=i < rows, other=-1).to(tl.int64) - first_expert
    expert = tl.where((i < rows) & (expert >= 0) & (expert < experts), expert, -1)
    return (expert[:, None] == tl.arange(0, E)[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["rows", "first_expert", "experts", "tiles", "rows_a_tile"])
def route_kernel(
    ids_ptr,
    order_ptr,
    schedule_ptr,
    rows,
    first_expert,
    experts,
    tiles,
    rows_a_tile,
    E: tl.constexpr,  # a power of two, at least the number of experts
    CHUNK: tl.constexpr,
):
    """A stable counting sort by one program: count, then place."""
    p.wait_for_previous()
    chunk = tl.arange(0, CHUNK)
    counts = tl.zeros((E,), tl.int32)
    done = rows * 0
    while done < rows:
        counts += tl.sum(_is_expert(ids_ptr, done + chunk, rows, first_expert, experts, E), 0)
        done += CHUNK
    starts = tl.cumsum(counts, 0) - counts
    tiles_of = (counts + rows_a_tile - 1) // rows_a_tile
    tiles_up_to = tl.cumsum(tiles_of, 0)

    done = rows * 0
    while done < tiles:
        tile = done + chunk
        expert = tl.sum((tiles_up_to[None, :] <= tile[:, None]).to(tl.int32), 1)
        one = (expert[:, None] == tl.arange(0, E)[None, :]).to(tl.int32)
        first = tile * rows_a_tile + tl.sum(one * (starts - (tiles_up_to - tiles_of) * rows_a_tile)[None, :], 1)
        there = tile < tiles
        tl.store(schedule_ptr + tile * 3, tl.where(expert < E, expert, -1), mask=there)
        tl.store(schedule_ptr + tile * 3 + 1, first, mask=there)
        tl.store(schedule_ptr + tile * 3 + 2, tl.sum(one * (starts + counts)[None, :], 1), mask=there)
        done += CHUNK

    done = rows * 0
    while done < rows:
        row = done + chunk
        one = _is_expert(ids_ptr, row, rows, first_expert, experts, E)
        place = tl.sum(one * (tl.cumsum(one, 0) - one + starts[None, :]), 1)
        tl.store(order_ptr + place, row.to(tl.int64), mask=tl.sum(one, 1) > 0)
        starts += tl.sum(one, 0)
        done += CHUNK


# Global scales of the activations


@triton.jit
def _scale_by_row(scales_ptr, out_ptr, row, there, expert):
    if scales_ptr is not None:
        tl.store(out_ptr + row, tl.load(scales_ptr + expert), mask=there)


@triton.jit(do_not_specialize=["rows", "first_expert", "experts"])
def scales_by_row_kernel(
    ids_ptr, fc1_ptr, fc2_ptr, fc1_out_ptr, fc2_out_ptr, rows, first_expert, experts, BLOCK: tl.constexpr
):
    p.wait_for_previous()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    expert = tl.load(ids_ptr + row, mask=there, other=0).to(tl.int64) - first_expert
    expert = tl.where((expert >= 0) & (expert < experts), expert, 0)  # foreign rows are not multiplied
    _scale_by_row(fc1_ptr, fc1_out_ptr, row, there, expert)
    _scale_by_row(fc2_ptr, fc2_out_ptr, row, there, expert)


def scales_by_row(
    expert_ids: Tensor, first_expert: int, experts: int, fc1: Tensor | None, fc2: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Each routed row's scale where there is one for each expert; one that all share stays that one, and None None."""
    given = [None if scale is None or scale.numel() == 1 else scale.contiguous() for scale in (fc1, fc2)]
    by_row = [None if scale is None else scale.new_empty(expert_ids.numel()) for scale in given]
    if any(scale is not None for scale in given):
        rows, block = expert_ids.numel(), 256
        sizes = (rows, first_expert, experts)
        grid = (triton.cdiv(rows, block),)
        ids = expert_ids.contiguous()
        launch(scales_by_row_kernel, grid, 128, ids.device, ids, *given, *by_row, *sizes, BLOCK=block)
    fc1, fc2 = (one if many is None else many for one, many in zip((fc1, fc2), by_row, strict=True))
    return fc1, fc2


# The activation. Minima and maxima are comparisons that let NaN pass, as torch's do.


@triton.jit
def _sigmoid(x):
    power = tl.exp(-x)
    if not p.INTERPRETED:
        # That is 2^y for the rounded product y, and off by more the larger y is: put back what rounding left out.
        y = x * -1.4426950408889634
        left = tl.fma(x, -1.4426950408889634, -y) + x * -1.925963033500e-8
        power = tl.where(power < float("inf"), tl.fma(power, left * 0.6931471805599453, power), power)
    return tl.div_rn(1.0, 1.0 + power)


@triton.jit(do_not_specialize=["first_expert", "experts", "units"])
def swiglu_kernel(
    up_gate_ptr,  # fp32 [rows, 2 * units * _UNIT]
    ids_ptr,
    alpha_ptr,
    beta_ptr,
    limit_ptr,
    out_ptr,
    first_expert,
    experts,
    units,
    STEP: tl.constexpr,  # SwigluStep: the limit is taken after silu
    BLOCK: tl.constexpr,
):
    p.wait_for_previous()
    inter = units * _UNIT
    blocks = tl.cdiv(inter, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    there = column < inter
    expert = tl.load(ids_ptr + row).to(tl.int64) - first_expert
    own = (expert >= 0) & (expert < experts)
    if not own:  # a foreign expert's row, which nothing has written, becomes zero
        expert = expert * 0
    written = column < tl.where(own, inter, 0)  # of a block & a scalar Triton 3.9's interpreter makes no mask
    up = tl.load(up_gate_ptr + row * 2 * inter + column, mask=written, other=0.0)
    gate = tl.load(up_gate_ptr + (row * 2 + 1) * inter + column, mask=written, other=0.0)
    if limit_ptr is not None:
        limit = tl.load(limit_ptr + expert)
    elif STEP:
        limit = 7.0  # FlashInfer's default
    else:
        limit = float("inf")
    up = tl.where(up > limit, limit, up)
    up = tl.where(up < -limit, -limit, up)
    if STEP:
        gate = gate * _sigmoid(gate)
        gate = tl.where(gate > limit, limit, gate)
    else:
        gate = tl.where(gate > limit, limit, gate)
        if alpha_ptr is None:
            gate = gate * _sigmoid(gate)
        else:
            gate = gate * _sigmoid(tl.load(alpha_ptr + expert) * gate)
        if beta_ptr is not None:
            up = up + tl.load(beta_ptr + expert)
    product = tl.where(own, gate * up, 0.0)
    tl.store(out_ptr + row * inter + column, p.round_to(product, out_ptr.dtype.element_ty), mask=there)


def swiglu(
    up_gate: Tensor,
    expert_ids: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    limit: Tensor | None,
    out: Tensor,
    first_expert: int,
    experts: int,
    step: bool,
) -> None:
    rows, inter = out.shape
    if not inter:
        return
    block = 1024
    parameters = (None if t is None else t.contiguous() for t in (alpha, beta, limit))
    launch(
        swiglu_kernel,
        (rows * triton.cdiv(inter, block),),
        128,
        out.device,
        up_gate,
        expert_ids.contiguous(),
        *parameters,
        out,
        first_expert,
        experts,
        inter // _UNIT.value,
        STEP=step,
        BLOCK=block,
    )


# The sum


@triton.jit
def _weighted(rows_ptr, expert_ids_ptr, final_scales_ptr, row, column, columns, first_expert, experts):
    """A row times its scale, zeros where its expert is foreign."""
    expert = tl.load(expert_ids_ptr + row).to(tl.int64) - first_expert
    own = (expert >= 0) & (expert < experts)
    y = tl.load(rows_ptr + row * columns + column, mask=column < tl.where(own, columns, 0), other=0.0)
    # Not a product with zero: the scale of a foreign expert may be infinite.
    return tl.where(own, y * tl.load(final_scales_ptr + row), 0.0)


@triton.jit(do_not_specialize=["first_expert", "experts", "units"])
def combine_kernel(
    rows_ptr,  # fp32 [tokens * TOP_K, units * _UNIT]
    expert_ids_ptr,
    final_scales_ptr,
    out_ptr,
    first_expert,
    experts,
    units,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weighted sum of each token's rows, always in the same order, less those of foreign experts."""
    p.wait_for_previous()
    columns = units * _UNIT
    blocks = tl.cdiv(columns, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    there = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    if TOP_K <= _UNROLLED:
        for k in tl.static_range(TOP_K):
            row = token * TOP_K + k
            total += _weighted(rows_ptr, expert_ids_ptr, final_scales_ptr, row, column, columns, first_expert, experts)
    else:
        for k in range(TOP_K):
            row = token * TOP_K + k
            total += _weighted(rows_ptr, expert_ids_ptr, final_scales_ptr, row, column, columns, first_expert, experts)
    tl.store(out_ptr + token * columns + column, p.round_to(total, out_ptr.dtype.element_ty), mask=there)


def combine(
    rows: Tensor, expert_ids: Tensor, final_scales: Tensor, out: Tensor, first_expert: int, experts: int
) -> None:
    tokens, top_k = expert_ids.shape
    columns = out.shape[1]
    block = 1024
    launch(
        combine_kernel,
        (tokens * triton.cdiv(columns, block),),
        128,
        out.device,
        rows,
        expert_ids.contiguous(),
        final_scales.contiguous(),
        out,
        first_expert,
        experts,
        columns // _UNIT.value,
        TOP_K=top_k,
        BLOCK=block,
    )


def aot_cases() -> Iterator[AotCase]:
    """Dtypes of outputs and expert ids, parameters or none, numbers of experts."""
    sizes = {"first_expert": "i32", "experts": "i32"}
    parameters = ("alpha_ptr", "beta_ptr", "limit_ptr")
    for dtype, index, given in (("bf16", "i32", ()), ("fp16", "i64", parameters), ("fp32", "i32", parameters)):
        name = f"{dtype}-{index}"
        signature = {"rows_ptr": "*fp32", "expert_ids_ptr": f"*{index}", "final_scales_ptr": "*fp32"}
        signature |= {"out_ptr": f"*{dtype}", **sizes, "units": "i32"}
        for top_k in (8, _UNROLLED.value + 1):
            constants = {"TOP_K": top_k, "BLOCK": 1024}
            yield AotCase(f"moe-combine-{top_k}-{name}", combine_kernel, signature, constants, 128)
        signature = {"up_gate_ptr": "*fp32", "out_ptr": f"*{dtype}", "ids_ptr": f"*{index}", **sizes, "units": "i32"}
        signature |= dict.fromkeys(given, "*fp32")
        constants = {"STEP": False, "BLOCK": 1024, **{p: None for p in parameters if p not in given}}
        yield AotCase(f"moe-swiglu-{name}{'-parameters' * bool(given)}", swiglu_kernel, signature, constants, 128)
    scales = ("fc1_ptr", "fc1_out_ptr", "fc2_ptr", "fc2_out_ptr")
    for none, index in ((0, "i32"), (2, "i64")):  # the first ones are one for all experts
        signature = {"ids_ptr": f"*{index}", **sizes, "rows": "i32", **dict.fromkeys(scales[none:], "*fp32")}
        yield AotCase(
            f"moe-scales-{none}",
            scales_by_row_kernel,
            signature,
            {**dict.fromkeys(scales[:none]), "BLOCK": 256},
            128,
        )
    for experts, index in ((32, "i64"), (128, "i32"), (256, "i32")):
        signature = {"ids_ptr": f"*{index}", **sizes, "order_ptr": "*i64", "schedule_ptr": "*i32"}
        signature |= dict.fromkeys(("rows", "tiles", "rows_a_tile"), "i32")
        yield AotCase(
            f"moe-route-{experts}", route_kernel, signature, {"E": experts, "CHUNK": _chunk(experts)}, _ROUTE_THREADS
        )
