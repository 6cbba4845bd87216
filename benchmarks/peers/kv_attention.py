"""Peers of attention over an FP4 cache: the same kernels over caches of more bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_fp4ops import OPS
from torch_fp4ops.testing import Sample

from ..cases import Case
from ..verify import Expected
from ._peer import Peer, Prepared, Run, imported


def _bf16_cache(case: Case, samples: Sequence[Sample], expected: Expected) -> Prepared:
    """The op's own kernels over a paged cache of the same values in bf16."""
    return _other_cache(samples, "plain", torch.bfloat16)


def _e4m3_cache(case: Case, samples: Sequence[Sample], expected: Expected) -> Prepared:
    """The op's own kernels over a paged cache of the same values in E4M3, without scales."""
    return _other_cache(samples, "e4m3", torch.float8_e4m3fn)


def _other_cache(samples: Sequence[Sample], fmt: str, dtype: torch.dtype) -> Prepared:
    attend = imported("torch_fp4ops.ops.fp4_kv_attention_decode.triton").attend

    def closure(sample: Sample) -> Run:
        q, k_cache, *_, tables, lengths, _, _ = sample.args
        page = k_cache.shape[1]
        order = torch.randperm(tables.numel(), device=q.device)
        caches = []
        for dense in OPS["nvfp4_kv_dequantize_paged"](*sample.args[1:], output_dtype=dtype):
            pages = dense.view(torch.uint8).view(-1, page, *dense.shape[2:3], dense.shape[3] * dense.itemsize)
            caches.append(torch.empty_like(pages).index_copy_(0, order, pages))
        rows = order.int().view(tables.shape)
        fixed = ((None, None), "NHD", q.shape[2] ** -0.5, -1, None, fmt)
        return lambda: attend(q, caches, None, rows, lengths, *fixed)

    # Each set is larger than the op's: half as many are larger than the L2, too.
    return Prepared([closure(s) for s in samples[: max(1, len(samples) // 2)]])


KV_ATTENTION = (
    Peer("bf16-cache", ("fp4_kv_attention_decode",), _bf16_cache),
    Peer("e4m3-cache", ("fp4_kv_attention_decode",), _e4m3_cache),
)
