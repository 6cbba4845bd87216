"""Global scales of keys and values, one for each layer, under the name of what they are."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contracts import SCALES, can_be_scales

__all__ = ["SCALE_CONVENTIONS", "KVScales"]

SCALE_CONVENTIONS = {"amax/2688": 2688.0, "amax/448": 448.0}
"""What the largest magnitude of a layer is divided by. Both are *decode* scales, ``x = code * block scale * scale``.

``amax/2688`` (448 * 6) lets block scales use E4M3 up to 448; checkpoints of ModelOpt hold it. ``amax/448`` keeps them
below 448/6; trtllm-gen attention and FlashInfer's ``nvfp4_quantize_paged_kv_cache`` have it.
"""


_CHECKPOINT_NAME = re.compile(r"\blayers\.(\d+)\.(?:.*\.)?([kv])_scale$")


def require_convention(where: str, convention: str) -> None:
    if convention not in SCALE_CONVENTIONS:
        allowed = " or ".join(map(repr, SCALE_CONVENTIONS))
        raise ValueError(f"{where}: the scale convention is {convention!r}; allowed: {allowed}")


@dataclass(frozen=True, eq=False)
class KVScales:
    """The global scales of a model's keys and values, in one convention.

    A cache that was written with one scale must be read with that very scale, so :meth:`to_convention` is for the time
    before the first token is stored.

    Attributes:
        k, v: float32 ``[layers]``, finite, above zero and with finite reciprocals (checked on the CPU), on one device.
        convention: a key of :data:`SCALE_CONVENTIONS`.
    """

    k: Tensor
    v: Tensor
    convention: str

    def __post_init__(self) -> None:
        require_convention("KVScales", self.convention)
        for name, t in (("k", self.k), ("v", self.v)):
            if not isinstance(t, Tensor):
                raise ValueError(f"KVScales: {name} is {t!r}; allowed: a float32 tensor of shape [layers]")
            if t.dtype != torch.float32 or t.dim() != 1 or not len(t):
                given = f"{t.dtype} of shape {tuple(t.shape)}"
                raise ValueError(f"KVScales: {name} is {given}; allowed: float32 of shape [layers], one layer or more")
            object.__setattr__(self, name, t.detach())  # of a checkpoint's parameters, say
            if t.device.type == "cpu" and not can_be_scales(t):
                raise ValueError(f"KVScales: {name} is {t.tolist()}; allowed: {SCALES}")
        if self.k.shape != self.v.shape or self.k.device != self.v.device:
            given = f"{len(self.v)} on {self.v.device}"
            raise ValueError(f"KVScales: v has {given}; allowed: as many as k, {len(self.k)} on {self.k.device}")

    @classmethod
    def from_amax(cls, k_amax: Tensor, v_amax: Tensor, convention: str = "amax/2688") -> KVScales:
        """Scales of the largest magnitudes ``[layers]`` of keys and values."""
        require_convention("KVScales.from_amax", convention)
        for name, t in (("k_amax", k_amax), ("v_amax", v_amax)):
            if not isinstance(t, Tensor):
                raise ValueError(f"KVScales.from_amax: {name} is {t!r}; allowed: a tensor of shape [layers]")
        divisor = SCALE_CONVENTIONS[convention]
        return cls(k_amax.float() / divisor, v_amax.float() / divisor, convention)

    @classmethod
    def from_checkpoint(cls, tensors: Mapping[str, Tensor], convention: str = "amax/2688") -> KVScales:
        """Scales of a checkpoint with an FP4 cache: its one-element tensors ``...layers.N....k_scale`` and ``v_scale``.

        ModelOpt has them on ``k_proj`` and ``v_proj``, in the default convention. Other names are passed over.

        Raises:
            ValueError: no such tensor, layers without one or with two (of a vision tower or an MTP head: leave those
                out of ``tensors``), or one of several elements.
        """
        where = "KVScales.from_checkpoint: tensors"
        names: dict[tuple[str, int], str] = {}
        for name, t in tensors.items():
            match = _CHECKPOINT_NAME.search(name)
            if match:
                first = names.setdefault((match[2], int(match[1])), name)
                if first != name:
                    both = f"with both {first!r} and {name!r}"
                    raise ValueError(f"{where} is {both}; allowed: one {match[2]}_scale of layer {match[1]}")
                if t.numel() != 1:
                    raise ValueError(f"{where}[{name!r}] is of shape {tuple(t.shape)}; allowed: one element")
        layers = range(1 + max((layer for _, layer in names), default=-1))
        missing = [f"{i}.{kv}_scale" for i in layers for kv in "kv" if (kv, i) not in names]
        if missing or not layers:
            given = f"without {', '.join(missing)}" if missing else "without any k_scale or v_scale"
            raise ValueError(f"{where} is {given}; allowed: one of each layer from 0 on")
        k, v = (torch.cat([tensors[names[kv, i]].float().reshape(1) for i in layers]) for kv in "kv")
        return cls(k, v, convention)

    def __len__(self) -> int:
        return len(self.k)

    def layer(self, layer_id: int) -> KVScales:
        """One layer's, as scales of a model with one layer. ValueError if there is no such layer."""
        if not 0 <= layer_id < len(self):
            raise ValueError(f"KVScales.layer: layer_id is {layer_id}; allowed: 0 to {len(self) - 1}")
        one = slice(layer_id, layer_id + 1)
        return KVScales(self.k[one], self.v[one], self.convention)

    def to_convention(self, convention: str) -> KVScales:
        """Scales of the same magnitudes in another convention."""
        require_convention("KVScales.to_convention", convention)
        ratio = SCALE_CONVENTIONS[self.convention] / SCALE_CONVENTIONS[convention]
        return KVScales(self.k * ratio, self.v * ratio, convention)

    def to(self, device: torch.device | str) -> KVScales:
        """The same scales on another device."""
        return KVScales(self.k.to(device), self.v.to(device), self.convention)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: ``k_scales`` and ``v_scales``, and the convention in its metadata."""
        from safetensors.torch import save_file

        # Copies, as a file takes no tensors that share memory.
        tensors = {f"{name}_scales": torch.empty(len(t)).copy_(t) for name, t in (("k", self.k), ("v", self.v))}
        save_file(tensors, path, metadata={"scale_convention": self.convention})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> KVScales:
        """Read what :meth:`save` wrote. ValueError where the file has other tensors or no convention."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            if names != {"k_scales", "v_scales"} or "scale_convention" not in metadata:
                given = f"a file of {sorted(names)} with the metadata {metadata}"
                allowed = "k_scales and v_scales with a scale_convention"
                raise ValueError(f"KVScales.load: {os.fspath(path)!r} is {given}; allowed: {allowed}")
            k, v = file.get_tensor("k_scales"), file.get_tensor("v_scales")
        return cls(k, v, metadata["scale_convention"]).to(device)
