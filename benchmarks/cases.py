"""What is measured: an op, a shape, inputs from a seed, and how many bytes and FLOPs one call has to move and do.

Bytes count each input read once and each output written once, padding of swizzled scales included. Of a cache that is
written in place only the slots written count, and of a mixture of experts only the experts that are hit.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from torch_fp4ops import weight_layouts
from torch_fp4ops.registry import OPS, Op
from torch_fp4ops.testing import Sample

from . import inputs, shapes
from .inputs import BF16

Build = Callable[[torch.device, torch.Generator], Sample]


@dataclass(frozen=True)
class Case:
    """One op at one shape; ``family`` is the format, layout or mode, and cases of one family share plots."""

    op: str
    family: str
    m: int
    n: int
    k: int
    bytes: int
    flops: int
    build: Build
    note: str = ""
    compiled: bool = False
    """Whether torch.compile of the reference is measured too; compiling takes long, so only for some."""
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        sizes = f"{self.m}x{self.n}x{self.k}" if self.n else f"{self.m}x{self.k}" if self.m else ""
        return " ".join(filter(None, (self.family, sizes, self.note)))

    def sample(self, device: torch.device | str, seed: int = 0) -> Sample:
        """The inputs: the same for the same seed on the same kind of device."""
        device = torch.device(device)
        return self.build(device, torch.Generator(device).manual_seed(seed))

    def sets(self, device: torch.device | str, count: int, seed: int = 0) -> list[Sample]:
        """``count`` copies of the inputs, each in memory of its own, to rotate through."""
        first = self.sample(device, seed)
        return [first, *(first.clone() for _ in range(count - 1))]


# Quantise and dequantise

_FP4_FLAGS: dict[str, dict[str, Any]] = {"nvfp4": {}, "mxfp4": {"sf_vec_size": 32, "sf_use_ue8m0": True}}
_LAYOUT_FLAGS: dict[str, dict[str, Any]] = {
    "128x4": {},
    "8x4": {"is_sf_8x4_layout": True},
    "linear": {"is_sf_swizzled_layout": False},
}


def fp4_quantize(m: int, k: int, fmt: str = "nvfp4", layout: str = "128x4", **more: Any) -> Case:
    def build(device: torch.device, g: torch.Generator) -> Sample:
        x = inputs.normal(g, m, k)
        scale = (2688 / x.abs().amax().float()).reshape(1) if fmt == "nvfp4" else None
        return Sample("", (x, scale), {**_FP4_FLAGS[fmt], **_LAYOUT_FLAGS[layout]})

    total = 2 * m * k + inputs.packed_bytes(fmt, m, k, layout) + (4 if fmt == "nvfp4" else 0)
    return Case("fp4_quantize", f"{fmt}-{layout}", m, 0, k, total, 0, build, **more)


def silu_and_mul_fp4_quantize(m: int, k: int, fmt: str = "nvfp4", layout: str = "128x4", **more: Any) -> Case:
    def build(device: torch.device, g: torch.Generator) -> Sample:
        scale = torch.full((1,), 2688 / 16.0, device=device) if fmt == "nvfp4" else None
        return Sample("", (inputs.normal(g, m, 2 * k), scale), {**_FP4_FLAGS[fmt], **_LAYOUT_FLAGS[layout]})

    total = 2 * m * 2 * k + inputs.packed_bytes(fmt, m, k, layout) + (4 if fmt == "nvfp4" else 0)
    return Case("silu_and_mul_fp4_quantize", f"{fmt}-{layout}", m, 0, k, total, 0, build, **more)


def rms_norm_fp4_quantize(m: int, k: int, fmt: str = "nvfp4", layout: str = "128x4", **more: Any) -> Case:
    def build(device: torch.device, g: torch.Generator) -> Sample:
        scale = torch.full((1,), 2688 / 16.0, device=device) if fmt == "nvfp4" else None
        return Sample(
            "", (inputs.normal(g, m, k), inputs.normal(g, k), scale), {**_FP4_FLAGS[fmt], **_LAYOUT_FLAGS[layout]}
        )

    total = 2 * m * k + 2 * k + inputs.packed_bytes(fmt, m, k, layout) + (4 if fmt == "nvfp4" else 0)
    return Case("rms_norm_fp4_quantize", f"{fmt}-{layout}", m, 0, k, total, 0, build, **more)


def fp4_dequantize(m: int, k: int, fmt: str = "nvfp4", layout: str = "128x4", **more: Any) -> Case:
    def build(device: torch.device, g: torch.Generator) -> Sample:
        scale = inputs.one(device) if fmt == "nvfp4" else None
        flags = {**_FP4_FLAGS[fmt], **_LAYOUT_FLAGS[layout], "out_dtype": BF16}
        return Sample("", (*inputs.quantized(g, fmt, m, k, layout), scale), flags)

    total = 2 * m * k + inputs.packed_bytes(fmt, m, k, layout) + (4 if fmt == "nvfp4" else 0)
    return Case("fp4_dequantize", f"{fmt}-{layout}", m, 0, k, total, 0, build, **more)


def mxfp8_quantize(m: int, k: int, layout: str = "128x4", **more: Any) -> Case:
    total = 2 * m * k + inputs.packed_bytes("mxfp8", m, k, layout)
    swizzled = layout != "linear"
    return Case(
        "mxfp8_quantize",
        layout,
        m,
        0,
        k,
        total,
        0,
        lambda device, g: Sample("", (inputs.normal(g, m, k), swizzled)),
        **more,
    )


def mxfp8_dequantize(m: int, k: int, layout: str = "128x4", **more: Any) -> Case:
    def build(device: torch.device, g: torch.Generator) -> Sample:
        return Sample("", (*inputs.quantized(g, "mxfp8", m, k, layout), layout != "linear"), {"out_dtype": BF16})

    total = 2 * m * k + inputs.packed_bytes("mxfp8", m, k, layout)
    return Case("mxfp8_dequantize", layout, m, 0, k, total, 0, build, **more)


# KV cache


def nvfp4_kv_quantize(m: int, k: int, **more: Any) -> Case:
    def build(device: torch.device, g: torch.Generator) -> Sample:
        x = inputs.normal(g, m, k)
        return Sample("", (x, (x.abs().amax().float() / 2688).reshape(1)))

    total = 2 * m * k + inputs.packed_bytes("nvfp4", m, k, "linear") + 4
    return Case("nvfp4_kv_quantize", "nvfp4", m, 0, k, total, 0, build, **more)


def nvfp4_kv_dequantize(m: int, k: int, **more: Any) -> Case:
    def build(device: torch.device, g: torch.Generator) -> Sample:
        return Sample("", (*inputs.quantized(g, "nvfp4", m, k, "linear"), inputs.one(device)))

    total = 2 * m * k + inputs.packed_bytes("nvfp4", m, k, "linear") + 4
    return Case("nvfp4_kv_dequantize", "nvfp4", m, 0, k, total, 0, build, **more)


def nvfp4_kv_quantize_store(tokens: int, heads: int, dim: int, kv_layout: str = "NHD", **more: Any) -> Case:
    pages = -(-tokens // shapes.KV_PAGE) + 1

    def build(device: torch.device, g: torch.Generator) -> Sample:
        middle = (shapes.KV_PAGE, heads) if kv_layout == "NHD" else (heads, shapes.KV_PAGE)
        slots = torch.randperm(pages * shapes.KV_PAGE, generator=g, device=device)[:tokens]
        caches = [
            torch.zeros(pages, *middle, last, dtype=torch.uint8, device=device)
            for last in (dim // 2, dim // 2, dim // 16, dim // 16)
        ]
        new = (inputs.normal(g, tokens, heads, dim), inputs.normal(g, tokens, heads, dim))
        scale = torch.full((1,), 5 / 2688, device=device)
        return Sample("", (*new, slots, *caches, scale, scale.clone(), kv_layout))

    rows = tokens * heads
    total = 2 * (2 * rows * dim + inputs.packed_bytes("nvfp4", rows, dim, "linear")) + 8 * tokens + 8
    return Case("nvfp4_kv_quantize_store", kv_layout, tokens, heads, dim, total, 0, build, **more)


def _paged(g: torch.Generator, batch: int, tokens: int, heads: int, dim: int) -> tuple[Tensor, ...]:
    """Full sequences on shuffled pages (NHD). Block scales are 1/2 and 1, so that E4M3, too, holds all values."""
    pages = -(-tokens // shapes.KV_PAGE)
    shape = (batch * pages, shapes.KV_PAGE, heads)
    codes = [inputs.random_bytes(g, *shape, dim // 2) for _ in "kv"]
    scales = [inputs.random_bytes(g, *shape, dim // 16, high=2) * 8 + 0x30 for _ in "kv"]
    tables = torch.randperm(batch * pages, generator=g, device=g.device).int().view(batch, pages)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=g.device)
    one = inputs.one(g.device)
    return (*codes, *scales, tables, lengths, one, one.clone())


def _paged_bytes(batch: int, tokens: int, heads: int, dim: int) -> int:
    """What is read of a paged cache: codes and scales, page table, lengths and global scales."""
    pages = -(-tokens // shapes.KV_PAGE)
    return 2 * inputs.packed_bytes("nvfp4", batch * tokens * heads, dim, "linear") + 4 * batch * (pages + 1) + 8


def nvfp4_kv_dequantize_paged(batch: int, tokens: int, heads: int, dim: int, **more: Any) -> Case:
    """In the names m is sequences, n the tokens of each and k the head dimension."""

    def build(device: torch.device, g: torch.Generator) -> Sample:
        return Sample("", _paged(g, batch, tokens, heads, dim))

    total = _paged_bytes(batch, tokens, heads, dim) + 2 * 2 * batch * tokens * heads * dim
    return Case("nvfp4_kv_dequantize_paged", f"NHD-kv{heads}", batch, tokens, dim, total, 0, build, **more)


def fp4_kv_attention_decode(batch: int, tokens: int, q_heads: int, heads: int, dim: int, **more: Any) -> Case:
    """In the names m is sequences, n the tokens of each and k the head dimension."""

    def build(device: torch.device, g: torch.Generator) -> Sample:
        return Sample("", (inputs.normal(g, batch, q_heads, dim), *_paged(g, batch, tokens, heads, dim)))

    total = _paged_bytes(batch, tokens, heads, dim) + 2 * 2 * batch * q_heads * dim
    flops = 2 * 2 * batch * q_heads * tokens * dim
    family = f"nvfp4-q{q_heads}-kv{heads}"
    return Case("fp4_kv_attention_decode", family, batch, tokens, dim, total, flops, build, **more)


# GEMMs


def gemm(op_name: str, fmt: str, m: int, n: int, k: int, **more: Any) -> Case:
    def build(device: torch.device, g: torch.Generator) -> Sample:
        a = inputs.activations(g, op_name, fmt, m, k)
        return inputs.gemm(op_name, a, inputs.Weight.random(g, fmt, n, k), inputs.alpha_of(fmt, device))

    of_a = 2 * m * k if op_name == "mm_bf16_fp4" else inputs.packed_bytes(fmt, m, k, "128x4")
    total = of_a + inputs.packed_bytes(fmt, n, k, "128x4") + 2 * m * n + (4 if fmt == "nvfp4" else 0)
    return Case(op_name, fmt, m, n, k, total, 2 * m * n * k, build, **more)


def mm_bf16_fp4(m: int, n: int, k: int, fmt: str = "nvfp4", **more: Any) -> Case:
    return gemm("mm_bf16_fp4", fmt, m, n, k, **more)


def mm_fp4(m: int, n: int, k: int, fmt: str = "nvfp4", **more: Any) -> Case:
    return gemm("mm_fp4", fmt, m, n, k, dtype=fmt, **more)


def mm_mxfp8(m: int, n: int, k: int, **more: Any) -> Case:
    return gemm("mm_mxfp8", "mxfp8", m, n, k, dtype="mxfp8", **more)


def routing(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Distinct experts for each token, uniformly drawn on the CPU, and scales that add up to 1."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    weights, ids = scores.topk(top_k, dim=1)
    return ids.int(), weights / weights.sum(1, keepdim=True)


def cutlass_fused_moe(tokens: int, model: str, fmt: str = "mxfp4", layout: str = "linear", **more: Any) -> Case:
    """W4A16 experts, SwiGLU. In the names m is tokens, n the intermediate and k the hidden size."""
    hidden, inter, experts, top_k = shapes.MOE_MODELS[model]
    block = 16 if fmt == "nvfp4" else 32
    ids, _ = routing(tokens, experts, top_k)
    hit = int(ids.unique().numel())
    matrices = ((2 * inter, hidden), (hidden, inter))

    def build(device: torch.device, g: torch.Generator) -> Sample:
        ids, final = (t.to(device) for t in routing(tokens, experts, top_k))
        weights = [inputs.random_bytes(g, experts, rows, k // 2) for rows, k in matrices]
        scales: list[Tensor] = []
        for rows, k in matrices:
            scales.append(inputs.block_scales(g, fmt == "mxfp4", experts, rows, k // block))
            if fmt == "mxfp4":
                scales[-1] -= 6  # there is no global scale to bring sums over K back to the size of one term
            else:
                scales.append(torch.full((experts,), 1 / 64, device=device))
        if layout == "sm90_interleaved":
            weights = [weight_layouts.interleave_moe_weights_for_sm90_mixed_gemm(w) for w in weights]
            scales = [weight_layouts.interleave_moe_scales_for_sm90_mixed_gemm(s) for s in scales]
        kwargs = {"use_w4_group_scaling": True, "weight_layout": layout}
        return Sample("", (inputs.normal(g, tokens, hidden), ids, final, *weights, BF16, scales), kwargs)

    expert_bytes = sum(inputs.packed_bytes(fmt, rows, k, "linear") for rows, k in matrices) + (
        8 if fmt == "nvfp4" else 0
    )
    total = 2 * 2 * tokens * hidden + 8 * tokens * top_k + hit * expert_bytes
    flops = 2 * tokens * top_k * sum(rows * k for rows, k in matrices)
    family = f"w4a16-{fmt}-{layout}-{model}"
    return Case("cutlass_fused_moe", family, tokens, inter, hidden, total, flops, build, **more)


# The lists


def all_cases() -> list[Case]:
    """Everything that is measured on a GPU."""
    return _with_examples(list(_full()))


def quick_cases() -> list[Case]:
    """A few cases of every op: some minutes on a GPU."""
    found: list[Case] = [fp4_quantize(m, k, compiled=m in (1, 8192)) for m, k in shapes.QUICK_QUANTIZE]
    found += [fp4_quantize(8192, 4096, "nvfp4", "linear"), fp4_quantize(128, 4096, "nvfp4", "8x4")]
    found += [make(8192, 4096) for make in (_mxfp4, fp4_dequantize, mxfp8_quantize, mxfp8_dequantize)]
    found += [make(m, k, compiled=m > 1) for make in _FUSED for m, k in shapes.QUICK_QUANTIZE]
    found += [nvfp4_kv_quantize(65536, 128), nvfp4_kv_dequantize(65536, 128)]
    found += [nvfp4_kv_quantize_store(64, 8, 128), nvfp4_kv_quantize_store(4096, 8, 128)]
    found += [nvfp4_kv_dequantize_paged(16, 4096, 8, 128), fp4_kv_attention_decode(64, 8192, 32, 8, 128)]
    found += [make(*mnk) for make in (mm_bf16_fp4, mm_fp4, mm_mxfp8) for mnk in shapes.QUICK_GEMMS]
    found += [cutlass_fused_moe(tokens, "gpt-oss-120b") for tokens in (8, 256)]
    return _with_examples(found)


def cpu_cases(quick: bool = False) -> list[Case]:
    """Shapes that a CPU gets through: of every op, or with ``quick`` of two."""
    if quick:
        return [fp4_quantize(128, 4096, compiled=True), mm_bf16_fp4(*shapes.SMALL_GEMMS[1])]
    found: list[Case] = [fp4_quantize(m, k, compiled=True) for m, k in shapes.SMALL_QUANTIZE]
    found += [make(128, 4096) for make in (_mxfp4, fp4_dequantize, mxfp8_quantize, mxfp8_dequantize)]
    found += [make(128, 1024, compiled=True) for make in _FUSED]
    found += [nvfp4_kv_quantize(1024, 128), nvfp4_kv_dequantize(1024, 128), nvfp4_kv_quantize_store(64, 8, 128)]
    found += [nvfp4_kv_dequantize_paged(2, 64, 2, 128), fp4_kv_attention_decode(2, 64, 4, 2, 128)]
    return found + [make(*mnk) for make in (mm_bf16_fp4, mm_fp4, mm_mxfp8) for mnk in shapes.SMALL_GEMMS]


_FUSED = (silu_and_mul_fp4_quantize, rms_norm_fp4_quantize)


def _mxfp4(m: int, k: int) -> Case:
    return fp4_quantize(m, k, "mxfp4")


def _full() -> Iterator[Case]:
    for k in shapes.QUANTIZE_COLUMNS:
        for m in shapes.QUANTIZE_ROWS:
            yield fp4_quantize(m, k, compiled=k in (4096, 8192) and m in (1, 512, 8192, 32768))
    for m, k, note in shapes.MODEL_ACTIVATIONS:
        yield fp4_quantize(m, k, note=note)
    for m, k in shapes.FEW_QUANTIZE:
        compiled = (m, k) == (8192, 4096)
        for fmt, layout in (("nvfp4", "linear"), ("nvfp4", "8x4"), ("mxfp4", "128x4"), ("mxfp4", "linear")):
            yield fp4_quantize(m, k, fmt, layout, compiled=compiled)
        for layout in ("128x4", "linear"):
            yield mxfp8_quantize(m, k, layout, compiled=compiled)
            yield fp4_dequantize(m, k, "nvfp4", layout, compiled=compiled)
        yield fp4_dequantize(m, k, "mxfp4")
        yield mxfp8_dequantize(m, k)
    for make in _FUSED:
        for m, k in shapes.FUSED_QUANTIZE:
            yield make(m, k, compiled=m in (128, 8192))
        for fmt, layout in (("nvfp4", "linear"), ("mxfp4", "128x4")):
            yield make(8192, 4096, fmt, layout)
    for m, k in shapes.KV_READS:
        yield nvfp4_kv_quantize(m, k)
        yield nvfp4_kv_dequantize(m, k)
    for sequences in shapes.KV_SEQUENCES:
        yield nvfp4_kv_dequantize_paged(*sequences)
    for attention in shapes.KV_ATTENTION:
        yield fp4_kv_attention_decode(*attention)
    for tokens, heads, dim in (*shapes.KV_APPENDS, *shapes.KV_DECODE_APPENDS):
        yield nvfp4_kv_quantize_store(tokens, heads, dim)
    yield nvfp4_kv_quantize_store(4096, 8, 128, "HND")
    yield from _gemms()
    for model in shapes.MOE_MODELS:
        for fmt, layout in (("mxfp4", "linear"), ("mxfp4", "sm90_interleaved"), ("nvfp4", "linear")):
            for tokens in shapes.MOE_TOKENS:
                yield cutlass_fused_moe(tokens, model, fmt, layout)


def _gemms() -> Iterator[Case]:
    for n, k in shapes.GEMM_WEIGHTS:
        for m in shapes.GEMM_ROWS:
            for make in (mm_bf16_fp4, mm_fp4, mm_mxfp8):
                yield make(m, n, k)
            if m in (1, 64, 1024):
                yield mm_bf16_fp4(m, n, k, "mxfp4")
                yield mm_fp4(m, n, k, "mxfp4")
    for m, n, k in shapes.RAGGED_GEMMS:
        for make in (mm_bf16_fp4, mm_fp4, mm_mxfp8):
            yield make(m, n, k, note="ragged")
    for n, k, note in shapes.MODEL_WEIGHTS:
        for m in shapes.MODEL_ROWS:
            yield mm_bf16_fp4(m, n, k, note=note)
            yield mm_fp4(m, n, k, note=note)
    for n, k, note in shapes.FLUX_WEIGHTS:
        yield mm_bf16_fp4(shapes.FLUX_TOKENS, n, k, note=note)
        yield mm_fp4(shapes.FLUX_TOKENS, n, k, note=note)


def example(op: Op) -> Case:
    """A case of the example in the op's own folder, at its usual sizes: FLOPs are not known, so they are zero."""
    make = importlib.import_module(f"{op.__module__}.samples").example
    with FakeTensorMode():
        args = make(torch.device("cpu"))
        total = sum(t.nbytes for t in tree_leaves((args, op(*args))) if isinstance(t, Tensor))

    def build(device: torch.device, g: torch.Generator) -> Sample:
        def filled(t: Tensor) -> Tensor:  # examples leave large tensors of values uninitialised
            return t.normal_(generator=g) if t.dtype in (BF16, torch.float16) else t

        return Sample("", make(device)).map_tensors(filled)

    sizes = "x".join(str(p.default) for p in list(inspect.signature(make).parameters.values())[1:])
    return Case(op.name, "example", 0, 0, 0, total, 0, build, note=sizes, dtype="")


def _with_examples(found: list[Case]) -> list[Case]:
    """An op that is not listed here is measured by its example, so that a new op needs nothing but its folder."""
    covered = {case.op for case in found}
    return found + [example(op) for name, op in OPS.items() if name not in covered and not name.startswith("_")]
