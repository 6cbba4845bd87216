"""fp4_kv_attention_decode in Triton: any GPU from compute capability 8.0, ROCm included.

Two launches, or one where a sequence isn't split. How many parts there are follows from shapes and the GPU alone, so a
captured call is right for all lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...contracts import Call
from ...formats import kv_format
from .. import _kv
from .._triton_launch import AotCase, launch, processors, why_not
from . import fp4_kv_attention_decode
from ._triton_kernels import NOT_SPECIALIZED, attend_kernel, combine_kernel

_PROGRAMS = 64  # for each of the GPU's processors, so that few are idle at the end
_FEWEST_TOKENS = 256  # of a part
_MOST_SPLITS = 64
_MOST_TOKENS = (1 << 31) - (1 << 16)  # their numbers, to the end of the last split's last tile, are of 32 bits
_MOST_QUERY_HEADS = 128  # of a kv head: a program has them all, and with more its shared memory would not suffice


def _why_not(call: Call) -> str | None:
    if call.q.dtype == torch.float16 and call.sf_use_ue8m0:
        return "float16 does not hold every value of a power-of-two scale; with such a cache q must be bfloat16"
    group = call.q.shape[1] // _kv.heads_of(call.k_cache, call.kv_layout)
    if group > _MOST_QUERY_HEADS:
        return f"q has {group} heads for each of the cache's; a program holds up to {_MOST_QUERY_HEADS}"
    return why_not(call)


class Tile(NamedTuple):
    """BN tokens a tile, the query heads of a kv head padded to ROWS, STAGES of loads, THREADS a program."""

    BN: int
    ROWS: int
    STAGES: int
    THREADS: int


def tile_for(fmt: str, dim: int, group: int, on_hip: bool) -> Tile:
    rows = triton.next_power_of_2(group)
    if on_hip:
        return Tile(32, max(16, rows), 1, 256)
    rows = max(8, rows)
    # One warp, as long as its registers hold the sums: then weights never leave it.
    warps = max(dim // 128, dim * rows // 2048, 1)
    if PER[fmt] == 8 and warps == 1 and rows == 8:
        return Tile(64, rows, 2, 32)  # fewer instructions a token, where registers last
    return Tile(16 if fmt == "plain" and dim > 64 else 32, rows, 3, 32 * min(8, warps))


def splits_for(sequences: int, tokens: int, multiprocessors: int) -> int:
    """Into how many parts to cut ``sequences`` (times kv heads) of at most so many tokens."""
    wanted = triton.cdiv(_PROGRAMS * multiprocessors, sequences)
    return max(1, min(wanted, triton.cdiv(tokens, _FEWEST_TOKENS), _MOST_SPLITS))


def attend(
    q: Tensor,
    caches: tuple[Tensor, Tensor],
    cache_scales: tuple[Tensor, Tensor] | None,
    block_tables: Tensor,
    seq_lens: Tensor,
    scales: tuple[Tensor | None, Tensor | None],
    kv_layout: str,
    sm_scale: float,
    window_left: int,
    logits_soft_cap: float | None,
    fmt: str,
    splits: int | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """The kernels over caches of a format: ``"nvfp4"``, ``"mxfp4"``, ``"blockfp4"``, or, without block scales,
    ``"e4m3"`` and ``"plain"`` (q's dtype)."""
    batch, q_heads, dim = q.shape
    out = torch.empty((batch, q_heads, dim), dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    heads, page = _kv.heads_of(caches[0], kv_layout), _kv.page_size(caches[0], kv_layout)
    tokens = min(block_tables.shape[1] * page, _MOST_TOKENS)
    if not tokens or not caches[0].shape[0]:
        return out.zero_()
    if q.stride(2) != 1:
        q = q.contiguous()
    if block_tables.stride(1) != 1:
        block_tables = block_tables.contiguous()
    if splits is None:
        splits = splits_for(batch * heads, tokens, processors(q.device))
    group = q_heads // heads
    if tile is None:
        tile = tile_for(fmt, dim, group, torch.version.hip is not None)
    bytes_of = tuple(t.view(torch.uint8) for t in caches)
    aligned, strides = _aligned(bytes_of, kv_layout)
    sf_aligned, sf_strides = (1, (0,) * 6) if cache_scales is None else _aligned(cache_scales, kv_layout)
    sums = stats = None
    if splits > 1:
        sums = torch.empty((batch, q_heads, splits, dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((batch, q_heads, splits, 2), dtype=torch.float32, device=q.device)
    launch(
        attend_kernel,
        (batch * splits * heads,),
        tile.THREADS,
        q.device,
        *(q, *bytes_of, *(cache_scales or (None, None)), block_tables, seq_lens.contiguous(), *scales),
        *(out, sums, stats, sm_scale, logits_soft_cap or 0.0, min(window_left, tokens), heads, tokens),
        *(caches[0].shape[0], q.stride(0), q.stride(1), block_tables.stride(0), *strides, *sf_strides),
        FORMAT=fmt,
        D=dim,
        GROUP=group,
        ROWS=tile.ROWS,
        PAGE_SIZE=page,
        WINDOW=window_left >= 0,
        CAP=logits_soft_cap is not None,
        ALIGNED=aligned,
        SF_ALIGNED=sf_aligned,
        SPLITS=splits,
        BN=tile.BN,
        STAGES=tile.STAGES,
    )
    if sums is not None:
        constants = {"PER": PER[fmt], "D": dim, "SPLITS": splits, "PADDED": triton.next_power_of_2(splits)}
        launch(combine_kernel, (batch * q_heads,), 128, q.device, sums, stats, out, second=True, **constants)
    return out


PER = {"nvfp4": 8, "mxfp4": 8, "blockfp4": 8, "e4m3": 4, "plain": 2}
"""Values in a 32-bit word."""


def _aligned(caches: tuple[Tensor, ...], kv_layout: str) -> tuple[int, tuple[int, ...]]:
    """By how many bytes, 16 at most, all rows of byte tensors are aligned, and both tensors' strides: from page to
    page, entry to entry, head to head."""
    strides = [s for cache in caches for s in _kv.strides(cache, kv_layout)]
    return math.gcd(16, *(t.data_ptr() for t in caches), *strides), tuple(strides)


@fp4_kv_attention_decode.backend("triton", unsupported=_why_not, replayable=True)
def fp4_kv_attention_decode_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_cache_sf: Tensor,
    v_cache_sf: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    kv_layout: str = "NHD",
    *,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    backend: str = "auto",
) -> Tensor:
    fmt = kv_format(sf_vec_size, sf_use_ue8m0)
    assert fmt is not None
    return attend(
        q,
        (k_cache, v_cache),
        (k_cache_sf, v_cache_sf),
        block_tables,
        seq_lens,
        (k_scale, v_scale),
        kv_layout,
        q.shape[2] ** -0.5 if sm_scale is None else sm_scale,
        window_left,
        logits_soft_cap,
        fmt.name,
    )


def aot_cases() -> Iterator[AotCase]:
    """Formats, head dimensions, dtypes of q and sizes of groups; the options, with page tables and lengths of int64,
    together; one and many splits."""
    for fmt, dim, dtype, group, options, splits in (
        ("nvfp4", 128, "bf16", 4, False, 16),
        ("nvfp4", 64, "bf16", 8, False, 1),
        ("nvfp4", 256, "bf16", 16, True, 16),
        ("nvfp4", 128, "fp16", 32, True, 1),
        ("mxfp4", 128, "bf16", 4, False, 16),
        ("blockfp4", 64, "bf16", 4, False, 16),
        ("e4m3", 128, "bf16", 4, False, 16),
        ("plain", 128, "bf16", 4, False, 16),
    ):
        yield _aot_case(fmt, dim, dtype, group, options, splits)
    for dim, splits in ((128, 16), (256, 64)):
        constants = {"PER": 8, "D": dim, "SPLITS": splits, "PADDED": splits}
        signature = {"sums_ptr": "*fp32", "stats_ptr": "*fp32", "out_ptr": "*bf16"}
        yield AotCase(f"kv_combine-D{dim}-{splits}", combine_kernel, signature, constants, 128)


def _aot_case(fmt: str, dim: int, dtype: str, group: int, options: bool, splits: int) -> AotCase:
    kv = "*u8"
    index = "*i64" if options else "*i32"
    signature = {"q_ptr": f"*{dtype}", "k_ptr": kv, "v_ptr": kv, "table_ptr": index, "length_ptr": index}
    signature |= {"out_ptr": f"*{dtype}", **dict.fromkeys(NOT_SPECIALIZED, "i32"), "sm_scale": "fp32", "cap": "fp32"}
    constants = {"FORMAT": fmt, "D": dim, "GROUP": group, "PAGE_SIZE": 16, "WINDOW": options, "CAP": options}
    constants |= {"ALIGNED": 16, "SF_ALIGNED": 8 if dim == 128 else 4, "SPLITS": splits}
    optional = {"k_sf_ptr": kv, "v_sf_ptr": kv} if PER[fmt] == 8 else {}
    optional |= {"k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32"} if fmt == "nvfp4" else {}
    optional |= {"sums_ptr": "*fp32", "stats_ptr": "*fp32"} if splits > 1 else {}
    signature |= optional
    names = ("k_sf_ptr", "v_sf_ptr", "k_scale_ptr", "v_scale_ptr", "sums_ptr", "stats_ptr")
    constants |= {name: None for name in names if name not in optional}
    (cuda, threads), (hip, hip_threads) = (_constants(tile_for(fmt, dim, group, on_hip)) for on_hip in (False, True))
    name = f"kv_attend-{fmt}-{dtype}-D{dim}-group{group}{'-options' * options}-{splits}"
    return AotCase(name, attend_kernel, signature, constants | cuda, threads, on_hip=(constants | hip, hip_threads))


def _constants(tile: Tile) -> tuple[dict[str, int], int]:
    return {"BN": tile.BN, "ROWS": tile.ROWS, "STAGES": tile.STAGES}, tile.THREADS
