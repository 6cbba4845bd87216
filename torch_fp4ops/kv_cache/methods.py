"""The three FP4 formats that the operators on paged caches have, and the registry of methods."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from ..block_quantization import dequantize_blocks, quantize_mx
from ..formats import BLOCKFP4, MXFP4, NVFP4
from ..ops.fp4_kv_attention_decode import HEAD_DIMS
from .base import FP4KVCacheQuantMethod
from .buffers import KVBuffers
from .scales import KVScales, require_convention

__all__ = [
    "BlockFP4KVMethod",
    "MXFP4KVMethod",
    "NVFP4KVMethod",
    "get_fp4_kv_cache_quant_method",
    "register_fp4_kv_cache_quant_method",
]

_DECODE_OPTIONS = ("sm_scale", "window_left", "logits_soft_cap", "backend")

_Method = TypeVar("_Method", bound=type[FP4KVCacheQuantMethod])
_METHODS: dict[str, type[FP4KVCacheQuantMethod]] = {}


def register_fp4_kv_cache_quant_method(cls: _Method) -> _Method:
    """Make a subclass of :class:`FP4KVCacheQuantMethod` known under its ``name``; a class decorator.

    Raises ValueError where the name is taken.
    """
    if cls.name in _METHODS:
        raise ValueError(f"register_fp4_kv_cache_quant_method: there is a method named {cls.name!r} already")
    _METHODS[cls.name] = cls
    return cls


def get_fp4_kv_cache_quant_method(name: str, **kwargs: Any) -> FP4KVCacheQuantMethod:
    """A new method by name: ``"nvfp4"``, ``"fp4_mx_block16"``, ``"mxfp4"`` or a registered one.

    ``kwargs`` go to the class: ``num_layers`` and ``device``, and for NVFP4 ``scale_convention``.
    """
    if name not in _METHODS:
        allowed = " or ".join(map(repr, _METHODS))
        raise ValueError(f"get_fp4_kv_cache_quant_method: name is {name!r}; allowed: {allowed}")
    return _METHODS[name](**kwargs)


class PagedKVMethod(FP4KVCacheQuantMethod):
    """A format that ``torch.ops.fp4`` stores, dequantises and attends to in pages, one launch each."""

    @property
    def _flags(self) -> dict[str, Any]:
        return {"sf_vec_size": self.format.block_size, "sf_use_ue8m0": self.format.scale == "ue8m0"}

    def needs_workspace_to_decode(self, head_dim: int) -> bool:
        return head_dim not in HEAD_DIMS

    def _store(
        self,
        buffers: KVBuffers,
        loc: Tensor,
        cache_k: Tensor,
        cache_v: Tensor,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
    ) -> None:
        caches = buffers.k, buffers.v, buffers.k_sf, buffers.v_sf
        torch.ops.fp4.nvfp4_kv_quantize_store(
            cache_k, cache_v, loc, *caches, k_scale, v_scale, buffers.kv_layout, **self._flags
        )

    def dequantize_paged(
        self,
        buffers: KVBuffers,
        block_tables: Tensor,
        seq_lens: Tensor,
        layer_id: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        max_seq_len: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        self._check_buffers("dequantize_paged", buffers)
        caches = buffers.k, buffers.v, buffers.k_sf, buffers.v_sf
        scales = self.global_scales(layer_id)
        return torch.ops.fp4.nvfp4_kv_dequantize_paged(
            *caches, block_tables, seq_lens, *scales, buffers.kv_layout, dtype, max_seq_len, **self._flags
        )

    def decode_attention(
        self, q: Tensor, buffers: KVBuffers, block_tables: Tensor, seq_lens: Tensor, layer_id: int = 0, **options: Any
    ) -> Tensor:
        self._check_buffers("decode_attention", buffers)
        unknown = options.keys() - _DECODE_OPTIONS
        if unknown:
            raise self._wrong("options", ", ".join(sorted(unknown)), " or ".join(_DECODE_OPTIONS))
        caches = buffers.k, buffers.v, buffers.k_sf, buffers.v_sf
        scales = self.global_scales(layer_id)
        return torch.ops.fp4.fp4_kv_attention_decode(
            q, *caches, block_tables, seq_lens, *scales, buffers.kv_layout, **options, **self._flags
        )


@register_fp4_kv_cache_quant_method
class NVFP4KVMethod(PagedKVMethod):
    """Blocks of 16 with E4M3 scales, and a float32 scale for each layer's keys and values.

    The scales are 1 until :meth:`load_scales`; E4M3 then has to span the values by itself, which is enough for
    magnitudes up to 2688, with block maxima below 6 * 2^-6 losing precision.

    Args:
        scale_convention: what the scales are, see :data:`SCALE_CONVENTIONS`.
    """

    name = "nvfp4"
    format = NVFP4

    def __init__(self, num_layers: int = 1, device: torch.device | str = "cpu", *, scale_convention: str = "amax/2688"):
        super().__init__(num_layers, device)
        require_convention(self.name, scale_convention)
        self._scale_convention = scale_convention
        # Tensors of their own: a layer's scale is an argument of an op, never a view that a graph has to make.
        ones = torch.ones(num_layers, 2, 1, dtype=torch.float32, device=device)
        self._scales = [(k.clone(), v.clone()) for k, v in ones]

    @property
    def scale_convention(self) -> str:
        return self._scale_convention

    def global_scales(self, layer_id: int) -> tuple[Tensor, Tensor]:
        self._check_layer(layer_id)
        return self._scales[layer_id]

    def load_scales(self, scales: KVScales) -> None:
        if len(scales) != self.num_layers:
            raise self._wrong("scales", f"of {len(scales)} layers", f"{self.num_layers} layers")
        scales = scales.to_convention(self.scale_convention)
        # In place: captured graphs hold these tensors.
        for own, k, v in zip(self._scales, scales.k, scales.v, strict=True):
            own[0].copy_(k)
            own[1].copy_(v)

    def quantize(self, x: Tensor, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.fp4.nvfp4_kv_quantize(x, global_scale)

    def dequantize(self, codes: Tensor, scales: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        return torch.ops.fp4.nvfp4_kv_dequantize(codes, scales, global_scale, dtype)


@register_fp4_kv_cache_quant_method
class MXFP4KVMethod(PagedKVMethod):
    """OCP MXFP4: blocks of 32, power-of-two scales rounded up so that nothing clips, no global scale."""

    name = "mxfp4"
    format = MXFP4

    def quantize(self, x: Tensor, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        codes, scales = torch.ops.fp4.fp4_quantize(x, None, self.format.block_size, True, is_sf_swizzled_layout=False)
        return codes, scales.view(*x.shape[:-1], x.shape[-1] // self.format.block_size)

    def dequantize(self, codes: Tensor, scales: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        scales = scales.contiguous().flatten()
        return torch.ops.fp4.fp4_dequantize(
            codes, scales, None, self.format.block_size, True, is_sf_swizzled_layout=False, out_dtype=dtype
        )


@register_fp4_kv_cache_quant_method
class BlockFP4KVMethod(PagedKVMethod):
    """Blocks of 16 with power-of-two scales, ``ceil(log2(amax / 6)) + 127`` in a byte, no global scale.

    Scales and their meaning are SGLang's. A tie of two codes goes to the even one, as everywhere in this package, and
    away from zero there, so codes differ where a value lies exactly between two: one in 150 of normal bfloat16 values.
    Either reads what the other wrote.
    """

    name = "fp4_mx_block16"
    format = BLOCKFP4

    def quantize(self, x: Tensor, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        return quantize_mx(x, self.format)

    def dequantize(self, codes: Tensor, scales: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        return dequantize_blocks(codes, scales, self.format).to(dtype)
