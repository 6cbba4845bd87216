"""nvfp4_kv_quantize_store: quantise keys and values to FP4 into a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ...block_quantization import quantize_mx, quantize_nvfp4
from ...contracts import Call
from ...formats import kv_format
from ...registry import op
from ...selection import Preference
from .. import _kv, _scales


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """One tensor twice, or real ones that begin at the same place, which is 0 for those of nothing or on "meta"."""
    return a is b or (type(a) is type(b) is Tensor and a.data_ptr() == b.data_ptr() != 0)


def _contract(call: Call) -> None:
    fmt = _kv.require_format(call)
    _kv.require_layout(call)
    key, slots = call.append_key, call.slot_mapping
    call.require_dtype("append_key", _scales.FLOATS)
    call.require_rank("append_key", 3)
    _scales.require_blocks(call, "append_key", key.shape[2], fmt)
    call.require_dtype("append_value", (key.dtype,))
    call.require_shape("append_value", key.shape, ", that of append_key")
    call.require_dtype("slot_mapping", (torch.int32, torch.int64))
    call.require_rank("slot_mapping", 1)
    call.require(slots.shape[0] <= key.shape[0], "slot_mapping", slots.shape, f"at most {key.shape[0]} slots")
    _kv.require_caches(call, key.shape[1], key.shape[2], fmt)
    for k, v in (("k_cache", "v_cache"), ("k_cache_sf", "v_cache_sf")):
        apart = not _same_memory(getattr(call, k), getattr(call, v))
        call.require(apart, v, f"{k} itself", "a tensor of its own: both are written")
    _kv.require_cache_scales(call, fmt)


def _check_values(call: Call) -> None:
    _kv.check_cache_scales(call)
    if call.slot_mapping.numel():
        slots = call.k_cache.shape[0] * _kv.page_size(call.k_cache, call.kv_layout)
        largest = int(call.slot_mapping.max())
        call.require(largest < slots, "slot_mapping", f"up to {largest}", f"slots below {slots}, or negative")


_PREFERENCES = (
    Preference(
        "triton",
        "cuda",
        "one launch for keys and values, where the reference takes a dozen; NVIDIA H200: 23.2 us for 16384 tokens of "
        "8 x 128, 87% of the copy rate",
    ),
)


@op(
    preferences=_PREFERENCES,
    contract=_contract,
    check_values=_check_values,
    byte_arguments=_kv.BYTES,
    mutates=("k_cache", "v_cache", "k_cache_sf", "v_cache_sf"),
)
def nvfp4_kv_quantize_store(
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
    """Quantise new keys and values to FP4 and write them into a paged cache, in place, at the given slots.

    Codes and scales are those of :func:`nvfp4_kv_quantize` and, of MXFP4, :func:`fp4_quantize`. BlockFP4 is MXFP4 with
    blocks of 16: SGLang's ``fp4_mx_block16``, but with ties to the even code.

    Args:
        append_key, append_value: ``[rows, heads, D]``, D a multiple of the block; bfloat16, float16 or float32, any
            strides. Rows beyond ``len(slot_mapping)`` are padding and not read.
        slot_mapping: int32 or int64 ``[n]``, n <= rows: row i goes to page ``slot // page_size``, entry ``slot %
            page_size``. A negative slot is skipped. What two rows of one slot leave there is not defined.
            A slot past the end raises on the CPU and is skipped on a GPU, where reading it would synchronise.
        k_cache, v_cache: uint8 ``[pages, page_size, heads, D/2]`` (NHD) or ``[pages, heads, page_size, D/2]``
            (HND); written. Any strides but a last one of 1.
        k_cache_sf, v_cache_sf: uint8 scales, the same with ``D / sf_vec_size``, linear; written.
        k_scale, v_scale: float32, one element, the *decode* global scales; None for formats without one.
        kv_layout: ``"NHD"`` or ``"HND"``.
        sf_vec_size, sf_use_ue8m0: the format: 16 and False NVFP4, 32 and True MXFP4, 16 and True BlockFP4.
        backend: ``"auto"`` or a backend's name.

    Raises:
        ValueError: a wrong dtype, shape, stride, D, layout or format, and on the CPU a slot past the end or a global
            scale that is not finite and above zero; the cache is untouched then.

    Source: FlashInfer ``nvfp4_quantize_append_paged_kv_cache_with_slot_mapping`` with the cache tuples spelt out.
    """
    n = slot_mapping.shape[0]
    if n == 0:
        return
    fmt = kv_format(sf_vec_size, sf_use_ue8m0)
    assert fmt is not None
    for new, cache, cache_sf, scale in (
        (append_key, k_cache, k_cache_sf, k_scale),
        (append_value, v_cache, v_cache_sf, v_scale),
    ):
        if scale is None:
            codes, scales = quantize_mx(new[:n], fmt)
        else:
            decode = scale.reshape(())
            codes, scales = quantize_nvfp4(new[:n], 1.0 / decode, decode)
        for target, data in ((cache, codes), (cache_sf, scales)):
            write_rows(target if kv_layout == "NHD" else target.transpose(1, 2), slot_mapping, data)


def write_rows(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """``cache[page, entry] = row`` for every slot within the cache.

    Where looking at slots would synchronise, or there is nothing to see yet, a row to be skipped repeats the first one
    that isn't; if all are, the cache's own content is written back.
    """
    if not cache.numel():
        return
    page_size = cache.shape[1]
    slots = slots.long()
    valid = (slots >= 0) & (slots < cache.shape[0] * page_size)
    if type(slots) is Tensor and slots.device.type == "cpu" and not torch.compiler.is_compiling():
        slots = slots[valid]
        cache[slots // page_size, slots % page_size] = rows[valid]
        return
    first = valid.to(torch.uint8).argmax()
    source = torch.where(valid, torch.arange(len(slots), device=slots.device), first)
    target = torch.where(valid.any(), slots[source], 0)
    page, entry = target // page_size, target % page_size
    cache[page, entry] = torch.where(valid.any(), rows[source], cache[page, entry])
