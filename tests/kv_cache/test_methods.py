"""The quantisation methods: what they write and read, byte for byte, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_fp4ops import fp4_quantize, nvfp4_kv_dequantize, nvfp4_kv_quantize
from torch_fp4ops.block_quantization import dequantize_blocks, quantize_mx
from torch_fp4ops.codecs import decode_e2m1, unpack_e2m1
from torch_fp4ops.formats import BLOCKFP4, MXFP4
from torch_fp4ops.kv_cache import (
    FP4KVCacheQuantMethod,
    KVScales,
    NVFP4KVMethod,
    get_fp4_kv_cache_quant_method,
    methods,
    register_fp4_kv_cache_quant_method,
)
from torch_fp4ops.testing import assert_same_bytes
from torch_fp4ops.testing.samples import values

NAMES = ("nvfp4", "fp4_mx_block16", "mxfp4")


def calibrated(name: str, layers: int = 2) -> FP4KVCacheQuantMethod:
    method = get_fp4_kv_cache_quant_method(name, num_layers=layers)
    if method.needs_global_scale:
        amax = torch.arange(1, layers + 1) * 3.0
        method.load_scales(KVScales.from_amax(amax, 2 * amax))
    return method


@settings(max_examples=20)
@given(
    st.sampled_from(NAMES),
    st.sampled_from(["NHD", "HND"]),
    st.sampled_from([torch.int32, torch.int64]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([32, 96, 128]),
    st.integers(0, 9),
    st.integers(0, 2),
    st.integers(0, 2**20),
)
def test_what_is_stored_is_what_is_read(name, layout, index, pages, page, heads, dim, n, padding, seed):
    """Slots hold the quantised rows, others stay as they were, and reading dequantises them."""
    method = calibrated(name)
    (buffers,) = method.create_buffers(pages * page, heads, dim, 1, "cpu", page_size=page, kv_layout=layout)
    shape = (pages, page, heads, dim // 2) if layout == "NHD" else (pages, heads, page, dim // 2)
    assert buffers.k.shape == shape
    assert buffers.slots == pages * page
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randperm(buffers.slots, generator=generator)[:n].to(index)
    skipped = torch.rand(len(loc), generator=generator) < 0.3
    new = [values(seed + i, len(loc) + padding, heads, dim) for i in range(2)]
    wanted = [torch.zeros(buffers.slots, heads, dim, dtype=torch.bfloat16) for _ in range(2)]
    for x, target, scale in zip(new, wanted, method.global_scales(1), strict=True):
        read = method.dequantize(*method.quantize(x[: len(loc)], scale), scale, torch.bfloat16)
        target[loc[~skipped].long()] = read[~skipped]
    method.quantize_and_store(buffers, torch.where(skipped, -1 - loc, loc).to(index), *new, layer_id=1)

    slots = torch.arange(buffers.slots, dtype=index)
    for out, target in zip(method.dequantize_prev_kv(buffers, 1, slots), wanted, strict=True):
        assert torch.equal(out, target)
    for out, target in zip(method.dequantize_prev_kv(buffers, 1, slots.flip(0)[:2]), wanted, strict=True):
        assert torch.equal(out, target.flip(0)[:2])
    for out, target in zip(method.dequantize_prev_kv(buffers, 1), wanted, strict=True):
        out = out if layout == "NHD" else out.transpose(1, 2)
        assert torch.equal(out.reshape(target.shape), target)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("name", NAMES)
def test_the_ops_on_pages_agree_with_the_pair(name, layout):
    """Stored by an operator or by quantize and a write; read in order, and attended to."""
    method, new = calibrated(name), [values(i, 10, 2, 64) for i in range(2)]
    both = method.create_buffers(24, 2, 64, 2, "cpu", page_size=4, kv_layout=layout)
    loc = torch.tensor([8, 9, 10, 11, 20, 21, -1, 0, 1, 2])
    method.quantize_and_store(both[0], loc, *new, layer_id=1)
    FP4KVCacheQuantMethod._store(method, both[1], loc, *new, *method.global_scales(1))
    for field in ("k", "v", "k_sf", "v_sf"):
        assert_same_bytes(getattr(both[0], field), getattr(both[1], field), field)

    tables, lengths = torch.tensor([[2, 5], [0, 3]]), torch.tensor([6, 3])
    keys, vals = method.dequantize_paged(both[0], tables, lengths, 1)
    slots = torch.tensor([8, 9, 10, 11, 20, 21])
    for out, wanted in zip((keys, vals), method.dequantize_prev_kv(both[0], 1, slots), strict=True):
        assert torch.equal(out[0, :6], wanted)
        assert not out[1, 3:].any()
    q = values(7, 2, 4, 64)
    assert not method.needs_workspace_to_decode(64)
    assert method.needs_workspace_to_decode(96)
    out = method.decode_attention(q, both[0], tables, lengths, 1, sm_scale=0.5)
    for i, n in enumerate(lengths):
        k, v = (x[i, :n].transpose(0, 1).float() for x in (keys, vals))
        wanted = torch.nn.functional.scaled_dot_product_attention(
            q[i].float().unsqueeze(1), k, v, scale=0.5, enable_gqa=True
        )
        torch.testing.assert_close(out[i].float(), wanted.squeeze(1), atol=0.02, rtol=0.02)


def test_nvfp4_is_the_ops():
    method, x = calibrated("nvfp4"), values(0, 5, 3, 64)
    assert isinstance(method, NVFP4KVMethod)
    scale = torch.tensor([6.0 / 2688])
    assert torch.equal(method.global_scales(1)[0], scale)
    codes, scales = nvfp4_kv_quantize(x, scale)
    for a, b in zip(method.quantize(x, scale), (codes, scales), strict=True):
        assert_same_bytes(a, b)
    out = method.dequantize(codes, scales, scale, torch.float16)
    assert_same_bytes(out, nvfp4_kv_dequantize(codes, scales, scale, torch.float16))


def test_mxfp4_is_the_ocp_format():
    method, x = calibrated("mxfp4"), values(0, 5, 3, 64)
    codes, scales = method.quantize(x, None)
    wanted = fp4_quantize(x, None, 32, True, is_sf_swizzled_layout=False)
    assert_same_bytes(codes, wanted[0])
    assert_same_bytes(scales.reshape(15, 2), wanted[1])
    out = method.dequantize(codes, scales, None, torch.bfloat16)
    assert_same_bytes(out, dequantize_blocks(codes, scales, MXFP4).bfloat16())


def test_block_fp4_scales_are_the_formula():
    x = values(0, 4, 2, 64, scale=3.0)
    x[0, 0, :16] = 0
    x[0, 1, :16] = torch.tensor([6.0] + [0.0] * 15)  # 6 * 2^0 needs no larger scale
    codes, scales = calibrated("fp4_mx_block16").quantize(x, None)
    amax = x.double().unflatten(-1, (4, 16)).abs().amax(-1)
    wanted = torch.ceil(torch.log2(amax / 6)) + 127
    assert torch.equal(scales.double(), wanted.clamp(min=0))
    assert (scales[0, 0, 0], scales[0, 1, 0]) == (0, 127)
    assert codes[0, 0, :8].count_nonzero() == 0


def test_block_fp4_ties_go_to_even_codes():
    """Where SGLang rounds away from zero; and how often that makes a difference."""
    method = calibrated("fp4_mx_block16")
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(2).view(1, 1, 16)
    out = decode_e2m1(unpack_e2m1(method.quantize(ties, None)[0])).flatten()[:8]
    assert out.tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    x = values(0, 4096, 8, 128)
    codes, scales = method.quantize(x, None)
    scaled = x.float().unflatten(-1, (8, 16)) / torch.exp2(scales.float() - 127).unsqueeze(-1)
    away = (scaled.abs().flatten().unsqueeze(-1) >= torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])).sum(-1)
    differ = (away != (unpack_e2m1(codes).flatten() & 7)).double().mean()
    assert 1 / 160 < differ < 1 / 140


@pytest.mark.parametrize("name", NAMES)
def test_error_of_a_round_trip(name):
    method, x = calibrated(name), values(3, 256, 8, 128)
    out = method.dequantize(*method.quantize(x, torch.tensor([5 / 2688])), torch.tensor([5 / 2688]), torch.float32)
    error = float((out - x.float()).norm() / x.float().norm())
    low, high = {"nvfp4": (0.08, 0.10), "fp4_mx_block16": (0.10, 0.125), "mxfp4": (0.10, 0.13)}[name]
    assert low < error < high


@pytest.mark.parametrize(("name", "per_head"), [("nvfp4", 72), ("fp4_mx_block16", 72), ("mxfp4", 68)])
def test_sizes(name, per_head):
    method = get_fp4_kv_cache_quant_method(name, num_layers=3)
    assert method.compute_cell_size(8, 128, 3) == 2 * 8 * 3 * per_head
    buffers = method.create_buffers(64, 8, 128, 3, "cpu", page_size=16)
    assert sum(b.nbytes for b in buffers) == 64 * method.compute_cell_size(8, 128, 3)
    assert method.workspace_cell_size(8, 128) == 2 * 8 * 128 * 2
    assert method.needs_global_scale is (name == "nvfp4")


def test_loading_scales_keeps_the_tensors_and_converts():
    method = get_fp4_kv_cache_quant_method("nvfp4", num_layers=2, scale_convention="amax/448")
    before = method.global_scales(1)[1]
    method.load_scales(KVScales.from_amax(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), "amax/2688"))
    assert method.global_scales(1)[1] is before
    assert before.item() == pytest.approx(4 / 448, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scales_are_float32_whatever_the_default(dtype):
    torch.set_default_dtype(dtype)
    try:
        method = NVFP4KVMethod(2)
    finally:
        torch.set_default_dtype(torch.float32)
    scales = [t for layer in range(2) for t in method.global_scales(layer)]
    assert all(t.dtype == torch.float32 and t.tolist() == [1.0] for t in scales)
    assert len({t.data_ptr() for t in scales}) == 4


def test_a_method_of_ones_own(monkeypatch):
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))

    @register_fp4_kv_cache_quant_method
    class Coarse(FP4KVCacheQuantMethod):
        name, format = "coarse", BLOCKFP4

        def quantize(self, x, global_scale):
            return quantize_mx(x.round(), self.format)

        def dequantize(self, codes, scales, global_scale, dtype):
            return dequantize_blocks(codes, scales, self.format).to(dtype)

    method = get_fp4_kv_cache_quant_method("coarse")
    (buffers,) = method.create_buffers(4, 1, 16, 1, "cpu")
    new = torch.full((1, 1, 16), 1.4)
    method.quantize_and_store(buffers, torch.tensor([2]), new, new)
    assert torch.equal(method.dequantize_prev_kv(buffers, loc=torch.tensor([2]))[0], torch.ones(1, 1, 16).bfloat16())
    assert method.needs_workspace_to_decode(128)
    for call in (method.dequantize_paged, lambda *a: method.decode_attention(new, *a)):
        with pytest.raises(NotImplementedError, match="coarse: no .*operator reads .*; use dequantize_prev_kv"):
            call(buffers, torch.zeros(1, 1).int(), torch.zeros(1).int())
    with pytest.raises(ValueError, match="there is a method named 'coarse' already"):
        register_fp4_kv_cache_quant_method(Coarse)
    with pytest.raises(ValueError, match=r"name is 'fp4'; allowed: 'nvfp4' or 'mxfp4' or 'fp4_mx_block16' or 'coarse'"):
        get_fp4_kv_cache_quant_method("fp4")


# What is refused, with nothing written

NEW, LOC = values(0, 5, 2, 64), torch.tensor([0, 5, -1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loc": torch.tensor([0, 12])}, r"loc is from 0 to 12; allowed: slots below 12"),
        ({"loc": LOC.float()}, r"loc is torch.float32 .*allowed: torch.int32 or torch.int64"),
        ({"loc": LOC.unsqueeze(0)}, r"loc is .*of shape \(1, 3\)"),
        ({"loc": torch.arange(6)}, r"loc is of 6 slots; allowed: at most 5"),
        ({"cache_k": NEW.double()}, r"cache_k is torch.float64"),
        ({"cache_k": NEW[:, :1]}, r"cache_k is of shape \(5, 1, 64\); allowed: \[rows, 2, 64\]"),
        ({"cache_v": NEW.half()}, r"cache_v is torch.float16 of .*allowed: torch.bfloat16"),
        ({"cache_v": NEW[:4]}, r"cache_v is .*\(4, 2, 64\); allowed: .*\(5, 2, 64\)"),
        ({"cache_v": NEW.to("meta")}, r"cache_v is torch.bfloat16 on meta; allowed: .* on cpu"),
        ({"layer_id": 2}, r"layer_id is 2; allowed: 0 to 1"),
    ],
)
def test_store_refuses_and_writes_nothing(name, change, message):
    method = calibrated(name)
    (buffers,) = method.create_buffers(12, 2, 64, 1, "cpu", page_size=4)
    arguments = {"loc": LOC, "cache_k": NEW, "cache_v": NEW, "layer_id": 0, **change}
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        method.quantize_and_store(buffers, **arguments)
    assert not any(t.any() for t in (buffers.k, buffers.v, buffers.k_sf, buffers.v_sf))


def test_buffers_of_another_method_or_convention():
    nvfp4, block = calibrated("nvfp4"), calibrated("fp4_mx_block16")
    (buffers,) = block.create_buffers(12, 2, 64, 1, "cpu", page_size=4)
    with pytest.raises(
        ValueError, match="nvfp4.quantize_and_store: the buffers' method is 'fp4_mx_block16'; allowed: 'n"
    ):
        nvfp4.quantize_and_store(buffers, LOC, NEW, NEW)
    (buffers,) = nvfp4.create_buffers(12, 2, 64, 1, "cpu", page_size=4, kv_layout="HND")
    other = get_fp4_kv_cache_quant_method("nvfp4", scale_convention="amax/448")
    with pytest.raises(ValueError, match=r"scale_convention is 'amax/2688'; allowed: 'amax/448'"):
        other.dequantize_prev_kv(buffers)
    interleaved, tables, lengths = buffers.with_v_scales("interleaved"), torch.zeros(1, 1).int(), torch.ones(1).int()
    for call in (
        lambda: nvfp4.dequantize_prev_kv(interleaved),
        lambda: nvfp4.quantize_and_store(interleaved, LOC, NEW, NEW),
        lambda: nvfp4.dequantize_paged(interleaved, tables, lengths),
        lambda: nvfp4.decode_attention(values(0, 1, 2, 64), interleaved, tables, lengths),
    ):
        with pytest.raises(
            ValueError, match=r"nvfp4.\w+: the buffers' v_sf_layout is 'interleaved'; allowed: 'linear'"
        ):
            call()
    assert not buffers.k.any()


@pytest.mark.parametrize("loc", [torch.tensor([-1]), torch.tensor([12]), torch.tensor([1.0])])
def test_reading_refuses_wrong_slots(loc):
    method = calibrated("nvfp4")
    (buffers,) = method.create_buffers(12, 2, 64, 1, "cpu", page_size=4)
    with pytest.raises(ValueError, match="nvfp4: loc is"):
        method.dequantize_prev_kv(buffers, 0, loc)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 48}, "mxfp4: head_dim is 48; allowed: a multiple of 32"),
        ({"size": 13}, "size is 13; allowed: a multiple of page_size 4"),
        ({"page_size": 0}, "page_size is 0"),
        ({"kv_layout": "DHN"}, "kv_layout is 'DHN'; allowed: 'NHD' or 'HND'"),
    ],
)
def test_create_buffers_refuses(change, message):
    arguments = {"size": 12, "head_num": 2, "head_dim": 64, "layer_num": 1, "device": "cpu", "page_size": 4, **change}
    with pytest.raises(ValueError, match=message):
        calibrated("mxfp4").create_buffers(**arguments)


def test_scales_that_do_not_belong():
    one = KVScales(torch.ones(1), torch.ones(1), "amax/448")
    with pytest.raises(ValueError, match="nvfp4: scales is of 1 layers; allowed: 2 layers"):
        calibrated("nvfp4").load_scales(one)
    with pytest.raises(ValueError, match="mxfp4: load_scales was called, but the method has no global scale"):
        calibrated("mxfp4").load_scales(one)
    with pytest.raises(ValueError, match=r"nvfp4: the scale convention is 'amax'; allowed: 'amax/2688' or 'amax/448'"):
        get_fp4_kv_cache_quant_method("nvfp4", scale_convention="amax")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_the_same_bytes(name, layout):
    loc = torch.tensor([8, 9, 30, 11, 20, 21, -1, 0, 1, 2])
    tables, lengths = torch.tensor([[2, 5], [0, 3]]), torch.tensor([6, 3])
    scales = KVScales.from_amax(torch.tensor([5.0]), torch.tensor([4.0]))
    results = []
    for device in ("cpu", "cuda"):
        method = get_fp4_kv_cache_quant_method(name, device=device)
        if method.needs_global_scale:
            method.load_scales(scales.to(device))
        (buffers,) = method.create_buffers(32, 2, 64, 1, device, page_size=4, kv_layout=layout)
        new = [values(i, 10, 2, 64).to(device) for i in range(2)]
        method.quantize_and_store(buffers, loc.to(device), *new)
        slots = torch.arange(32, device=device)
        paged = method.dequantize_paged(buffers, tables.to(device), lengths.to(device))
        read = *method.dequantize_prev_kv(buffers), *method.dequantize_prev_kv(buffers, loc=slots), *paged
        results.append([t.cpu() for t in (buffers.k, buffers.v, buffers.k_sf, buffers.v_sf, *read)])
        with pytest.raises(ValueError, match="cache_k is torch.bfloat16 on .*; allowed: .* on"):
            method.quantize_and_store(buffers, loc.to(device), *(t.to("meta") for t in new))
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert_same_bytes(b, a, f"tensor {i}")


@pytest.mark.gpu
def test_scales_on_another_device_are_refused():
    method = calibrated("nvfp4")
    (buffers,) = method.create_buffers(12, 2, 64, 1, "cuda")
    with pytest.raises(ValueError, match="k_scale is cpu; allowed: cuda"):
        method.quantize_and_store(buffers, LOC.cuda(), NEW.cuda(), NEW.cuda())
    assert not buffers.k.any()


@pytest.mark.parametrize("name", NAMES)
def test_arguments_of_other_types(name):
    method = calibrated(name)
    (buffers,) = method.create_buffers(8, 2, 64, 1, "cpu")
    x, q = values(0, 2, 2, 64), values(1, 1, 4, 64)
    with pytest.raises(ValueError, match=f"{name}: loc is a list; allowed: a tensor of slots"):
        method.quantize_and_store(buffers, [1, 2], x, x)
    assert not buffers.k.any()
    for dtype in (torch.float64, torch.int8):
        with pytest.raises(ValueError, match=f"{name}: dtype is {dtype}; allowed: torch.bfloat16 or torch.float16"):
            method.dequantize_prev_kv(buffers, dtype=dtype)
    with pytest.raises(ValueError, match=f"{name}: options is kv_layout, window; allowed: sm_scale or window_left"):
        method.decode_attention(q, buffers, torch.tensor([[0]]), torch.tensor([1]), window=3, kv_layout="HND")
