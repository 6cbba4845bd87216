"""Hopper products that ask for all at once, interpreted on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from torch_fp4ops.block_quantization import dequantize_blocks
from torch_fp4ops.formats import FORMATS, MXFP8, NVFP4
from torch_fp4ops.hopper_layout import pack_hopper_weight
from torch_fp4ops.testing import assert_matmul_close, assert_same_bytes

from .test_hopper import storable
from .test_hopper_strips import (
    check_any_stride,
    check_decoded_rows,
    check_every_strip,
    check_rows_are_read,
    quantized_rows,
)
from .test_hopper_ways import check_way, needs_hopper

pytest.importorskip("triton.experimental.gluon", reason="needs Gluon")

from torch_fp4ops.ops import _hopper_at_once, _hopper_kernels, _hopper_launch
from torch_fp4ops.ops._hopper_plan import SHARED_BYTES
from torch_fp4ops.ops._hopper_strip_plan import AtOncePlan
from torch_fp4ops.ops._hopper_ways import AT_ONCE, AtOnce, choose, cut, decodes
from torch_fp4ops.ops._triton_dequantize import decoded as decoded_before

from ..gluon_interpreter import interpreted

ways = pytest.mark.parametrize("way", AT_ONCE, ids=lambda way: f"{way.BM}x{way.S}")
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)


@formats
@pytest.mark.parametrize("s", [1, 2, 3, 4])
def test_programs_copy_and_multiply_every_strip_once(fmt, s):
    with interpreted():
        # Twelve steps, one of them padding: the second turn of some warps has none.
        check_every_strip(fmt, AtOnce(8, s), 704, s)


@formats
@ways
def test_strips_are_where_the_layout_has_them(fmt, way):
    for steps in (12, 64):
        plan = AtOncePlan(fmt.name, False, way.BM, way.S, steps, 0, 0, 1.0)
        places = {}
        for program in range(-(-24 // way.S)):
            first = min(program * way.S, 24 - way.S)
            for i in range(way.S):
                places[first + i] = _hopper_at_once._strip.fn(first, i, 10000, 100, 1, plan)
        assert places == {strip: strip // 8 * 10000 + strip % 8 // 4 * 100 + strip % 4 for strip in range(24)}


@formats
@pytest.mark.parametrize("layout", ["128x4", "8x4"])
@pytest.mark.parametrize("m", [2, 9])
def test_programs_read_the_rows_that_they_decode(fmt, layout, m):
    with interpreted():
        check_rows_are_read(fmt, AtOnce(8 if m <= 8 else 16, 2), m, layout)


def test_one_row_may_have_any_stride():
    with interpreted():
        check_any_stride(AT_ONCE[0])


@formats
@pytest.mark.parametrize("m", [1, 8, 9, 16])
def test_what_is_chosen_has_room(fmt, m):
    """Shared memory for all of it, also where rows are decoded there, and a multiprocessor for each program."""
    chosen = decoding = 0
    for n, k, quantized in itertools.product(range(128, 17000, 128 * 7), range(256, 17000, 256), (False, True)):
        way = choose(m, n, k, 132, fmt=fmt.name, quantized=quantized)
        if not isinstance(way.way, AtOnce):
            continue
        chosen += 1
        assert way.programs <= 132 and way.programs * way.way.S * 16 >= n
        x_layout = int(quantized and decodes(way.way, fmt.name, k, m))
        plan = _hopper_kernels.at_once_plan(way.way, fmt.name, torch.bfloat16, way.trips, x_layout, 1)
        assert plan.SHARED_BYTES <= SHARED_BYTES and plan.TURNS * plan.WARPS >= way.trips == k // 64
        assert plan.KS >= plan.TURNS * plan.WARPS and plan.BM % plan.ROWS == 0
        decoding += x_layout
        smaller = [each for each in AT_ONCE if each.BM == way.way.BM and each.S < way.way.S]
        assert all(cut(each, m, n, k, 132, fmt.name, quantized) is None for each in smaller)
    assert chosen > 50 and 0 < decoding <= chosen


def test_small_weights_are_asked_for_at_once():
    for m, (n, k) in itertools.product((1, 4, 8, 16), ((4096, 4096), (7168, 2048), (1024, 4096))):
        assert isinstance(choose(m, n, k, 132).way, AtOnce)
        assert not isinstance(choose(m, n, k, 132, whole_steps=False).way, AtOnce)
    assert not isinstance(choose(1, 28672, 8192, 132).way, AtOnce)
    assert not isinstance(choose(17, 4096, 4096, 132).way, AtOnce)
    for m in (1, 16):
        assert isinstance(choose(m, 7168, 2048, 132, fmt="mxfp8", quantized=True).way, AtOnce)
    # x of 16 bits takes twice the room of codes.
    assert isinstance(choose(16, 4096, 4096, 132, fmt="mxfp8", quantized=True).way, AtOnce)
    assert not isinstance(choose(16, 4096, 4096, 132, fmt="mxfp8").way, AtOnce)


@formats
@ways
def test_a_way_is_right_in_the_interpreter(fmt, way):
    """Where programs begin with turns of their own, and where they do not; the last one's strips are the one before's too."""
    for m, n, k in ((way.BM, 384, 768), (way.BM - 3, 128, 4096)):
        chosen = cut(way, m, n, k, 132, fmt.name)
        if chosen is not None:
            check_way(chosen, m, n, k, fmt, device="cpu")


@formats
@ways
def test_decoded_rows_in_the_interpreter(fmt, way):
    check_decoded_rows(fmt, way, [(1, 128, 512), (way.BM, 256, 960), (way.BM - 3, 128, 3008)], "cpu")


@pytest.mark.gpu
@ways
@formats
def test_a_way_is_right_and_always_the_same(fmt, way):
    """One program and many, whose last one's strips are also the one before's; turns that some warps have no step for."""
    needs_hopper()
    checked = 0
    for m, n, k in (
        (1, 384, 256),
        (way.BM, 128 * way.S * 16, 1024),
        (way.BM - 3, 2048 * way.S - 128, 2304 // way.S // 256 * 256),
        (way.BM - 7, 1920, 2560),
    ):
        chosen = cut(way, m, n, k, 132, fmt.name)
        if chosen is not None:
            check_way(chosen, m, n, k, fmt)
            checked += 1
    assert checked > 2


@pytest.mark.gpu
@ways
def test_a_way_is_right_for_other_types(way):
    needs_hopper()
    chosen = cut(way, way.BM - 1, 512, 1280, 132)
    check_way(chosen, way.BM - 1, 512, 1280, NVFP4, torch.float16, torch.float16)
    check_way(chosen, way.BM - 1, 512, 1280, NVFP4, out_dtype=torch.float32)


@pytest.mark.gpu
@ways
@formats
def test_rows_decoded_in_the_product_are_those_decoded_before(fmt, way):
    """Bit for bit, also where programs are many and calls follow each other; NaN and infinite scales included."""
    needs_hopper()
    sizes = [(1, 896, 512), (way.BM, 2048 * way.S, 960), (way.BM - 3, 256, 1344), (2, 1024, 4096), (3, 1024, 5440)]
    check_decoded_rows(fmt, way, sizes)


@pytest.mark.gpu
def test_rows_of_which_only_codes_have_room():
    needs_hopper()
    m, n, k = 16, 4096, 4096
    chosen = choose(m, n, k, 132, fmt="mxfp8", quantized=True)
    assert isinstance(chosen.way, AtOnce) and cut(chosen.way, m, n, k, 132, "mxfp8") is None
    codes, scales = storable(1, n, k, MXFP8)
    scales = torch.where(scales == 255, 127, scales)
    weight, scale = (t.cuda() for t in pack_hopper_weight(codes, scales, MXFP8))
    for layout in ("128x4", "8x4"):
        rows = quantized_rows(m, k, MXFP8, layout, 2, "cuda")
        outs = [torch.full((m, n), 7.0, device="cuda") for _ in range(20)]
        for out in outs:
            _hopper_launch.multiply(rows, weight, scale, MXFP8, out, None, chosen)
        assert all(torch.equal(out, outs[0]) for out in outs)
        w = dequantize_blocks(codes.view(torch.float8_e4m3fn), scales, MXFP8).cuda()
        assert_matmul_close(outs[0], decoded_before(rows, torch.bfloat16), w)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [NVFP4, MXFP8], ids=lambda fmt: fmt.name)
def test_products_on_several_streams_at_once(fmt):
    """Nothing is shared but the arguments: not between streams, nor between ways that follow each other on one."""
    needs_hopper()
    sizes = [(1, 4096, 2048), (16, 2048, 2048), (5, 1024, 4096), (48, 4096, 4096), (200, 1024, 2048)]
    cases = []
    for seed, (m, n, k) in enumerate(sizes):
        weight, scale = (t.cuda() for t in pack_hopper_weight(*storable(seed, n, k, fmt), fmt))
        cases.append((quantized_rows(m, k, fmt, "128x4", seed, "cuda"), weight, scale, (m, n)))

    def products():
        outs = [torch.full(size, 7.0, device="cuda", dtype=torch.bfloat16) for *_, size in cases]
        for (rows, weight, scale, _), out in zip(cases, outs, strict=True):
            _hopper_launch.product(rows, weight, scale, fmt, out, None)
        return outs

    wanted = [out.nan_to_num(nan=12345.0) for out in products()]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    got = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                got.append(products())
    torch.cuda.synchronize()
    for outs in got:
        for out, want in zip(outs, wanted, strict=True):
            assert_same_bytes(out.nan_to_num(nan=12345.0), want)
