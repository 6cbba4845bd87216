"""Scale layouts: bytes against index formulas in slow loops, inverses, padding, batches and rejections."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_fp4ops import scale_layouts
from torch_fp4ops.scale_layouts import LAYOUTS, LINEAR, SWIZZLED_8X4, SWIZZLED_128X4

DTYPES = (torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu)
quick = settings(max_examples=100, deadline=None)
layouts = st.sampled_from(LAYOUTS)
rows_ = st.sampled_from((0, 1, 7, 8, 9, 31, 33, 127, 128, 129, 257))
cols_ = st.integers(0, 9)
leads = st.sampled_from(((), (1,), (3,), (2, 2)))
seeds = st.integers(0, 2**31)


def random_bytes(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Never 0, so that a zero byte in a result is padding."""
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def ceil_to(size: int, multiple: int) -> int:
    while size % multiple:
        size += 1
    return size


def expected_shape(rows: int, cols: int, layout: str) -> tuple[int, int]:
    row_tile, col_tile = {"linear": (1, 1), "128x4": (128, 4), "8x4": (8, 4)}[layout]
    return ceil_to(rows, row_tile), ceil_to(cols, col_tile)


def offset(m: int, k: int, cols: int, layout: str) -> int:
    col_tiles = (cols + 3) // 4
    if layout == "linear":
        return m * cols + k
    if layout == "8x4":
        return ((m // 8) * col_tiles + k // 4) * 32 + (m % 8) * 4 + k % 4
    return ((m // 128) * col_tiles + k // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4


def slow_swizzle(scales: torch.Tensor, layout: str) -> torch.Tensor:
    rows, cols = scales.shape
    shape = expected_shape(rows, cols, layout)
    out, values = [0] * (shape[0] * shape[1]), scales.tolist()
    for m, k in itertools.product(range(rows), range(cols)):
        out[offset(m, k, cols, layout)] = values[m][k]
    return torch.tensor(out, dtype=torch.uint8).reshape(shape)


def slow_interleave_v(scales: torch.Tensor) -> torch.Tensor:
    page, cols = scales.shape
    out, values = [0] * (page * cols), scales.tolist()
    for t, s in itertools.product(range(page), range(cols)):
        out[(t // 4) * 4 * cols + s * 4 + t % 4] = values[t][s]
    return torch.tensor(out, dtype=torch.uint8).reshape(page, cols)


@quick
@given(rows_, cols_, layouts, seeds)
def test_swizzle_follows_the_offset_formula_and_zeroes_the_padding(rows, cols, layout, seed):
    scales = random_bytes((rows, cols), seed)
    swizzled = scale_layouts.swizzle(scales, layout)
    assert swizzled.shape == expected_shape(rows, cols, layout)
    assert torch.equal(swizzled, slow_swizzle(scales, layout))
    assert (swizzled == 0).sum() == swizzled.numel() - rows * cols


@quick
@given(leads, rows_, cols_, layouts, st.sampled_from(DTYPES), seeds)
def test_unswizzle_inverts_swizzle(lead, rows, cols, layout, dtype, seed):
    scales = random_bytes((*lead, rows, cols), seed).view(dtype)
    swizzled = scale_layouts.swizzle(scales, layout)
    back = scale_layouts.unswizzle(swizzled, rows, cols, layout)
    assert swizzled.dtype == back.dtype == dtype
    assert swizzled.is_contiguous() and back.is_contiguous()
    assert swizzled.shape == (*lead, *expected_shape(rows, cols, layout))
    assert torch.equal(back.view(torch.uint8), scales.view(torch.uint8))


@quick
@given(leads, st.integers(1, 3), st.integers(1, 3), layouts, seeds)
def test_swizzle_inverts_unswizzle_on_whole_tiles(lead, row_tiles, col_tiles, layout, seed):
    rows, cols = row_tiles * 128, col_tiles * 4
    swizzled = random_bytes((*lead, rows, cols), seed)
    linear = scale_layouts.unswizzle(swizzled, rows, cols, layout)
    assert torch.equal(scale_layouts.swizzle(linear, layout), swizzled)


@quick
@given(st.integers(0, 3), rows_, cols_, layouts, seeds)
def test_a_batch_is_its_items(batch, rows, cols, layout, seed):
    scales = random_bytes((batch, rows, cols), seed)
    swizzled = scale_layouts.swizzle(scales, layout)
    assert swizzled.shape == (batch, *expected_shape(rows, cols, layout))
    for item, alone in zip(swizzled, scales, strict=True):
        assert torch.equal(item, scale_layouts.swizzle(alone, layout))


@quick
@given(leads, rows_, cols_, layouts, seeds)
def test_unswizzle_takes_flat_bytes(lead, rows, cols, layout, seed):
    scales = random_bytes((*lead, rows, cols), seed)
    flat = scale_layouts.swizzle(scales, layout).flatten(-2)
    # [1, n] is both a matrix of one row and a batch of one flat tensor; it reads as the matrix.
    expected = scales[0] if lead == (1,) and flat.shape == expected_shape(rows, cols, layout) else scales
    assert torch.equal(scale_layouts.unswizzle(flat, rows, cols, layout), expected)


@pytest.mark.parametrize("layout", [SWIZZLED_128X4, SWIZZLED_8X4])
def test_unswizzle_does_not_read_padding(layout):
    scales = random_bytes((129, 5), 0)
    swizzled = scale_layouts.swizzle(scales, layout)
    poisoned = torch.where(swizzled == 0, 0xAA, swizzled)
    assert not torch.equal(poisoned, swizzled)
    assert torch.equal(scale_layouts.unswizzle(poisoned, 129, 5, layout), scales)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_input_and_fresh_results(layout):
    base = random_bytes((4, 128), 1)
    scales = base.t()  # [128, 4] with strides (1, 128)
    swizzled = scale_layouts.swizzle(scales, layout)
    assert torch.equal(swizzled, slow_swizzle(scales, layout))
    # One tile of one column tile: the permuted view of 8x4 is the identity, where an alias would be easiest.
    source = random_bytes((8, 4), 2)
    for result in (scale_layouts.swizzle(source, layout), scale_layouts.unswizzle(source, 8, 4, LINEAR)):
        assert result.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()
    tile = scale_layouts.swizzle(source, layout)
    back = scale_layouts.unswizzle(tile, 8, 4, layout)
    assert back.untyped_storage().data_ptr() != tile.untyped_storage().data_ptr()


def test_one_dynamic_graph_serves_every_size():
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    def round_trip(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        swizzled = scale_layouts.swizzle(scales, SWIZZLED_128X4)
        back = scale_layouts.unswizzle(swizzled, scales.shape[1], scales.shape[2], SWIZZLED_128X4)
        return swizzled, back

    compiled = torch.compile(round_trip, backend=backend, fullgraph=True, dynamic=True)
    # More than one tile each way and padded columns: torch keeps other graphs for size 1 and for a whole slice.
    for rows, cols in ((130, 5), (129, 7), (256, 11), (257, 9), (1031, 33)):
        scales = random_bytes((2, rows, cols), rows)
        swizzled, back = compiled(scales)
        assert torch.equal(swizzled, scale_layouts.swizzle(scales, SWIZZLED_128X4))
        assert torch.equal(back, scales)
    assert len(graphs) == 1


@quick
@given(leads, st.integers(0, 9), st.integers(0, 4), st.sampled_from(DTYPES), seeds)
def test_v_scale_interleave(lead, page, cols, dtype, seed):
    shape = (*lead, 4 * page, 4 * cols)
    scales = random_bytes(shape, seed).view(dtype)
    interleaved = scale_layouts.interleave_v_scales(scales)
    assert interleaved.dtype == dtype and interleaved.shape == shape and interleaved.is_contiguous()
    for index in itertools.product(*map(range, lead)):
        assert torch.equal(interleaved.view(torch.uint8)[index], slow_interleave_v(scales.view(torch.uint8)[index]))
    back = scale_layouts.deinterleave_v_scales(interleaved)
    assert torch.equal(back.view(torch.uint8), scales.view(torch.uint8))
    again = scale_layouts.interleave_v_scales(scale_layouts.deinterleave_v_scales(scales))
    assert torch.equal(again.view(torch.uint8), scales.view(torch.uint8))


def test_round_up():
    assert [scale_layouts.round_up(x, 4) for x in (0, 1, 3, 4, 5, 8)] == [0, 4, 4, 4, 8, 8]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 127, 128, 129])
@pytest.mark.parametrize("cols", [0, 1, 3, 4, 5])
def test_scale_shape(rows, cols, layout):
    assert scale_layouts.scale_shape(rows, cols, layout) == expected_shape(rows, cols, layout)


def test_layout_from_flags():
    assert scale_layouts.layout_from_flags(False, False) == LINEAR
    assert scale_layouts.layout_from_flags(True, False) == SWIZZLED_128X4
    assert scale_layouts.layout_from_flags(True, True) == SWIZZLED_8X4


def flashinfer_helper(module: str, name: str):
    """A FlashInfer function that runs on CPU; skips where it is absent, since some are private."""
    pytest.importorskip("flashinfer")
    helper = getattr(importlib.import_module(module), name, None)
    return helper or pytest.skip(f"this FlashInfer has no {module}.{name}")


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (127, 4), (128, 8), (129, 5), (300, 9)])
def test_128x4_bytes_are_flashinfers(rows, cols):
    unswizzle = flashinfer_helper("flashinfer.trace.templates.gemm", "_unswizzle_batched_sf_128x4")
    scales = random_bytes((3, rows, cols), rows)
    swizzled = scale_layouts.swizzle(scales, SWIZZLED_128X4)
    assert torch.equal(unswizzle(swizzled.flatten(), 3, rows, cols), scales)


def test_v_scale_bytes_are_flashinfers():
    index = flashinfer_helper("flashinfer.msa_ops._nvfp4_decode_sm100", "_v_scale_unswizzle_index")("cpu")
    scales = random_bytes((128, 8), 0)
    interleaved = scale_layouts.interleave_v_scales(scales)
    assert torch.equal(interleaved.flatten()[index].reshape(128, 8), scales)


def test_rejects_8x4_without_swizzling():
    with pytest.raises(ValueError, match=r"is_sf_8x4_layout=True needs is_sf_swizzled_layout=True"):
        scale_layouts.layout_from_flags(False, True)


@pytest.mark.parametrize("call", [scale_layouts.swizzle, scale_layouts.unswizzle, scale_layouts.scale_shape])
def test_rejects_unknown_layout(call):
    sizes = () if call is scale_layouts.swizzle else (8, 4)
    data = () if call is scale_layouts.scale_shape else (torch.zeros(8, 4, dtype=torch.uint8),)
    with pytest.raises(ValueError, match=r"layout must be one of .*'8x4'.*got '4x4'"):
        call(*data, *sizes, "4x4")


def test_swizzle_rejects_wide_dtype():
    with pytest.raises(ValueError, match=r"scales must have a 1-byte dtype.*float16"):
        scale_layouts.swizzle(torch.zeros(8, 4, dtype=torch.float16), LINEAR)


def test_swizzle_rejects_a_vector():
    with pytest.raises(ValueError, match=r"scales must have at least 2 .*\(8,\)"):
        scale_layouts.swizzle(torch.zeros(8, dtype=torch.uint8), LINEAR)


def test_unswizzle_rejects_wide_dtype():
    with pytest.raises(ValueError, match=r"swizzled must have a 1-byte dtype.*int32"):
        scale_layouts.unswizzle(torch.zeros(8, 4, dtype=torch.int32), 8, 4, LINEAR)


def test_unswizzle_rejects_a_scalar():
    with pytest.raises(ValueError, match=r"swizzled must have at least 1 "):
        scale_layouts.unswizzle(torch.zeros((), dtype=torch.uint8), 1, 1, LINEAR)


@pytest.mark.parametrize("shape", [(129, 5), (128, 8), (256, 4), (1024,), (2, 1024)])
def test_unswizzle_rejects_another_size(shape):
    with pytest.raises(ValueError, match=r"swizzled must be \[..., 256, 8\] or, flat, \[..., 2048\].*got shape"):
        scale_layouts.unswizzle(torch.zeros(shape, dtype=torch.uint8), 129, 5, SWIZZLED_128X4)


@pytest.mark.parametrize(("rows", "cols"), [(-1, 4), (8, -1)])
def test_unswizzle_rejects_negative_sizes(rows, cols):
    with pytest.raises(ValueError, match=rf"must not be negative, got rows={rows}, cols={cols}"):
        scale_layouts.unswizzle(torch.zeros(0, 4, dtype=torch.uint8), rows, cols, SWIZZLED_128X4)


@pytest.mark.parametrize("call", [scale_layouts.interleave_v_scales, scale_layouts.deinterleave_v_scales])
class TestVScaleRejections:
    @pytest.mark.parametrize(("page", "cols"), [(6, 4), (4, 6)])
    def test_size(self, call, page, cols):
        with pytest.raises(ValueError, match=rf"multiples of 4, got page={page}, S={cols}"):
            call(torch.zeros(page, cols, dtype=torch.uint8))

    def test_dtype(self, call):
        with pytest.raises(ValueError, match=r"scales must have a 1-byte dtype.*float32"):
            call(torch.zeros(4, 4))

    def test_vector(self, call):
        with pytest.raises(ValueError, match=r"scales must have at least 2 "):
            call(torch.zeros(4, dtype=torch.uint8))
