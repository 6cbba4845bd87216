"""silu_and_mul_fp4_quantize and rms_norm_fp4_quantize: what they are fused from, rejections, and Triton's bytes.

As in ``test_triton_quantize``, each ``check_*`` runs in Triton's interpreter and, marked ``gpu``, compiled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from torch_fp4ops import OPS, fp4_dequantize, fp4_quantize, rms_norm_fp4_quantize, scale_layouts
from torch_fp4ops import silu_and_mul_fp4_quantize as silu_quantize
from torch_fp4ops.formats import MXFP4, NVFP4, BlockFormat
from torch_fp4ops.ops._activations import rms_norm, silu_and_mul
from torch_fp4ops.testing import assert_right, assert_same_bytes, samples
from torch_fp4ops.testing.samples import values
from torch_fp4ops.testing.strategies import matrices

from ..interpreter import Interpreter
from .rejections import assert_rejected, assert_rejected_by_contract
from .test_triton_quantize import FLAGS, LAYOUTS, compare, few, poisoned_memory

FORMATS = (NVFP4, MXFP4)
SCALE = torch.tensor([300.0])


def tail(fmt: BlockFormat, layout: str, inversed: bool = False) -> tuple[Any, ...]:
    """The arguments behind the global scale, or eps."""
    return fmt.block_size, fmt is MXFP4, *FLAGS[layout], inversed


def scale_for(fmt: BlockFormat, scale: float = 300.0) -> Tensor | None:
    return torch.tensor([scale]) if fmt is NVFP4 else None


# What they are


@given(matrices(block=64, max_blocks=3), st.sampled_from(FORMATS), st.sampled_from(LAYOUTS))
def test_silu_and_mul_is_the_pair_in_fp32(x, fmt, layout):
    pair = fp4_quantize(silu_and_mul(x), scale_for(fmt), *tail(fmt, layout))
    for given_, wanted in zip(silu_quantize(x, scale_for(fmt), *tail(fmt, layout)), pair, strict=True):
        assert_same_bytes(given_, wanted)


@given(matrices(block=32, max_blocks=3), st.sampled_from(FORMATS), st.sampled_from(LAYOUTS))
def test_rms_norm_is_the_pair_in_fp32(x, fmt, layout):
    weight = values(0, x.shape[1])
    pair = fp4_quantize(rms_norm(x, weight, 1e-6), scale_for(fmt), *tail(fmt, layout))
    fused = rms_norm_fp4_quantize(x, weight, scale_for(fmt), 1e-6, *tail(fmt, layout))
    for given_, wanted in zip(fused, pair, strict=True):
        assert_same_bytes(given_, wanted)


def test_codes_are_near_those_of_the_pair_in_bf16():
    """The pair that rounds to bf16 in between decodes to nearly the same, and is no nearer to the exact values."""
    x, weight = values(0, 64, 512), values(1, 256)
    y = torch.nn.functional.silu(x[:, :256].double()) * x[:, 256:].double()
    n = torch.nn.functional.rms_norm(x[:, :256].double(), (256,), weight.double(), 1e-6)
    for fused, exact in ((silu_quantize(x, SCALE), y), (rms_norm_fp4_quantize(x[:, :256], weight, SCALE), n)):
        pair = fp4_quantize(exact.bfloat16(), SCALE)
        assert (fused[0] != pair[0]).float().mean() < 0.05
        errors = [float((fp4_dequantize(*out, SCALE) - exact).norm() / exact.norm()) for out in (fused, pair)]
        assert errors[0] < 0.11 and errors[0] < 1.001 * errors[1]


def test_leading_dimensions_flatten():
    x = values(0, 2, 3, 64)
    for op, args in ((silu_quantize, (SCALE,)), (rms_norm_fp4_quantize, (None, SCALE))):
        codes, sf = op(x, *args)
        flat = op(x.reshape(6, 64), *args)
        assert codes.shape[:2] == (2, 3)
        assert_same_bytes(codes.flatten(0, 1), flat[0])
        assert_same_bytes(sf, flat[1])


# Rejections

VALID_SILU = {"input": values(0, 4, 64), "global_scale": SCALE}
VALID_NORM = {"input": values(0, 4, 64), "weight": values(1, 64), "global_scale": SCALE}
MXFP4_FLAGS = {"sf_vec_size": 32, "sf_use_ue8m0": True, "global_scale": None}
SHARED = [
    ({"input": values(0, 4, 64).double()}, r"input is torch.float64; allowed: torch.bfloat16 or torch.float16 or"),
    ({"input": values(0, 4, 64).to(torch.float8_e4m3fn)}, r"input is torch.float8_e4m3fn; allowed: torch.bfloat16"),
    ({"input": values(0, 64)}, r"input is of shape \(64,\); allowed: two dimensions or more"),
    ({"sf_vec_size": 32}, r"sf_vec_size is 32 with sf_use_ue8m0=False; allowed: 16 with False \(NVFP4\) or 32"),
    ({"is_sf_swizzled_layout": False, "is_sf_8x4_layout": True}, r"is_sf_swizzled_layout is False; allowed: True"),
    ({"global_scale": None}, r"global_scale is None; allowed: a float32 tensor \(nvfp4\)"),
    ({"global_scale": torch.tensor([1])}, r"global_scale is torch.int64; allowed: torch.float32"),
    ({"global_scale": torch.ones(3)}, r"global_scale is of shape \(3,\); allowed: one element or one .* 4 rows"),
    ({**MXFP4_FLAGS, "global_scale": SCALE}, r"global_scale is given; allowed: None: mxfp4"),
]
SILU = [
    ({"input": values(0, 4, 65)}, r"input is of shape \(4, 65\); allowed: an even last dimension: gate and up"),
    ({"input": values(0, 4, 48)}, r"input is of K = 24; allowed: K a multiple of 16 \(nvfp4\)"),
    ({**MXFP4_FLAGS, "input": values(0, 4, 96)}, r"input is of K = 48; allowed: K a multiple of 32 \(mxfp4\)"),
]
NORM = [
    ({"weight": values(1, 64).double()}, r"weight is torch.float64; allowed: torch.bfloat16 or"),
    ({"weight": values(1, 32)}, r"weight is of shape \(32,\); allowed: shape \(64,\): one for each of the K columns"),
    ({"weight": values(1, 1, 64)}, r"weight is of shape \(1, 64\); allowed: shape \(64,\)"),
    ({"eps": -1e-6}, r"eps is -1e-06; allowed: zero or more"),
    ({"eps": math.nan}, r"eps is nan; allowed: zero or more"),
    ({"input": values(0, 4, 24), "weight": None}, r"input is of K = 24; allowed: K a multiple of 16"),
]


@pytest.mark.parametrize(("change", "message"), SHARED + SILU)
def test_silu_and_mul_rejects(change, message):
    assert_rejected_by_contract(silu_quantize, VALID_SILU, change, message)


@pytest.mark.parametrize(("change", "message"), SHARED + NORM)
def test_rms_norm_rejects(change, message):
    assert_rejected_by_contract(rms_norm_fp4_quantize, VALID_NORM, change, message)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_global_scale_that_is_not_finite_and_positive_is_rejected(value):
    change = {"global_scale": torch.tensor([value])}
    assert_rejected(silu_quantize, VALID_SILU, change, r"global_scale is \[.*\]; allowed: finite values above zero")
    assert_rejected(rms_norm_fp4_quantize, VALID_NORM, change, r"global_scale is \[.*\]; allowed: finite")


# Triton


def silu(device: str, fmt: BlockFormat, layout: str, x: Tensor, scale: Tensor | None, inversed: bool = False) -> None:
    compare(device, silu_quantize, x, scale, *tail(fmt, layout, inversed))


def norm(device: str, fmt: BlockFormat, layout: str, x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> None:
    compare(device, rms_norm_fp4_quantize, x, weight, scale_for(fmt), eps, *tail(fmt, layout))


def check_samples(device: str) -> None:
    for name in ("silu_and_mul_fp4_quantize", "rms_norm_fp4_quantize"):
        for sample in samples(OPS[name], device):
            with poisoned_memory():
                assert_right(OPS[name], sample, "triton")


def check_rows_and_ragged_columns(device: str) -> None:
    for fmt, layout, m, blocks in itertools.product(FORMATS, LAYOUTS, (0, 1, 129), (1, 17)):
        k = blocks * fmt.block_size
        silu(device, fmt, layout, values(m, m, 2 * k), scale_for(fmt))
        norm(device, fmt, layout, values(m, m, k), values(m + 1, k))


def check_long_rows(device: str) -> None:
    for fmt, k, dtype in itertools.product(FORMATS, (4096, 7168, 16384, 32768), (torch.bfloat16, torch.float32)):
        norm(device, fmt, "linear", values(k, 2, k, dtype=dtype), values(1, k, dtype=dtype))


@few
@given(
    x=matrices(block=64, max_blocks=4),
    fmt=st.sampled_from(FORMATS),
    layout=st.sampled_from(LAYOUTS),
    inversed=st.booleans(),
    scale=st.floats(2.0**-30, 2.0**30, width=32),
)
@example(x=torch.full((1, 64), -math.inf), fmt=NVFP4, layout="linear", inversed=False, scale=1.0)
@example(x=torch.full((1, 64), -math.nan), fmt=NVFP4, layout="linear", inversed=False, scale=1.0)
@example(x=torch.full((1, 64), 3.4e38), fmt=MXFP4, layout="linear", inversed=True, scale=2.0**30)
@example(x=torch.full((1, 64), -3.4e38), fmt=NVFP4, layout="linear", inversed=True, scale=2.0**-30)
@example(x=torch.full((1, 64), 1e-45), fmt=NVFP4, layout="linear", inversed=True, scale=1.0)
def check_silu_and_mul_of_hard_values(
    device: str, x: Tensor, fmt: BlockFormat, layout: str, inversed: bool, scale: float
) -> None:
    silu(device, fmt, layout, x, scale_for(fmt, scale), inversed)


def check_silu_and_mul_of_every_bf16(device: str) -> None:
    every = torch.arange(2**16, dtype=torch.int32).sub(2**15).to(torch.int16).view(torch.bfloat16)
    shuffled = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))].reshape(256, 256)
    for up, fmt in itertools.product((torch.ones_like(shuffled), shuffled.roll(1, 0)), FORMATS):
        silu(device, fmt, "128x4", torch.cat((shuffled, up), dim=1), scale_for(fmt))


@few
@given(
    x=matrices(rows=st.integers(1, 40), block=32),
    fmt=st.sampled_from(FORMATS),
    layout=st.sampled_from(LAYOUTS),
    weight=st.sampled_from([None, torch.bfloat16, torch.float16, torch.float32]),
    eps=st.sampled_from([0.0, 1e-6, 0.3]),
)
@example(x=torch.full((1, 32), -math.nan), fmt=NVFP4, layout="linear", weight=None, eps=0.0)
@example(x=torch.full((1, 32), -math.inf), fmt=MXFP4, layout="linear", weight=torch.float32, eps=1e-6)
@example(x=torch.full((2, 32), 1e-45), fmt=NVFP4, layout="linear", weight=None, eps=0.0)
def check_rms_norm_of_hard_values(
    device: str, x: Tensor, fmt: BlockFormat, layout: str, weight: torch.dtype | None, eps: float
) -> None:
    norm(device, fmt, layout, x, None if weight is None else values(3, x.shape[1], dtype=weight), eps)


def check_rms_norm_of_every_magnitude(device: str) -> None:
    exponents = torch.arange(-149, 128, dtype=torch.float32)
    x = values(0, len(exponents), 64, dtype=torch.float32) * exponents.exp2()[:, None]
    for eps in (0.0, 1e-6):
        norm(device, NVFP4, "linear", x, None, eps)
    x[:, 7] *= 2.0**12  # an outlier
    norm(device, MXFP4, "linear", x, values(1, 64), 0.0)


def check_views(device: str) -> None:
    x = values(0, 96, 192)
    flat = values(1, 96 * 192 + 64)
    views = (x.T, x[:, 32:160], x[::3, 8:72], x[:1].expand(5, 192), flat[1:-63].reshape(96, 192))
    views += (flat[:-64].reshape(4, 24, 192)[:, ::2], flat[:-64].reshape(4, 24, 192).transpose(0, 1))
    weight = values(2, 400)[::2]
    for view, layout in itertools.product(views, ("128x4", "linear")):
        silu(device, NVFP4, layout, view, SCALE)
        norm(device, MXFP4, layout, view, weight[3 : 3 + view.shape[-1]])


def check_every_tiling(device: str) -> None:
    """The tilings that ship, and for norms others: no tiling changes a byte."""
    from torch_fp4ops.ops import _triton_quantize
    from torch_fp4ops.ops import _triton_rms_norm as rms

    rows, blocks = 17, 21
    for fmt, layout in ((NVFP4, "128x4"), (MXFP4, "8x4"), (NVFP4, "linear")):
        k = blocks * fmt.block_size
        x, weight = values(3, rows, 2 * k).to(device), values(4, k).to(device)
        gs = None if fmt is MXFP4 else SCALE.to(device)
        codes = torch.empty(rows, k // 2, dtype=torch.uint8, device=device)
        sf = torch.empty(scale_layouts.scale_shape(rows, blocks, layout), dtype=torch.uint8, device=device)
        wanted = silu_quantize(x.cpu(), scale_for(fmt), *tail(fmt, layout), backend="reference")
        for tile in _triton_quantize.shipped_tilings(fmt, layout):
            _triton_quantize.quantize_rows(
                x, fmt, layout, gs, False, codes.fill_(0xEE), sf.fill_(0xEE), gated=True, tile=tile
            )
            for given_, right in zip((codes, sf), wanted, strict=True):
                assert_same_bytes(given_.cpu(), right, f"{fmt.name} {layout} {tile}")
        flags = (1e-6, *tail(fmt, layout))
        wanted = rms_norm_fp4_quantize(x[:, :k].cpu(), weight.cpu(), scale_for(fmt), *flags, backend="reference")
        others = [rms.RowTiling(4, 8, 3, 2), rms.RowTiling(8, 16, 2)]
        if layout == "linear":
            others += [rms.RowTiling(1, 32, 1), rms.RowTiling(1, 128, 1, 4)]
        for tile in (*rms.shipped_tilings(fmt, blocks), *others):
            out = (codes.fill_(0xEE), sf.fill_(0xEE))
            rms.rms_norm_quantize_rows(x[:, :k], weight, 1e-6, fmt, layout, gs, False, *out, tile=tile)
            for given_, right in zip(out, wanted, strict=True):
                assert_same_bytes(given_.cpu(), right, f"{fmt.name} {layout} {tile}")


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]


def _name(check: Any) -> str:
    return check.__name__.removeprefix("check_")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.mark.parametrize("check", CHECKS, ids=_name)
def test_in_the_interpreter(interpreter, check):
    interpreter(check, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=_name)
def test_on_a_gpu(check):
    check("cuda")


@pytest.mark.gpu
def test_the_reciprocal_is_rounded_correctly_on_the_gpu():
    """Every mantissa, at exponents over the whole range that the sigmoid reaches."""
    import triton
    import triton.language as tl

    from torch_fp4ops.ops._triton_activations import _minus_reciprocal
    from torch_fp4ops.ops._triton_launch import LAUNCH_OPTIONS

    global reciprocal_kernel

    @triton.jit
    def reciprocal_kernel(d_ptr, out_ptr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + i, _minus_reciprocal(tl.load(d_ptr + i)))

    mantissas = torch.arange(2**23, device="cuda", dtype=torch.int32)
    for exponent in (0, 1, 2, 22, 23, 24, 60, 100, 124, 125):
        d = -((127 + exponent << 23) + mantissas).view(torch.float32)
        out = torch.empty_like(d)
        reciprocal_kernel[(2**23 // 1024,)](d, out, 1024, **LAUNCH_OPTIONS)
        assert torch.equal(out, torch.full_like(d, -1.0) / d), f"2^{exponent}"


def test_rows_that_are_too_long_are_a_reason():
    x = values(0, 1, 32768 + 16)
    reason = rms_norm_fp4_quantize.why_not("triton", rms_norm_fp4_quantize.check(x, None, SCALE))
    assert reason is not None and ("up to 32768" in reason or "not importable" in reason)
