"""Decode attention in several forms, which differ in what a call of them costs the host: for ``piecewise_probe.py``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import decoder

try:
    import triton
    import triton.language as tl
except ImportError:  # the variants that need it then fail as they are called
    triton = None

_NAMESPACE = "torch_fp4ops_probe"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Variant:
    """An attention with the arguments of ``decoder.decode_attention``, and the op in it at which a graph is split."""

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    op: str


def arguments(shape: decoder.Shape, batch: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a layer of that shape gives to its attention."""
    q = torch.randn(batch, shape.heads, shape.head_dim, device=device, dtype=torch.bfloat16)
    rows = (shape.batch, shape.length, shape.kv_heads, shape.head_dim)
    keys, values = (torch.randn(rows, device=device, dtype=torch.bfloat16) for _ in range(2))
    return q, keys, values, torch.full((batch,), shape.length // 2, device=device)


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> tuple[Any, str]:
    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default, f"{_NAMESPACE}::{name}"


def _like_q(q: Tensor, *others: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


# decoder.py's own body, without what torch.library.custom_op adds to a call


def _plain(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    keys, values = (t[: q.shape[0]].transpose(1, 2) for t in (keys, values))
    mask = torch.arange(keys.shape[2], device=q.device) <= positions[:, None]
    out = nn.functional.scaled_dot_product_attention(q.unsqueeze(2), keys, values, mask[:, None, None], enable_gqa=True)
    return out.squeeze(2).contiguous()


_FOUR = "(Tensor q, Tensor keys, Tensor values, Tensor positions) -> Tensor"
_library, _library_name = _define("attend_library", _FOUR, _plain, _like_q)


# The heads of a group as rows of one query, so that no keys are repeated; the mask comes from the graph before


def _attend_grouped(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    keys, values = (t[: q.shape[0]].transpose(1, 2) for t in (keys, values))
    groups = q.unflatten(1, (keys.shape[1], -1))
    mask = bias[:, None, None].expand(-1, keys.shape[1], groups.shape[2], -1)
    return nn.functional.scaled_dot_product_attention(groups, keys, values, mask).flatten(1, 2)


def _attend_grouped_out(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, out: Tensor) -> None:
    out.copy_(_attend_grouped(q, keys, values, bias))


_BIASED = "(Tensor q, Tensor keys, Tensor values, Tensor bias) -> Tensor"
_BIASED_OUT = "(Tensor q, Tensor keys, Tensor values, Tensor bias, Tensor(a!) out) -> ()"
_grouped, _grouped_name = _define("attend_grouped", _BIASED, _attend_grouped, _like_q)
_grouped_out, _grouped_out_name = _define("attend_grouped_out", _BIASED_OUT, _attend_grouped_out, lambda *given: None)


def _bias(q: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    seen = torch.arange(keys.shape[1], device=q.device) <= positions[:, None]
    return torch.where(seen, 0.0, -math.inf).to(q.dtype)


def _with_bias(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    return _grouped(q, keys, values, _bias(q, keys, positions))


def _with_bias_out(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _grouped_out(q, keys, values, _bias(q, keys, positions), out)
    return out


# One launch


def _attend_triton_out(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, out: Tensor) -> None:
    batch, heads, dim = q.shape
    kv_heads = keys.shape[2]
    steps = dim**-0.5 * math.log2(math.e)
    strides = q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), keys.stride(2)
    group = heads // kv_heads
    rows = max(16, triton.next_power_of_2(group))
    _decode_kernel[(batch, kv_heads)](q, keys, values, positions, out, steps, *strides, group, rows, dim, 64)


def _attend_triton(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    out = _like_q(q)
    _attend_triton_out(q, keys, values, positions, out)
    return out


_FOUR_OUT = "(Tensor q, Tensor keys, Tensor values, Tensor positions, Tensor(a!) out) -> ()"
_triton, _triton_name = _define("attend_triton", _FOUR, _attend_triton, _like_q)
_triton_out, _triton_out_name = _define("attend_triton_out", _FOUR_OUT, _attend_triton_out, lambda *given: None)


def _with_out(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _triton_out(q, keys, values, positions, out)
    return out


if triton is not None:

    @triton.jit
    def _decode_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        positions_ptr,
        out_ptr,
        scale,
        q_row,
        q_head,
        cache_row,
        cache_position,
        cache_head,
        GROUP: tl.constexpr,
        ROWS: tl.constexpr,
        D: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One sequence and KV head: online softmax over the cache up to the position, in base 2."""
        sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        row, column, step = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BLOCK)
        mine = (row < GROUP)[:, None]
        heads = head * GROUP + row[:, None]
        q = tl.load(q_ptr + sequence * q_row + heads * q_head + column, mask=mine, other=0.0)
        last = tl.load(positions_ptr + sequence).to(tl.int32)
        cache = sequence * cache_row + head * cache_head
        top = tl.full((ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sums = tl.zeros((ROWS, D), tl.float32)
        for start in range(0, last + 1, BLOCK):
            seen = start + step <= last
            where = cache + (start + step)[:, None].to(tl.int64) * cache_position + column
            keys = tl.load(k_ptr + where, mask=seen[:, None], other=0.0)
            scores = tl.where(seen, tl.dot(q, tl.trans(keys)) * scale, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            values = tl.load(v_ptr + where, mask=seen[:, None], other=0.0)
            sums = sums * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
            total = total * shrink + tl.sum(weights, 1)
            top = new_top
        out = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (sequence * tl.num_programs(1) * GROUP + heads) * D + column, out, mask=mine)


VARIANTS = {
    "custom-op": Variant(decoder.decode_attention, decoder.ATTENTION),
    "library": Variant(_library, _library_name),
    "grouped": Variant(_with_bias, _grouped_name),
    "grouped-out": Variant(_with_bias_out, _grouped_out_name),
    "triton": Variant(_triton, _triton_name),
    "triton-out": Variant(_with_out, _triton_out_name),
}
