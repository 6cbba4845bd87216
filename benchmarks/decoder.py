"""A Llama-style decoder that makes one decoding step: what ``decode_step.py`` times and GPU tests capture.

Written for capture: caches are buffers, positions are tensors, attention is one opaque operator at which a graph can
be split.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = "torch_fp4ops_benchmarks::decode_attention"


@torch.library.custom_op(ATTENTION, mutates_args=())
def decode_attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """One query token of each sequence over its cache, up to its position.

    ``q`` [batch, heads, D], ``keys`` and ``values`` [at least batch, length, KV heads, D]; like q.
    """
    keys, values = (t[: q.shape[0]].transpose(1, 2) for t in (keys, values))
    mask = torch.arange(keys.shape[2], device=q.device) <= positions[:, None]
    out = nn.functional.scaled_dot_product_attention(q.unsqueeze(2), keys, values, mask[:, None, None], enable_gqa=True)
    return out.squeeze(2).contiguous()


@decode_attention.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


CAN_MARK_BATCH = "shape_id" in inspect.signature(torch._dynamo.decorators.mark_unbacked).parameters


def mark_batch(*tensors: Tensor) -> None:
    """Have the first dimension, the same one in all, compiled once for every size (where this torch can)."""
    for t in tensors if CAN_MARK_BATCH else ():
        torch._dynamo.decorators.mark_unbacked(t, 0, shape_id="batch")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; the defaults are Llama 3 8B's, with fewer layers."""

    hidden: int = 4096
    layers: int = 8
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 14336
    vocabulary: int = 32000
    batch: int = 64
    length: int = 1024

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Layer(nn.Module):
    def __init__(self, shape: Shape, kv_cache: str, **factory: Any):
        super().__init__()
        self.shape, self.nvfp4_cache = shape, kv_cache == "nvfp4"
        hidden, kv = shape.hidden, shape.kv_heads * shape.head_dim
        no_bias = {"bias": False, **factory}
        self.norm1, self.norm2 = (nn.RMSNorm(hidden, eps=1e-5, **factory) for _ in range(2))
        self.qkv = nn.Linear(hidden, hidden + 2 * kv, **no_bias)
        self.out = nn.Linear(hidden, hidden, **no_bias)
        self.gate_up = nn.Linear(hidden, 2 * shape.intermediate, **no_bias)
        self.down = nn.Linear(shape.intermediate, hidden, **no_bias)
        rows = (shape.batch, shape.length, shape.kv_heads)
        device = factory.get("device")
        if self.nvfp4_cache:
            for name, last in (("", shape.head_dim // 2), ("_sf", shape.head_dim // 16)):
                for kv_name in ("keys", "values"):
                    cache = torch.zeros(*rows, last, dtype=torch.uint8, device=device)
                    self.register_buffer(kv_name + name, cache)
            self.register_buffer("cache_scale", torch.full((1,), 6 / 2688, device=device))
        else:
            for kv_name in ("keys", "values"):
                self.register_buffer(kv_name, torch.zeros(*rows, shape.head_dim, **factory))

    def forward(self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = self.shape
        kv = shape.kv_heads * shape.head_dim
        qkv = self.qkv(self.norm1(x)).split([shape.hidden, kv, kv], -1)
        q, key, value = (t.unflatten(-1, (-1, shape.head_dim)) for t in qkv)
        q, key = _rotate(q, cos, sin), _rotate(key, cos, sin)
        rows = torch.arange(x.shape[0], device=x.device)
        if self.nvfp4_cache:
            caches, scale = (self.keys, self.values, self.keys_sf, self.values_sf), self.cache_scale
            torch.ops.fp4.nvfp4_kv_quantize_store(key, value, rows * shape.length + positions, *caches, scale, scale)
            pairs = ((self.keys, self.keys_sf), (self.values, self.values_sf))
            keys, values = (self._dequantized(*pair) for pair in pairs)
        else:
            self.keys.index_put_((rows, positions), key)
            self.values.index_put_((rows, positions), value)
            keys, values = self.keys, self.values
        x = x + self.out(decode_attention(q, keys, values, positions).flatten(1))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)

    def _dequantized(self, codes: Tensor, scales: Tensor) -> Tensor:
        # Of all sequences: not every torch compiles a slice by an unbacked batch.
        flat = torch.ops.fp4.nvfp4_kv_dequantize(codes.flatten(0, 2), scales.flatten(0, 2), self.cache_scale)
        return flat.view(*codes.shape[:3], self.shape.head_dim)


class Decoder(nn.Module):
    """``step(tokens [batch], positions [batch]) -> logits [batch, vocabulary]``; writes each token into the caches.

    Args:
        shape: ``shape.batch`` and ``shape.length`` are the caches'; a step may have fewer sequences.
        kv_cache: ``"bf16"`` or ``"nvfp4"``.
        device: where the random weights (of the current seed) are made.
    """

    def __init__(self, shape: Shape, kv_cache: str = "bf16", device: torch.device | str | None = None):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden, **factory)
        self.layers = nn.ModuleList(Layer(shape, kv_cache, **factory) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5, **factory)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False, **factory)
        self.requires_grad_(False)
        half = shape.head_dim // 2
        frequencies = 500000.0 ** (-torch.arange(half, device=device) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        angles = positions[:, None, None] * self.frequencies
        x = self.embedding(tokens)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, positions, cos, sin)
        return self.head(self.norm(x))

    def clear(self) -> None:
        """Empty the caches."""
        for layer in self.layers:
            for name in ("keys", "values", "keys_sf", "values_sf"):
                cache = getattr(layer, name, None)
                if cache is not None:
                    cache.zero_()
