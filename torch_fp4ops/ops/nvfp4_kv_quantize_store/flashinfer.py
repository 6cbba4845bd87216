"""nvfp4_kv_quantize_store by FlashInfer: NVFP4, compute capability 8.0 and later.

Its kernel rounds in software, so it is not bound to the hardware of 10.0. Like the op it skips slots that are negative
or past the cache's end. A NaN it stores as zero, where the op makes its block NaN; finite values are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Call
from .. import _flashinfer
from . import nvfp4_kv_quantize_store

_FUNCTION = "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping"
KERNELS = {
    "flashinfer": _flashinfer.Kernel(_FUNCTION, (80, 86, 89, 90, 100, 103, 107, 110, 120, 121), modules="page"),
}
_HEAD_DIMS = (64, 128, 256, 512)


def _unsupported(call: Call, name: str) -> str | None:
    if call.sf_use_ue8m0:
        return "FlashInfer writes NVFP4 caches only"
    if call.append_key.dtype == torch.float32:
        return "FlashInfer takes bfloat16 and float16, not float32"
    if call.append_key.shape[2] not in _HEAD_DIMS:
        return f"FlashInfer's kernel is for head dimensions of {_HEAD_DIMS}, not {call.append_key.shape[2]}"
    if not call.slot_mapping.shape[0] * call.append_key.shape[1] or not call.k_cache.numel():
        return "FlashInfer's kernel needs a row and a cache"
    return None


@_flashinfer.adapter(nvfp4_kv_quantize_store, KERNELS, _unsupported)
def nvfp4_kv_quantize_store_flashinfer(
    append_key: Tensor,
    append_value: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_cache_sf: Tensor,
    v_cache_sf: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    kv_layout: str = "NHD",
    *,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    backend: str = "auto",
) -> None:
    assert k_scale is not None and v_scale is not None  # NVFP4 has them
    _flashinfer.function(_FUNCTION)(
        append_key=append_key.contiguous(),
        append_value=append_value.contiguous(),
        slot_mapping=slot_mapping.contiguous(),
        paged_kv_cache=(k_cache, v_cache),
        kv_cache_sf=(k_cache_sf.view(torch.float8_e4m3fn), v_cache_sf.view(torch.float8_e4m3fn)),
        k_scale=k_scale.reshape(1),
        v_scale=v_scale.reshape(1),
        kv_layout=kv_layout,
    )
