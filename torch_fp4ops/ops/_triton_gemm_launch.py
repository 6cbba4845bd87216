"""Launches the matrix product of ``_triton_gemm``: operands, configurations and split K.

Configurations stand in a table by architecture and number of rows; nothing is tuned at run time, so a call's result
depends on its arguments alone. Splits of K are summed in a fixed order.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import scale_layouts
from ..formats import FORMATS, BlockFormat
from ._triton_gemm import matmul_kernel, sum_splits_kernel
from ._triton_launch import INTERPRETED, LAYOUT_CODES, global_scale_form, launch, processors, rows_of_units

__all__ = [
    "PLAIN",
    "SUMMED_AT_ONCE",
    "Config",
    "Grouping",
    "Operand",
    "aligned",
    "architecture",
    "configuration",
    "constants_of",
    "matmul",
    "most_registers",
    "multiplied_as",
]

PLAIN = "plain"
_PACK = {PLAIN: 1, "nvfp4": 2, "mxfp4": 2, "mxfp8": 1}
SUMMED_AT_ONCE = 1024


class Operand(NamedTuple):
    """One side of a product: rows along K, with the scales of a block-scaled format in their layout.

    ``elements`` is ``[rows, K]`` in 16 bits, or packed; b is contiguous and may have a leading dimension of experts.
    """

    elements: Tensor
    format: str = PLAIN
    scales: Tensor | None = None
    layout: str = scale_layouts.LINEAR

    @classmethod
    def of(cls, fmt: BlockFormat | None, elements: Tensor, scales: Tensor | None, layout: str) -> Operand:
        if fmt is None or scales is None:
            return cls(elements)
        if elements.dtype != torch.uint8:
            elements = elements.view(torch.uint8)  # Triton knows no E4M3 on compute capability 8.0
        return cls(elements, fmt.name, aligned(scales), layout)

    @property
    def k(self) -> int:
        return self.elements.shape[-1] * _PACK[self.format]


class Config(NamedTuple):
    """How a product is cut up: tiles of BM x BN x BK, GROUP rows of tiles beside each other.

    SPLIT lets K be split where there are few tiles; SWAP gives the weights the tensor cores' wide side; NATIVE leaves
    decoding to them.
    """

    BM: int
    BN: int
    BK: int
    threads: int
    STAGES: int
    SPLIT: bool = False
    SWAP: bool = False
    GROUP: int = 8
    NATIVE: bool = False


class Grouping(NamedTuple):
    """Rows grouped by expert: see ``matmul_kernel`` for ``schedule`` and ``order``."""

    schedule: Tensor
    order: Tensor
    a_share: int
    alpha: Tensor | None
    bias: Tensor | None


# By architecture, the largest number of rows each configuration is for. A small tile of rows wastes no multiplications
# where weights are all there is to read; a large one decodes each weight fewer times.
_ROWS = (16, 64, 256, None)
_AMPERE = (
    Config(16, 128, 64, 128, 4, SPLIT=True),
    Config(64, 128, 64, 256, 3, SPLIT=True),
    Config(128, 128, 64, 256, 3, SPLIT=True),
    Config(128, 128, 64, 256, 3),
)
_HOPPER = (
    Config(16, 128, 64, 128, 4, SPLIT=True),
    Config(64, 128, 64, 128, 4, SPLIT=True),
    Config(128, 128, 64, 256, 3, SPLIT=True),
    Config(128, 128, 64, 256, 3),
)
_SM120 = (Config(16, 64, 64, 128, 4, SPLIT=True), *_AMPERE[1:])  # twice as wide Triton 3.9 spills
_AMD = (
    Config(16, 64, 64, 256, 2, SPLIT=True),
    Config(64, 64, 64, 256, 2, SPLIT=True),
    Config(64, 128, 64, 512, 2, SPLIT=True),
    Config(128, 128, 64, 512, 2),
)
_NATIVE = Config(128, 128, 128, 256, 3, NATIVE=True)
_NATIVE_TABLE = (_NATIVE._replace(SPLIT=True),) * 3 + (_NATIVE,)
_TABLES = {
    "interpreter": (
        Config(16, 64, 64, 128, 1, SPLIT=True, SWAP=True),
        Config(64, 64, 128, 128, 1, SPLIT=True),
        Config(64, 64, 64, 128, 1),
        Config(128, 128, 64, 256, 1),
    ),
    "sm80": _AMPERE,
    "sm90": _HOPPER,
    "sm100": _HOPPER,
    "sm120": _SM120,
    "amd": _AMD,
}
# TF32 operands take twice the room.
_TF32 = Config(64, 64, 64, 256, 3)
_TF32_TABLE = (_TF32._replace(BM=16, threads=128, SPLIT=True), _TF32._replace(SPLIT=True), _TF32, _TF32)


@functools.cache
def architecture(device: torch.device) -> str:
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return "amd"
    major = torch.cuda.get_device_capability(device)[0]
    return {8: "sm80", 9: "sm90", 10: "sm100"}.get(major, "sm120")


def configuration(arch: str, m: int, a_format: str, b_format: str, dtype: Any) -> Config:
    """The configuration of a product with m rows (of an expert, where they are grouped)."""
    row = next(i for i, most in enumerate(_ROWS) if most is None or m <= most)
    if arch in ("sm100", "sm120") and a_format == b_format != PLAIN:
        return _NATIVE_TABLE[row]
    if dtype == tl.float32 and arch != "interpreter":
        return _TF32_TABLE[row]
    config = _TABLES[arch][row]
    # Decoding both sides takes more registers.
    return config._replace(BN=64) if a_format != PLAIN and config.BM == 16 else config


def most_registers(arch: str) -> int | None:
    """Of a thread. Where sums are in registers ptxas may spill for more programs at once unless it is told so many."""
    return 255 if arch in ("sm80", "sm120") else None


def splits(config: Config, m: int, n: int, k: int, multiprocessors: int) -> int:
    """Into how many parts K goes: a power of two that gives every processor two programs, each with four K-tiles."""
    if not config.SPLIT:
        return 1
    tiles = triton.cdiv(m, config.BM) * triton.cdiv(n, config.BN)
    most = min(2 * multiprocessors // max(tiles, 1), k // config.BK // 4, 16)
    return 1 << (most.bit_length() - 1) if most > 1 else 1


def multiplied_as(a: Operand, b: Operand) -> Any:
    """The type in which the products of two operands are exact (see ``_triton_gemm``)."""
    if a.format != PLAIN or a.elements.dtype == torch.bfloat16:
        return tl.bfloat16
    return tl.float32 if b.format == "mxfp4" else tl.float16


def matmul(
    a: Operand,
    b: Operand,
    out: Tensor,
    alpha: Tensor | None = None,
    grouping: Grouping | None = None,
    config: Config | None = None,
    parts: int | None = None,
) -> None:
    """``out = (a @ b.T) * alpha``, accumulated in fp32; grouped, also plus the bias."""
    m, n = out.shape
    if not out.numel():
        return
    k = a.k
    device = out.device
    dtype = multiplied_as(a, b)
    arch = architecture(device)
    if config is None:
        config = configuration(arch, m, a.format, b.format, dtype)
    elements, units = rows_of_units(a.elements, _row_unit(a))
    b_elements = aligned(b.elements)
    alpha, alpha_form = global_scale_form(alpha)
    constants = constants_of(a, b, config)
    scales = (a.scales, b.scales)
    cols = [_scale_cols(operand, k) for operand in (a, b)]
    tiles_n = triton.cdiv(n, config.BN)
    n_unit = 8 if n % 8 == 0 else 1
    tail: tuple[Tensor | None, ...]
    if grouping is not None:
        grid = (grouping.schedule.shape[0] * tiles_n, 1)
        tail = (grouping.alpha, grouping.bias, out, grouping.schedule, grouping.order)
        constants |= {"ALPHA": 0 if grouping.alpha is None else 3, "SPLITS": 1}
        constants |= {"EXPERTS": True, "A_SHARE": grouping.a_share}
    else:
        if parts is None:
            parts = splits(config, m, n, k, processors(device, on_cpu=4))
        target = out if parts == 1 else out.new_empty((parts, m, n), dtype=torch.float32)
        grid = (triton.cdiv(m, config.BM) * tiles_n, parts)
        tail = (alpha, None, target, None, None)
        constants |= {"ALPHA": alpha_form, "SPLITS": parts, "EXPERTS": False, "A_SHARE": 1}
    launch(
        matmul_kernel,
        grid,
        config.threads,
        device,
        elements,
        scales[0],
        b_elements,
        scales[1],
        *tail,
        m,
        n // n_unit,
        k,
        units,
        *cols,
        max_registers=most_registers(arch),
        N_UNIT=n_unit,
        **constants,
    )
    if grouping is None and parts != 1:
        launch(
            sum_splits_kernel,
            (triton.cdiv(m * n, SUMMED_AT_ONCE),),
            256,
            device,
            target,
            alpha,
            out,
            m,
            n // n_unit,
            second=True,
            N_UNIT=n_unit,
            SPLITS=parts,
            ALPHA=alpha_form,
            BLOCK=SUMMED_AT_ONCE,
        )


def constants_of(a: Operand, b: Operand, config: Config) -> dict[str, Any]:
    """The constants of ``matmul_kernel`` that follow from the operands and the configuration."""
    k = a.k
    return {
        "A_FORMAT": a.format,
        "B_FORMAT": b.format,
        "A_LAYOUT": LAYOUT_CODES[a.layout],
        "B_LAYOUT": LAYOUT_CODES[b.layout],
        "A_WORDS": _has_scale_words(a, k),
        "B_WORDS": _has_scale_words(b, k),
        "DTYPE": multiplied_as(a, b),
        "PRECISION": "ieee" if torch.version.hip is not None else "tf32",
        "A_UNIT": _row_unit(a) // a.elements.element_size(),
        "EVEN_K": k % config.BK == 0,
        "BM": config.BM,
        "BN": config.BN,
        "BK": config.BK,
        "GROUP": config.GROUP,
        "STAGES": config.STAGES,
        "SWAP": config.SWAP,
        "NATIVE": config.NATIVE and not INTERPRETED,
    }


def aligned(t: Tensor) -> Tensor:
    """``t``, contiguous, where words can be loaded from its start."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _row_unit(a: Operand) -> int:
    """Bytes that the compiler can count on the distance of a's rows to be a multiple of."""
    return 16 if a.elements.shape[1] * a.elements.element_size() % 16 == 0 else 8


def _scale_cols(operand: Operand, k: int) -> int:
    if operand.scales is None:
        return 0
    return scale_layouts.scale_shape(1, k // FORMATS[operand.format].block_size, operand.layout)[1]


def _has_scale_words(operand: Operand, k: int) -> bool:
    return operand.scales is not None and _scale_cols(operand, k) % 4 == 0
