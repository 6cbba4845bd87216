"""The Triton quantisers, dequantisers and KV store: byte for byte what the reference gives.

Each ``check_*`` runs through the op with ``backend="triton"`` twice: on the CPU in Triton's interpreter, and, marked
``gpu``, compiled. The reference runs on the CPU, and fresh memory is filled with 0xFF, so bytes left unwritten show.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_fp4ops import OPS, scale_layouts
from torch_fp4ops.formats import FORMATS, MXFP4, MXFP8, NVFP4, BlockFormat
from torch_fp4ops.registry import Op
from torch_fp4ops.testing import assert_right, assert_same_bytes, samples
from torch_fp4ops.testing.samples import values
from torch_fp4ops.testing.strategies import matrices

from ..interpreter import few, test_in_the_interpreter, test_on_a_gpu  # noqa: F401

pytest.importorskip("triton", reason="needs Triton")

OP_NAMES = (
    "fp4_quantize",
    "fp4_dequantize",
    "mxfp8_quantize",
    "mxfp8_dequantize",
    "nvfp4_kv_quantize",
    "nvfp4_kv_dequantize",
    "nvfp4_kv_quantize_store",
)
FLAGS = {"128x4": (True, False), "8x4": (True, True), "linear": (False, False)}
LAYOUTS = tuple(FLAGS)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # with it, torch fills what empty() gives
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def compare(device: str, op: Op, *args: Any, **kwargs: Any) -> None:
    """Outputs, and arguments that may have been written, against the reference's on the CPU."""
    copies = tree_map_only(Tensor, lambda t: _clone(t, "cpu"), args)
    wanted = op.default(*copies, **kwargs, backend="reference")
    moved = tree_map_only(Tensor, lambda t: _clone(t, device), args)
    with poisoned_memory():
        out = op.default(*moved, **kwargs, backend="triton")
    for i, (a, b) in enumerate(zip(tree_leaves((out, moved)), tree_leaves((wanted, copies)), strict=True)):
        if isinstance(a, Tensor):
            # Copying from a GPU makes a strided view dense, so both become so; .contiguous() would keep a row's stride.
            a, b = (t.cpu().clone(memory_format=torch.contiguous_format) for t in (a, b))
            assert_same_bytes(a, b, f"{op.name}, tensor {i} of outputs and arguments")


def _clone(t: Tensor, device: str) -> Tensor:
    """The same view of a copied storage: offset and strides are part of what is tested."""
    storage = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone().to(device)
    return storage.view(t.dtype).as_strided(t.shape, t.stride(), t.storage_offset())


def quantize(
    device: str, fmt: BlockFormat, layout: str, x: Tensor, scale: Tensor | None, inversed: bool = False
) -> None:
    if fmt is MXFP8:
        number = ("128x4", "8x4", "linear").index(layout)
        compare(device, OPS["mxfp8_quantize"], x, sf_swizzle_layout=number)
        return
    scale = scale if fmt is NVFP4 else None
    compare(device, OPS["fp4_quantize"], x, scale, fmt.block_size, fmt is MXFP4, *FLAGS[layout], inversed)


# What is checked


def check_samples(device: str) -> None:
    for name in OP_NAMES:
        for sample in samples(OPS[name], device):
            with poisoned_memory():
                assert_right(OPS[name], sample, "triton")


def check_rows_and_ragged_columns(device: str) -> None:
    for fmt, layout, m, blocks in itertools.product(FORMATS.values(), LAYOUTS, (0, 1, 7, 127, 128, 129), (1, 4, 17)):
        quantize(device, fmt, layout, values(m, m, blocks * fmt.block_size), torch.tensor([700.0]))


@few()
@given(
    x=matrices(block=32),
    fmt=st.sampled_from(list(FORMATS.values())),
    layout=st.sampled_from(LAYOUTS),
    inversed=st.booleans(),
    scale=st.floats(2.0**-30, 2.0**30, width=32),
)
@example(x=torch.full((1, 32), math.inf), fmt=NVFP4, layout="linear", inversed=False, scale=1.0)
@example(x=torch.full((1, 32), -math.nan), fmt=NVFP4, layout="linear", inversed=False, scale=1.0)
@example(x=torch.full((1, 32), 3.4e38), fmt=NVFP4, layout="linear", inversed=True, scale=2.0**30)
@example(x=torch.full((1, 32), 1e-45), fmt=MXFP8, layout="linear", inversed=True, scale=1.0)
@example(x=torch.full((1, 32), 1e-45), fmt=NVFP4, layout="linear", inversed=True, scale=2.0**-30)
def check_hard_values(device: str, x: Tensor, fmt: BlockFormat, layout: str, inversed: bool, scale: float) -> None:
    quantize(device, fmt, layout, x, torch.tensor([scale]), inversed)


@few()
@given(x=matrices(), inversed=st.booleans(), seed=st.integers(0, 2**31), layout=st.sampled_from(LAYOUTS))
def check_a_global_scale_for_each_row(device: str, x: Tensor, inversed: bool, seed: int, layout: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(x.shape[0], 1, generator=generator).mul(8).exp2()
    if len(scale) > 1:
        quantize(device, NVFP4, layout, x, scale, inversed)
        codes, sf = OPS["fp4_quantize"](x, scale, 16, False, *FLAGS[layout], inversed)
        compare(device, OPS["fp4_dequantize"], codes, sf, scale, 16, False, *FLAGS[layout], inversed)


def check_every_bf16(device: str) -> None:
    every = torch.arange(2**16, dtype=torch.int32).sub(2**15).to(torch.int16).view(torch.bfloat16)
    shuffled = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    for x, fmt in itertools.product((every, shuffled), FORMATS.values()):
        quantize(device, fmt, "128x4", x.reshape(256, 256), torch.tensor([300.0]))


def check_every_tie_and_its_neighbours(device: str) -> None:
    """Blocks whose largest value makes the multiplier a power of two, so that ties of the grid are exact."""
    for fmt, grid in ((NVFP4, _e2m1_grid()), (MXFP4, _e2m1_grid()), (MXFP8, _e4m3_grid())):
        ties = (grid[1:] + grid[:-1]) / 2
        points = torch.cat((grid, ties)).float()
        points = torch.cat((points, *(torch.nextafter(points, torch.tensor(to)) for to in (-math.inf, math.inf))))
        points = torch.cat((points, -points))
        columns = fmt.block_size - 1
        points = torch.nn.functional.pad(points, (0, -len(points) % columns)).reshape(-1, columns)
        largest = torch.full((len(points), 1), fmt.element_max)
        for exponent in (-100, 0, 100):
            x = torch.cat((points, largest), dim=1) * 2.0**exponent
            quantize(device, fmt, "linear", x, torch.tensor([2.0**-exponent]))


def _e2m1_grid() -> Tensor:
    return torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _e4m3_grid() -> Tensor:
    return torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def check_e4m3_input(device: str) -> None:
    every = torch.arange(2**8, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    for layout, scale in itertools.product(LAYOUTS, (0.01, 1.0, 700.0, 1e5)):
        quantize(device, NVFP4, layout, every.view(torch.uint8).repeat(3, 5).view(every.dtype), torch.tensor([scale]))


def check_views(device: str) -> None:
    """Transposed, sliced, broadcast and unaligned inputs, and leading dimensions that do and do not flatten."""
    x = values(0, 96, 192)
    flat = values(1, 96 * 192 + 64)
    views = (
        x.T,
        x[:, 32:128],
        x[::3],
        x[::3, 8:72],
        x[:1].expand(5, 192),
        flat[1:-63].reshape(96, 192),
        flat[:-64].reshape(4, 24, 192)[:, ::2],
        flat[:-64].reshape(4, 24, 192).transpose(0, 1),
    )
    for view, fmt, layout in itertools.product(views, FORMATS.values(), ("128x4", "linear")):
        quantize(device, fmt, layout, view, torch.tensor([500.0]))
    codes, sf = OPS["fp4_quantize"](x, torch.tensor([500.0]), is_sf_swizzled_layout=False)
    for view, out_dtype in itertools.product((codes[:, :48], codes[1:].flatten()[4:-92].reshape(-1, 96)), DTYPES):
        scales = sf[: view.shape[0], : view.shape[1] // 8]
        compare(device, OPS["nvfp4_kv_dequantize"], view, scales, torch.tensor([0.01]), out_dtype)


@few()
@given(x=matrices(block=32, max_blocks=3), alignment=st.sampled_from([32, 64, 128]), layout=st.integers(0, 2))
def check_mxfp8_pads_columns_with_zeros(device: str, x: Tensor, alignment: int, layout: int) -> None:
    compare(device, OPS["mxfp8_quantize"], x, True, alignment, sf_swizzle_layout=layout)


@few()
@given(
    x=matrices(rows=st.integers(1, 140), block=32),
    fmt=st.sampled_from(list(FORMATS.values())),
    layout=st.sampled_from(LAYOUTS),
    out_dtype=st.sampled_from(DTYPES),
    inversed=st.booleans(),
    flat=st.booleans(),
)
def check_dequantize(
    device: str, x: Tensor, fmt: BlockFormat, layout: str, out_dtype: torch.dtype, inversed: bool, flat: bool
) -> None:
    """Also that padding bytes are not read."""
    rows, cols = x.shape[0], x.shape[1] // fmt.block_size
    padding = scale_layouts.swizzle(torch.ones(rows, cols, dtype=torch.uint8), layout) == 0
    if fmt is MXFP8:
        number = ("128x4", "8x4", "linear").index(layout)
        elements, scales = OPS["mxfp8_quantize"](x, sf_swizzle_layout=number)
        scales = scales.view(padding.shape).masked_fill(padding, 0xFF)
        scales = scales.flatten() if flat else scales
        compare(device, OPS["mxfp8_dequantize"], elements, scales, sf_swizzle_layout=number, out_dtype=out_dtype)
        return
    scale = torch.tensor([37.5]) if fmt is NVFP4 else None
    tail = (scale, fmt.block_size, fmt is MXFP4, *FLAGS[layout], inversed)
    codes, scales = OPS["fp4_quantize"](x, *tail)
    scales = scales.masked_fill(padding, 0xFF)
    scales = scales.flatten() if flat else scales
    compare(device, OPS["fp4_dequantize"], codes, scales, *tail, out_dtype=out_dtype)


def check_every_code_and_scale(device: str) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    scales = codes[:, None].expand(256, 256).contiguous()
    for gs, out_dtype in itertools.product((1.0, 0.3, 1e-30, 1e30), DTYPES):
        packed = codes.repeat(256, 8)  # a row for each scale, every byte in it
        compare(device, OPS["nvfp4_kv_dequantize"], packed, scales, torch.tensor([gs]), out_dtype)
    for out_dtype in DTYPES:
        tail = (None, 32, True, False)
        compare(
            device, OPS["fp4_dequantize"], codes.repeat(256, 1), scales[:, :16].contiguous(), *tail, out_dtype=out_dtype
        )
        elements = codes.repeat(256, 1).view(torch.float8_e4m3fn)
        compare(device, OPS["mxfp8_dequantize"], elements, scales[:, :8].contiguous(), False, out_dtype=out_dtype)


@few()
@given(
    x=matrices(rows=st.integers(0, 9), block=16, max_blocks=8),
    heads=st.integers(1, 5),
    page_size=st.sampled_from([1, 3, 16]),
    layout=st.sampled_from(["NHD", "HND"]),
    holds=st.sampled_from(["apart", "stacked", "scales in the page", "unaligned"]),
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**31),
)
def check_kv_store(
    device: str, x: Tensor, heads: int, page_size: int, layout: str, holds: str, index: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, dim = x.shape
    pages = 4
    key = x[:, None].expand(rows, heads, dim) * torch.arange(1, heads + 1)[:, None]
    key = key.to(x.dtype)
    value = torch.flip(key, (0,)) if seed % 2 else key.transpose(0, 1).contiguous().transpose(0, 1)
    slots = torch.randperm(pages * page_size, generator=generator)[:rows].to(index)
    if len(slots):
        slots[torch.rand(len(slots), generator=generator) < 0.2] = -1
    caches = _caches(pages, page_size, heads, dim, layout, holds)
    scales = torch.tensor([0.003]), torch.tensor([1.7])
    compare(device, OPS["nvfp4_kv_quantize_store"], key, value, slots, *caches, *scales, layout)


def _caches(pages: int, page_size: int, heads: int, dim: int, layout: str, holds: str) -> tuple[Tensor, ...]:
    """k_cache, v_cache, k_cache_sf, v_cache_sf with bytes that must survive between them."""
    middle = (page_size, heads) if layout == "NHD" else (heads, page_size)
    data, sf = (*middle, dim // 2), (*middle, dim // 16)
    if holds == "apart":
        sizes = (data, data, sf, sf)
        return tuple(torch.full((pages, *size), 0x5A, dtype=torch.uint8) for size in sizes)
    if holds == "stacked":
        both = [torch.full((pages, 2, *size), 0x5A, dtype=torch.uint8) for size in (data, sf)]
        return both[0][:, 0], both[0][:, 1], both[1][:, 0], both[1][:, 1]
    gap = 1 if holds == "unaligned" else 0
    width = dim // 2 + dim // 16 + gap
    kv = [torch.full((pages, *middle, width), 0x5A, dtype=torch.uint8) for _ in "kv"]
    return (
        *(t[..., gap : gap + dim // 2] for t in kv),
        *(t[..., gap + dim // 2 :] for t in kv),
    )


def check_slots_past_the_end_are_skipped(device: str) -> None:
    """On a GPU; on the CPU the op refuses them, so the kernel is run past the op's checks."""
    from torch_fp4ops.ops.nvfp4_kv_quantize_store.triton import nvfp4_kv_quantize_store_triton as store

    for slot in (8, 9, 2**31 - 1, 2**40, -1, -(2**40)):
        caches = [t.to(device) for t in _caches(2, 4, 2, 32, "NHD", "apart")]
        x = values(0, 1, 2, 32).to(device)
        scale = torch.tensor([0.01], device=device)
        store(x, x, torch.tensor([slot], device=device), *caches, scale, scale)
        assert all(bool((t == 0x5A).all()) for t in caches)


def check_every_shipped_tiling(device: str) -> None:
    """The interpreter has tiles of its own, so that it has few programs to run; these are the GPU's."""
    from torch_fp4ops.ops import _triton_dequantize, _triton_quantize

    ragged, whole = (37, 5), (128, 32)
    kinds = [(fmt, layout, *ragged) for fmt in FORMATS.values() for layout in scale_layouts.LAYOUTS]
    kinds += [(NVFP4, "128x4", *whole), (MXFP8, "linear", *whole), (MXFP4, "128x4", 1, 3), (NVFP4, "128x4", 130, 2)]
    for fmt, layout, rows, blocks in kinds:
        x = values(3, rows, blocks * fmt.block_size).to(device)
        gs = torch.tensor([500.0], device=device) if fmt is NVFP4 else None
        packed = blocks * fmt.block_size // fmt.elements_per_byte
        payload = torch.empty(rows, packed, dtype=torch.uint8, device=device)
        scales = torch.empty(scale_layouts.scale_shape(rows, blocks, layout), dtype=torch.uint8, device=device)
        out = torch.empty(x.shape, dtype=torch.float32, device=device)
        results = []
        for tile in (None, *_triton_quantize.shipped_tilings(fmt, layout)):
            for t in (payload, scales):
                t.fill_(0xEE)
            _triton_quantize.quantize_rows(x, fmt, layout, gs, False, payload, scales, tile=tile)
            results.append((payload.clone(), scales.clone()))
        for tile in (None, *_triton_dequantize.shipped_tilings(layout, fmt.block_size // 4)):
            _triton_dequantize.dequantize_rows(payload, scales, fmt, layout, gs, False, out.fill_(7.0), tile=tile)
            results.append((out.clone(),))
        in_front = _triton_dequantize._tiling_in_front(rows, blocks, fmt.block_size // 4)
        args = (payload, scales, fmt, layout, gs, False, out.fill_(7.0), in_front)
        _triton_dequantize.dequantize_rows(*args, in_front=True)
        results.append((out.clone(),))
        quantized, dequantized = ([r for r in results if len(r) == n] for n in (2, 1))
        for group in (quantized, dequantized):
            for other in group[1:]:
                for a, b in zip(group[0], other, strict=True):
                    assert_same_bytes(b, a, f"{fmt.name} {layout} {rows}x{blocks}")


def test_a_cpu_without_the_interpreter_is_a_reason():
    """The reason says what would help."""
    x = values(0, 1, 32)
    reason = OPS["mxfp8_quantize"].why_not("triton", OPS["mxfp8_quantize"].check(x))
    assert reason is None or "TRITON_INTERPRET=1" in reason
