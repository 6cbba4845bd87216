"""Marlin's dense W4A16 GEMM for NVFP4, from libraries that were compiled beforehand.

``TORCH_FP4OPS_BENCH_MARLIN`` names a folder with ``marlin_gemm.so`` and ``marlin_repack.so``: sglang's CUDA sources of
Marlin, built as tvm-ffi modules that export ``gptq_marlin_gemm`` and ``gptq_marlin_repack``; loading them needs
``apache-tvm-ffi``. Their dense kernel has FP4 codes with one E4M3 scale for 16 of them, so no MXFP4.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_fp4ops import scale_layouts

from ..inputs import Weight
from ._peer import Multiply, Unsuitable, imported

FOLDER = "TORCH_FP4OPS_BENCH_MARLIN"

_E2M1 = 562949953487106
"""sglang's id of the weights' type: a sign, 2 exponent bits, 1 mantissa bit, neither infinity nor NaN."""
_TILE = 64  # of N and of K: the granularity of the repacking
_WIDEST_TILE = 256  # columns of a thread block at most, for the scratch of partial sums


def load(weight: Weight, alpha: Tensor | None) -> Multiply:
    """Marlin (sglang's sources), NVFP4 W4A16 with fp32 partial sums, which allocates its output and scratch by call."""
    if weight.fmt != "nvfp4":
        raise Unsuitable("its dense kernel takes NVFP4 only")
    if weight.n % _TILE or weight.k % (2 * _TILE):
        raise Unsuitable(f"it takes N in multiples of {_TILE} and K in multiples of {2 * _TILE}")
    gemm = _library("marlin_gemm")
    device, n = weight.elements.device, weight.n
    elements, scales = repacked(weight), permuted_scales(weight)
    scale = bf16_global_scale(torch.ones(1, device=device) if alpha is None else alpha)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    locks = torch.zeros(multiprocessors, dtype=torch.int32, device=device)  # every call leaves zeros
    no_ints, no_values = (torch.empty(0, dtype=d, device=device) for d in (torch.int32, torch.bfloat16))

    def multiply(a: Tensor) -> Tensor:
        m = a.shape[0]
        out = torch.empty(m, n, dtype=a.dtype, device=device)
        rows = min(-(-m // 16) * 16, 64)
        sums = torch.empty(multiprocessors * rows * _WIDEST_TILE, dtype=torch.float32, device=device)
        # After the scales: no zero points, no order of groups, no permutation. Then the whole K, no atomic adds, fp32
        # partial sums, no zero points in floating point.
        gemm.gptq_marlin_gemm(
            a,
            elements,
            scales,
            scale,
            no_ints,
            no_ints,
            no_ints,
            out,
            sums,
            no_values,
            locks,
            _E2M1,
            True,
            False,
            True,
            False,
        )
        return out

    return multiply


def repacked(weight: Weight) -> Tensor:
    """Marlin's int32 ``[K / 16, 2 N]`` of the codes."""
    n, k = weight.n, weight.k
    words = weight.elements.view(torch.int32).T.contiguous()
    out = torch.empty(k // 16, 2 * n, dtype=torch.int32, device=words.device)
    no_permutation = torch.empty(0, dtype=torch.int32, device=words.device)
    _library("marlin_repack").gptq_marlin_repack(words, no_permutation, out, k, n, 4)
    return out


def permuted_scales(weight: Weight) -> Tensor:
    """The E4M3 scales ``[K / 16, N]`` in the order in which a warp reads them, as 8 bits of a binary16 times 2^7.

    The sign is left out, so that the upper byte holds five exponent and three mantissa bits.
    """
    blocks = weight.k // 16
    linear = scale_layouts.unswizzle(weight.scales, weight.n, blocks, scale_layouts.SWIZZLED_128X4)
    values = linear.view(torch.float8_e4m3fn).T.to(torch.float16)
    # In each run of 64 columns an 8 x 8 transposition, then in each four the middle two change places.
    values = values.reshape(-1, 8, 8).transpose(1, 2).reshape(-1, 2, 2).transpose(1, 2).reshape(blocks, weight.n)
    shifted = (values * 2.0**7).view(torch.int16) << 1
    return shifted.view(torch.uint8)[:, 1::2].contiguous().view(torch.float8_e4m3fn)


def bf16_global_scale(alpha: Tensor) -> Tensor:
    """The factor of the result in bf16 ``[1]``, times the power of two that the decoded codes and scales lack.

    Codes are read as bf16 with the exponent of an E2M1, which is 2^126 too small; scales were multiplied by 2^7.
    """
    return alpha.reshape(1).to(torch.bfloat16) * 2.0**119


@functools.cache
def _library(name: str) -> Any:
    folder = os.environ.get(FOLDER)
    path = Path(folder or "") / f"{name}.so"
    if not folder or not path.exists():
        raise Unsuitable(f"not installed: {path if folder else f'{FOLDER} is not set'}")
    return imported("tvm_ffi").load_module(str(path))
