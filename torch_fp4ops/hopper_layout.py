"""The layout "hopper": a weight and its scales as the GEMM of compute capability 9.0 reads them.

The kernel decodes codes in registers to the 16-bit values that the tensor cores take. So what a thread reads at once
are codes of its own elements, and their bits are placed so that a shift and a mask make a pair of values.

Element (r, c) of a weight ``[n, k]``, padded with zeros to ``[round_up(n, 128), round_up(k, 256)]``, is split into

    T = r // 128, sub = r // 64 % 2, w = r // 16 % 4, n3 = r // 8 % 2, g = r % 8
    kt = c // 64, i = c // 16 % 4, k3 = c // 8 % 2, t = c // 2 % 4, k0 = c % 2

and stored, slowest index first:

* FP4: pairs of words, of 16 codes (i % 2, n3, k3, k0), in the order [T, kt, sub, w, g, t, i // 2];
* E4M3: words of 4 codes (k3, k0) in the order [T, kt, sub, i // 2, w, g, t, i % 2, n3];
* scales of NVFP4: bytes in the order [T, kt, sub, w, g, i // 2, n3, i % 2];
* scales of MXFP4 and MXFP8: bytes in the order [T, kt, sub, w, g, n3, i // 2].

Words are little-endian; ``FP4_BITS`` and ``FP8_BITS`` say where in them each bit goes. The bits of an element with k0
= 1 lie in the same places of the words' other halves.

bfloat16 has the four bits of a code at 15 and 8 to 6 (``_hopper_decode``), so in each half of a word there is room for
three codes whose four bits are there at once: as they are, rotated by 6 to the right, or shifted by 6 to the left. The
places left are 3, 4, 10 and 11. Of two words, the odd one shifted by 2, they make one word more, with two codes: one
is there when rotated by 4, one when shifted by 2.

Scale bytes hold what the kernel can multiply with, and a block must decode to the same values:

* NVFP4: 5 bits of exponent (22 above the true one) and 3 of mantissa, subnormals normalised; 8 is zero, 255 is NaN.
* MXFP4 and MXFP8: the UE8M0 byte itself, 0 to 128 and 3 to 134 (down to 0 in blocks of zeros); the next byte, which
  decodes to infinity, stands for NaN, as the block's codes are then zeros.

What :func:`unpack_hopper_weight` gives back is the packed weight byte for byte, but for blocks with several forms:
where the scale is zero or an MX NaN, codes are zeros of their own signs; the sign of an NVFP4 scale is in the codes;
an MX block of zeros whose scale is above the range has the scale 1. Values are the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import MXFP8, NVFP4, BlockFormat
from .scale_layouts import round_up

__all__ = ["HOPPER_SCALE_RANGES", "NotStorableError", "hopper_size", "pack_hopper_weight", "unpack_hopper_weight"]

ROWS, COLUMNS = 128, 256

HOPPER_SCALE_RANGES = {"mxfp4": (0, 128), "mxfp8": (3, 134)}
"""The first and the last UE8M0 byte that is stored as it is."""
_ONE_AS_UE8M0 = 127
_NVFP4_ZERO = 8


class NotStorableError(ValueError):
    """A weight has values that the layout has no form for."""


_SIGN = {"e2m1": 0x88, "e4m3": 0x80}
"""The signs in a byte of codes."""

# Where the bits of an element with k0 = 0 go, the sign first.
FP4_BITS = {  # by (i % 2, n3, k3), in the 64 bits of both words
    (0, 0, 0): (15, 8, 7, 6),
    (0, 0, 1): (21, 14, 13, 12),
    (0, 1, 0): (9, 2, 1, 0),
    (0, 1, 1): (19, 42, 11, 10),
    (1, 0, 0): (47, 40, 39, 38),
    (1, 0, 1): (53, 46, 45, 44),
    (1, 1, 0): (41, 34, 33, 32),
    (1, 1, 1): (43, 36, 35, 4),
}
FP8_BITS = ((15, 10, 9, 8, 7, 6, 5, 4), (11, 14, 13, 12, 3, 2, 1, 0))  # by k3

_ROW_PARTS = (2, 4, 2, 8)  # sub, w, n3, g


class _Order(NamedTuple):
    """A reordering of bytes: the parts of a column beside kt, and the order of [T, *_ROW_PARTS, kt, *parts]."""

    parts: tuple[int, ...]
    order: tuple[int, ...]

    def apply(self, data: Tensor) -> Tensor:
        rows, columns = data.shape
        parts = data.unflatten(1, (-1, *self.parts)).unflatten(0, (-1, *_ROW_PARTS))
        return parts.permute(self.order).reshape(rows, columns)

    def undo(self, data: Tensor) -> Tensor:
        rows, columns = data.shape
        sizes = (rows // ROWS, *_ROW_PARTS, columns // _product(self.parts), *self.parts)
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return data.view([sizes[i] for i in self.order]).permute(inverse).reshape(rows, columns)


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


# Parts of a byte's column: i, k3, t, so that the bytes of a word come last, as (n3, k3).
_FP4_ORDER = _Order((4, 2, 4), (0, 5, 1, 2, 4, 8, 6, 3, 7))
# i // 2, i % 2, k3, t, k0; the bytes of a word are (k3, k0).
_FP8_ORDER = _Order((2, 2, 2, 4, 2), (0, 5, 1, 6, 2, 4, 9, 7, 3, 8, 10))
_SCALE_ORDERS = {
    16: _Order((2, 2), (0, 5, 1, 2, 4, 6, 3, 7)),  # i // 2, i % 2
    32: _Order((2,), (0, 5, 1, 2, 4, 3, 6)),  # i // 2
}


def moves(places: dict[int, int], width: int) -> tuple[tuple[int, int], ...]:
    """Shifts to the left with the bits they fill, for words of ``width`` whose bits are to go where ``places`` says."""
    masks: dict[int, int] = {}
    for source, target in places.items():
        masks[target - source] = masks.get(target - source, 0) | 1 << target
    return tuple((shift, mask - (mask >> width - 1 << width)) for shift, mask in masks.items())  # signed


def _fp4_places() -> dict[int, int]:
    return {
        32 * i + 16 * n3 + 8 * k3 + 4 * k0 + 3 - bit: place ^ 16 * k0
        for (i, n3, k3), places in FP4_BITS.items()
        for k0 in (0, 1)
        for bit, place in enumerate(places)
    }


def _fp8_places() -> dict[int, int]:
    return {
        16 * k3 + 8 * k0 + 7 - bit: place ^ 16 * k0
        for k3, places in enumerate(FP8_BITS)
        for k0 in (0, 1)
        for bit, place in enumerate(places)
    }


_UNITS = {"e2m1": torch.int64, "e4m3": torch.int32}
"""What has all bits that change places with each other."""
_PLACES = {"e2m1": _fp4_places(), "e4m3": _fp8_places()}
_ORDERS = {"e2m1": _FP4_ORDER, "e4m3": _FP8_ORDER}


def _moved(data: Tensor, element: str, places: dict[int, int]) -> Tensor:
    unit = _UNITS[element]
    flat = data.flatten()  # rows of nothing have strides that no view as words takes, nor do other offsets
    words = (flat.clone() if flat.storage_offset() % unit.itemsize else flat).view(unit)
    out = torch.zeros_like(words)
    for shift, mask in moves(places, 8 * words.element_size()):
        out |= (words << shift if shift >= 0 else words >> -shift) & mask
    return out.view(torch.uint8).view(data.shape)


def hopper_size(n: int, k: int) -> tuple[int, int]:
    """The sizes that a weight ``[n, k]`` has in this layout: multiples of 128 and 256."""
    return round_up(n, ROWS), round_up(k, COLUMNS)


def pack_hopper_weight(codes: Tensor, scales: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Bring a weight into the layout "hopper".

    Args:
        codes: ``[n, k / elements per byte]``, any 1-byte dtype, strides and device; k a multiple of the block size.
        scales: linear block scales ``[n, k / block size]``, any 1-byte dtype, same device.
        fmt: ``NVFP4``, ``MXFP4`` or ``MXFP8``.

    Returns:
        ``(weight, scale)``, uint8, contiguous, ``[N, K / elements per byte]`` and ``[N, K / block size]`` with
        ``N, K = hopper_size(n, k)``.

    Raises:
        ValueError: another dtype or shape.
        NotStorableError: a ValueError, for MXFP4 or MXFP8 with a block that is not all zeros and whose scale is outside
            ``HOPPER_SCALE_RANGES``, or with an MXFP8 element that is NaN in a block whose scale is not. Found by a look
            at the data, which synchronises on a GPU.
    """
    where = "pack_hopper_weight"
    for name, t in (("codes", codes), ("scales", scales)):
        if t.element_size() != 1 or t.dim() != 2:
            given = f"{t.dtype} of shape {tuple(t.shape)}"
            raise ValueError(f"{where}: {name} is {given}; allowed: two dimensions of a 1-byte dtype")
    n, k = codes.shape[0], codes.shape[1] * fmt.elements_per_byte
    if k % fmt.block_size:
        raise ValueError(f"{where}: codes is of K = {k}; allowed: K a multiple of {fmt.block_size} ({fmt.name})")
    wanted = (n, k // fmt.block_size)
    if tuple(scales.shape) != wanted:
        raise ValueError(f"{where}: scales is of shape {tuple(scales.shape)}; allowed: {wanted}")
    blocks = codes.view(torch.uint8).unflatten(1, (wanted[1], fmt.block_size // fmt.elements_per_byte))
    pack = _nvfp4_blocks if fmt is NVFP4 else _mx_blocks
    data, steps = pack(blocks, scales.view(torch.uint8), fmt)
    padded_n, padded_k = hopper_size(n, k)
    data = F.pad(data.flatten(1), (0, (padded_k - k) // fmt.elements_per_byte, 0, padded_n - n))
    padding = (0, padded_k // fmt.block_size - wanted[1], 0, padded_n - n)
    steps = F.pad(steps, padding, value=_NVFP4_ZERO if fmt is NVFP4 else 0)
    weight = _moved(_ORDERS[fmt.element].apply(data).contiguous(), fmt.element, _PLACES[fmt.element])
    return weight, _SCALE_ORDERS[fmt.block_size].apply(steps).contiguous()


def unpack_hopper_weight(weight: Tensor, scale: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`pack_hopper_weight`, as far as the module's docstring says.

    Args:
        weight, scale: uint8 of the shapes that it returns, contiguous.
        fmt: as there.

    Returns:
        ``(codes, scales)``, uint8, contiguous, of the same shapes: padding is there still, and zero.

    Raises:
        ValueError: another dtype or shape.
    """
    rows, k = (weight.shape[0], weight.shape[1] * fmt.elements_per_byte) if weight.dim() == 2 else (1, 0)
    shapes = {"weight": (weight, (rows, k // fmt.elements_per_byte)), "scale": (scale, (rows, k // fmt.block_size))}
    for name, (t, shape) in shapes.items():
        if t.dtype != torch.uint8 or tuple(t.shape) != shape or rows % ROWS or k % COLUMNS:
            raise ValueError(
                f"unpack_hopper_weight: {name} is {t.dtype} of shape {tuple(t.shape)}; allowed: torch.uint8 as "
                f"pack_hopper_weight gives it, N a multiple of {ROWS}, K of {COLUMNS}"
            )
    back = {target: source for source, target in _PLACES[fmt.element].items()}
    data = _moved(weight.contiguous(), fmt.element, back)
    steps = _SCALE_ORDERS[fmt.block_size].undo(scale.contiguous())
    if fmt is NVFP4:
        steps = _e4m3_of(steps)
    else:
        steps = steps.masked_fill(steps > HOPPER_SCALE_RANGES[fmt.name][1], 0xFF)
    return _ORDERS[fmt.element].undo(data), steps


def _nvfp4_blocks(blocks: Tensor, scales: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Codes ``[n, blocks, bytes]`` and scale bytes as the kernel multiplies them."""
    signs = _SIGN[fmt.element]
    step = scales & 0x7F
    kept = torch.full_like(step, 0xFF).masked_fill_(step == 0, signs)
    turned = torch.where(scales > 0x7F, signs, 0).to(torch.uint8)
    return (blocks & kept.unsqueeze(-1)) ^ turned.unsqueeze(-1), _bytes_of_e4m3(step)


def _bytes_of_e4m3(step: Tensor) -> Tensor:
    """E4M3 bytes without a sign to exponents of 5 bits; a subnormal's exponent is its first bit's."""
    out = step + 120
    for below, shift, offset in ((8, 1, 112), (4, 2, 104), (2, 3, 96)):
        out = torch.where(step < below, (step << shift) + offset, out)
    return out.masked_fill_(step == 0, _NVFP4_ZERO).masked_fill_(step == 0x7F, 0xFF)


def _e4m3_of(code: Tensor) -> Tensor:
    out = code.clamp(max=247) - 120
    for below, shift, offset in ((128, 1, 112), (120, 2, 104), (112, 3, 96)):
        out = torch.where(code < below, (code - offset) >> shift, out)
    return out.masked_fill_(code == _NVFP4_ZERO, 0)


def _mx_blocks(blocks: Tensor, scales: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """As :func:`_nvfp4_blocks`; raises where a block can't be stored."""
    low, high = HOPPER_SCALE_RANGES[fmt.name]
    signs = _SIGN[fmt.element]
    nan = scales == 0xFF
    zero = ((blocks & (0xFF ^ signs)) == 0).all(-1)
    stored = zero | ((scales >= low) & (scales <= high))
    if fmt is MXFP8:
        stored &= ~((blocks & 0x7F) == 0x7F).any(-1)
    wrong = ~(nan | stored)
    if not wrong.is_meta and bool(wrong.any()):
        given = f"of {fmt.name} with {int(wrong.sum())} blocks that can't be stored"
        allowed = f"scales from 2^{low - 127} to 2^{high - 127} or NaN, blocks of zeros" + ", no element NaN" * (
            fmt is MXFP8
        )
        raise NotStorableError(f"pack_hopper_weight: the weight is {given}; allowed: {allowed}")
    kept = torch.full_like(scales, 0xFF).masked_fill_(nan, signs)
    steps = scales.masked_fill(zero & (scales > high), _ONE_AS_UE8M0).masked_fill_(nan, high + 1)
    return blocks & kept.unsqueeze(-1), steps
