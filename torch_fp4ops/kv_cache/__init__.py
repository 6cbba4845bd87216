"""FP4 KV caches: quantisation methods behind one interface, typed buffers, and a cache for ``transformers``.

``torch_fp4ops.kv_cache.transformers`` has the last; it alone imports transformers.
"""

from __future__ import annotations

from .base import FP4KVCacheQuantMethod
from .buffers import KV_LAYOUTS, V_SCALE_LAYOUTS, KVBuffers
from .methods import (
    BlockFP4KVMethod,
    MXFP4KVMethod,
    NVFP4KVMethod,
    get_fp4_kv_cache_quant_method,
    register_fp4_kv_cache_quant_method,
)
from .scales import SCALE_CONVENTIONS, KVScales

__all__ = [
    "KV_LAYOUTS",
    "SCALE_CONVENTIONS",
    "V_SCALE_LAYOUTS",
    "BlockFP4KVMethod",
    "FP4KVCacheQuantMethod",
    "KVBuffers",
    "KVScales",
    "MXFP4KVMethod",
    "NVFP4KVMethod",
    "get_fp4_kv_cache_quant_method",
    "register_fp4_kv_cache_quant_method",
]
