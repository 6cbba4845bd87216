"""nvfp4_kv_quantize, nvfp4_kv_dequantize and the store into a paged cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_fp4ops import fp4_quantize, nvfp4_kv_dequantize, nvfp4_kv_quantize, nvfp4_kv_quantize_store
from torch_fp4ops.block_quantization import dequantize_blocks
from torch_fp4ops.formats import NVFP4
from torch_fp4ops.testing import assert_same_bytes
from torch_fp4ops.testing.samples import values
from torch_fp4ops.testing.strategies import matrices

from .rejections import assert_rejected, assert_rejected_by_contract

SCALE = torch.tensor([5 / 2688])


@given(matrices(), st.floats(2.0**-20, 2.0**20, width=32))
def test_quantize_is_fp4_quantize_with_a_decode_scale(x, scale):
    scale = torch.tensor([scale])
    wanted = fp4_quantize(x, scale, is_sf_swizzled_layout=False, is_global_scale_inversed=True)
    for a, b in zip(nvfp4_kv_quantize(x, scale), wanted, strict=True):
        assert_same_bytes(a, b)


@given(matrices(), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_dequantize(x, dtype):
    codes, scales = nvfp4_kv_quantize(x, SCALE)
    wanted = dequantize_blocks(codes, scales, NVFP4, SCALE).to(dtype)
    assert_same_bytes(nvfp4_kv_dequantize(codes, scales, SCALE, dtype), wanted)


@given(
    st.integers(0, 2**31),
    st.sampled_from(["NHD", "HND"]),
    st.integers(1, 3),
    st.sampled_from([1, 4, 16]),
    st.integers(1, 3),
    st.sampled_from([16, 64, 112]),
    st.integers(0, 12),
    st.integers(0, 3),
)
def test_store_writes_the_slots_and_nothing_else(seed, layout, pages, page, heads, dim, n, padding):
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(pages * page, generator=generator)[:n]
    slots = torch.where(torch.rand(len(slots), generator=generator) < 0.3, -1 - slots, slots)
    rows = len(slots) + padding
    key, value = values(seed, rows, heads, dim), values(seed + 1, rows, heads, dim)
    middle = (page, heads) if layout == "NHD" else (heads, page)
    caches = [
        torch.randint(0, 256, (pages, *middle, last), generator=generator, dtype=torch.uint8)
        for last in (dim // 2, dim // 2, dim // 16, dim // 16)
    ]
    wanted = [c.clone() for c in caches]
    k_scale, v_scale = SCALE, SCALE * 2
    for new, scale, which in ((key, k_scale, 0), (value, v_scale, 1)):
        for target, data in zip(wanted[which::2], nvfp4_kv_quantize(new, scale), strict=True):
            for i, slot in enumerate(slots.tolist()):
                if slot >= 0:
                    rows_of_page = target[slot // page] if layout == "NHD" else target[slot // page].transpose(0, 1)
                    rows_of_page[slot % page] = data[i]
    nvfp4_kv_quantize_store(key, value, slots, *caches, k_scale, v_scale, layout)
    for name, a, b in zip(("k", "v", "k_sf", "v_sf"), caches, wanted, strict=True):
        assert_same_bytes(a, b, name)


def kv_arguments(**change):
    cache, sf = (torch.zeros(3, 4, 2, last, dtype=torch.uint8) for last in (32, 4))
    new = values(0, 5, 2, 64)
    slots = torch.tensor([0, 5, -1])
    names = ("append_key", "append_value", "slot_mapping", "k_cache", "v_cache", "k_cache_sf", "v_cache_sf")
    tensors = (new, new.clone(), slots, cache, cache.clone(), sf, sf.clone())
    return {**dict(zip(names, tensors, strict=True)), "k_scale": SCALE, "v_scale": SCALE, **change}


NEW, CACHE, SF = (kv_arguments()[n] for n in ("append_key", "k_cache", "k_cache_sf"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_layout": "DHN"}, r"kv_layout is 'DHN'; allowed: 'NHD' or 'HND'"),
        ({"append_key": NEW.double()}, r"append_key is torch.float64"),
        ({"append_key": NEW[0]}, r"append_key is of shape \(2, 64\); allowed: 3 dimensions"),
        ({"append_key": NEW[..., :40]}, r"append_key is of K = 40; allowed: K a multiple of 16"),
        ({"append_value": NEW.half()}, r"append_value is torch.float16; allowed: torch.bfloat16"),
        (
            {"append_value": NEW[:4]},
            r"append_value is of shape \(4, 2, 64\); allowed: shape \(5, 2, 64\), that of appe",
        ),
        ({"slot_mapping": torch.zeros(3)}, r"slot_mapping is torch.float32; allowed: torch.int32 or torch.int64"),
        ({"slot_mapping": torch.zeros(1, 3).long()}, r"slot_mapping is of shape \(1, 3\); allowed: 1 dimension$"),
        ({"slot_mapping": torch.arange(6)}, r"slot_mapping is of shape \(6,\); allowed: at most 5 slots"),
        ({"k_cache": CACHE[0]}, r"k_cache is of shape \(4, 2, 32\); allowed: 4 dimensions"),
        ({"k_cache": CACHE.int()}, r"k_cache is torch.int32; allowed: torch.uint8"),
        ({"v_cache": CACHE[:2]}, r"v_cache is of shape \(2, 4, 2, 32\); allowed: shape \(3, 4, 2, 32\) \(NHD\)"),
        ({"kv_layout": "HND"}, r"k_cache is of shape \(3, 4, 2, 32\); allowed: shape \(3, 2, 2, 32\) \(HND\)"),
        ({"k_cache_sf": CACHE}, r"k_cache_sf is of shape \(3, 4, 2, 32\); allowed: shape \(3, 4, 2, 4\)"),
        ({"v_cache_sf": SF.float()}, r"v_cache_sf is torch.float32"),
        ({"k_cache": CACHE.mT.contiguous().mT}, r"k_cache is of strides .*allowed: any strides but a last one of 1"),
        ({"k_scale": torch.ones(2)}, r"k_scale is of shape \(2,\); allowed: one element"),
        ({"v_scale": torch.ones(1).half()}, r"v_scale is torch.float16; allowed: torch.float32"),
    ],
)
def test_store_rejects(change, message):
    assert_rejected_by_contract(nvfp4_kv_quantize_store, kv_arguments(), change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot_mapping": torch.tensor([0, 12])}, r"slot_mapping is up to 12; allowed: slots below 12, or negative"),
        ({"k_scale": torch.zeros(1)}, r"k_scale is \[0.0\]; allowed: finite values above zero"),
        ({"v_scale": -torch.ones(1)}, r"v_scale is \[-1.0\]; allowed: finite values above zero"),
        ({"k_cache": CACHE, "v_cache": CACHE}, r"v_cache is k_cache itself; allowed: a tensor of its own"),
        ({"k_cache_sf": SF, "v_cache_sf": SF}, r"v_cache_sf is k_cache_sf itself; allowed: a tensor of its own"),
        ({"k_cache": CACHE, "v_cache": CACHE[:]}, r"v_cache is k_cache itself; allowed: a tensor of its own"),
    ],
)
def test_store_rejects_bad_values_and_leaves_the_cache_alone(change, message):
    arguments = kv_arguments(**change)
    with pytest.raises(ValueError, match=message):
        nvfp4_kv_quantize_store(**arguments)
    assert not any(arguments[n].any() for n in ("k_cache", "v_cache", "k_cache_sf", "v_cache_sf"))


def test_a_cache_of_no_pages_takes_no_token():
    empty = {name: kv_arguments()[name][:0] for name in ("k_cache", "v_cache", "k_cache_sf", "v_cache_sf")}
    nvfp4_kv_quantize_store(**kv_arguments(**empty, slot_mapping=torch.tensor([-1, -1])))
    with pytest.raises(ValueError, match="slot_mapping is up to 0; allowed: slots below 0, or negative"):
        nvfp4_kv_quantize_store(**kv_arguments(**empty, slot_mapping=torch.tensor([0])))


VALID = {"input": values(0, 4, 64), "global_scale": SCALE}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": VALID["input"].double()}, r"input is torch.float64"),
        ({"input": VALID["input"][0]}, r"input is of shape \(64,\); allowed: two dimensions"),
        ({"input": VALID["input"][:, :40]}, r"input is of K = 40; allowed: K a multiple of 16"),
        ({"global_scale": torch.ones(2)}, r"global_scale is of shape \(2,\); allowed: one element"),
        ({"global_scale": torch.ones(1).double()}, r"global_scale is torch.float64; allowed: torch.float32"),
    ],
)
def test_quantize_rejects(change, message):
    assert_rejected_by_contract(nvfp4_kv_quantize, VALID, change, message)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0, 1e-40])
def test_quantize_rejects_a_bad_global_scale(value):
    change = {"global_scale": torch.tensor([value])}
    assert_rejected(nvfp4_kv_quantize, VALID, change, r"global_scale is \[.*\]; allowed: finite values above zero")


CODES, SCALES = nvfp4_kv_quantize(**VALID)
VALID_DEQUANTIZE = {"fp4_data": CODES, "block_scales": SCALES, "global_scale": SCALE}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fp4_data": CODES.int()}, r"fp4_data is torch.int32; allowed: torch.uint8"),
        ({"fp4_data": CODES[0]}, r"fp4_data is of shape \(32,\); allowed: two dimensions"),
        ({"fp4_data": CODES[:, :20]}, r"fp4_data is of K = 40"),
        ({"block_scales": SCALES.float()}, r"block_scales is torch.float32"),
        ({"block_scales": SCALES[:, :2]}, r"block_scales is of shape \(4, 2\); allowed: shape \(4, 4\)"),
        ({"global_scale": torch.ones(2)}, r"global_scale is of shape \(2,\)"),
        ({"output_dtype": torch.int8}, r"output_dtype is torch.int8"),
    ],
)
def test_dequantize_rejects(change, message):
    assert_rejected_by_contract(nvfp4_kv_dequantize, VALID_DEQUANTIZE, change, message)


def test_dequantize_rejects_a_zero_global_scale():
    change = {"global_scale": torch.zeros(1)}
    assert_rejected(nvfp4_kv_dequantize, VALID_DEQUANTIZE, change, r"global_scale is \[0.0\]; allowed: finite")
