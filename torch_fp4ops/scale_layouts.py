"""Layouts of block-scale tensors: the only place that knows a scale tensor's shape.

A scale tensor holds one byte per block: `rows` rows (one per row of the quantised matrix) by `cols` columns
(one per block along K). Three layouts are in use:

* `linear`: row-major, no padding. Checkpoints are stored so.
* `128x4`: tiles of 128 rows by 4 columns, 512 bytes each, which cuBLAS and CUTLASS block-scaled GEMMs read.
* `8x4`: tiles of 8 rows by 4 columns, 32 bytes each, which TensorRT-LLM kernels read when there are few rows.

In a tiled layout the tensor is padded to whole tiles and **every padding byte is zero**. Each item of a batch
is padded on its own. Up to that padding all three are bijections. With C = ceil(cols / 4):

    128x4: offset(m, k) = ((m // 128) * C + k // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4
    8x4:   offset(m, k) = ((m // 8) * C + k // 4) * 32 + (m % 8) * 4 + k % 4

Everything here is plain torch: any device, traceable, sizes may be symbolic, nothing depends on the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

LINEAR = "linear"
SWIZZLED_128X4 = "128x4"
SWIZZLED_8X4 = "8x4"
LAYOUTS = (LINEAR, SWIZZLED_128X4, SWIZZLED_8X4)

# (row_tile, col_tile): the shape is padded to multiples of these.
TILES = {LINEAR: (1, 1), SWIZZLED_128X4: (128, 4), SWIZZLED_8X4: (8, 4)}

# A tile is cut into strips of at most this many rows; row i of each strip lies next to row i of the others.
_STRIP_ROWS = 32

# trtllm-gen reads the V scales of this many tokens together.
_V_TOKENS = 4


def round_up(x: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `x`. Both may be `torch.SymInt`."""
    return (x + multiple - 1) // multiple * multiple


def layout_from_flags(is_sf_swizzled_layout: bool, is_sf_8x4_layout: bool) -> str:
    """The layout that FlashInfer's pair of flags stands for.

    Raises ValueError for 8x4 without swizzling, which does not exist. Source: FlashInfer `fp4_quantize`.
    """
    if is_sf_8x4_layout and not is_sf_swizzled_layout:
        raise ValueError(
            "is_sf_8x4_layout=True needs is_sf_swizzled_layout=True, got is_sf_swizzled_layout=False: "
            "8x4 is a swizzled layout"
        )
    if not is_sf_swizzled_layout:
        return LINEAR
    return SWIZZLED_8X4 if is_sf_8x4_layout else SWIZZLED_128X4


def scale_shape(rows: int, cols: int, layout: str) -> tuple[int, int]:
    """The padded 2-D shape of the scales of `rows` x `cols` blocks. ValueError for an unknown `layout`."""
    row_tile, col_tile = _tile(layout)
    return round_up(rows, row_tile), round_up(cols, col_tile)


def swizzle(scales: Tensor, layout: str) -> Tensor:
    """Bring linear scales into `layout`.

    `scales`: `[..., rows, cols]`, any 1-byte dtype, any strides. Returns a fresh contiguous tensor
    `[..., *scale_shape(rows, cols, layout)]` of the same dtype whose padding bytes are zero; `linear` is a
    plain copy. Raises ValueError for another dtype, fewer than two dimensions or an unknown layout.
    Source: the bytes of FlashInfer `block_scale_interleave` (128x4 only, and flat).
    """
    row_tile, col_tile = _tile(layout)
    data = _as_bytes("scales", scales, min_dim=2)
    rows, cols = scales.shape[-2:]
    padded_rows, padded_cols = scale_shape(rows, cols, layout)
    data = torch.nn.functional.pad(data, (0, padded_cols - cols, 0, padded_rows - rows))
    strip = min(row_tile, _STRIP_ROWS)
    data = data.unflatten(-1, (padded_cols // col_tile, col_tile))
    data = data.unflatten(-3, (padded_rows // row_tile, row_tile // strip, strip))
    data = _fresh(data.transpose(-4, -2)).flatten(-5).unflatten(-1, (padded_rows, padded_cols))
    return data.view(scales.dtype)


def unswizzle(swizzled: Tensor, rows: int, cols: int, layout: str) -> Tensor:
    """Bring scales in `layout` back to linear order and drop the padding: the inverse of `swizzle`.

    `swizzled`: any 1-byte dtype, `[..., padded_rows, padded_cols]` as `swizzle` returns it, or the same bytes
    flat, `[..., padded_rows * padded_cols]`. Returns a fresh contiguous `[..., rows, cols]` of the same
    dtype. Raises ValueError for another dtype or size, a negative `rows` or `cols`, or an unknown layout.
    """
    row_tile, col_tile = _tile(layout)
    data = _as_bytes("swizzled", swizzled, min_dim=1)
    if rows < 0 or cols < 0:
        raise ValueError(f"rows and cols must not be negative, got rows={rows}, cols={cols}")
    padded_rows, padded_cols = scale_shape(rows, cols, layout)
    if tuple(swizzled.shape[-2:]) == (padded_rows, padded_cols):
        data = data.flatten(-2)
    elif swizzled.shape[-1] != padded_rows * padded_cols:
        raise ValueError(
            f"swizzled must be [..., {padded_rows}, {padded_cols}] or, flat, "
            f"[..., {padded_rows * padded_cols}] for rows={rows}, cols={cols} in layout {layout!r}, "
            f"got shape {tuple(swizzled.shape)}"
        )
    strip = min(row_tile, _STRIP_ROWS)
    tiles = (padded_rows // row_tile, padded_cols // col_tile, strip, row_tile // strip, col_tile)
    data = _fresh(data.unflatten(-1, tiles).transpose(-4, -2)).flatten(-2).flatten(-4, -2)
    return data[..., :rows, :cols].contiguous().view(swizzled.dtype)


def interleave_v_scales(scales: Tensor) -> Tensor:
    """Interleave the V scales of KV-cache pages over groups of four tokens, for trtllm-gen decoding.

    `scales`: `[..., page, S]`, any 1-byte dtype, page = tokens of a page, S = head_dim / 16. Byte (t, s) of a
    page goes to flat position `(t // 4) * 4 * S + s * 4 + t % 4`. Returns a fresh contiguous tensor of the
    same shape and dtype. Raises ValueError for another dtype, fewer than two dimensions, or a page or S that
    is no multiple of 4.

    K scales stay linear, and so do V scales for attention kernels below SM100 and on SM120/121.
    Source: FlashInfer `nvfp4_quantize_paged_kv_cache`.
    """
    *lead, page, cols = _v_shape(scales)
    data = scales.view(torch.uint8).reshape(*lead, page // _V_TOKENS, _V_TOKENS, cols)
    return _fresh(data.transpose(-2, -1)).view(*lead, page, cols).view(scales.dtype)


def deinterleave_v_scales(scales: Tensor) -> Tensor:
    """The inverse of `interleave_v_scales`: same shapes, dtypes and errors."""
    *lead, page, cols = _v_shape(scales)
    data = scales.view(torch.uint8).reshape(*lead, page // _V_TOKENS, cols, _V_TOKENS)
    return _fresh(data.transpose(-2, -1)).view(*lead, page, cols).view(scales.dtype)


def _tile(layout: str) -> tuple[int, int]:
    if layout not in TILES:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    return TILES[layout]


def _as_bytes(name: str, tensor: Tensor, min_dim: int) -> Tensor:
    if tensor.element_size() != 1:
        raise ValueError(f"{name} must have a 1-byte dtype (uint8, float8_e4m3fn, float8_e8m0fnu), got {tensor.dtype}")
    if tensor.dim() < min_dim:
        raise ValueError(f"{name} must have at least {min_dim} dimension(s), got shape {tuple(tensor.shape)}")
    return tensor.view(torch.uint8)


def _v_shape(scales: Tensor) -> torch.Size:
    _as_bytes("scales", scales, min_dim=2)
    page, cols = scales.shape[-2:]
    if page % _V_TOKENS != 0 or cols % 4 != 0:
        raise ValueError(f"scales must be [..., page, S] with page and S multiples of 4, got page={page}, S={cols}")
    return scales.shape


def _fresh(tensor: Tensor) -> Tensor:
    # clone, not contiguous(): over dimensions of size 1 a permuted view is contiguous and would be an alias.
    return tensor.clone(memory_format=torch.contiguous_format)
