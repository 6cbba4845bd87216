"""The Triton matrix products and the mixture of experts, against float64 with the bound that fp32 sums obey.

Each ``check_*`` runs through the op with ``backend="triton"`` twice: on the CPU in Triton's interpreter, and, marked
``gpu``, compiled. Fresh memory is filled with NaN, so values left unwritten show.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_fp4ops import OPS, scale_layouts
from torch_fp4ops.block_quantization import dequantize_blocks
from torch_fp4ops.formats import MXFP4, MXFP8, NVFP4, BlockFormat
from torch_fp4ops.testing import Sample, assert_matmul_close, assert_right, samples
from torch_fp4ops.testing.samples import values
from torch_fp4ops.testing.strategies import row_counts

from ..interpreter import few, test_in_the_interpreter, test_on_a_gpu  # noqa: F401
from .test_triton_quantize import poisoned_memory

pytest.importorskip("triton", reason="needs Triton")

MATMULS = ("mm_bf16_fp4", "mm_fp4", "mm_mxfp8")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = (NVFP4, MXFP4, MXFP8)


def codes(seed: int, rows: int, k: int, fmt: BlockFormat, exponents: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Random codes, every one of them, and linear scales of a range of exponents."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, k // fmt.elements_per_byte)
    elements = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    if fmt is MXFP8:
        elements = torch.where((elements & 0x7F) == 0x7F, 0, elements).to(torch.uint8)
    blocks = (rows, k // fmt.block_size)
    if fmt is NVFP4:
        scales = torch.randint(0, 256, blocks, generator=generator).to(torch.uint8)
        scales = torch.where((scales & 0x7F) == 0x7F, 1, scales)
    else:
        scales = torch.randint(exponents[0] + 127, exponents[1] + 128, blocks, generator=generator)
    return elements, scales.to(torch.uint8)


def swizzled(scales: Tensor, layout: str) -> Tensor:
    """In their layout, with NaN in the padding: it must not be read, or not matter."""
    padding = scale_layouts.swizzle(torch.ones_like(scales), layout) == 0
    return scale_layouts.swizzle(scales, layout).masked_fill(padding, 0xFF)


def product(
    device: str, fmt: BlockFormat, a: Any, b: Any, alpha: Tensor | None, out_dtype: torch.dtype, layout: str
) -> Tensor:
    """The op's result. ``a`` is plain, or elements and linear scales as ``b`` is."""
    b_elements, b_scales = b[0], swizzled(b[1], "128x4")
    if isinstance(a, Tensor):
        args: tuple[Any, ...] = (a, b_elements, b_scales, alpha)
        name, kwargs = "mm_bf16_fp4", {"out_dtype": out_dtype, "block_size": fmt.block_size}
    else:
        a_elements, a_scales = a[0], swizzled(a[1], layout)
        kwargs = {"use_8x4_sf_layout": layout == "8x4"}
        if fmt is MXFP8:
            a_elements, b_elements = a_elements.view(torch.float8_e4m3fn), b_elements.view(torch.float8_e4m3fn)
            args = (a_elements, b_elements.T, a_scales.flatten(), b_scales.flatten())
            name, kwargs = "mm_mxfp8", {**kwargs, "out_dtype": out_dtype}
        else:
            args = (a_elements, b_elements.T, a_scales, b_scales.T, alpha, out_dtype)
            name, kwargs = "mm_fp4", {**kwargs, "block_size": fmt.block_size, "use_nvfp4": fmt is NVFP4}
    args = tree_map_only(Tensor, lambda t: t.to(device), args)
    with poisoned_memory():
        return OPS[name].default(*args, **kwargs, backend="triton").cpu()


def dequantized(operand: Any, fmt: BlockFormat) -> Tensor:
    if isinstance(operand, Tensor):
        return operand
    elements, scales = operand
    elements = elements.view(torch.float8_e4m3fn) if fmt is MXFP8 else elements
    return dequantize_blocks(elements, scales, fmt)


# What is checked


def check_samples(device: str) -> None:
    for name in (*MATMULS, "cutlass_fused_moe"):
        op = OPS[name]
        for sample in samples(op, device):
            if op.why_not("triton", op.check(*sample.args, **sample.kwargs)) is None:
                with poisoned_memory():
                    assert_right(op, sample, "triton")


@few(25)
@given(
    m=row_counts(140),
    n=st.integers(1, 140),
    blocks=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    fmt=st.sampled_from(FORMATS),
    a_dtype=st.sampled_from([None, torch.bfloat16, torch.float16]),
    out_dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["128x4", "8x4"]),
    alpha=st.sampled_from([None, "one", "rows"]),
)
def check_shapes(
    device: str,
    m: int,
    n: int,
    blocks: int,
    seed: int,
    fmt: BlockFormat,
    a_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    layout: str,
    alpha: str | None,
) -> None:
    if fmt is MXFP8:
        a_dtype = alpha = None  # there is no such op or argument
    k = blocks * fmt.block_size
    factor = {None: None, "one": torch.tensor([0.37]), "rows": torch.linspace(-1, 2, m)}[alpha]
    a: Any = codes(seed + 1, m, k, fmt, (-8, 3)) if a_dtype is None else values(seed + 1, m, k, dtype=a_dtype)
    b = codes(seed, n, k, fmt, (-8, 3))
    if out_dtype == torch.float16 and factor is None:
        out_dtype = torch.float32  # sums exceed float16
    out = product(device, fmt, a, b, factor, torch.float32 if out_dtype == torch.float16 else out_dtype, layout)
    assert_matmul_close(out, dequantized(a, fmt), dequantized(b, fmt), factor)


def check_a_long_sum(device: str) -> None:
    """K long enough to be split, by every number of rows that has a configuration of its own."""
    for m, fmt, dtype in itertools.product((1, 16, 40, 130), (NVFP4, MXFP4), (torch.bfloat16, torch.float16)):
        k = 512 + 32 if device == "cpu" else 8192 + 32
        a, b = values(m, m, k, dtype=dtype), codes(m, 24, k, fmt, (-8, 3))
        alpha = torch.tensor([0.01])
        out = product(device, fmt, a, b, alpha, torch.float32, "128x4")
        if m == 1:
            assert torch.equal(out, product(device, fmt, a, b, alpha, torch.float32, "128x4")), "two calls differ"
        assert_matmul_close(out, a, dequantized(b, fmt), alpha)


def check_every_code_and_scale(device: str) -> None:
    """One element a block times a power of two: every code with every scale comes back exactly, or is NaN."""
    for fmt, dtype in itertools.product((NVFP4, MXFP4), (torch.bfloat16, torch.float16)):
        block = fmt.block_size
        scales = torch.arange(256, dtype=torch.int32).to(torch.uint8)[:, None].expand(256, 16).contiguous()
        elements = torch.zeros(256, 16, block // 2, dtype=torch.uint8)
        elements[:, :, 0] = torch.arange(16, dtype=torch.uint8)  # block i has code i, then zeros
        elements = elements.flatten(1)
        a = torch.zeros(16, 16, block, dtype=dtype)
        a[range(16), range(16), 0] = 0.25
        a = a.flatten(1)
        # Without the sums of other blocks, which would be NaN for a NaN and overflow next to an infinity.
        out = product(device, fmt, a, (elements, scales), None, torch.float32, "128x4")
        wanted = dequantize_blocks(elements, scales, fmt).view(256, 16, block)[:, :, 0].T * 0.25
        finite = wanted.isfinite() & wanted.isfinite().all(0)
        assert torch.equal(out[finite], wanted[finite]), f"{fmt.name} {dtype}"
        nan = dequantize_blocks(elements, scales, fmt).isnan().all(1)
        assert out[:, nan].isnan().all(), f"{fmt.name} {dtype}"
        assert not out[:, ~nan & wanted.isfinite().all(0)].isnan().any()


def check_every_mxfp8_scale(device: str) -> None:
    """Exact from a scale of 2^-124 up; below that, within bfloat16's smallest subnormal of every element."""
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    every = torch.where((every & 0x7F) == 0x7F, 0, every).to(torch.uint8)
    every_byte = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    b = (every.expand(256, 256).contiguous(), every_byte[:, None].expand(256, 8).contiguous())  # a row for each scale
    a = torch.eye(256).to(torch.float8_e4m3fn).view(torch.uint8)  # each row picks one code
    a_scales = torch.full((256, 8), 127, dtype=torch.uint8)
    out = product(device, MXFP8, (a, a_scales), b, None, torch.float32, "128x4")
    wanted = dequantized(b, MXFP8).T
    rows = wanted.isfinite().all(0)
    exact = rows & (torch.arange(256) >= 3)
    assert torch.equal(out[:, exact], wanted[:, exact])
    assert bool(((out - wanted)[:, rows].abs() <= 2.0**-134).all())
    assert out[:, 255].isnan().all()
    b[0][:, 7], b[0][:, 70] = 0x7F, 0xFF  # NaN elements make their rows NaN
    out = product(device, MXFP8, (a, a_scales), (b[0][:8], b[1][120:128]), None, torch.float32, "128x4")
    assert out.isnan().all()


def check_extreme_scales(device: str) -> None:
    """Scales at both ends of UE8M0, where products are still finite in fp32."""
    for fmt, (low, high), dtype in itertools.product(
        (MXFP4,), ((-127, -120), (110, 118)), (torch.bfloat16, torch.float16, None)
    ):
        a: Any = values(0, 5, 128, dtype=dtype) if dtype else codes(1, 5, 128, fmt, (-3, 3))
        b = codes(2, 33, 128, fmt, (low, high))
        out = product(device, fmt, a, b, None, torch.float32, "128x4")
        # The bound's relative error does not cover what fp32 itself can't hold.
        exact = dequantized(a, fmt).double() @ dequantized(b, fmt).double().T
        magnitude = dequantized(a, fmt).double().abs() @ dequantized(b, fmt).double().abs().T
        assert bool(((out.double() - exact).abs() <= 128 * 2.0**-23 * magnitude + 128 * 2.0**-149).all())


def check_strides(device: str) -> None:
    """Transposed, sliced and unaligned activations, and weights that do not start at 16 bytes."""
    x = values(0, 128, 256)
    flat = values(1, 64 * 128 + 8)
    b = codes(3, 40, 128, NVFP4, (0, 0))
    for a in (x[:, 128:], x[::3, :128], x[:, ::2], x.T[:, :128], flat[3:-5].view(64, 128), x[:1, :128].expand(9, 128)):
        out = product(device, NVFP4, a, b, None, torch.float32, "128x4")
        assert_matmul_close(out, a, dequantized(b, NVFP4))
    storage = torch.zeros(40 * 64 + 4, dtype=torch.uint8)
    unaligned = storage[4:].view(40, 64).copy_(b[0])
    out = product(device, NVFP4, x[:, :128], (unaligned, b[1]), None, torch.float32, "128x4")
    assert_matmul_close(out, x[:, :128], dequantized(b, NVFP4))


def check_empty(device: str) -> None:
    for m, n, k in ((0, 8, 64), (3, 0, 64), (3, 8, 0)):
        a, b = values(0, m, k), codes(0, n, k, NVFP4, (0, 0))
        out = product(device, NVFP4, a, b, torch.ones(1), torch.float32, "128x4")
        assert torch.equal(out, torch.zeros(m, n))


def check_every_configuration(device: str) -> None:
    """The interpreter takes its own; these are every architecture's, as far as the device can run them."""
    from torch_fp4ops.ops import _triton_gemm_launch as launch

    shipped = {c for table in (*launch._TABLES.values(), launch._TF32_TABLE) for c in table}
    if device != "cpu":
        shipped = {c for c in launch._TABLES[launch.architecture(torch.device(device, 0))]} | set(launch._TF32_TABLE)
    a, b = values(0, 40, 160), codes(1, 70, 160, MXFP4, (-3, 3))
    operands = [
        launch.Operand(a.to(device)),
        launch.Operand.of(MXFP4, b[0].to(device), swizzled(b[1], "128x4").to(device), "128x4"),
    ]
    for config, parts in itertools.product(sorted(shipped), (1, 4)):
        out = torch.full((40, 70), math.nan, device=device)
        launch.matmul(*operands, out, config=config, parts=parts)
        assert_matmul_close(out.cpu(), a, dequantized(b, MXFP4))


@few(12, nightly=1000)
@given(
    tokens=st.integers(1, 70),
    seed=st.integers(0, 2**31),
    ranks=st.sampled_from([(1, 0), (2, 0), (3, 1), (3, 2)]),
    skew=st.booleans(),
    sample=st.sampled_from(["w4a16-mxfp4-linear", "w4a16-nvfp4", "w4a4-nvfp4", "mxfp4-mxfp8", "bf16-bias-swiglu"]),
)
def check_routings(device: str, tokens: int, seed: int, ranks: tuple[int, int], skew: bool, sample: str) -> None:
    """Experts without rows, one expert with all of them, ids of other ranks, and one expert twice for a token."""
    op = OPS["cutlass_fused_moe"]
    found = next(s for s in samples(op) if s.name == sample)
    generator = torch.Generator().manual_seed(seed)
    experts = found.args[3].shape[0]
    ids = torch.randint(0, 1 if skew else experts * ranks[0], (tokens, 2), generator=generator)
    final = torch.rand(tokens, 2, generator=generator)
    args = (values(seed, tokens, 128), ids.int(), final, *found.args[3:])
    kwargs = {**found.kwargs, "ep_size": ranks[0], "ep_rank": ranks[1]}
    moved = Sample(sample, args, kwargs).map_tensors(lambda t: t.to(device))
    with poisoned_memory():
        assert_right(op, moved, "triton")


def check_routing_of_many_rows(device: str) -> None:
    """One program sorts few rows, torch many: the same tiles, and the same rows in the same order."""
    from torch_fp4ops.ops.cutlass_fused_moe import _triton_kernels as kernels

    generator = torch.Generator().manual_seed(0)
    for tokens, experts, first in ((1, 3, 0), (300, 5, 3), (700, 40, 8)):
        ids = torch.randint(0, 16, (tokens, 4), generator=generator).to(device)
        one = kernels.route(ids, first, experts, 16)
        many = kernels._route_with_torch(ids, first, experts, 16, len(one.schedule))
        used = one.schedule[:, 0] >= 0
        assert torch.equal(used, many.schedule[:, 0] >= 0)
        assert torch.equal(one.schedule[used], many.schedule[used])
        own = int(((ids >= first) & (ids < first + experts)).sum())
        assert torch.equal(one.order[:own], many.order[:own])


def check_weighted_sums_of_experts(device: str) -> None:
    """Few experts a token and many, of which a third is another rank's: nothing is in their rows, nor need their scales
    be finite. Small integers and powers of two, so that sums are exact."""
    from torch_fp4ops.ops.cutlass_fused_moe import _triton_kernels as kernels

    generator = torch.Generator().manual_seed(0)
    for top_k in (1, 8, 32, 33, 70):
        ids = torch.randint(0, 9, (3, top_k), generator=generator)
        own = (ids >= 3) & (ids < 9)
        rows = torch.randint(-8, 9, (3, top_k, 1040), generator=generator).float()
        scales = torch.exp2(torch.randint(-3, 4, (3, top_k), generator=generator).float())
        wanted = torch.where(own[:, :, None], rows * scales[:, :, None], 0.0).sum(1)
        given = rows.masked_fill(~own[:, :, None], math.nan).flatten(0, 1), ids, scales.masked_fill(~own, math.inf)
        out = torch.full((3, 1040), math.nan, device=device)
        kernels.combine(*(t.to(device) for t in given), out, 3, 6)
        assert torch.equal(out.cpu(), wanted)


def check_activation_scales_of_experts(device: str) -> None:
    op = OPS["cutlass_fused_moe"]
    found = next(s for s in samples(op) if s.name == "w4a4-nvfp4")
    scales = list(found.args[6])
    scales[0] = torch.tensor([400.0, 500.0, 600.0])
    scales[2] = scales[2] * 537.6 / scales[0]
    args = (*found.args[:6], scales, *found.args[7:])
    assert_right(op, Sample("scales", args, found.kwargs).map_tensors(lambda t: t.to(device)), "triton")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input": values(0, 5, 128, dtype=torch.float32)}, "bfloat16 or float16"),
        ({"weight_layout": "sm90_interleaved"}, "plain rows"),
    ],
)
def test_what_the_mixture_of_experts_refuses(change, reason, monkeypatch):
    from torch_fp4ops.ops.cutlass_fused_moe import triton

    monkeypatch.setattr(triton, "why_not", lambda call: None)
    op = OPS["cutlass_fused_moe"]
    name = "w4a16-mxfp4-flashinfer" if "weight_layout" in change else "w4a16-mxfp4-linear"
    found = next(s for s in samples(op) if s.name == name)
    args = (change.pop("input", found.args[0]), *found.args[1:])
    why = triton._unsupported(op.check(*args, **{**found.kwargs, **change}))
    assert why is not None and reason in why
