"""Hopper products by strips: what the kernel would load and compute, followed on the CPU."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from torch_fp4ops.block_quantization import dequantize_blocks
from torch_fp4ops.formats import FORMATS, MXFP4, MXFP8, NVFP4
from torch_fp4ops.hopper_layout import pack_hopper_weight, unpack_hopper_weight

from .test_hopper import storable, values

pytest.importorskip("triton.experimental.gluon", reason="needs Gluon")

from torch_fp4ops.ops import _hopper_launch, _hopper_ways
from torch_fp4ops.ops._hopper_ways import STRIPS, WAYS, Strips, choose, cut


def box(descriptor, at):
    """What a TMA load brings: zeros beyond the tensor."""
    data = torch.as_strided(descriptor.base, descriptor.shape, descriptor.strides)
    out = torch.zeros(descriptor.block_shape, dtype=data.dtype)
    inside = tuple(slice(a, a + size) for a, size in zip(at, descriptor.block_shape, strict=True))
    part = data[inside]
    out[tuple(slice(0, size) for size in part.shape)] = part
    return out


def decoded(codes, scales, fmt):
    """Four steps of a strip, [4, pieces, 128] and [4, words]: [4, 16, 64], as the four quarters of a tile."""
    pieces, words = codes.shape[1], scales.shape[1]
    tile = torch.zeros(4, 2, pieces, 4, 128, dtype=torch.int32)  # kt, sub, piece, quarter
    tile[0, 0] = codes.transpose(0, 1)
    steps = torch.zeros(4, 2, 4, words, dtype=torch.int32)
    steps[0, 0] = scales
    packed = tile.view(torch.uint8).view(128, -1), steps.view(torch.uint8).view(128, -1)
    return dequantize_blocks(*unpack_hopper_weight(*packed, fmt), fmt)[:64, :64].view(4, 16, 64)


class Simulated:
    """In place of ``strips_kernel``: its loads, its division of K among warps and its sums."""

    def __init__(self, fmt):
        self.fmt = fmt

    def __getitem__(self, grid):
        return lambda *args, **constants: [self.program(i, *args, **constants) for i in range(*grid)]

    def program(self, i, x_desc, codes_desc, scales_desc, out, alpha, m, n, steps, **constants):
        s, ks, stages = constants["S"], constants["KS"], constants["STAGES"]
        width = codes_desc.block_shape[2]
        pieces = codes_desc.block_shape[1]
        assert steps % ks == 0 and s % width == 0 and stages * ks * pieces >= constants["BM"]  # room for the sums
        first = min(i * s, n // 16 - s)
        sums = torch.zeros(s, 8, 16, constants["BM"])
        for k in range(0, steps, ks):
            x = box(x_desc, [k, 0, 0]).float()
            for j in range(s):
                strip = first + j // width * width
                row = strip // 8 * steps + k
                codes = box(codes_desc, [row, strip % 8 // 4 * pieces, strip % 4, 0])[:, :, j % width]
                scales = box(scales_desc, [row, strip % 8, 0])[:, j % width]
                for q in range(0, ks, 4):
                    w = decoded(codes[q : q + 4], scales[q : q + 4], self.fmt)
                    group = k // ks % 2 * 4
                    sums[j, group : group + 4] += w @ x[q : q + 4].mT
        result = sums.sum(1).view(s * 16, -1)[:, :m].T * (1 if alpha is None else alpha.reshape(-1, 1))
        out[:, first * 16 : (first + s) * 16] = result


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, MXFP8], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(("s", "ks"), [(1, 4), (2, 8), (3, 4), (4, 4), (14, 4), (8, 8)])
def test_programs_load_and_multiply_every_strip_once(fmt, s, ks):
    m, n, k = 3, 250, 448
    codes, scales = storable(s, n, k, fmt)
    clean = torch.arange(n) % 3 > 0  # leave rows without NaN
    scales[clean] = torch.where((scales[clean] & 0x7F) == 0x7F, 0x3F, scales[clean])
    weight, scale = pack_hopper_weight(codes, scales, fmt)
    x = values(m, m, k)
    out = torch.full((m, weight.shape[0]), float("nan"), dtype=torch.float32)
    alpha = torch.tensor([0.5, 2.0, -1.0])
    way = Strips(8, s, ks, 4, start=4.0, strip=0.02)
    with mock.patch("torch_fp4ops.ops._hopper_strips.strips_kernel", Simulated(fmt)):
        _hopper_launch.multiply(x, weight, scale, fmt, out, alpha, cut(way, m, weight.shape[0], 512, 132))
    codes = codes.view(torch.float8_e4m3fn) if fmt is MXFP8 else codes
    wanted = x.double() @ dequantize_blocks(codes, scales, fmt).double().T * alpha.view(-1, 1)
    size = x.double().abs() @ dequantize_blocks(codes, scales, fmt).double().abs().T * alpha.abs().view(-1, 1)
    nan = wanted.isnan()
    assert torch.equal(out[:, :n].isnan(), nan) and not nan.all() and not out[:, n:].any()
    assert ((out[:, :n] - wanted).abs() <= 1e-5 * size + 1e-30)[~nan].all()


def test_one_row_may_have_any_stride():
    """TMA takes strides of whole units of 16 bytes, and a slice of one row keeps the stride of its rows."""
    weight, scale = pack_hopper_weight(*storable(0, 128, 256, NVFP4), NVFP4)
    x = torch.zeros(3, 261, dtype=torch.bfloat16)[:1, :256]
    chosen = cut(STRIPS[1], 1, 128, 256, 132)
    out = torch.empty(1, 128, dtype=torch.bfloat16)
    with mock.patch("torch_fp4ops.ops._hopper_strips.strips_kernel", Simulated(NVFP4)):
        _hopper_launch.multiply(x, weight, scale, NVFP4, out, None, chosen)


@pytest.mark.parametrize("way", STRIPS, ids=lambda way: f"{way.BM}x{way.S}x{way.KS}")
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_stage_is_always_the_same_groups(fmt, way):
    """Groups wait for the parity of a stage's phase, and see only every second phase of a stage that they share."""
    plan = _hopper_launch._strip_plan(way, fmt, torch.bfloat16, torch.bfloat16, 1)
    assert plan.STAGES % 2 == 0 and 2 <= plan.STAGES <= way.STAGES


def test_strips_need_steps_of_64():
    whole = choose(1, 4096, 4096, 132)
    assert isinstance(whole.way, Strips) and whole.way.S * whole.programs * 16 >= 4096
    assert choose(1, 4096, 4096, 132, whole_steps=False).way in WAYS


@pytest.mark.parametrize("way", STRIPS, ids=lambda way: f"{way.BM}x{way.S}x{way.KS}")
def test_a_way_is_refused_where_it_does_not_fit(way):
    assert cut(way, 1, 128 * 8, 256 * 2, 132) is not None
    assert (cut(way, 1, 128, 256, 132) is None) == (way.S > 8 or way.KS > 4)
    assert _hopper_ways.cut(way._replace(KS=8), 1, 4096, 7424, 132) is None
