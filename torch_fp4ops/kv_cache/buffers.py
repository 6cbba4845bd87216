"""One layer's paged keys and values, with everything that a reader must know about their bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..scale_layouts import deinterleave_v_scales, interleave_v_scales
from .scales import require_convention

__all__ = ["KV_LAYOUTS", "V_SCALE_LAYOUTS", "KVBuffers"]

KV_LAYOUTS = ("NHD", "HND")
V_SCALE_LAYOUTS = ("linear", "interleaved")


@dataclass(frozen=True, eq=False)
class KVBuffers:
    """The cache of one layer: packed codes, block scales, and how to read them.

    Attributes:
        method: name of the quantisation method that writes it.
        k, v: codes, uint8 ``[pages, page, heads, D/2]`` (NHD) or ``[pages, heads, page, D/2]`` (HND).
        k_sf, v_sf: block scales, uint8, the same with ``D/block`` last.
        kv_layout: ``"NHD"`` or ``"HND"``.
        v_sf_layout: ``"linear"``, or ``"interleaved"`` over four tokens, which trtllm-gen decoding on SM100 reads and
            nothing else does. Always linear for ``k_sf``.
        scale_convention: of the global scales; None where the method has none.

    Raises:
        ValueError: tensors that don't fit each other, or an unknown layout or convention.
    """

    method: str
    k: Tensor
    v: Tensor
    k_sf: Tensor
    v_sf: Tensor
    kv_layout: str = "NHD"
    v_sf_layout: str = "linear"
    scale_convention: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("kv_layout", KV_LAYOUTS), ("v_sf_layout", V_SCALE_LAYOUTS)):
            if getattr(self, name) not in allowed:
                raise _wrong(name, repr(getattr(self, name)), " or ".join(map(repr, allowed)))
        if self.scale_convention is not None:
            require_convention("KVBuffers", self.scale_convention)
        for name in ("k", "v", "k_sf", "v_sf"):
            t = getattr(self, name)
            if not isinstance(t, Tensor):
                raise _wrong(name, f"a {type(t).__name__}", "a tensor")
            if t.dtype != torch.uint8 or t.device != self.k.device:
                raise _wrong(name, f"{t.dtype} on {t.device}", f"torch.uint8 on {self.k.device}, where k is")
            if t.dim() != 4 or t.shape[:3] != self.k.shape[:3]:
                shape = "4 dimensions" if self.k.dim() != 4 else f"[{', '.join(map(str, self.k.shape[:3]))}, ...] as k"
                raise _wrong(name, f"of shape {tuple(t.shape)}", shape)
        if self.v.shape != self.k.shape:
            raise _wrong("v", f"of shape {tuple(self.v.shape)}", f"that of k, {tuple(self.k.shape)}")
        blocks = self.k_sf.shape[3]
        if not blocks or self.head_dim % blocks:
            raise _wrong("k_sf", f"of {blocks} scales a head", f"whole blocks of head_dim {self.head_dim}")
        if self.v_sf.shape != self.k_sf.shape:
            raise _wrong("v_sf", f"of shape {tuple(self.v_sf.shape)}", f"that of k_sf, {tuple(self.k_sf.shape)}")
        if self.v_sf_layout == "interleaved" and (self.kv_layout != "HND" or self.page_size % 4 or blocks % 4):
            given = f"'interleaved' with {self.kv_layout!r}, pages of {self.page_size} and {blocks} scales a head"
            raise _wrong("v_sf_layout", given, "'interleaved' only with 'HND' and multiples of 4")

    @property
    def page_size(self) -> int:
        return self.k.shape[1 if self.kv_layout == "NHD" else 2]

    @property
    def heads(self) -> int:
        return self.k.shape[2 if self.kv_layout == "NHD" else 1]

    @property
    def head_dim(self) -> int:
        return 2 * self.k.shape[3]

    @property
    def block_size(self) -> int:
        return self.head_dim // self.k_sf.shape[3]

    @property
    def slots(self) -> int:
        """Tokens that there is room for; slot s is entry ``s % page_size`` of page ``s // page_size``."""
        return self.k.shape[0] * self.page_size

    @property
    def device(self) -> torch.device:
        return self.k.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.k, self.v, self.k_sf, self.v_sf))

    def require(
        self,
        reader: str,
        *,
        method: str | None = None,
        kv_layout: str | None = None,
        v_sf_layout: str | None = None,
        scale_convention: str | None = None,
    ) -> None:
        """Raise unless the buffers are what ``reader`` takes; None leaves a point open.

        Raises:
            ValueError: naming the reader, the point, what the buffers have and what the reader takes.
        """
        wanted = {
            "method": method,
            "kv_layout": kv_layout,
            "v_sf_layout": v_sf_layout,
            "scale_convention": scale_convention,
        }
        for name, allowed in wanted.items():
            given = getattr(self, name)
            if allowed is not None and given != allowed:
                raise ValueError(f"{reader}: the buffers' {name} is {given!r}; allowed: {allowed!r}")

    def with_v_scales(self, v_sf_layout: str) -> KVBuffers:
        """The buffers with V scales in a layout, in a tensor of their own; the others are shared. Itself if it has it.

        Raises ValueError for an unknown layout, and where interleaving is undefined: NHD, or a page or ``D/block`` that
        is no multiple of 4.
        """
        if v_sf_layout == self.v_sf_layout:
            return self
        replace(self, v_sf_layout=v_sf_layout)  # refuses what can't have it
        turn = interleave_v_scales if v_sf_layout == "interleaved" else deinterleave_v_scales
        return replace(self, v_sf=turn(self.v_sf), v_sf_layout=v_sf_layout)


def _wrong(name: str, given: str, allowed: str) -> ValueError:
    return ValueError(f"KVBuffers: {name} is {given}; allowed: {allowed}")
