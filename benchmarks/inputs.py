"""Random inputs. Packed weights are random bytes, which needs no quantiser and no fp32 copy of a large matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_fp4ops import prepare_fp4_weight, scale_layouts
from torch_fp4ops.scale_layouts import scale_shape
from torch_fp4ops.testing import Sample

BF16 = torch.bfloat16
PREPARED_FOR = {"gluon": "hopper"}
"""Backends of the GEMMs that read no plain weights, and the layout that they read."""


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=BF16)


def random_bytes(generator: torch.Generator, *shape: int, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, shape, generator=generator, device=generator.device, dtype=torch.uint8)


def block_scales(generator: torch.Generator, ue8m0: bool, *shape: int) -> Tensor:
    """Scales around 1, so that products neither overflow nor vanish: E4M3 0.5 to 1.875, UE8M0 2^-3 to 2^0."""
    low, high = (124, 128) if ue8m0 else (0x30, 0x40)
    return random_bytes(generator, *shape, low=low, high=high)


def block_size(fmt: str) -> int:
    return 16 if fmt == "nvfp4" else 32


def quantized(g: torch.Generator, fmt: str, rows: int, k: int, layout: str) -> tuple[Tensor, Tensor]:
    """Elements and block scales ``[rows, K]`` as the quantisers would give them."""
    scales = scale_layouts.swizzle(block_scales(g, fmt != "nvfp4", rows, k // block_size(fmt)), layout)
    if fmt == "mxfp8":
        return normal(g, rows, k).to(torch.float8_e4m3fn), scales.flatten()
    return random_bytes(g, rows, k // 2), scales


def packed_bytes(fmt: str, rows: int, k: int, layout: str) -> int:
    """Bytes of a quantised matrix with its scales."""
    padded_rows, padded_columns = scale_shape(rows, k // block_size(fmt), layout)
    return rows * k // (1 if fmt == "mxfp8" else 2) + padded_rows * padded_columns


def one(device: torch.device) -> Tensor:
    return torch.ones(1, device=device)


# Matrix products, of which many rows share a weight


class Weight(NamedTuple):
    """A quantised weight ``[n, k]``: plain with 128x4 scales, or prepared into ``layout``."""

    fmt: str
    elements: Tensor
    scales: Tensor
    n: int
    k: int
    layout: str = "plain"

    @classmethod
    def random(cls, g: torch.Generator, fmt: str, n: int, k: int) -> Weight:
        return cls(fmt, *quantized(g, fmt, n, k, scale_layouts.SWIZZLED_128X4), n, k)

    @classmethod
    def of(cls, op_name: str, sample: Sample) -> Weight:
        """The plain weight among the arguments of a GEMM."""
        if op_name == "mm_bf16_fp4":
            _, elements, scales = sample.args[:3]
        else:
            _, transposed, _, scales = sample.args[:4]
            elements, scales = transposed.T, scales.T if scales.dim() == 2 else scales
        fmt = "mxfp8" if op_name == "mm_mxfp8" else "nvfp4" if sample.kwargs["block_size"] == 16 else "mxfp4"
        n, k = elements.shape[0], elements.shape[1] * (1 if fmt == "mxfp8" else 2)
        return cls(fmt, elements, scales, n, k)

    def prepared(self, layout: str) -> Weight:
        """The same in a layout of ``prepare_fp4_weight``; ValueError where that has no such layout."""
        prepared = prepare_fp4_weight(
            self.elements,
            self.scales,
            layout=layout,
            scale_layout=scale_layouts.SWIZZLED_128X4,
            block_size=block_size(self.fmt),
        )
        return self._replace(elements=prepared.weight, scales=prepared.scale, layout=prepared.layout)


def activations(g: torch.Generator, op_name: str, fmt: str, m: int, k: int) -> tuple[Tensor, ...]:
    """``[m, k]`` in bf16, or quantised as the op takes it: elements and scales."""
    if op_name == "mm_bf16_fp4":
        return (normal(g, m, k),)
    return quantized(g, fmt, m, k, scale_layouts.SWIZZLED_128X4)


def alpha_of(fmt: str, device: torch.device) -> Tensor | None:
    return one(device) if fmt == "nvfp4" else None


def gemm(op_name: str, a: tuple[Tensor, ...], weight: Weight, alpha: Tensor | None) -> Sample:
    """The call of a GEMM's op."""
    flags: dict[str, Any] = {} if weight.layout == "plain" else {"b_layout": weight.layout}
    if op_name != "mm_mxfp8":
        flags["block_size"] = block_size(weight.fmt)
    if op_name == "mm_bf16_fp4":
        return Sample("", (*a, weight.elements, weight.scales, alpha), flags)
    elements, scales = a
    if op_name == "mm_mxfp8":
        return Sample("", (elements, weight.elements.T, scales, weight.scales.flatten()), flags)
    flags["use_nvfp4"] = weight.fmt == "nvfp4"
    return Sample("", (elements, weight.elements.T, scales, weight.scales.T, alpha), flags)


def for_backend(op_name: str, backend: str, sample: Sample) -> Sample:
    """The call as a backend takes it: with the weight prepared for it, where it reads no plain one."""
    layout = PREPARED_FOR.get(backend) if op_name.startswith("mm_") else None
    if layout is None:
        return sample
    a = sample.args[:1] if op_name == "mm_bf16_fp4" else (sample.args[0], sample.args[2])
    alpha = None if op_name == "mm_mxfp8" else sample.args[-1]
    return gemm(op_name, a, Weight.of(op_name, sample).prepared(layout), alpha)
