"""A Llama-style decoder: what ``decode_step.py`` and ``end_to_end.py`` time and GPU tests capture.

Written for capture: caches are buffers, positions are tensors, attention to the caches is one opaque operator at which
a graph can be split.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention import ATTENTION, decode_attention

__all__ = ["ATTENTION", "CAN_MARK_BATCH", "Decoder", "Layer", "Shape", "decode_attention", "mark_batch"]

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
        """``x`` [tokens, hidden] of the tokens at ``positions`` [batch] or, whole prompts, [batch, length]."""
        shape = self.shape
        kv = shape.kv_heads * shape.head_dim
        qkv = self.qkv(self.norm1(x)).split([shape.hidden, kv, kv], -1)
        q, key, value = (t.unflatten(-1, (-1, shape.head_dim)) for t in qkv)
        q, key = _rotate(q, cos, sin), _rotate(key, cos, sin)
        self._store(key, value, positions)
        if positions.dim() == 2:
            q, key, value = (t.unflatten(0, positions.shape).transpose(1, 2) for t in (q, key, value))
            out = nn.functional.scaled_dot_product_attention(q, key, value, is_causal=True, enable_gqa=True)
            attended = out.transpose(1, 2).flatten(0, 1)
        else:
            attended = decode_attention(q, *self._caches(), positions)
        x = x + self.out(attended.flatten(1))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)

    def _store(self, key: Tensor, value: Tensor, positions: Tensor) -> None:
        rows = torch.arange(positions.shape[0], device=positions.device)
        if positions.dim() == 2:
            rows = rows[:, None].expand(positions.shape).flatten()
            positions = positions.flatten()
        if self.nvfp4_cache:
            caches, scale = (self.keys, self.values, self.keys_sf, self.values_sf), self.cache_scale
            slots = rows * self.shape.length + positions
            torch.ops.fp4.nvfp4_kv_quantize_store(key, value, slots, *caches, scale, scale)
        else:
            self.keys.index_put_((rows, positions), key)
            self.values.index_put_((rows, positions), value)

    def _caches(self) -> tuple[Tensor, Tensor]:
        if self.nvfp4_cache:
            return self._dequantized(self.keys, self.keys_sf), self._dequantized(self.values, self.values_sf)
        return self.keys, self.values

    def _dequantized(self, codes: Tensor, scales: Tensor) -> Tensor:
        # Of all sequences: not every torch compiles a slice by an unbacked batch.
        flat = torch.ops.fp4.nvfp4_kv_dequantize(codes.flatten(0, 2), scales.flatten(0, 2), self.cache_scale)
        return flat.view(*codes.shape[:3], self.shape.head_dim)


class Decoder(nn.Module):
    """``model(tokens [batch], positions [batch]) -> logits [batch, vocabulary]``; writes each token into the caches.

    With ``[batch, length]`` each sequence is a whole prompt, from position 0, and the logits are its last token's.

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
        angles = positions.flatten()[:, None, None] * self.frequencies
        x = self.embedding(tokens.flatten())
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, positions, cos, sin)
        if positions.dim() == 2:
            x = x.unflatten(0, positions.shape)[:, -1]
        return self.head(self.norm(x))

    def clear(self) -> None:
        """Empty the caches."""
        for layer in self.layers:
            for name in ("keys", "values", "keys_sf", "values_sf"):
                cache = getattr(layer, name, None)
                if cache is not None:
                    cache.zero_()
