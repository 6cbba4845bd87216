"""Decode attention in several forms, which differ in what a call of them costs the host: for ``piecewise_probe.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import attention, decoder

_NAMESPACE = "torch_fp4ops_probe"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")
_SCHEMA = "(Tensor q, Tensor keys, Tensor values, Tensor positions) -> Tensor"
_OUT_SCHEMA = "(Tensor q, Tensor keys, Tensor values, Tensor positions, Tensor(a!) out) -> ()"


@dataclass(frozen=True)
class Variant:
    """An attention with the arguments of ``decode_attention``, and the op in it at which a graph is split."""

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


def _repeated(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """torch's attention with ``enable_gqa``, which repeats the keys where it has a mask."""
    keys, values = (t[: q.shape[0]].transpose(1, 2) for t in (keys, values))
    mask = torch.arange(keys.shape[2], device=q.device) <= positions[:, None]
    out = nn.functional.scaled_dot_product_attention(q.unsqueeze(2), keys, values, mask[:, None, None], enable_gqa=True)
    return out.squeeze(2).contiguous()


def _launched(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    out = _like_q(q)
    attention.launch(q, keys, values, positions, out)
    return out


def _copying(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, out: Tensor) -> None:
    out.copy_(attention.attend_by_sdpa(q, keys, values, positions))


_custom_op = torch.library.custom_op(f"{_NAMESPACE}::repeated_custom", mutates_args=())(_repeated)
_custom_op.register_fake(_like_q)
_library, _library_name = _define("repeated", _SCHEMA, _repeated, _like_q)
_grouped, _grouped_name = _define("grouped", _SCHEMA, attention.attend_by_sdpa, _like_q)
_triton, _triton_name = _define("launched", _SCHEMA, _launched, _like_q)
_copied, _copied_name = _define("grouped_out", _OUT_SCHEMA, _copying, lambda *given: None)


def _grouped_out(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _copied(q, keys, values, positions, out)
    return out


VARIANTS = {
    "custom-op": Variant(_custom_op, f"{_NAMESPACE}::repeated_custom"),
    "library": Variant(_library, _library_name),
    "grouped": Variant(_grouped, _grouped_name),
    "grouped-out": Variant(_grouped_out, _copied_name),
    "triton": Variant(_triton, _triton_name),
    "triton-out": Variant(attention.decode_attention, attention.ATTENTION),
}
