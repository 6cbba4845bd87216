"""The ops on paged FP4 caches that read: into contiguous keys and values, and attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from torch_fp4ops import (
    fp4_kv_attention_decode,
    nvfp4_kv_dequantize,
    nvfp4_kv_dequantize_paged,
    nvfp4_kv_quantize_store,
)
from torch_fp4ops.block_quantization import dequantize_blocks, quantize_mx
from torch_fp4ops.codecs import decode_ue8m0
from torch_fp4ops.formats import BLOCKFP4, MXFP4
from torch_fp4ops.ops.fp4_kv_attention_decode.samples import assert_close
from torch_fp4ops.ops.nvfp4_kv_dequantize_paged.samples import FORMATS, paged
from torch_fp4ops.ops.nvfp4_kv_quantize_store import write_rows
from torch_fp4ops.testing import assert_same_bytes
from torch_fp4ops.testing.samples import values

from .paged_caches import Case, cases
from .rejections import assert_rejected, assert_rejected_by_contract

NAMES = ("k_cache", "v_cache", "k_cache_sf", "v_cache_sf", "block_tables", "seq_lens", "k_scale", "v_scale")


@given(cases(formats=("nvfp4",)))
def test_dequantize_gives_the_tokens_in_order_and_zeros(case: Case):
    arguments = case.arguments()
    k_cache, _, k_sf, _, tables, lengths, k_scale, _, layout = arguments
    keys, _ = nvfp4_kv_dequantize_paged(*arguments)
    assert keys.shape == (len(case.lengths), tables.shape[1] * case.page, case.heads, case.dim)
    if layout == "HND":
        k_cache, k_sf = k_cache.transpose(1, 2), k_sf.transpose(1, 2)
    for i, n in enumerate(lengths.tolist()):
        for t in range(n):
            place = (int(tables[i, t // case.page]), t % case.page)
            assert_same_bytes(keys[i, t], nvfp4_kv_dequantize(k_cache[place], k_sf[place], k_scale))
        assert_same_bytes(keys[i, n:], torch.zeros_like(keys[i, n:]))


@pytest.mark.parametrize("slots", [[-1, -1], [-1, 3], [2, -7]])
def test_store_writes_the_rows_of_its_slots_and_no_other(slots):
    """Content that is written back would undo what another thread stores meanwhile."""

    class Written(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.index_put_.default:
                Written.rows += len(args[1][0])
            return func(*args, **(kwargs or {}))

    cache, new = torch.zeros(3, 4, 2, 8), torch.ones(2, 2, 8)
    with Written():
        write_rows(cache, torch.tensor(slots), new)
    assert Written.rows == sum(slot >= 0 for slot in slots)
    assert cache.sum() == 16 * Written.rows


def test_dequantize_saturates_in_fp8_and_keeps_nan():
    arguments = list(paged(0, [2], 1, 16, page=1))
    arguments[6] = torch.tensor([1000.0])
    page = int(arguments[4][0, 1])
    arguments[2][page] = 0x7F
    keys, values_ = nvfp4_kv_dequantize_paged(*arguments, torch.float8_e4m3fn)
    exact, exact_values = nvfp4_kv_dequantize_paged(*arguments, torch.bfloat16)
    assert exact[0, 0].abs().max() > 448
    assert_same_bytes(keys[0, 0], exact[0, 0].float().clamp(-448, 448).to(torch.float8_e4m3fn))
    assert (keys[0, 1].view(torch.uint8) == 0x7F).all()
    assert exact[0, 1].isnan().all()
    # E4M3 of bf16 would round twice.
    error = (values_.float() - exact_values.float()).abs() / exact_values.float().abs().clamp(min=2.0**-6)
    assert error.max() <= 2**-4 + 2**-8


@pytest.mark.parametrize("fmt", [MXFP4, BLOCKFP4], ids=lambda f: f.name)
def test_power_of_two_formats_round_trip(fmt):
    key = torch.stack([values(i, 3, 64, scale=2.0 ** (4 * i)) for i in range(2)], 1)
    caches = [torch.zeros(1, 4, 2, last, dtype=torch.uint8) for last in (32, 32, *2 * [64 // fmt.block_size])]
    flags = FORMATS[fmt.name]
    nvfp4_kv_quantize_store(key, -key, torch.tensor([2, 0, 1]), *caches, None, None, **flags)
    tables, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    keys, values_ = nvfp4_kv_dequantize_paged(*caches, tables, lengths, None, None, **flags)
    wanted = dequantize_blocks(*quantize_mx(key, fmt), fmt)[[1, 2, 0]].bfloat16()
    assert_same_bytes(keys[0, :3], wanted)
    assert_same_bytes(values_[0, :3], -wanted)
    # A block's largest magnitude lies in the upper half of what its scale can hold, or fills it.
    blocks = key[[1, 2, 0]].float().unflatten(-1, (-1, fmt.block_size)).abs().amax(-1)
    filled = blocks / decode_ue8m0(caches[2][0, :3])
    assert bool(((filled > 3) & (filled <= 6)).all())


@given(cases(dims=(64, 128)), st.sampled_from([1, 3]), st.integers(-1, 20), st.sampled_from([None, 0.5, 30.0]))
def test_attention_is_within_its_bound(case: Case, group, window, cap):
    q = values(case.seed, len(case.lengths), case.heads * group, case.dim, scale=2.0)
    arguments = (q, *case.arguments())
    flags = {"window_left": window, "logits_soft_cap": cap, **FORMATS[case.fmt]}
    out = fp4_kv_attention_decode(*arguments, **flags)
    assert_close(out, *arguments, **flags)


def test_attention_of_one_token_is_its_value():
    arguments = paged(3, [1, 1], 2, 64)
    _, v = nvfp4_kv_dequantize_paged(*arguments)
    out = fp4_kv_attention_decode(values(0, 2, 6, 64), *arguments)
    assert torch.equal(out, v[:, 0].repeat_interleave(3, 1))


def test_attention_is_torchs():
    arguments = paged(4, [19, 19], 2, 64)
    q = values(0, 2, 4, 64)
    k, v = (t[:, :19].transpose(1, 2).float() for t in nvfp4_kv_dequantize_paged(*arguments))
    wanted = torch.nn.functional.scaled_dot_product_attention(q.float().unsqueeze(2), k, v, enable_gqa=True)
    torch.testing.assert_close(fp4_kv_attention_decode(q, *arguments).float(), wanted.squeeze(2), rtol=1e-2, atol=1e-2)


def test_the_bound_notices_a_wrong_token():
    arguments = paged(5, [8], 1, 64)
    q = values(1, 1, 2, 64)
    with pytest.raises(AssertionError, match="error .* where the bound is"):
        assert_close(fp4_kv_attention_decode(q, *arguments, window_left=6), q, *arguments)


def valid(**change):
    return {**dict(zip(NAMES, paged(0, [5, 2], 2, 64), strict=False)), **change}


VALID = valid()
CACHE, TABLES = VALID["k_cache"], VALID["block_tables"]
SHARED_REJECTIONS = [
    ({"sf_vec_size": 32}, r"sf_vec_size is 32 with sf_use_ue8m0=False; allowed: 16 with False \(NVFP4\)"),
    ({"kv_layout": "DHN"}, r"kv_layout is 'DHN'; allowed: 'NHD' or 'HND'"),
    ({"k_cache": CACHE[0]}, r"k_cache is of shape \(4, 2, 32\); allowed: 4 dimensions"),
    ({"v_cache": CACHE[:2]}, r"v_cache is of shape \(2, 4, 2, 32\); allowed: shape \(5, 4, 2, 32\) \(NHD\)"),
    ({"v_cache_sf": CACHE}, r"v_cache_sf is of shape \(5, 4, 2, 32\); allowed: shape \(5, 4, 2, 4\)"),
    ({"k_cache": CACHE.mT.contiguous().mT}, r"k_cache is of strides .*allowed: any strides but a last one of 1"),
    ({"block_tables": TABLES.float()}, r"block_tables is torch.float32; allowed: torch.int32 or torch.int64"),
    ({"block_tables": TABLES[0]}, r"block_tables is of shape \(3,\); allowed: 2 dimensions"),
    ({"seq_lens": VALID["seq_lens"][:1]}, r"seq_lens is of shape \(1,\); allowed: shape \(2,\)"),
    ({"k_scale": None}, r"k_scale is None; allowed: a float32 tensor \(nvfp4\)"),
    ({"v_scale": torch.ones(2)}, r"v_scale is of shape \(2,\); allowed: one element"),
]
SHARED_BAD_VALUES = [
    ({"seq_lens": torch.tensor([5, -1])}, r"seq_lens is -1 to 5; allowed: 0 to 12"),
    ({"seq_lens": torch.tensor([13, 1])}, r"seq_lens is 1 to 13; allowed: 0 to 12"),
    ({"block_tables": TABLES * 0 + 5}, r"block_tables is 5 to 5; allowed: 0 to 4 for every page that"),
    ({"k_scale": torch.zeros(1)}, r"k_scale is \[0.0\]; allowed: finite values above zero"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *SHARED_REJECTIONS,
        ({"k_cache": CACHE[..., :4]}, r"k_cache is of K = 8; allowed: K a multiple of 16"),
        ({"output_dtype": torch.float32}, r"output_dtype is torch.float32; allowed: torch.bfloat16"),
        ({"max_seq_len": 13}, r"max_seq_len is 13; allowed: 0 to the 12 tokens that block_tables"),
        ({"max_seq_len": -1}, r"max_seq_len is -1; allowed: 0 to the 12 tokens"),
    ],
)
def test_dequantize_rejects(change, message):
    assert_rejected_by_contract(nvfp4_kv_dequantize_paged, VALID, change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [*SHARED_BAD_VALUES, ({"max_seq_len": 4}, r"seq_lens is 2 to 5; allowed: 0 to 4")],
)
def test_dequantize_rejects_bad_values(change, message):
    assert_rejected(nvfp4_kv_dequantize_paged, VALID, change, message)


Q = values(9, 2, 4, 64)
VALID_ATTENTION = {"q": Q, **VALID}


def test_attention_over_no_page_is_contiguous_for_any_q():
    arguments = {**VALID, "block_tables": TABLES[:, :0], "seq_lens": torch.zeros(2, dtype=torch.int32)}
    out = fp4_kv_attention_decode(Q.transpose(0, 1).contiguous().transpose(0, 1), **arguments)
    assert_same_bytes(out, torch.zeros(2, 4, 64, dtype=Q.dtype))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("window", [1 << 31, 1 << 40, (1 << 63) - 1])
def test_a_window_that_int32_does_not_hold_is_of_all_tokens(index, window):
    arguments = {**VALID_ATTENTION, "seq_lens": VALID["seq_lens"].to(index)}
    wanted = fp4_kv_attention_decode(**arguments)
    assert_same_bytes(fp4_kv_attention_decode(**arguments, window_left=window), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *SHARED_REJECTIONS,
        ({"q": Q.float()}, r"q is torch.float32; allowed: torch.bfloat16 or torch.float16"),
        ({"q": Q[0]}, r"q is of shape \(4, 64\); allowed: 3 dimensions"),
        ({"q": Q[..., :48]}, r"q is of D = 48; allowed: D = 64 or 128 or 256"),
        ({"q": Q[:, :3]}, r"q is of 3 heads; allowed: a multiple of the 2 heads of k_cache"),
        ({"q": Q[:1]}, r"block_tables is of shape \(2, 3\); allowed: shape \(1, 3\) \(a row for each sequence\)"),
        ({"window_left": -2}, r"window_left is -2; allowed: -1 for no window, or 0 and more"),
        *(
            ({"logits_soft_cap": cap}, rf"logits_soft_cap is {cap}; allowed: None, or finite and above zero")
            for cap in (0.0, float("inf"), float("nan"))
        ),
        ({"sm_scale": float("inf")}, r"sm_scale is inf; allowed: None, or finite"),
        ({"sm_scale": float("nan")}, r"sm_scale is nan; allowed: None, or finite"),
    ],
)
def test_attention_rejects(change, message):
    assert_rejected_by_contract(fp4_kv_attention_decode, VALID_ATTENTION, change, message)


@pytest.mark.parametrize(("change", "message"), SHARED_BAD_VALUES)
def test_attention_rejects_bad_values(change, message):
    assert_rejected(fp4_kv_attention_decode, VALID_ATTENTION, change, message)


def test_power_of_two_formats_refuse_a_global_scale():
    arguments = dict(zip(NAMES, paged(0, [5], 2, 64, fmt="mxfp4"), strict=False)) | FORMATS["mxfp4"]
    change = {"k_scale": torch.ones(1)}
    message = r"k_scale is given; allowed: None: mxfp4 has no global scale"
    assert_rejected_by_contract(nvfp4_kv_dequantize_paged, arguments, change, message)
