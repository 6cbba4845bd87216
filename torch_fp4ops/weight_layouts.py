"""Layouts of quantised weights: each one a bijection on bytes, with its inverse.

Nothing here changes a number, only where it is stored. Every function takes any device, any strides and
leading batch dimensions (experts), returns a fresh contiguous tensor, and raises ValueError before it
computes anything.

* nibble order: which of the two FP4 codes of a byte comes first along K;
* trtllm-gen's row shuffle of a GEMM's weight and its scales;
* the row order of a fused gate/up projection;
* the interleave that the SM90 mixed-input MoE GEMM expects of 4-bit weights and their scales;
* "hopper", of the GEMM of compute capability 9.0: see `hopper_layout`, where its two functions live.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_fp4ops import scale_layouts
from torch_fp4ops.hopper_layout import hopper_size as hopper_size
from torch_fp4ops.hopper_layout import pack_hopper_weight as pack_hopper_weight
from torch_fp4ops.hopper_layout import unpack_hopper_weight as unpack_hopper_weight

GEMM_LAYOUTS = ("plain", "trtllm", "hopper")
"""How a GEMM's weight is stored: rows in order, shuffled with their scales as trtllm-gen's kernels read them, or for
the GEMM of compute capability 9.0 (see `hopper_layout`)."""

# name -> (the part that comes first, whether the rows of the two parts alternate)
_GATE_UP_ORDERS = {
    "up_gate": ("up", False),
    "gate_up": ("gate", False),
    "alternating_gate_up": ("gate", True),
    "alternating_up_gate": ("up", True),
}
GATE_UP_ORDERS = tuple(_GATE_UP_ORDERS)

SM90_QUANT_TYPES = ("fp4", "int4", "fp4_fp8")


def swap_nibbles(packed: Tensor) -> Tensor:
    """Swap the two 4-bit codes of every byte: from low-nibble-first packing to high-nibble-first and back.

    `packed`: any shape, any 1-byte dtype. Returns the same shape and dtype. ValueError for another dtype.
    """
    _check_one_byte("packed", packed)
    data = packed.view(torch.uint8)
    return _fresh((data >> 4) | (data << 4)).view(packed.dtype)


# --- trtllm-gen row shuffle -----------------------------------------------------------------------


def shuffle_matrix_a(input_tensor: Tensor, epilogue_tile_m: int = 128) -> Tensor:
    """Permute the rows of a weight as trtllm-gen GEMMs read them.

    `input_tensor`: `[..., M, K]`, any dtype; M is a multiple of B, which is 32 if `epilogue_tile_m` is a
    multiple of 128 and otherwise 16. In every block of B rows, new row r is old row
    `(B // 8) * (r % 8) + r // 8`. Returns the same shape and dtype. Raises ValueError for fewer than two
    dimensions, another M, or a tile below 1.
    Source: FlashInfer `shuffle_matrix_a` (2-D only, and the tile has no default).
    """
    block = _shuffle_block(epilogue_tile_m)
    return _transpose_row_blocks("input_tensor", input_tensor, 8, block // 8)


def unshuffle_matrix_a(shuffled: Tensor, epilogue_tile_m: int = 128) -> Tensor:
    """The inverse of `shuffle_matrix_a`: same shapes, dtypes and errors."""
    block = _shuffle_block(epilogue_tile_m)
    return _transpose_row_blocks("shuffled", shuffled, block // 8, 8)


def shuffle_matrix_sf_a(input_tensor: Tensor, epilogue_tile_m: int = 128) -> Tensor:
    """Permute the rows of linear weight scales as `shuffle_matrix_a` does the weight's, then swizzle 128x4.

    `input_tensor`: linear scales `[..., M, K_sf]`, any 1-byte dtype, M a multiple of 128. Returns the bytes
    flat, `[..., M * round_up(K_sf, 4)]`, padding columns zero, same dtype. Raises ValueError for another
    dtype, fewer than two dimensions, another M, or a tile below 1.
    Source: FlashInfer `shuffle_matrix_sf_a`; its `num_elts_per_sf` changes nothing and is left out.
    """
    _shuffle_block(epilogue_tile_m)
    _check_one_byte("input_tensor", input_tensor)
    _check_multiple("input_tensor", "rows", _matrix_shape("input_tensor", input_tensor)[-2], 128)
    shuffled = shuffle_matrix_a(input_tensor, epilogue_tile_m)
    return scale_layouts.swizzle(shuffled, scale_layouts.SWIZZLED_128X4).flatten(-2)


def unshuffle_matrix_sf_a(shuffled: Tensor, rows: int, cols: int, epilogue_tile_m: int = 128) -> Tensor:
    """The inverse of `shuffle_matrix_sf_a`: linear scales `[..., rows, cols]` without padding.

    `shuffled`: `[..., rows * round_up(cols, 4)]`, or the same bytes as `[..., rows, round_up(cols, 4)]`, any
    1-byte dtype. Raises ValueError for another dtype or size, rows that are no multiple of 128, or a tile
    below 1.
    """
    _shuffle_block(epilogue_tile_m)
    if rows % 128 != 0:
        raise ValueError(f"rows must be a multiple of 128, got {rows}")
    linear = scale_layouts.unswizzle(shuffled, rows, cols, scale_layouts.SWIZZLED_128X4)
    return unshuffle_matrix_a(linear, epilogue_tile_m)


def _shuffle_block(epilogue_tile_m: int) -> int:
    if epilogue_tile_m < 1:
        raise ValueError(f"epilogue_tile_m must be at least 1, got {epilogue_tile_m}")
    return 32 if epilogue_tile_m % 128 == 0 else 16


def _transpose_row_blocks(name: str, tensor: Tensor, outer: int, inner: int) -> Tensor:
    """See every `outer * inner` rows as an `[outer, inner]` grid and transpose it."""
    *lead, rows, cols = _matrix_shape(name, tensor)
    _check_multiple(name, "rows", rows, outer * inner)
    data = _movable(tensor).reshape(*lead, rows // (outer * inner), outer, inner, cols)
    return _fresh(data.transpose(-3, -2)).view(*lead, rows, cols).view(tensor.dtype)


# --- gate/up row orders ---------------------------------------------------------------------------


def reorder_gate_up(x: Tensor, source: str, target: str, dim: int = -2) -> Tensor:
    """Bring the rows of a fused gate/up projection from one order into another.

    `x`: payload or scales `[..., 2 * I, cols]` with `dim=-2`, biases `[..., 2 * I]` with `dim=-1`; any dtype.
    `source` and `target` are one of

    * `up_gate`: halves `[up; gate]` (w3 before w1), what FlashInfer `cutlass_fused_moe` takes;
    * `gate_up`: halves `[gate; up]`;
    * `alternating_gate_up`: gate in the even rows, up in the odd rows, as GPT-OSS checkpoints store them;
    * `alternating_up_gate`: up in the even rows, gate in the odd rows, the step before trtllm-gen's shuffle
      (FlashInfer `reorder_rows_for_gated_act_gemm` makes it of `up_gate`).

    Returns the same shape and dtype; exchanging `source` and `target` gives the inverse. Raises ValueError
    for an unknown order, a `dim` out of range or an odd number of rows.
    """
    for name, order in (("source", source), ("target", target)):
        if order not in _GATE_UP_ORDERS:
            raise ValueError(f"{name} must be one of {GATE_UP_ORDERS}, got {order!r}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be a dimension of x, got dim={dim} for shape {tuple(x.shape)}")
    dim = dim % x.dim()
    rows = x.shape[dim]
    _check_multiple("x", "rows", rows, 2)
    source_first, source_alternates = _GATE_UP_ORDERS[source]
    target_first, target_alternates = _GATE_UP_ORDERS[target]
    split = (rows // 2, 2) if source_alternates else (2, rows // 2)
    first, second = _movable(x).unflatten(dim, split).unbind(dim + 1 if source_alternates else dim)
    parts = (first, second) if source_first == target_first else (second, first)
    joined = torch.stack(parts, dim + 1 if target_alternates else dim).flatten(dim, dim + 1)
    return joined.contiguous().view(x.dtype)  # stack keeps channels_last strides of a 4-D x


# --- SM90 mixed-input MoE GEMM: weights -----------------------------------------------------------
#
# All three types work on tiles of 16 rows by 32 bytes, seen as [2 halves, 8 rows] by [2 (h), 2 (c), 8 bytes].
# Column index c becomes the row half, and the bytes that a thread of the GEMM needs together, from both row
# halves, become four neighbours: a "word". The fp4 types then rearrange bits inside each word.


def interleave_moe_weights_for_sm90_mixed_gemm(weight: Tensor, quant_type: str = "fp4") -> Tensor:
    """Interleave 4-bit weights for the SM90 mixed-input MoE GEMM.

    `weight`: `[..., N, K // 2]`, any 1-byte dtype, low nibble first, N % 16 == 0, K % 64 == 0. `quant_type`:
    `fp4` (MXFP4 weights, BF16 activations), `int4` (INT4 weights, FP8 activations) or `fp4_fp8` (MXFP4
    weights, FP8 activations). Returns the same shape and dtype. Raises ValueError for another dtype, size or
    type.
    Source: FlashInfer `interleave_moe_weights_for_sm90_mixed_gemm` (uint8 `[E, N, K // 2]` on CUDA only).
    """
    *lead, rows, cols = _sm90_weight_shape(weight, quant_type)
    data = weight.view(torch.uint8)
    if quant_type == "fp4":
        data = data.reshape(*lead, rows // 16, 2, 8, cols // 32, 2, 2, 2, 4)  # n, half, r, k, h, c, pair, lane
        words = _permute_tail(data, (0, 5, 2, 3, 4, 7, 6, 1)).flatten(-2)  # n, c, r, k, h, lane, (pair, half)
        words = _fp4_word(*words.unbind(-1))
    else:
        data = data.reshape(*lead, rows // 16, 2, 8, cols // 32, 2, 2, 4, 2)  # n, half, r, k, h, c, lane, byte
        words = _permute_tail(data, (0, 5, 2, 3, 4, 6, 1, 7))  # n, c, r, k, h, lane, half, byte
        if quant_type == "fp4_fp8":
            words = _fp4_fp8_word(words)
    return _fresh(words).view(*lead, rows, cols).view(weight.dtype)


def deinterleave_moe_weights_for_sm90_mixed_gemm(weight: Tensor, quant_type: str = "fp4") -> Tensor:
    """The inverse of `interleave_moe_weights_for_sm90_mixed_gemm`: same shapes, dtypes and errors."""
    *lead, rows, cols = _sm90_weight_shape(weight, quant_type)
    words = weight.view(torch.uint8)
    if quant_type == "fp4":
        words = words.reshape(*lead, rows // 16, 2, 8, cols // 32, 2, 4, 4)
        words = _fp4_word_inverse(*words.unbind(-1)).unflatten(-1, (2, 2))  # n, c, r, k, h, lane, pair, half
        data = _permute_tail(words, (0, 7, 2, 3, 4, 1, 6, 5))
    else:
        words = words.reshape(*lead, rows // 16, 2, 8, cols // 32, 2, 4, 2, 2)  # n, c, r, k, h, lane, half, byte
        if quant_type == "fp4_fp8":
            words = _fp4_fp8_word_inverse(words)
        data = _permute_tail(words, (0, 6, 2, 3, 4, 1, 5, 7))
    return _fresh(data).view(*lead, rows, cols).view(weight.dtype)


def _fp4_word(b0: Tensor, b1: Tensor, b2: Tensor, b3: Tensor) -> Tensor:
    """Spread the codes of four bytes so that shifts and masks alone turn them into BF16 bit patterns.

    The low nibbles share the word's low half, the high nibbles its high half. In a half, a shift by 0, 3 or 6
    brings b0, b1 or b2 to bits 15 (sign) and 8:6 (magnitude); b3 fills the gaps and takes three shifts.
    """
    halves = []
    for n0, n1, n2, n3 in ((b0 & 15, b1 & 15, b2 & 15, b3 & 15), (b0 >> 4, b1 >> 4, b2 >> 4, b3 >> 4)):
        halves.append((n2 & 7) | (n1 & 7) << 3 | (n0 & 3) << 6)
        magnitudes = (n0 >> 2) & 1 | (n3 & 6) << 1 | (n3 & 1) << 5
        signs = (n2 >> 3) << 1 | (n1 >> 3) << 4 | (n3 >> 3) << 6 | (n0 >> 3) << 7
        halves.append(magnitudes | signs)
    return torch.stack(halves, -1)


def _fp4_word_inverse(w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    codes = []
    for low, high in ((w0, w1), (w2, w3)):
        n0 = low >> 6 | (high & 1) << 2 | (high >> 7) << 3
        n1 = (low >> 3) & 7 | ((high >> 4) & 1) << 3
        n2 = low & 7 | ((high >> 1) & 1) << 3
        n3 = (high >> 5) & 1 | (high >> 1) & 6 | ((high >> 6) & 1) << 3
        codes.append(torch.stack((n0, n1, n2, n3), -1))
    return codes[0] | codes[1] << 4


def _fp4_fp8_word(words: Tensor) -> Tensor:
    """Move the eight sign bits of each word `[..., half, byte]`: those of half 0, in K order, become bit 7 of
    the four bytes, those of half 1 become bit 3. The magnitudes stay."""
    signs = torch.stack(((words >> 3) & 1, words >> 7), -1).flatten(-2)  # [..., half, 4 in K order]
    moved = signs.select(-2, 0) << 7 | signs.select(-2, 1) << 3
    return words & 0x77 | moved.unflatten(-1, (2, 2))


def _fp4_fp8_word_inverse(words: Tensor) -> Tensor:
    flat = words.flatten(-2)
    signs = torch.stack((flat >> 7, (flat >> 3) & 1), -2).unflatten(-1, (2, 2))  # [..., half, byte, nibble]
    return words & 0x77 | signs.select(-1, 0) << 3 | signs.select(-1, 1) << 7


def _sm90_weight_shape(weight: Tensor, quant_type: str) -> torch.Size:
    if quant_type not in SM90_QUANT_TYPES:
        raise ValueError(f"quant_type must be one of {SM90_QUANT_TYPES}, got {quant_type!r}")
    _check_one_byte("weight", weight)
    shape = _matrix_shape("weight", weight)
    _check_multiple("weight", "rows", shape[-2], 16)
    _check_multiple("weight", "columns (bytes of two codes)", shape[-1], 32)
    return shape


# --- SM90 mixed-input MoE GEMM: scales ------------------------------------------------------------


def interleave_moe_scales_for_sm90_mixed_gemm(scales: Tensor, group_size: int = 32) -> Tensor:
    """Fold weight scales for the SM90 mixed-input MoE GEMM: 64 rows by 128 k become one contiguous piece.

    `scales`: `[..., rows, K // group_size]`, rows % 64 == 0, K % 128 == 0; uint8 E8M0 with `group_size` 32
    for MXFP4, 2-byte BF16 bit patterns with 128 for INT4. With G = 128 // group_size, C = the number of
    scales in 16 bytes and F = 64 * G // C:

        out[..., r // 64, g // G, r % F, (r % 64) // F * G + g % G] = in[..., r, g]

    Returns `[..., rows // 64, K // 128, F, C]`, same dtype: (F, C) is (16, 16) for MXFP4, (8, 8) for INT4.
    Raises ValueError for a group size that does not divide 128 or has G > C, or for another size.
    Source: FlashInfer `interleave_moe_scales_for_sm90_mixed_gemm` (3-D only).
    """
    groups, folds, folded_rows, scale_cols = _fold(scales, group_size)
    *lead, rows, cols = _matrix_shape("scales", scales)
    _check_multiple("scales", "rows", rows, 64)
    _check_multiple("scales", "columns", cols, groups)
    data = _movable(scales).reshape(*lead, rows // 64, folds, folded_rows, cols // groups, groups)
    data = _fresh(_permute_tail(data, (0, 3, 2, 1, 4)))
    return data.view(*lead, rows // 64, cols // groups, folded_rows, scale_cols).view(scales.dtype)


def deinterleave_moe_scales_for_sm90_mixed_gemm(scales: Tensor, group_size: int = 32) -> Tensor:
    """The inverse of `interleave_moe_scales_for_sm90_mixed_gemm`: `[..., rows // 64, K // 128, F, C]` of the
    scales' own dtype to `[..., rows, K // group_size]`. Raises ValueError for another shape or group size."""
    groups, folds, folded_rows, scale_cols = _fold(scales, group_size)
    if scales.dim() < 4 or tuple(scales.shape[-2:]) != (folded_rows, scale_cols):
        raise ValueError(
            f"scales must be [..., rows // 64, K // 128, {folded_rows}, {scale_cols}] for {scales.dtype} and "
            f"group_size={group_size}, got shape {tuple(scales.shape)}"
        )
    *lead, row_blocks, k_blocks = scales.shape[:-2]
    data = _movable(scales).reshape(*lead, row_blocks, k_blocks, folded_rows, folds, groups)
    data = _fresh(_permute_tail(data, (0, 3, 2, 1, 4)))
    return data.view(*lead, row_blocks * 64, k_blocks * groups).view(scales.dtype)


def _fold(scales: Tensor, group_size: int) -> tuple[int, int, int, int]:
    """(scales of a row per 128 k, rows folded into 16 bytes, rows of the result, scales in 16 bytes)."""
    if group_size <= 0 or 128 % group_size != 0:
        raise ValueError(f"group_size must be positive and divide 128, got {group_size}")
    groups = 128 // group_size
    scale_cols = 16 // scales.element_size()
    if scale_cols % groups != 0:
        raise ValueError(
            f"group_size must be at least {128 // scale_cols} for scales of {scales.dtype}, got {group_size}"
        )
    folds = scale_cols // groups
    return groups, folds, 64 // folds, scale_cols


# --- helpers --------------------------------------------------------------------------------------


def _matrix_shape(name: str, tensor: Tensor) -> torch.Size:
    if tensor.dim() < 2:
        raise ValueError(f"{name} must have at least 2 dimensions, got shape {tuple(tensor.shape)}")
    return tensor.shape


def _check_one_byte(name: str, tensor: Tensor) -> None:
    if tensor.element_size() != 1:
        raise ValueError(f"{name} must have a 1-byte dtype, got {tensor.dtype}")


def _check_multiple(name: str, what: str, size: int, multiple: int) -> None:
    if size % multiple != 0:
        raise ValueError(f"{name}: {what} must be a multiple of {multiple}, got {size}")


def _movable(tensor: Tensor) -> Tensor:
    # Torch's kernels do not cover the FP4 and FP8 dtypes evenly; their bytes can always be moved.
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _permute_tail(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """Permute the last `len(order)` dimensions, keeping the leading ones."""
    lead = tensor.dim() - len(order)
    return tensor.permute(*range(lead), *(lead + i for i in order))


def _fresh(tensor: Tensor) -> Tensor:
    # clone, not contiguous(): over dimensions of size 1 a permuted view is contiguous and would be an alias.
    return tensor.clone(memory_format=torch.contiguous_format)
