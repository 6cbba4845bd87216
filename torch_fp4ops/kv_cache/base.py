"""How an FP4 KV cache quantises: the interface, and what every method shares.

The interface follows SGLang's ``FP4KVCacheQuantMethod``: a method computes and says what it needs, whoever owns the
cache keeps the buffers. Here the buffers are typed (:class:`KVBuffers`), so a method refuses those of another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..formats import BlockFormat
from ..ops.nvfp4_kv_quantize_store import write_rows
from .buffers import KV_LAYOUTS, KVBuffers
from .scales import KVScales

__all__ = ["FP4KVCacheQuantMethod"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_ALLOWED_FLOATS = " or ".join(map(str, _FLOATS))


class FP4KVCacheQuantMethod(ABC):
    """A way to keep keys and values in four bits.

    A subclass gives ``name``, ``format`` and the pair :meth:`quantize` and :meth:`dequantize`; storing, reading and
    every check are here.

    Args:
        num_layers: layers of the model; ``layer_id`` is below it.
        device: of what the method keeps (global scales).
    """

    name: ClassVar[str]
    format: ClassVar[BlockFormat]

    def __init__(self, num_layers: int = 1, device: torch.device | str = "cpu"):
        if num_layers < 1:
            raise self._wrong("num_layers", num_layers, "1 or more")
        self.num_layers = num_layers
        self.device = torch.device(device)

    # What differs from format to format

    @abstractmethod
    def quantize(self, x: Tensor, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """``[..., D]`` to packed codes ``[..., D/2]`` and linear block scales ``[..., D/block]``, both uint8."""

    @abstractmethod
    def dequantize(self, codes: Tensor, scales: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The inverse: ``[..., D]`` of ``dtype``."""

    @property
    def scale_convention(self) -> str | None:
        """What the global scales are; None where there are none."""
        return None

    @property
    def needs_global_scale(self) -> bool:
        return self.format.has_global_scale

    def needs_workspace_to_decode(self, head_dim: int) -> bool:
        """Whether decoding needs keys and values dequantised first, as :meth:`decode_attention` doesn't read them."""
        return True

    def global_scales(self, layer_id: int) -> tuple[Tensor | None, Tensor | None]:
        """The decode scales of a layer's keys and values, float32 ``[1]`` each; None where there are none."""
        self._check_layer(layer_id)
        return None, None

    def load_scales(self, scales: KVScales) -> None:
        """Take over calibrated global scales, converted to the method's convention. Before anything is stored: what is
        in a cache is read with the scales that are loaded then.

        Raises:
            ValueError: the method has no global scale, or there is not one for each layer.
        """
        raise ValueError(f"{self.name}: load_scales was called, but the method has no global scale")

    # What is the same for all

    def create_buffers(
        self,
        size: int,
        head_num: int,
        head_dim: int,
        layer_num: int,
        device: torch.device | str,
        *,
        page_size: int = 1,
        kv_layout: str = "NHD",
    ) -> list[KVBuffers]:
        """Empty (zero) buffers for ``size`` tokens, one :class:`KVBuffers` for each layer.

        Pages of one token in NHD are SGLang's ``[slots, heads, D/2]`` with a dimension of 1 after the first.

        Raises:
            ValueError: a size that is not whole pages, a head_dim that is not whole blocks, or an unknown layout.
        """
        for name, given in (("page_size", page_size), ("head_num", head_num), ("layer_num", layer_num)):
            if given < 1:
                raise self._wrong(name, given, "1 or more")
        if size < 0 or size % page_size:
            raise self._wrong("size", size, f"a multiple of page_size {page_size}")
        self.check_head_dim(head_dim)
        if kv_layout not in KV_LAYOUTS:
            raise self._wrong("kv_layout", repr(kv_layout), " or ".join(map(repr, KV_LAYOUTS)))
        middle = (page_size, head_num) if kv_layout == "NHD" else (head_num, page_size)
        pages, blocks = size // page_size, head_dim // self.format.block_size

        def zeros(last: int) -> Tensor:
            return torch.zeros(pages, *middle, last, dtype=torch.uint8, device=device)

        return [
            KVBuffers(
                self.name,
                *(zeros(head_dim // 2), zeros(head_dim // 2), zeros(blocks), zeros(blocks)),
                kv_layout,
                scale_convention=self.scale_convention,
            )
            for _ in range(layer_num)
        ]

    def quantize_and_store(
        self, buffers: KVBuffers, loc: Tensor, cache_k: Tensor, cache_v: Tensor, layer_id: int = 0
    ) -> None:
        """Quantise new keys and values and write them into a layer's buffers, in place, at the given slots.

        Args:
            buffers: what :meth:`create_buffers` gave, V scales linear.
            loc: int32 or int64 ``[n]``, n <= rows: row i goes to slot ``loc[i]``, a negative one is skipped. A slot
                past the end raises on the CPU and is skipped on a GPU, where reading it would synchronise.
            cache_k, cache_v: ``[rows, heads, D]``, bfloat16, float16 or float32. Rows beyond n are padding.
            layer_id: chooses the global scales.

        Raises:
            ValueError: buffers of another method, layout or scale convention, a wrong shape, dtype or device, or, on
                the CPU, a slot past the end. The buffers are untouched then.
        """
        self._check_buffers("quantize_and_store", buffers)
        self._check_new(buffers, loc, cache_k, cache_v)
        self._store(buffers, loc, cache_k, cache_v, *self.global_scales(layer_id))

    def _store(
        self,
        buffers: KVBuffers,
        loc: Tensor,
        cache_k: Tensor,
        cache_v: Tensor,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
    ) -> None:
        n = loc.shape[0]
        if n == 0:
            return
        new = self.quantize(cache_k[:n], k_scale), self.quantize(cache_v[:n], v_scale)
        targets = (buffers.k, buffers.k_sf), (buffers.v, buffers.v_sf)
        for pair, data in zip(targets, new, strict=True):
            for target, rows in zip(pair, data, strict=True):
                write_rows(target if buffers.kv_layout == "NHD" else target.transpose(1, 2), loc, rows)

    def dequantize_prev_kv(
        self,
        buffers: KVBuffers,
        layer_id: int = 0,
        loc: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> tuple[Tensor, Tensor]:
        """Stored keys and values for attention that doesn't read FP4.

        Args:
            buffers: a layer's, V scales linear.
            layer_id: chooses the global scales.
            loc: slots ``[n]`` of int32 or int64, each in the cache (checked on the CPU). None: all, page by page.
            dtype: bfloat16, float16 or float32.

        Returns:
            Keys and values, fresh: ``[n, heads, D]``, or in the page layout of the buffers, with D last.

        Raises:
            ValueError: buffers of another method, layout or scale convention, wrong slots or another dtype.
        """
        self._check_buffers("dequantize_prev_kv", buffers)
        if dtype not in _FLOATS:
            raise self._wrong("dtype", dtype, _ALLOWED_FLOATS)
        k_scale, v_scale = self.global_scales(layer_id)
        pairs = (buffers.k, buffers.k_sf, k_scale), (buffers.v, buffers.v_sf, v_scale)
        if loc is not None:
            self._check_slots(buffers, loc, "0 or more")
            page, entry = loc.long() // buffers.page_size, loc.long() % buffers.page_size
        out = []
        for codes, scales, global_scale in pairs:
            if loc is not None:
                by_entry = (t if buffers.kv_layout == "NHD" else t.transpose(1, 2) for t in (codes, scales))
                codes, scales = (t[page, entry] for t in by_entry)
            out.append(self.dequantize(codes, scales, global_scale, dtype))
        return out[0], out[1]

    def dequantize_paged(
        self,
        buffers: KVBuffers,
        block_tables: Tensor,
        seq_lens: Tensor,
        layer_id: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        max_seq_len: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sequences in order, by page tables: see :func:`torch_fp4ops.nvfp4_kv_dequantize_paged`."""
        raise NotImplementedError(f"{self.name}: no operator reads its pages; use dequantize_prev_kv")

    def decode_attention(
        self, q: Tensor, buffers: KVBuffers, block_tables: Tensor, seq_lens: Tensor, layer_id: int = 0, **options: Any
    ) -> Tensor:
        """Attention of one token a sequence, straight from FP4: see :func:`torch_fp4ops.fp4_kv_attention_decode`."""
        raise NotImplementedError(f"{self.name}: no attention operator reads it; use dequantize_prev_kv")

    def compute_cell_size(self, head_num: int, head_dim: int, num_layers: int) -> int:
        """Bytes that a token takes in the cache: codes and scales, keys and values, every layer."""
        self.check_head_dim(head_dim)
        return 2 * num_layers * head_num * (head_dim // 2 + head_dim // self.format.block_size)

    def workspace_cell_size(self, head_num: int, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that a token takes when :meth:`dequantize_prev_kv` gives it in ``dtype``: one layer at a time."""
        return 2 * head_num * head_dim * dtype.itemsize

    # Checks

    def check_head_dim(self, head_dim: int) -> None:
        """Raise ValueError unless a head is whole blocks."""
        if head_dim < 1 or head_dim % self.format.block_size:
            raise self._wrong("head_dim", head_dim, f"a multiple of {self.format.block_size}")

    def _check_layer(self, layer_id: int) -> None:
        if not 0 <= layer_id < self.num_layers:
            raise self._wrong("layer_id", layer_id, f"0 to {self.num_layers - 1}")

    def _check_buffers(self, reader: str, buffers: KVBuffers) -> None:
        reader = f"{self.name}.{reader}"
        buffers.require(reader, method=self.name, v_sf_layout="linear", scale_convention=self.scale_convention)
        if buffers.block_size != self.format.block_size:
            raise self._wrong("buffers", f"of blocks of {buffers.block_size}", f"blocks of {self.format.block_size}")

    def _check_new(self, buffers: KVBuffers, loc: Tensor, cache_k: Tensor, cache_v: Tensor) -> None:
        heads, dim = buffers.heads, buffers.head_dim
        for name, x in (("cache_k", cache_k), ("cache_v", cache_v)):
            if x.dtype not in _FLOATS or x.device != buffers.device:
                raise self._wrong(name, f"{x.dtype} on {x.device}", f"{_ALLOWED_FLOATS} on {buffers.device}")
            if x.dim() != 3 or x.shape[1:] != (heads, dim):
                raise self._wrong(name, f"of shape {tuple(x.shape)}", f"[rows, {heads}, {dim}], as the buffers are")
        if cache_v.dtype != cache_k.dtype or cache_v.shape != cache_k.shape:
            given = f"{cache_v.dtype} of shape {tuple(cache_v.shape)}"
            raise self._wrong("cache_v", given, f"{cache_k.dtype} of shape {tuple(cache_k.shape)}, as cache_k")
        self._check_slots(buffers, loc, "negative to skip a row")
        if loc.shape[0] > cache_k.shape[0]:
            raise self._wrong("loc", f"of {loc.shape[0]} slots", f"at most {cache_k.shape[0]}, the rows of cache_k")

    def _check_slots(self, buffers: KVBuffers, loc: Tensor, below: str) -> None:
        if not isinstance(loc, Tensor):
            raise self._wrong("loc", f"a {type(loc).__name__}", "a tensor of slots")
        if loc.dtype not in (torch.int32, torch.int64) or loc.dim() != 1 or loc.device != buffers.device:
            given = f"{loc.dtype} of shape {tuple(loc.shape)} on {loc.device}"
            raise self._wrong("loc", given, f"torch.int32 or torch.int64, one dimension, on {buffers.device}")
        # Values are data: a graph that is being traced has none, and those of a GPU would have to be waited for.
        if loc.device.type != "cpu" or torch.compiler.is_compiling() or not loc.numel():
            return
        least, largest = int(loc.min()), int(loc.max())
        if largest >= buffers.slots or (least < 0 and below == "0 or more"):
            raise self._wrong("loc", f"from {least} to {largest}", f"slots below {buffers.slots}, {below}")

    def _wrong(self, argument: str, given: Any, allowed: str) -> ValueError:
        return ValueError(f"{self.name}: {argument} is {given}; allowed: {allowed}")
