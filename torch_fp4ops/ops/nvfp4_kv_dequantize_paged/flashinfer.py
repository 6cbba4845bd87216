"""nvfp4_kv_dequantize_paged by FlashInfer: NVFP4 to 16 bits, compute capability 8.0 and later.

Like the op it passes over pages outside of the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Call
from .. import _flashinfer, _kv
from . import nvfp4_kv_dequantize_paged, tokens_of, tokens_of_call

KERNELS = {
    "flashinfer": _flashinfer.Kernel(
        "nvfp4_kv_dequantize_paged", (80, 86, 89, 90, 100, 103, 107, 110, 120, 121), modules="fp4_kv_dequant"
    ),
}


def _unsupported(call: Call, name: str) -> str | None:
    if call.sf_use_ue8m0:
        return "FlashInfer reads NVFP4 caches only"
    if call.output_dtype not in (torch.bfloat16, torch.float16):
        return f"FlashInfer gives bfloat16 and float16, not {call.output_dtype}"
    if not call.k_cache.numel() or not call.block_tables.shape[0] * tokens_of_call(call):
        return "FlashInfer's kernel needs a token"
    return None


@_flashinfer.adapter(nvfp4_kv_dequantize_paged, KERNELS, _unsupported)
def nvfp4_kv_dequantize_paged_flashinfer(
    k_cache: Tensor,
    v_cache: Tensor,
    k_cache_sf: Tensor,
    v_cache_sf: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    kv_layout: str = "NHD",
    output_dtype: torch.dtype = torch.bfloat16,
    max_seq_len: int | None = None,
    *,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    assert k_scale is not None and v_scale is not None  # NVFP4 has them
    tokens = tokens_of(k_cache, block_tables, kv_layout, max_seq_len)
    shape = (block_tables.shape[0], tokens, _kv.heads_of(k_cache, kv_layout), k_cache.shape[3] * 2)
    # FlashInfer leaves what lies behind a sequence's end as it is.
    keys, values = (torch.zeros(shape, dtype=output_dtype, device=k_cache.device) for _ in range(2))
    _flashinfer.function("nvfp4_kv_dequantize_paged")(
        paged_kv_cache=(k_cache, v_cache),
        kv_cache_sf=(k_cache_sf, v_cache_sf),
        block_tables=block_tables.contiguous(),
        seq_lens=seq_lens.int().contiguous(),
        k_scale=k_scale.reshape(1),
        v_scale=v_scale.reshape(1),
        output_k=keys,
        output_v=values,
        kv_layout=kv_layout,
    )
    return keys, values
