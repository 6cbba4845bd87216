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

    ``order`` holds the rows by local expert, foreign ones last. ``schedule`` has for each tile of rows its expert (-1:
    none), its first place in ``order`` and the one past its expert's last. ``experts`` is each row's local expert,
    clamped into range where it is foreign.
    """

    schedule: Tensor
    order: Tensor
    experts: Tensor


def route(expert_ids: Tensor, first_expert: int, experts: int, rows_a_tile: int) -> Routing:
    """Where each expert's rows are. Nothing here synchronises: there are as many tiles as there could be."""
    local = expert_ids.reshape(-1).long() - first_expert
    own = (local >= 0) & (local < experts)
    group, order = torch.where(own, local, experts).sort(stable=True)
    device = local.device
    starts = torch.searchsorted(group, torch.arange(experts + 1, device=device))
    tiles = (starts.diff() + (rows_a_tile - 1)) // rows_a_tile
    tiles_up_to = tiles.cumsum(0)
    rows = local.numel()
    tile = torch.arange(triton.cdiv(rows, rows_a_tile) + min(experts, rows), device=device)
    expert = torch.searchsorted(tiles_up_to, tile, right=True)
    some = expert.clamp(max=experts - 1)
    first = starts[some] + (tile - tiles_up_to[some] + tiles[some]) * rows_a_tile
    schedule = torch.stack((torch.where(expert < experts, expert, -1), first, starts[some + 1]), 1)
    return Routing(schedule.int(), order, local.clamp(0, experts - 1))


@triton.jit(do_not_specialize=["first_expert", "columns"])
def combine_kernel(
    rows_ptr,  # fp32 [tokens * TOP_K, columns]
    expert_ids_ptr,
    final_scales_ptr,
    out_ptr,
    first_expert,
    experts,
    columns,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weighted sum of each token's rows, always in the same order, less those of foreign experts."""
    blocks = tl.cdiv(columns, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    there = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = token * TOP_K + k
        expert = tl.load(expert_ids_ptr + row).to(tl.int64) - first_expert
        own = (expert >= 0) & (expert < experts)
        y = tl.load(rows_ptr + row * columns + column, mask=there & own, other=0.0)
        # Not a product with zero: the scale of a foreign expert may be infinite.
        total += tl.where(own, y * tl.load(final_scales_ptr + row), 0.0)
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
        columns,
        TOP_K=top_k,
        BLOCK=block,
    )


def combine_cases() -> Iterator[AotCase]:
    signature = {"rows_ptr": "*fp32", "expert_ids_ptr": "*i32", "final_scales_ptr": "*fp32", "out_ptr": "*bf16"}
    signature |= dict.fromkeys(("first_expert", "experts", "columns"), "i32")
    yield AotCase("moe-combine-8", combine_kernel, signature, {"TOP_K": 8, "BLOCK": 1024}, 128)
