"""Attention of one token to a cache, as an engine has it: one kernel, one op that writes into what it is given.

Where a graph is split at an op, what that op returns is new memory at every step, which the next graph has to copy;
memory that the graph before has made stays where it is. So the op returns nothing and writes into ``out``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # SDPA does everywhere
    triton = None

ATTENTION = "torch_fp4ops_benchmarks::decode_attention"

_LIBRARY = torch.library.Library("torch_fp4ops_benchmarks", "FRAGMENT")
_LIBRARY.define("decode_attention(Tensor q, Tensor keys, Tensor values, Tensor positions, Tensor(a!) out) -> ()")
_LEAST_ROWS = 16  # of an operand of tl.dot
_BLOCK = 64


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """One query token of each sequence over its cache, up to its position.

    ``q`` [batch, heads, D], ``keys`` and ``values`` [at least batch, length, KV heads, D], all contiguous in D;
    ``positions`` [batch] integers below the length. Like q, contiguous.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    torch.ops.torch_fp4ops_benchmarks.decode_attention(q, keys, values, positions, out)
    return out


def attend_by_sdpa(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """The same by torch's attention, with the heads of a group as rows of one query."""
    keys, values = (t[: q.shape[0]].transpose(1, 2) for t in (keys, values))
    seen = torch.arange(keys.shape[2], device=q.device) <= positions[:, None]
    groups = q.unflatten(1, (keys.shape[1], -1))
    out = nn.functional.scaled_dot_product_attention(groups, keys, values, seen[:, None, None])
    return out.flatten(1, 2)


def _attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, out: Tensor) -> None:
    if triton is None or not q.is_cuda:
        out.copy_(attend_by_sdpa(q, keys, values, positions))
    else:
        launch(q, keys, values, positions, out)


def launch(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, out: Tensor) -> None:
    batch, heads, dim = q.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    _kernel[(batch, kv_heads)](
        q,
        keys,
        values,
        positions,
        out,
        dim**-0.5 * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        GROUP=group,
        ROWS=max(_LEAST_ROWS, triton.next_power_of_2(group)),
        D=dim,
        BLOCK=_BLOCK,
    )


_LIBRARY.impl("decode_attention", _attend, "CompositeExplicitAutograd")
torch.library.register_fake(ATTENTION, lambda *given: None, lib=_LIBRARY)


if triton is not None:

    @triton.jit
    def _kernel(
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
        """One sequence and KV head: online softmax in base 2 over the cache up to the position."""
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
