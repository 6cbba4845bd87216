"""Hopper products by strips, interpreted on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from torch_fp4ops import scale_layouts
from torch_fp4ops.formats import FORMATS, MXFP4, MXFP8, NVFP4
from torch_fp4ops.hopper_layout import hopper_size, pack_hopper_weight
from torch_fp4ops.testing import assert_same_bytes

from .test_hopper import dequantized, storable, values
from .test_hopper_ways import check_way, needs_hopper

pytest.importorskip("triton.experimental.gluon", reason="needs Gluon")

from torch_fp4ops.ops import _hopper_kernels, _hopper_launch, _hopper_strips, _hopper_ways
from torch_fp4ops.ops._hopper_ways import AT_ONCE, STRIPS, WAYS, AtOnce, Strips, choose, cut, decodes
from torch_fp4ops.ops._triton_dequantize import decoded as decoded_before
from torch_fp4ops.ops._triton_gemm_launch import Operand

from ..gluon_interpreter import decoded_by_reference, interpreted

FORMATS_AND_WAYS = [(fmt, way) for fmt in (NVFP4, MXFP4, MXFP8) for way in STRIPS[fmt.name]]
formats_and_ways = pytest.mark.parametrize(
    ("fmt", "way"), FORMATS_AND_WAYS, ids=[f"{fmt.name}-{way.BM}x{way.S}x{way.KS}" for fmt, way in FORMATS_AND_WAYS]
)


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, MXFP8], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(
    ("s", "ks", "own"), [(1, 4, 0), (2, 8, 0), (2, 8, 2), (3, 4, 0), (4, 4, 0), (14, 4, 3), (6, 8, 3)]
)
def test_programs_load_and_multiply_every_strip_once(fmt, s, ks, own):
    way = Strips(8, s, ks, 3 if own else 4, own, start=4.0, step=0.004, strip=0.02)
    with interpreted():
        check_every_strip(fmt, way, 448, s)


def check_every_strip(fmt, way, k, seed):
    """With K that is no multiple of 256, and NaN."""
    m, n = 3, 250
    codes, scales = storable(seed, n, k, fmt)
    clean = torch.arange(n) % 3 > 0  # leave rows without NaN
    scales[clean] = torch.where((scales[clean] & 0x7F) == 0x7F, 0x3F, scales[clean])
    weight, scale = pack_hopper_weight(codes, scales, fmt)
    x = values(m, m, k)
    out = torch.full((m, weight.shape[0]), float("nan"), dtype=torch.float32)
    alpha = torch.tensor([0.5, 2.0, -1.0])
    chosen = cut(way, m, *hopper_size(n, k), 132, fmt.name)
    _hopper_launch.multiply(Operand(x), weight, scale, fmt, out, alpha, chosen)
    w = dequantized(codes, scales, fmt).double()
    wanted = x.double() @ w.T * alpha.view(-1, 1)
    size = x.double().abs() @ w.abs().T * alpha.abs().view(-1, 1)
    nan = wanted.isnan()
    assert torch.equal(out[:, :n].isnan(), nan) and not nan.all() and not out[:, n:].any()
    assert ((out[:, :n] - wanted).abs() <= 1e-5 * size + 1e-30)[~nan].all()


def quantized_rows(m, k, fmt, layout, seed, device="cpu", any_scale=False):
    """Any codes but NaN, and any scales, or any that leave products finite."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (m, k // fmt.elements_per_byte), generator=g, dtype=torch.uint8)
    if fmt is MXFP8:
        codes[(codes & 0x7F) == 0x7F] = 0x3F
    low, high = (0, 256) if any_scale else (0, 0x7F) if fmt is NVFP4 else (100, 140)
    shape = scale_layouts.scale_shape(m, k // fmt.block_size, layout)
    scales = torch.randint(low, high, shape, generator=g, dtype=torch.uint8)
    return Operand.of(fmt, codes.to(device), scales.to(device), layout)


@pytest.mark.parametrize(
    ("fmt", "m", "cut_up"),
    [(fmt, 7, (8, 4, 8, 4, 0)) for fmt in (NVFP4, MXFP4, MXFP8)] + [(MXFP8, 9, (16, 8, 4, 3, 2))],
    ids=lambda value: getattr(value, "name", None),
)
@pytest.mark.parametrize("layout", ["128x4", "8x4"])
def test_programs_read_the_rows_that_they_decode(fmt, m, cut_up, layout):
    with interpreted():
        check_rows_are_read(fmt, Strips(*cut_up, start=4.0, step=0.004, strip=0.02), m, layout)


def check_rows_are_read(fmt, way, m, layout):
    n, k = 128, 448
    codes, scales = storable(3, n, k, fmt)
    scales = torch.where((scales & 0x7F) == 0x7F, 0x3F, scales)
    weight, scale = pack_hopper_weight(codes, scales, fmt)
    rows = quantized_rows(m, k, fmt, layout, 4)
    assert decodes(way, fmt.name, k, m)
    out = torch.empty(m, n)
    _hopper_launch.multiply(rows, weight, scale, fmt, out, None, cut(way, m, n, 512, 132, fmt.name))
    unswizzled = scale_layouts.unswizzle(rows.scales, m, k // fmt.block_size, layout)
    x, w = dequantized(rows.elements, unswizzled, fmt).double(), dequantized(codes, scales, fmt).double()
    wanted = x @ w.T
    size = x.abs() @ w.abs().T
    assert ((out - wanted).abs() <= 1e-5 * size + 1e-30).all()


@pytest.mark.gpu
@formats_and_ways
def test_rows_decoded_in_the_product_are_those_decoded_before(fmt, way):
    """Bit for bit, also where programs are many and calls follow each other; NaN and infinite scales included."""
    needs_hopper()
    if not decodes(way, fmt.name, 512, 1):
        pytest.skip("rows are decoded before")
    check_decoded_rows(fmt, way, [(1, 896, 512), (way.BM, 2048 * way.S, 1088), (way.BM - 3, 256, 4096)])


@formats_and_ways
def test_decoded_rows_in_the_interpreter(fmt, way):
    k = 64 * way.KS * 7 - 64
    if not decodes(way, fmt.name, k, way.BM - 3):
        pytest.skip("rows are decoded before")
    check_decoded_rows(fmt, way, [(way.BM - 3, 16 * way.S, k)], "cpu")


def check_decoded_rows(fmt, way, sizes, device="cuda"):
    """What the product decodes itself gives the bytes that a kernel before it does."""
    compared = 0
    for seed, (m, n, k) in enumerate(sizes):
        chosen = cut(way, m, n, hopper_size(n, k)[1], 132, fmt.name)
        if chosen is None or not decodes(way, fmt.name, k, m):
            continue
        codes, scales = storable(seed, n, k, fmt)
        weight, scale = (t.to(device) for t in pack_hopper_weight(codes, scales, fmt))
        for layout, any_scale in itertools.product(("128x4", "8x4"), (False, True)):
            rows = quantized_rows(m, k, fmt, layout, seed, device, any_scale)
            before = Operand((decoded_before if device == "cuda" else decoded_by_reference)(rows, torch.bfloat16))
            operands = [rows, rows, rows, before] if device == "cuda" else [rows, before]
            outs = [torch.full((m, weight.shape[0]), 7.0, device=device) for _ in operands]
            with interpreted(seed) if device == "cpu" else contextlib.nullcontext():
                for a, out in zip(operands, outs, strict=True):
                    _hopper_launch.multiply(a, weight, scale, fmt, out, None, chosen)
            for out in outs[:-1]:
                assert_same_bytes(out.nan_to_num(nan=12345.0), outs[-1].nan_to_num(nan=12345.0))
            compared += 1
    assert compared


def test_one_row_may_have_any_stride():
    with interpreted():
        check_any_stride(STRIPS["nvfp4"][1])


def check_any_stride(way):
    """A slice of one row keeps the stride of its rows; TMA takes those of whole 16 bytes, a view as words whole words."""
    weight, scale = pack_hopper_weight(*storable(0, 128, 256, NVFP4), NVFP4)
    chosen = cut(way, 1, 128, 256, 132)
    for rows in (Operand(values(0, 1, 256)), quantized_rows(1, 256, NVFP4, "128x4", 1)):
        elements = rows.elements.new_zeros(3, 261)[:1, : rows.elements.shape[1]]
        elements.copy_(rows.elements)
        outs = torch.empty(2, 1, 128, dtype=torch.bfloat16)
        for out, given in zip(outs, (rows, rows._replace(elements=elements)), strict=True):
            _hopper_launch.multiply(given, weight, scale, NVFP4, out, None, chosen)
        assert torch.equal(*outs.nan_to_num(nan=7.0))


@formats_and_ways
def test_stages_have_room_and_belong_to_groups(fmt, way):
    """Groups wait for the parity of a stage's phase: those that take turns see only every second phase of each stage."""
    for x_layout in (0, 1) if decodes(way, fmt.name, 512, 1) else (0,):
        plan = _hopper_kernels.strip_plan(way, fmt.name, torch.bfloat16, x_layout, 1)
        assert plan.STAGES == way.STAGES >= max(plan.LEAST_STAGES, 2) and plan.STAGES % plan.TURNS == 0
        strips = [range(_hopper_strips._begin.fn(plan, g), _hopper_strips._end.fn(plan, g)) for g in range(plan.GROUPS)]
        if plan.OWN:
            assert list(itertools.chain(*strips)) == list(range(way.S)) and all(strips)
        else:
            assert strips == [range(way.S)] * 2


@pytest.mark.parametrize("fmt", FORMATS)
def test_who_decodes_rows(fmt):
    """Programs of the product where that is little work beside their weights; a kernel before for tiles, always."""
    for way in (*STRIPS[fmt], *AT_ONCE, *WAYS):
        for m, k in itertools.product((1, 8), (512, 2048, 4096, 8192, 28672)):
            assert decodes(way, fmt, k, m) <= decodes(way, fmt, 512, 1)
            assert isinstance(way, Strips | AtOnce) or not decodes(way, fmt, k, m)
    few, many = (choose(1, n, 2048, 132, fmt=fmt).way for n in (4096, 28672))
    assert decodes(few, fmt, 2048, 1) and decodes(many, fmt, 2048, 1)
    rows = choose(16, 28672, 8192, 132, fmt=fmt).way
    assert decodes(rows, fmt, 4096, 16) and decodes(rows, fmt, 8192, 16) == (fmt == "mxfp8")


def test_strips_need_steps_of_64():
    whole = choose(1, 8192, 8192, 132)
    assert isinstance(whole.way, Strips) and whole.way.S * whole.programs * 16 >= 8192
    assert choose(1, 8192, 8192, 132, whole_steps=False).way in WAYS


@formats_and_ways
def test_a_way_is_refused_where_it_does_not_fit(fmt, way):
    assert cut(way, 1, 128 * 8, 256 * 2, 132) is not None
    assert (cut(way, 1, 128, 256, 132) is None) == (way.S > 8 or way.KS > 4)
    assert _hopper_ways.cut(way._replace(KS=8), 1, 4096, 7424, 132) is None


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("m", [8, 16])
def test_stages_are_short_where_k_is(fmt, m):
    """With as many strips, eight steps a stage from some 4096 of K on, if the format has both."""

    def best(n, k):
        cuts = [cut(way, m, n, k, 132, fmt) for way in STRIPS[fmt] if m == way.BM]
        return min((each for each in cuts if each), key=lambda each: each.us).way

    for n in (4096, 6144, 8192):
        ways = [best(n, k) for k in (2048, 3072, 8192, 28672)]
        assert len({way.S for way in ways}) == 1
        steps = [way.KS for way in ways]
        assert steps == ([4, 4, 8, 8] if fmt != "mxfp8" else [8 if n == 4096 else 4] * 4)
    assert best(4096, 28672 + 256).KS == 4


@formats_and_ways
def test_a_way_by_strips_is_right_in_the_interpreter(fmt, way):
    """With more stages than the ring holds."""
    m, (n, k) = way.BM - 3, hopper_size(16 * way.S, (way.STAGES + 3) * way.KS * 64)
    chosen = cut(way, m, n, k, 132)
    assert chosen is not None
    check_way(chosen, m, n, k, fmt, device="cpu")


@pytest.mark.gpu
@formats_and_ways
def test_a_way_by_strips_is_right_and_always_the_same(fmt, way):
    """Few programs and many, whose last one's strips are also the one before's, and fewer steps than the ring holds."""
    needs_hopper()
    checked = 0
    for m, n, k in (
        (1, 384, 512),
        (way.BM, 2112 * way.S // 128 * 128, 1024),
        (way.BM - 3, 2176 * way.S // 128 * 128, 2304),
    ):
        chosen = cut(way, m, n, k, 132)
        if chosen is not None:
            check_way(chosen, m, n, k, fmt)
            checked += 1
    assert checked
