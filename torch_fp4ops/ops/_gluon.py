"""Names of Gluon that differ between Triton 3.6 and 3.9, and PTX that is run for its effect."""

from __future__ import annotations

from typing import Any

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

__all__ = ["async_load", "async_store", "copy_async", "reinterpret", "run_asm", "warp_group_barrier"]

_async_copy: Any = async_copy
_tma: Any = tma
_gl: Any = gl

# The newer name first: the older one stays behind as a function that raises.
async_load = getattr(_tma, "async_load", None) or _tma.async_copy_global_to_shared
async_store = getattr(_tma, "async_store", None) or _tma.async_copy_shared_to_global
copy_async = getattr(_async_copy, "async_load", None) or _async_copy.async_copy_global_to_shared
warp_group_barrier = getattr(_gl, "barrier", None) or _gl.thread_barrier
_descriptor: Any = gl.shared_memory_descriptor
reinterpret = getattr(_descriptor, "reinterpret", None) or _descriptor._reinterpret


@gluon.jit
def run_asm(ASM: gl.constexpr):
    """PTX by each thread; a result is asked for, so ``ASM`` names it, if only behind ``//``."""
    gl.inline_asm_elementwise(ASM, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
