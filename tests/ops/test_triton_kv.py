"""The Triton kernels on paged FP4 caches: byte for byte the reference's, and attention within its bound.

Each ``check_*`` runs twice, as those of ``test_triton_quantize``.
"""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_fp4ops import OPS
from torch_fp4ops.ops import _kv
from torch_fp4ops.ops.fp4_kv_attention_decode import in_window
from torch_fp4ops.ops.fp4_kv_attention_decode.samples import assert_close
from torch_fp4ops.ops.nvfp4_kv_dequantize_paged.samples import FORMATS, paged
from torch_fp4ops.testing import assert_attention_close, assert_right, assert_same_bytes, samples
from torch_fp4ops.testing.samples import values
from torch_fp4ops.testing.strategies import matrices

from ..interpreter import few, test_in_the_interpreter, test_on_a_gpu  # noqa: F401
from .paged_caches import Case, cases
from .test_triton_quantize import compare

pytest.importorskip("triton", reason="needs Triton")

STORE, DEQUANTIZE, ATTEND = (
    OPS[name] for name in ("nvfp4_kv_quantize_store", "nvfp4_kv_dequantize_paged", "fp4_kv_attention_decode")
)


def to(device: str, arguments: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(device), arguments)


def unaligned(cache: Tensor) -> Tensor:
    """The same bytes in memory where no row starts at a word."""
    wide = torch.zeros(*cache.shape[:3], cache.shape[3] + 1, dtype=torch.uint8)
    wide[..., 1:] = cache
    return wide[..., 1:]


def check_samples(device: str) -> None:
    for op in (DEQUANTIZE, ATTEND):
        for sample in samples(op, device):
            assert_right(op, sample, "triton")


@few(30)
@given(
    x=matrices(rows=st.integers(0, 9), block=32, max_blocks=4),
    heads=st.integers(1, 3),
    fmt=st.sampled_from(["mxfp4", "blockfp4"]),
    layout=st.sampled_from(["NHD", "HND"]),
)
def check_store_of_power_of_two_formats(device: str, x: Tensor, heads: int, fmt: str, layout: str) -> None:
    rows, dim = x.shape
    key = (x[:, None].expand(rows, heads, dim) * torch.arange(1, heads + 1)[:, None]).to(x.dtype)
    middle = (4, heads) if layout == "NHD" else (heads, 4)
    caches = [
        torch.full((3, *middle, last), 0x5A, dtype=torch.uint8)
        for last in (dim // 2, dim // 2, *2 * [dim // FORMATS[fmt].get("sf_vec_size")])
    ]
    slots = torch.randperm(12)[:rows] - 1
    compare(device, STORE, key, key.flip(0), slots, *caches, None, None, layout, **FORMATS[fmt])


def check_steps_of_large_calls(device: str) -> None:
    """Programs that go on for several steps, which only large calls have, give what single steps give."""
    stores, dequantizes = (importlib.import_module(f"{op.__module__}.triton") for op in (STORE, DEQUANTIZE))
    sample = next(s for s in samples(STORE) if s.name == "HND-prefill")
    wide = paged(7, [9, 0, 14], 3, 64, layout="HND")
    for module, op, args in ((stores, STORE, sample.args), (dequantizes, DEQUANTIZE, wide)):
        shipped = module.tiling
        for tile in ((1, 8, 2), (2, 4, 4), (2, 16, 1)):
            try:
                module.tiling = lambda n, cols, tile=tile: tile
                compare(device, op, *args)
            finally:
                module.tiling = shipped


@few(30)
@given(
    case=cases(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float8_e4m3fn]),
    short=st.booleans(),
    index=st.sampled_from([torch.int32, torch.int64]),
    off=st.booleans(),
)
def check_dequantize(device: str, case: Case, dtype: torch.dtype, short: bool, index: torch.dtype, off: bool) -> None:
    arguments = list(case.arguments())
    arguments[4:6] = (t.to(index) for t in arguments[4:6])
    if off:
        arguments[:4] = map(unaligned, arguments[:4])
    tokens = max(case.lengths, default=0) if short else None
    compare(device, DEQUANTIZE, *arguments, dtype, tokens, **FORMATS[case.fmt])


def all_codes_and_scales(device: str) -> tuple[Tensor, Tensor]:
    """Bytes of codes, all of them, and of scales: in the interpreter only some, as it takes its time."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    return codes, codes if device == "cuda" else codes[[0, 1, 7, 8, 0x38, 0x7E, 0x7F, 0x80, 0x81, 0xC3, 0xFE, 0xFF]]


def check_dequantize_every_code_and_scale(device: str) -> None:
    """Every byte of codes under every scale, in all formats and dtypes."""
    codes, scales = all_codes_and_scales(device)
    n = len(scales)
    cache = codes.repeat(n).view(n, 1, 1, 256)
    tables, lengths = torch.arange(n, dtype=torch.int32)[None], torch.tensor([n], dtype=torch.int32)
    dtypes = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
    for (fmt, flags), dtype, scale in itertools.product(FORMATS.items(), dtypes, (1.0, 0.3, 1e-30)):
        if fmt != "nvfp4" and scale != 1.0:
            continue
        sf = scales[:, None].expand(n, 512 // flags.get("sf_vec_size", 16)).reshape(n, 1, 1, -1).contiguous()
        decode = torch.tensor([scale]) if fmt == "nvfp4" else None
        compare(device, DEQUANTIZE, cache, cache, sf, sf, tables, lengths, decode, decode, "NHD", dtype, **flags)


@few(15)
@given(
    case=cases(dims=(64, 128), longest=90),
    group=st.sampled_from([1, 3, 8, 20]),
    window=st.integers(-1, 40),
    cap=st.sampled_from([None, 0.5, 30.0]),
    splits=st.sampled_from([None, 1, 2, 5]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    off=st.booleans(),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def check_attention(
    device: str,
    case: Case,
    group: int,
    window: int,
    cap: float | None,
    splits: int | None,
    dtype: torch.dtype,
    off: bool,
    index: torch.dtype,
) -> None:
    from torch_fp4ops.ops.fp4_kv_attention_decode.triton import attend

    arguments = list(case.arguments())
    arguments[4:6] = (t.to(index) for t in arguments[4:6])
    if index == torch.int64:  # the first sequence's are no pages, though their lowest 32 bits are those of one
        arguments[4][:1] += 1 << 32
    if off:
        arguments[:4] = map(unaligned, arguments[:4])
    if case.fmt != "nvfp4":
        dtype = torch.bfloat16
    q = values(case.seed, len(case.lengths), case.heads * group, case.dim, dtype=dtype, scale=2.0)
    there = to(device, [q, *arguments])
    out = attend(
        there[0],
        tuple(there[1:3]),
        tuple(there[3:5]),
        there[5],
        there[6],
        tuple(there[7:9]),
        case.layout,
        0.1,
        window,
        cap,
        case.fmt,
        splits,
    )
    flags = {"sm_scale": 0.1, "window_left": window, "logits_soft_cap": cap, **FORMATS[case.fmt]}
    assert_close(out.cpu(), q, *arguments, **flags)


def check_attention_leaves_out_lengths_and_tables_that_are_none(device: str) -> None:
    """Negative lengths, of which 32 bits would be positive ones; a table of 2^31 tokens, of which 5 are there."""
    from torch_fp4ops.ops.fp4_kv_attention_decode.triton import attend

    def run(tables: Tensor, lengths: Tensor, caches: list[Tensor]) -> Tensor:
        *given, tables, lengths, one = to(
            device, [values(0, len(lengths), 2, 64), *caches, tables, lengths, torch.ones(1)]
        )
        scales = (one, one)
        arguments = (
            given[0],
            tuple(given[1:3]),
            tuple(given[3:]),
            tables,
            lengths,
            scales,
            "NHD",
            0.1,
            -1,
            None,
            "nvfp4",
        )
        return attend(*arguments).cpu()

    few = [torch.full((1, 4, 1, last), 0x33, dtype=torch.uint8) for last in (32, 32, 4, 4)]
    lengths = torch.tensor([3, 0, -5, 3 - (1 << 32), -(1 << 31)])
    out = run(torch.zeros(5, 1, dtype=torch.int32), lengths, few)
    assert out[0].all() and not out[1:].any()
    page = 1 << 20
    many = [torch.full((1, page, 1, last), 0x33, dtype=torch.uint8) for last in (32, 32, 4, 4)]
    out = run(torch.zeros(1, 1 << 11, dtype=torch.int32), torch.tensor([5]), many)
    assert torch.equal(out, run(torch.zeros(1, 1, dtype=torch.int32), torch.tensor([5]), many)) and out.all()


def check_attention_of_more_query_heads_than_a_program_holds_is_refused(device: str) -> None:
    *caches, tables, lengths, k_scale, v_scale, layout = paged(3, [5], 1, 64)
    for heads, why in ((128, None), (129, "q has 129 heads for each of the cache's; a program holds up to 128")):
        q = values(0, 1, heads, 64)
        call = ATTEND.check(*to(device, (q, *caches, tables, lengths, k_scale, v_scale, layout)))
        assert ATTEND.why_not("triton", call) == why


def check_attention_of_every_code_and_scale(device: str) -> None:
    """A sequence of one token gives that token's values: all codes under all scales, exactly."""
    codes, scales = all_codes_and_scales(device)
    tokens = len(scales) * 4  # 64 of the bytes each
    cache = codes.view(1, 4, 1, 64).repeat(len(scales), 1, 1, 1).view(tokens, 1, 1, 64)
    tables, lengths = torch.arange(tokens, dtype=torch.int32)[:, None], torch.ones(tokens, dtype=torch.int32)
    q = torch.zeros(tokens, 1, 128, dtype=torch.bfloat16)
    for fmt, flags in FORMATS.items():
        sf = scales.repeat_interleave(4)[:, None].repeat(1, 128 // flags.get("sf_vec_size", 16))
        sf = sf.view(tokens, 1, 1, -1)
        one = torch.ones(1) if fmt == "nvfp4" else None
        arguments = (cache, cache, torch.full_like(sf, 0x38), sf, tables, lengths, one, one)
        _, wanted = DEQUANTIZE.default(*arguments, **flags)
        out = ATTEND.default(*to(device, (q, *arguments)), **flags, backend="triton").cpu()
        wanted = wanted[:, 0]
        assert torch.equal(out.isnan(), wanted.isnan()), fmt
        assert torch.equal(out.nan_to_num(), wanted.nan_to_num()), fmt  # without the sign of zeros


def check_attention_of_other_caches(device: str) -> None:
    """What benchmarks compare with: 16 bits and E4M3."""
    from torch_fp4ops.ops.fp4_kv_attention_decode.triton import attend

    *_, tables, lengths, _, _, _ = paged(1, [37, 0, 20], 2, 128, 16)
    pages = int(tables.max()) + 1
    seen = torch.arange(tables.shape[1] * 16)[None] < lengths[:, None]
    q = values(1, 3, 8, 128)
    for fmt, dtype in (("plain", torch.bfloat16), ("plain", torch.float16), ("e4m3", torch.float8_e4m3fn)):
        queries = q if dtype is torch.float8_e4m3fn else q.to(dtype)
        caches = [values(seed, pages, 16, 2, 128).to(dtype) for seed in (2, 3)]
        for splits in (1, 3):
            moved = to(device, (queries, *caches, tables, lengths))
            out = attend(
                moved[0], moved[1:3], None, moved[3], moved[4], (None, None), "NHD", 0.1, -1, None, fmt, splits
            )
            k, v = (c.double()[tables.clamp(min=0).long()].flatten(1, 2) for c in caches)
            assert_attention_close(out.cpu(), queries, k, v, seen, 0.1)


def check_attention_of_rising_and_falling_scores(device: str) -> None:
    """Scores far apart, which references follow; scales of scores of either sign, and of none."""
    arguments = paged(16, [150, 40], 2, 64, 16)
    for dtype in (torch.bfloat16, torch.float16):
        q = values(16, 2, 4, 64, dtype=dtype)
        for sm_scale in (3.0, -3.0, 0.01, 0.0):
            out = ATTEND.default(*to(device, (q, *arguments)), sm_scale=sm_scale, backend="triton").cpu()
            assert_close(out, q, *arguments, sm_scale=sm_scale)


def check_a_nan_scale_reaches_only_what_depends_on_it(device: str) -> None:
    arguments = list(paged(2, [20, 20], 2, 64))
    page = int(arguments[4][0, 1])
    arguments[3][page, 2, 1, 3] = 0x7F  # values 48 to 63 of head 1 of sequence 0
    q = values(3, 2, 4, 64)
    out = ATTEND.default(*to(device, (q, *arguments)), backend="triton").cpu()
    wanted = torch.zeros(out.shape, dtype=torch.bool)
    wanted[0, 2:, 48:] = True
    assert torch.equal(out.isnan(), wanted)
    arguments[2][page, 2, 1, 0] = 0x7F  # keys: every value of those query heads
    out = ATTEND.default(*to(device, (q, *arguments)), backend="triton").cpu()
    wanted[0, 2:] = True
    assert torch.equal(out.isnan(), wanted)
    # Outside of the window it reaches nothing.
    out = ATTEND.default(*to(device, (q, *arguments)), window_left=12, backend="triton").cpu()
    assert not out.isnan().any()


def check_lengths_and_pages_out_of_range(device: str) -> None:
    """On a GPU; on the CPU the ops refuse them, so the kernels are run past the ops' checks."""
    from torch_fp4ops.ops.fp4_kv_attention_decode.triton import fp4_kv_attention_decode_triton
    from torch_fp4ops.ops.nvfp4_kv_dequantize_paged.triton import nvfp4_kv_dequantize_paged_triton

    arguments = list(paged(4, [10, 12, 9], 2, 64))
    *caches, tables, _, k_scale, v_scale, layout = arguments
    tables[0, 1], tables[1, 0] = 10**6, -3
    tables[:, 3] = tables[:, 2]
    arguments[5] = torch.tensor([10, 10**6, -5], dtype=torch.int32)
    index, there = _kv.present(tables, arguments[5], caches[0].shape[0], 4, 16)
    assert there.sum(1).tolist() == [6, 12, 0]
    keys, _ = nvfp4_kv_dequantize_paged_triton(*to(device, arguments))
    fmt = _format("nvfp4")
    k, v = (
        _kv.gather(cache, sf, scale, fmt, layout, index, there)
        for cache, sf, scale in zip(caches[:2], caches[2:], (k_scale, v_scale), strict=True)
    )
    assert_same_bytes(keys.cpu(), k.bfloat16())
    q = values(5, 3, 4, 64)
    out = fp4_kv_attention_decode_triton(*to(device, (q, *arguments))).cpu()
    seen = in_window(there, arguments[5], -1)
    assert_attention_close(out, q, k.double(), v.double(), seen, 64**-0.5)


def _format(name: str) -> Any:
    from torch_fp4ops.formats import kv_format

    flags = FORMATS[name]
    return kv_format(flags.get("sf_vec_size", 16), flags.get("sf_use_ue8m0", False))


@pytest.mark.gpu
def test_a_captured_graph_is_right_for_other_lengths_and_pages():
    """One graph serves every length, and gives the bits of the same call in eager mode."""
    arguments = list(to("cuda", paged(6, [100, 7, 64], 8, 128, 16)))
    q = values(6, 3, 32, 128).cuda()
    STORE_ARGUMENTS = (values(7, 3, 8, 128).cuda(), values(8, 3, 8, 128).cuda())
    slots = torch.full((3,), -1, device="cuda")

    def step() -> tuple[Tensor, ...]:
        STORE.default(*STORE_ARGUMENTS, slots, *arguments[:4], *arguments[6:8])
        return (*DEQUANTIZE.default(*arguments), ATTEND.default(q, *arguments))

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in ([100, 7, 64], [1, 0, 33], [0, 0, 0], [99, 5, 2]):
        arguments[5].copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert_same_bytes(a, b)
        on_cpu = to("cpu", [q, *arguments])
        assert_close(captured[2].cpu(), *on_cpu)


@pytest.mark.gpu
def test_long_contexts_are_right_and_deterministic():
    """Many splits, tiles that are whole and tiles that aren't, a table of more pages than are used."""
    arguments = to("cuda", paged(9, [3000, 1, 2048, 777], 2, 128, 16))
    q = values(9, 4, 16, 128, scale=2.0).cuda()
    first = ATTEND.default(q, *arguments)
    for _ in range(3):
        assert_same_bytes(ATTEND.default(q, *arguments), first)
    assert_close(first.cpu(), *to("cpu", (q, *arguments)))
