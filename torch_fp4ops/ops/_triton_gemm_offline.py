"""What is compiled offline of the matrix product of ``_triton_gemm``: every configuration, and what calls can vary.

Each product has all its configurations as usual calls launch them. What else a call can have hardly depends on the
formats, so a table of variants has each of it once or twice on tiles of every kind, several in a case. Constants that
follow from the operands are those that ``_triton_gemm_launch`` launches with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl

from ..formats import FORMATS, MXFP8, NVFP4
from ..scale_layouts import LINEAR, SWIZZLED_8X4, SWIZZLED_128X4
from ._triton_gemm import matmul_kernel, sum_splits_kernel
from ._triton_gemm_launch import (
    PLAIN,
    SUMMED_AT_ONCE,
    Config,
    Operand,
    configuration,
    constants_of,
    most_registers,
    multiplied_as,
)
from ._triton_launch import AotCase

__all__ = ["Call", "MatmulCase", "Product", "aot_case", "aot_cases", "matmul_cases"]


class MatmulCase(NamedTuple):
    """A configuration that ships, the targets it ships for and what their assembly must have."""

    case: AotCase
    targets: tuple[str, ...]
    instruction: str


class Product(NamedTuple):
    """What is multiplied: formats, the dtype of plain values, the layout of b's scales, and whether by expert."""

    a_format: str
    b_format: str
    plain: torch.dtype
    layout: str
    grouped: bool = False


class Call(NamedTuple):
    """What else a call has; dtypes are Triton's. For ``alpha``, ``splits``, ``share`` and ``n_unit`` see the kernel."""

    k: int = 4096
    a_layout: str = SWIZZLED_128X4
    out: str = "bf16"
    bias: str | None = None
    alpha: int = 1
    splits: int = 1
    share: int = 1
    n_unit: int = 8


_HALF_WORDS = 4160
"""A K of whole tiles, whose linear MX scales do not fill whole words."""
_RAGGED = 4128
"""A K that fills neither whole tiles nor, with linear scales, whole words of those."""
_HALF_UNITS = 4112
"""Ragged too, and rows of E2M1 codes are no multiple of 16 bytes."""

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_MULTIPLIED = {tl.bfloat16: "bf16", tl.float16: "f16", tl.float32: "tf32"}

_TARGETS = {
    "sm80": (("sm_80", "sm_86", "sm_89"), r"mma\.sync\.aligned\.m16n8k(16|8)\.row\.col\.f32\.{0}\.{0}"),
    "sm90": (("sm_90",), r"(wgmma\.mma_async|mma\.sync).*\.f32\.{0}\.{0}"),
    "sm100": (("sm_100", "sm_103"), r"(tcgen05\.mma|mma\.sync)"),
    "sm120": (("sm_120", "sm_121"), r"mma\.sync.*\.f32\.{0}\.{0}"),
    "amd": (("gfx942", "gfx950"), r"v_mfma_f32"),
}
_NATIVE_INSTRUCTIONS = {
    ("sm100", "nvfp4"): r"tcgen05\.mma.*kind::mxf4nvf4.*(4X|block16)",
    ("sm100", "mxfp4"): r"tcgen05\.mma.*kind::mxf4\b",
    ("sm100", "mxfp8"): r"tcgen05\.mma.*kind::mxf8f6f4",
    ("sm120", "nvfp4"): r"mma\.sync.*kind::mxf4nvf4.*4X.*ue4m3",
    ("sm120", "mxfp4"): r"mma\.sync.*kind::mxf4nvf4.*2X.*ue8m0",
    ("sm120", "mxfp8"): r"mma\.sync.*kind::mxf8f6f4",
}
_SPLITS = {16: 16, 64: 8, 256: 4, 4096: 1}
"""Rows that have each configuration, and into how many parts K goes there."""

_BF16, _FP16 = torch.bfloat16, torch.float16
# Products, rows and what differs from the usual call; K is not split, as where n is large, unless this says so. From
# compute capability 10.0, a and b of one format are multiplied as they are; float16 meets MXFP4 as TF32. Grouped, n is
# the K of another product, so a multiple of 16.
_VARIANTS: tuple[tuple[Product, int, dict[str, Any]], ...] = (
    (Product(PLAIN, "nvfp4", _BF16, SWIZZLED_128X4), 16, {"k": _RAGGED}),
    (Product(PLAIN, "nvfp4", _FP16, SWIZZLED_128X4), 64, {"k": _RAGGED, "alpha": 0, "n_unit": 1}),
    (Product(PLAIN, "mxfp4", _BF16, SWIZZLED_128X4), 4096, {"out": "fp32", "alpha": 2, "n_unit": 1}),
    (
        Product("nvfp4", "nvfp4", _BF16, SWIZZLED_128X4),
        16,
        {"k": _HALF_UNITS, "a_layout": SWIZZLED_8X4, "out": "fp16", "alpha": 2, "n_unit": 1},
    ),
    (
        Product("mxfp8", "mxfp8", _BF16, SWIZZLED_128X4),
        64,
        {"k": _RAGGED, "a_layout": SWIZZLED_8X4, "splits": 2, "n_unit": 1},
    ),
    (Product(PLAIN, PLAIN, _FP16, LINEAR, True), 64, {"bias": None, "share": 1}),
    (Product(PLAIN, "nvfp4", _FP16, LINEAR, True), 64, {"k": _RAGGED, "bias": "fp16"}),
    (Product(PLAIN, "mxfp4", _BF16, LINEAR, True), 16, {"k": _HALF_WORDS, "bias": "bf16"}),
    (Product(PLAIN, "mxfp4", _FP16, LINEAR, True), 16, {"bias": None, "share": 1}),
    (Product(PLAIN, "mxfp4", _FP16, SWIZZLED_128X4, True), 4096, {"k": _RAGGED, "share": 6}),
    (
        Product("nvfp4", "nvfp4", _BF16, LINEAR, True),
        64,
        {"k": _HALF_UNITS, "a_layout": SWIZZLED_128X4, "bias": None, "share": 1},
    ),
    (Product("mxfp8", "mxfp4", _BF16, LINEAR, True), 64, {"k": _HALF_WORDS, "share": 6}),
)


def aot_cases() -> Iterator[AotCase]:
    """The sum of the splits, the same everywhere; the products are :func:`matmul_cases`, an architecture's each."""
    for splits, alpha, out, n_unit in ((2, 1, "bf16", 8), (4, 0, "fp16", 1), (8, 2, "fp32", 1), (16, 2, "bf16", 8)):
        signature = {"partial_ptr": "*fp32", "out_ptr": f"*{out}", "M": "i32", "n_units": "i32"}
        constants: dict[str, Any] = {"N_UNIT": n_unit, "SPLITS": splits, "ALPHA": alpha, "BLOCK": SUMMED_AT_ONCE}
        if alpha:
            signature["alpha_ptr"] = "*fp32"
        else:
            constants["alpha_ptr"] = None
        yield AotCase(f"matmul-sum-{splits}-alpha{alpha}-{out}-n{n_unit}", sum_splits_kernel, signature, constants, 256)


def matmul_cases(
    operands: list[tuple[str, str, torch.dtype]], layout: str, *, grouped: bool = False
) -> Iterator[MatmulCase]:
    """Cases of products of ``(format of a, format of b, dtype of a plain a)`` on every architecture."""
    products = [Product(*formats, layout, grouped) for formats in operands]
    for product in products:
        usual = _usual(product)
        for arch in _TARGETS:
            configs = {_configuration(arch, product, m): splits for m, splits in _SPLITS.items()}
            if grouped:  # K is never split there
                configs = {config._replace(SPLIT=False): 1 for config in configs}
            for config, splits in configs.items():
                call = usual._replace(splits=splits)
                yield _matmul_case(arch, config, product, call, "-split" * (splits > 1))
            # With the last one, which has the largest tiles.
            yield _matmul_case(arch, config, product, usual._replace(k=_RAGGED), "-ragged")
    for product, m, differences in _VARIANTS:
        # Grouped products are all one op's, which lists fewer than it can have.
        if product in products or (grouped and product.grouped and product.layout == layout):
            call = _usual(product)._replace(**differences)
            label = "".join(f"-{name}={value}" for name, value in differences.items())
            for arch in _TARGETS:
                yield _matmul_case(arch, _configuration(arch, product, m), product, call, label)


def _usual(product: Product) -> Call:
    """The call of a product that most calls are."""
    if product.grouped:
        # The experts have global scales in the modes with NVFP4 weights and with MXFP8 activations.
        scaled = product.b_format == NVFP4.name or product.a_format == MXFP8.name
        return Call(a_layout=LINEAR, out="fp32", bias="fp32", alpha=3 if scaled else 0, share=4)
    return Call(out=_SHORT[product.plain], alpha=1 if product.b_format == NVFP4.name else 0)


def _configuration(arch: str, product: Product, m: int) -> Config:
    a, b = _operands(product, Call())
    return configuration(arch, m, a.format, b.format, multiplied_as(a, b))


def _operands(product: Product, call: Call) -> tuple[Operand, Operand]:
    """A row of either side, without memory."""

    def operand(fmt: str, layout: str) -> Operand:
        if fmt == PLAIN:
            return Operand(torch.empty(1, call.k, dtype=product.plain, device="meta"))
        elements = torch.empty(1, call.k // FORMATS[fmt].elements_per_byte, dtype=torch.uint8, device="meta")
        return Operand(elements, fmt, torch.empty(0, dtype=torch.uint8, device="meta"), layout)

    return operand(product.a_format, call.a_layout), operand(product.b_format, product.layout)


def _matmul_case(arch: str, config: Config, product: Product, call: Call, label: str) -> MatmulCase:
    case = aot_case(arch, config, product, call, label)
    targets, instruction = _TARGETS[arch]
    if config.NATIVE:
        instruction = _NATIVE_INSTRUCTIONS[arch, product.a_format]
    return MatmulCase(case, targets, instruction.replace("{0}", _MULTIPLIED[case.constants["DTYPE"]]))


def aot_case(arch: str, config: Config, product: Product, call: Call, label: str = "") -> AotCase:
    a, b = _operands(product, call)
    plain = _SHORT[product.plain]
    ints = ("M", "n_units", "K", "a_row_units", "a_scale_cols", "b_scale_cols")
    signature = {"out_ptr": f"*{call.out}" if call.splits == 1 else "*fp32", **dict.fromkeys(ints, "i32")}
    for side, operand in (("a", a), ("b", b)):
        if operand.format == PLAIN:
            signature[f"{side}_ptr"] = f"*{plain}"
        else:
            signature |= {f"{side}_ptr": "*u8", f"{side}_scales_ptr": "*u8"}
    if call.alpha:
        signature["alpha_ptr"] = "*fp32"
    if call.bias:
        signature["bias_ptr"] = f"*{call.bias}"
    if product.grouped:
        signature |= {"schedule_ptr": "*i32", "order_ptr": "*i64"}
    constants: dict[str, Any] = {name: None for name in matmul_kernel.arg_names if name not in signature}
    constants |= constants_of(a, b, config)
    constants |= {
        "PRECISION": "ieee" if arch == "amd" else "tf32",
        "ALPHA": call.alpha,
        "EXPERTS": product.grouped,
        "A_SHARE": call.share,
        "N_UNIT": call.n_unit,
        "SPLITS": call.splits,
    }
    tile = f"{config.BM}x{config.BN}x{config.BK}{'s' * config.SWAP}"
    formats = f"{plain if a.format == PLAIN else a.format}-{b.format}-{product.layout}"
    name = f"{'moe' if product.grouped else 'matmul'}-{formats}-{arch}-{tile}{label}"
    most = most_registers(arch)
    return AotCase(name, matmul_kernel, signature, constants, config.threads, max_registers=most)
