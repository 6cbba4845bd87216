"""What goes around the Hopper products: the kernel that packs weights, the layout in the ops' contracts, the backends.

The products themselves are those of ``test_hopper_products`` and of the samples of their ops.
"""

from __future__ import annotations

import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_fp4ops import (
    OPS,
    BackendUnavailable,
    fp4_quantize,
    mm_bf16_fp4,
    mm_fp4,
    mm_mxfp8,
    mxfp8_quantize,
    scale_layouts,
)
from torch_fp4ops.block_quantization import dequantize_blocks
from torch_fp4ops.formats import FORMATS, MXFP4, MXFP8, NVFP4, BlockFormat
from torch_fp4ops.hopper_layout import HOPPER_SCALE_RANGES
from torch_fp4ops.testing import assert_same_bytes, samples
from torch_fp4ops.testing.samples import values
from torch_fp4ops.weight_layouts import hopper_size, pack_hopper_weight, unpack_hopper_weight

from ..interpreter import few, gpu_cases, test_in_the_interpreter  # noqa: F401
from .rejections import assert_rejected_by_contract

pytest.importorskip("triton", reason="needs Triton")

from torch_fp4ops.ops._triton_dequantize import decoded
from torch_fp4ops.ops._triton_gemm_launch import Operand


def storable(seed: int, n: int, k: int, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Random codes and linear scales, with blocks of zeros and of NaN, and every NVFP4 scale."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // fmt.elements_per_byte), generator=generator).to(torch.uint8)
    low, high = HOPPER_SCALE_RANGES.get(fmt.name, (0, 255))
    scales = torch.randint(low, high + 1, (n, k // fmt.block_size), generator=generator).to(torch.uint8)
    if fmt is MXFP8:
        codes[(codes & 0x7F) == 0x7F] = 0
    special = torch.randint(0, 8, scales.shape, generator=generator)
    scales[special == 0] = 0xFF if fmt is not NVFP4 else 0
    blocks = codes.view(*scales.shape, -1)
    blocks[special == 1] &= 0x80 if fmt is MXFP8 else 0x88
    scales[special == 1] = torch.randint(0, 256, scales.shape, generator=generator).to(torch.uint8)[special == 1]
    return codes, scales


def packed_by_triton(
    device: str, codes: Tensor, scales: Tensor, fmt: BlockFormat, layout: str
) -> tuple[Tensor, Tensor, int]:
    from torch_fp4ops.ops._triton_hopper_pack import pack_hopper

    n, k = hopper_size(codes.shape[0], codes.shape[1] * fmt.elements_per_byte)
    out = [
        torch.full((n, k // d), 0x5A, dtype=torch.uint8, device=device) for d in (fmt.elements_per_byte, fmt.block_size)
    ]
    wrong = torch.zeros(1, dtype=torch.int32, device=device)
    swizzled = scale_layouts.swizzle(scales, layout).to(device)
    pack_hopper(codes.to(device), swizzled, fmt, layout, *out, wrong)
    return out[0].cpu(), out[1].cpu(), int(wrong)


@few(12)
@given(
    st.integers(0, 2**31),
    st.integers(1, 200),
    st.integers(1, 20),
    st.sampled_from(list(FORMATS.values())),
    st.sampled_from(["linear", "128x4"]),
    st.booleans(),
)
def check_packing(device: str, seed: int, n: int, blocks: int, fmt: BlockFormat, layout: str, strided: bool) -> None:
    codes, scales = storable(seed, n, blocks * fmt.block_size, fmt)
    given_codes = torch.stack([codes, codes], -1)[..., 0] if strided else codes
    weight, scale, wrong = packed_by_triton(device, given_codes, scales, fmt, layout)
    wanted = pack_hopper_weight(codes, scales, fmt)
    assert_same_bytes(weight, wanted[0], "weight")
    assert_same_bytes(scale, wanted[1], "scale")
    assert not wrong


def check_packing_of_what_cannot_be_stored(device: str) -> None:
    for fmt, scale, code in ((MXFP4, 129, 0x22), (MXFP8, 135, 0x38), (MXFP8, 2, 0x38), (MXFP8, 127, 0x7F)):
        codes = torch.full((20, 512 // fmt.elements_per_byte), 0x22, dtype=torch.uint8)
        scales = torch.full((20, 512 // 32), 127, dtype=torch.uint8)
        scales[11, 5] = scale
        codes.view(20, 16, -1)[11, 5, 3] = code
        *stored, wrong = packed_by_triton(device, codes, scales, fmt, "linear")
        assert wrong == 1
        elements, steps = (t[:20] for t in unpack_hopper_weight(*stored, fmt))
        is_nan = dequantize_blocks(elements, steps, fmt).view(20, 16, 32).isnan()
        assert is_nan[11, 5].all() and is_nan.sum() == 32
        scales[11, 5] = codes.view(20, 16, -1)[11, 5] = 127
        with pytest.raises(ValueError, match="can't be stored"):
            codes.view(20, 16, -1)[11, 5] = code
            scales[11, 5] = scale
            pack_hopper_weight(codes, scales, fmt)


def product_by_reference(
    a: Operand, weight: Tensor, scale: Tensor, fmt: BlockFormat, out: Tensor, alpha: Tensor | None
) -> None:
    """What a launch would compute, of arguments as a launch takes them."""
    x = decoded(a, torch.bfloat16)
    assert weight.is_contiguous() and scale.is_contiguous() and out.is_contiguous()
    assert weight.dtype == scale.dtype == torch.uint8 and x.dtype in (torch.bfloat16, torch.float16)
    scale = scale.view(weight.shape[0], weight.shape[1] * fmt.elements_per_byte // fmt.block_size)
    values = dequantize_blocks(*unpack_hopper_weight(weight, scale, fmt), fmt)[:, : x.shape[1]]
    sums = x.float() @ values.T
    out.copy_(sums if alpha is None else sums * alpha.reshape(-1, 1))


def check_backends_hand_over_what_the_kernels_read(device: str) -> None:
    from torch_fp4ops.ops import _hopper_launch  # noqa: F401  (the backends import it)

    count = 0
    for name in ("mm_fp4", "mm_mxfp8", "mm_bf16_fp4"):
        op = OPS[name]
        op.backend_names()
        module = f"torch_fp4ops.ops.{name}.gluon"
        for sample in samples(op):
            if sample.kwargs.get("b_layout") != "hopper":
                continue
            with (
                mock.patch(f"{module}.product", product_by_reference),
                mock.patch("torch_fp4ops.ops._hopper.unavailable", lambda device: None),
            ):
                out = op.default(*sample.args, **sample.kwargs, backend="gluon")
            assert_same_bytes(out, op.default(*sample.args, **sample.kwargs, backend="reference"), sample.name)
            count += 1
    assert count == 6


@pytest.mark.gpu
@pytest.mark.parametrize("check", gpu_cases([check_packing, check_packing_of_what_cannot_be_stored]))
def test_on_a_gpu(check):
    check("cuda")


def dequantized(codes: Tensor, scales: Tensor, fmt: BlockFormat) -> Tensor:
    return dequantize_blocks(codes.view(torch.float8_e4m3fn) if fmt is MXFP8 else codes, scales, fmt)


# Contracts and the reference


def operands(name: str, m: int, n: int, k: int, fmt: BlockFormat, seed: int):
    """Plain arguments of an op, and those with a weight of the layout "hopper"."""
    flags = {"sf_vec_size": 32, "sf_use_ue8m0": True} if fmt is MXFP4 else {}
    if fmt is MXFP8:
        (a, a_sf), (b, b_sf) = (mxfp8_quantize(values(seed + r, r, k)) for r in (m, n))
    else:
        scale = torch.tensor([300.0]) if fmt is NVFP4 else None
        (a, a_sf), (b, b_sf) = (fp4_quantize(values(seed + r, r, k), scale, **flags) for r in (m, n))
    linear = scale_layouts.unswizzle(b_sf, n, k // fmt.block_size, "128x4")
    weight, scales = pack_hopper_weight(b, linear, fmt)
    block = {"block_size": fmt.block_size}
    if name == "mm_bf16_fp4":
        x = values(seed, m, k)
        return (x, b, b_sf), (x, weight, scales), block
    if fmt is MXFP8:
        return (a, b.T, a_sf, b_sf), (a, weight.view(b.dtype).T, a_sf, scales.flatten()), {}
    return (a, b.T, a_sf, b_sf.T), (a, weight.T, a_sf, scales.T), {**block, "use_nvfp4": fmt is NVFP4}


@given(
    st.sampled_from(
        [("mm_bf16_fp4", NVFP4), ("mm_bf16_fp4", MXFP4), ("mm_fp4", NVFP4), ("mm_fp4", MXFP4), ("mm_mxfp8", MXFP8)]
    ),
    st.tuples(st.integers(1, 9), st.integers(1, 150), st.integers(1, 10)),
    st.integers(0, 2**31),
)
def test_the_reference_computes_the_same_from_both_layouts(case, size, seed):
    (name, fmt), (m, n, blocks) = case, size
    plain, hopper, kwargs = operands(name, m, n, blocks * fmt.block_size, fmt, seed)
    out = OPS[name].default(*hopper, **kwargs, b_layout="hopper", backend="reference")
    wanted = OPS[name].default(*plain, **kwargs, backend="reference")
    assert out.shape == (m, hopper_size(n, 0)[0]) and not out[:, n:].any()
    torch.testing.assert_close(out[:, :n], wanted, rtol=0.008, atol=1e-6)  # sums of padded matrices differ in order


PLAIN_FP4, HOPPER_FP4, _ = operands("mm_fp4", 4, 40, 96, NVFP4, 0)
MM_FP4 = dict(zip(("a", "b", "a_descale", "b_descale"), HOPPER_FP4, strict=True)) | {"b_layout": "hopper"}
PLAIN_16, HOPPER_16, _ = operands("mm_bf16_fp4", 4, 40, 96, NVFP4, 0)
MM_BF16_FP4 = dict(zip(("a", "b", "b_descale"), HOPPER_16, strict=True)) | {"b_layout": "hopper"}
PLAIN_8, HOPPER_8, _ = operands("mm_mxfp8", 4, 40, 96, MXFP8, 0)
MM_MXFP8 = dict(zip(("a", "b", "a_descale", "b_descale"), HOPPER_8, strict=True)) | {"b_layout": "hopper"}


@pytest.mark.parametrize(
    ("op", "valid", "change", "message"),
    [
        (mm_fp4, MM_FP4, {"b": PLAIN_FP4[1]}, r"b is of n = 40 with b_layout='hopper'; allowed: n a multiple of 128"),
        (mm_fp4, MM_FP4, {"b_layout": "plain"}, r"b is of shape \(128, 128\); allowed: \(48, n\): the packed K of a"),
        (mm_fp4, MM_FP4, {"b": MM_FP4["b"].T[:, :64].contiguous().T}, r"b is of shape \(64, 128\); allowed: \(128, n\): the packed K of a, rounded up to 256"),
        (mm_fp4, MM_FP4, {"b_descale": PLAIN_FP4[3]}, r"b_descale is of shape \(8, 128\); allowed: shape \(16, 128\)"),
        (mm_bf16_fp4, MM_BF16_FP4, {"b": PLAIN_16[1]}, r"b is of n = 40 with b_layout='hopper'"),
        (mm_bf16_fp4, MM_BF16_FP4, {"b_descale": PLAIN_16[2]}, r"b_descale is of shape \(128, 8\); allowed: shape \(128, 16\)"),
        (mm_bf16_fp4, MM_BF16_FP4, {"b_layout": "nz"}, r"b_layout is 'nz'; allowed: 'plain' or 'trtllm' or 'hopper'"),
        (mm_bf16_fp4, MM_BF16_FP4, {"b": MM_BF16_FP4["b"].T.contiguous().T}, r"b is of strides .*; allowed: contiguous"),
        (mm_mxfp8, MM_MXFP8, {"b": PLAIN_8[1]}, r"b is of n = 40 with b_layout='hopper'"),
        (mm_mxfp8, MM_MXFP8, {"b_descale": PLAIN_8[3]}, r"b_descale is of shape \(512,\); allowed: shape \(1024,\)"),
    ],
)  # fmt: skip
def test_rejections(op, valid, change, message):
    assert_rejected_by_contract(op, valid, change, message)


@pytest.mark.parametrize("name", ["mm_fp4", "mm_mxfp8", "mm_bf16_fp4"])
def test_backends_refuse_a_layout_that_they_cannot_read(name):
    op = OPS[name]
    by_layout = {s.kwargs.get("b_layout", "plain"): s for s in samples(op)}
    sample, prepared = by_layout["plain"], by_layout["hopper"]
    with pytest.raises(BackendUnavailable, match="the kernels read plain weights, not b_layout='hopper'"):
        op.default(*prepared.args, **prepared.kwargs, backend="triton")
    with pytest.raises(
        BackendUnavailable, match="read weights of b_layout='hopper', not 'plain'; see prepare_fp4_weight"
    ):
        op.default(*sample.args, **sample.kwargs, backend="gluon")
    with pytest.raises(BackendUnavailable, match="NVIDIA GPUs of compute capability 9.0"):
        op.default(*prepared.args, **prepared.kwargs, backend="gluon")


def test_the_triton_backends_do_without_gluon():
    code = (
        "import sys, torch\n"
        "sys.modules['triton.experimental.gluon'] = None\n"
        "import torch_fp4ops as f\n"
        "for op in (f.mm_bf16_fp4, f.mm_fp4, f.mm_mxfp8):\n"
        "    assert 'triton' in op.backend_names() and not {'triton', 'gluon'} & set(op.unimportable), op.unimportable\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
