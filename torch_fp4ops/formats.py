"""The block-scaled number formats: what an element is, what a block is, what its scale is."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BLOCKFP4", "FORMATS", "MXFP4", "MXFP8", "NVFP4", "BlockFormat", "fp4_format", "kv_format"]


@dataclass(frozen=True)
class BlockFormat:
    """A block-scaled format along the last dimension of a tensor.

    Attributes:
        name: ``"nvfp4"``, ``"mxfp4"``, ``"mxfp8"`` or ``"blockfp4"``.
        element: element code, ``"e2m1"`` (4 bits, two in a byte, low nibble first) or ``"e4m3"``.
        block_size: consecutive elements that share one scale.
        scale: scale code, ``"e4m3"`` or ``"ue8m0"`` (one byte either way).
        has_global_scale: whether an fp32 scale for the whole tensor multiplies the block scales.
        element_max: largest magnitude of an element.
        element_max_exponent: exponent of that magnitude (``emax`` in the OCP MX specification).

    Sources: NVFP4 as in FlashInfer ``nvfp4_quantize``; MXFP4 and MXFP8 as in the OCP Microscaling
    Formats (MX) specification 1.0.
    """

    name: str
    element: str
    block_size: int
    scale: str
    has_global_scale: bool
    element_max: float
    element_max_exponent: int

    @property
    def elements_per_byte(self) -> int:
        return 2 if self.element == "e2m1" else 1

    @property
    def bits_per_element(self) -> float:
        """Storage cost of an element, its share of the block scale included."""
        return 8 / self.elements_per_byte + 8 / self.block_size


NVFP4 = BlockFormat("nvfp4", "e2m1", 16, "e4m3", True, 6.0, 2)
MXFP4 = BlockFormat("mxfp4", "e2m1", 32, "ue8m0", False, 6.0, 2)
MXFP8 = BlockFormat("mxfp8", "e4m3", 32, "ue8m0", False, 448.0, 8)
# Of KV caches only: SGLang's "fp4_mx_block16", blocks of NVFP4's size with MXFP4's scales.
BLOCKFP4 = BlockFormat("blockfp4", "e2m1", 16, "ue8m0", False, 6.0, 2)

FORMATS = {f.name: f for f in (NVFP4, MXFP4, MXFP8)}


def fp4_format(block_size: int, ue8m0_scales: bool) -> BlockFormat | None:
    """The FP4 format with this block size and scale code; None where no format has them."""
    return _named((NVFP4, MXFP4), block_size, ue8m0_scales)


def kv_format(block_size: int, ue8m0_scales: bool) -> BlockFormat | None:
    """The format of an FP4 KV cache with this block size and scale code; None where there is none."""
    return _named((NVFP4, MXFP4, BLOCKFP4), block_size, ue8m0_scales)


def _named(formats: tuple[BlockFormat, ...], block_size: int, ue8m0_scales: bool) -> BlockFormat | None:
    for f in formats:
        if (f.block_size, f.scale == "ue8m0") == (block_size, ue8m0_scales):
            return f
    return None
