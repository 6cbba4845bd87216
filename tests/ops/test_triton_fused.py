"""The fused quantisers in Triton: byte for byte what their references give.

As in ``test_triton_quantize``, each ``check_*`` runs in Triton's interpreter and, marked ``gpu``, compiled.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from torch_fp4ops import OPS, rms_norm_fp4_quantize, scale_layouts
from torch_fp4ops import silu_and_mul_fp4_quantize as silu_quantize
from torch_fp4ops.formats import MXFP4, NVFP4, BlockFormat
from torch_fp4ops.testing import assert_right, assert_same_bytes, samples
from torch_fp4ops.testing.samples import values
from torch_fp4ops.testing.strategies import matrices

from ..interpreter import few, test_in_the_interpreter, test_on_a_gpu  # noqa: F401
from .test_fused_quantize import FORMATS, SCALE, scale_for, tail
from .test_triton_quantize import LAYOUTS, compare, poisoned_memory

triton = pytest.importorskip("triton", reason="needs Triton")
tl = triton.language

from torch_fp4ops.ops import _triton_activations, _triton_quantize  # noqa: E402
from torch_fp4ops.ops import _triton_rms_norm as rms  # noqa: E402
from torch_fp4ops.ops._triton_launch import LAUNCH_OPTIONS  # noqa: E402


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


@few()
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


@few()
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


def check_whole_tiles(device: str) -> None:
    """Where nothing is ragged the kernel has no masks."""
    for fmt, layout in ((NVFP4, "128x4"), (MXFP4, "linear")):
        silu(device, fmt, layout, values(5, 128, 2 * 32 * fmt.block_size), scale_for(fmt))


def check_every_tiling(device: str) -> None:
    """The tilings that ship, and for norms others: no tiling changes a byte."""
    rows, blocks = 17, 21
    for fmt, layout in ((NVFP4, "128x4"), (MXFP4, "8x4"), (NVFP4, "linear")):
        k = blocks * fmt.block_size
        x, weight = values(3, rows, 2 * k).to(device), values(4, k).to(device)
        gs = None if fmt is MXFP4 else SCALE.to(device)
        codes = torch.empty(rows, k // 2, dtype=torch.uint8, device=device)
        sf = torch.empty(scale_layouts.scale_shape(rows, blocks, layout), dtype=torch.uint8, device=device)
        wanted = silu_quantize(x.cpu(), scale_for(fmt), *tail(fmt, layout), backend="reference")
        for tile in _triton_quantize.shipped_tilings(fmt, layout, gated=True):
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


@triton.jit
def reciprocal_kernel(d_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, _triton_activations._minus_reciprocal(tl.load(d_ptr + i)))


@pytest.mark.gpu
def test_the_reciprocal_is_rounded_correctly_on_the_gpu():
    """Every mantissa, at exponents over the whole range that the sigmoid reaches."""
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
