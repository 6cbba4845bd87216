"""What the quantised layers share: sizes, bias, shapes around the operator, and buffers whose bytes no cast touches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import scale_layouts
from ..formats import FORMATS, BlockFormat
from ..hopper_layout import NotStorableError, pack_hopper_weight, unpack_hopper_weight
from ..selection import requested

__all__ = ["LAYOUTS", "BlockScaledLinear", "allowed_values", "best_layout", "why_not_quantizable"]

LAYOUTS = ("hopper", "plain")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def allowed_values(values: Sequence[Any]) -> str:
    return " or ".join(str(v) if isinstance(v, torch.dtype) else repr(v) for v in values)


def why_not_quantizable(linear: nn.Linear, fmt: BlockFormat) -> str | None:
    """Why a layer can't be brought into ``fmt``; None if it can. Reads the weight (a synchronisation on a GPU)."""
    weight = linear.weight
    if linear.in_features == 0 or linear.in_features % fmt.block_size:
        return f"in_features is {linear.in_features}; allowed: a positive multiple of {fmt.block_size} ({fmt.name})"
    if linear.out_features == 0:
        return "out_features is 0; allowed: 1 or more"
    if is_traceable_wrapper_subclass(weight):
        return f"weight is a {type(weight).__name__}; allowed: a plain tensor"
    if weight.dtype not in _FLOATS:
        return f"weight is {weight.dtype}; allowed: {allowed_values(_FLOATS)}"
    if weight.shape != (linear.out_features, linear.in_features):
        return f"weight is of shape {tuple(weight.shape)}; allowed: ({linear.out_features}, {linear.in_features})"
    if linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__:
        return "it has forward hooks or a forward of its own, which the new layer would lose; remove them first"
    if not weight.is_meta and not bool(weight.detach().isfinite().all()):
        return "weight holds NaN or infinite values; allowed: finite values"
    return None


def best_layout(device: torch.device, op_name: str) -> str:
    """The layout that the fastest kernels for a device read; plain where another backend is asked for."""
    if device.type != "cuda" or requested(op_name) not in ("auto", "gluon"):
        return "plain"
    try:
        from ..ops._hopper_launch import unavailable
    except ImportError:  # Triton is missing, or too old
        return "plain"
    return "hopper" if unavailable(device) is None else "plain"


class BlockScaledLinear(nn.Module):
    """The base of :class:`FP4Linear` and :class:`MXFP8Linear`; a new layer holds zeros."""

    weight: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None
    weight_layout: str = "plain"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        fmt: BlockFormat,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        name = type(self).__name__
        if in_features <= 0 or in_features % fmt.block_size:
            allowed = f"a positive multiple of {fmt.block_size} ({fmt.name})"
            raise ValueError(f"{name}: in_features is {in_features}; allowed: {allowed}")
        if out_features <= 0:
            raise ValueError(f"{name}: out_features is {out_features}; allowed: 1 or more")
        self.in_features = in_features
        self.out_features = out_features
        self.format = fmt.name
        codes = torch.zeros(out_features, in_features // fmt.elements_per_byte, dtype=torch.uint8, device=device)
        self.register_buffer("weight", codes if fmt.element == "e2m1" else codes.view(torch.float8_e4m3fn))
        shape = scale_layouts.scale_shape(out_features, in_features // fmt.block_size, scale_layouts.SWIZZLED_128X4)
        self.register_buffer("weight_scale", torch.zeros(shape, dtype=torch.uint8, device=device))
        values = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if values is None else nn.Parameter(values, requires_grad=False)

    @property
    def _block_format(self) -> BlockFormat:
        return FORMATS[self.format]

    @property
    def _product_op(self) -> str:
        """The name of the GEMM."""
        raise NotImplementedError

    @property
    def weight_nbytes(self) -> int:
        """Bytes of the weight with its scales, padding included; without the bias."""
        return sum(b.nbytes for name, b in self.named_buffers(recurse=False) if name.startswith("weight"))

    def prepare(self, layout: str = "hopper") -> bool:
        """Bring the weight and its scales, in place, into the layout that a GEMM reads.

        ``"hopper"`` is for compute capability 9.0 (see ``torch_fp4ops.hopper_layout``): elsewhere only the reference
        reads it, slowly. ``"plain"`` undoes it. It can be done on any device, and again and again: what is done
        already is left. ``state_dict()`` and ``load_state_dict()`` speak of the plain weight in both layouts. Prepare
        before compiling or exporting.

        Returns:
            Whether the layer now has that layout. A weight that it has no form for, and one without data, on the meta
            device, stay as they are.

        Raises:
            ValueError: an unknown layout.
        """
        if layout not in LAYOUTS:
            name = type(self).__name__
            raise ValueError(f"{name}.prepare: layout is {layout!r}; allowed: {allowed_values(LAYOUTS)}")
        if layout == self.weight_layout:
            return True
        if layout == "plain":
            self.weight, self.weight_scale = self._plain_weight()
        elif self.weight.is_meta:
            return False
        else:
            blocks = self.in_features // self._block_format.block_size
            scales = scale_layouts.unswizzle(self.weight_scale, self.out_features, blocks, scale_layouts.SWIZZLED_128X4)
            try:
                weight, scale = pack_hopper_weight(self.weight, scales, self._block_format)
            except NotStorableError:
                return False
            self.weight, self.weight_scale = weight.view(self.weight.dtype), self._shaped(scale)
        self.weight_layout = layout
        return True

    def _plain_weight(self) -> tuple[Tensor, Tensor]:
        """``weight`` and ``weight_scale`` as the class describes them."""
        if self.weight_layout == "plain":
            return self.weight, self.weight_scale
        fmt, rows = self._block_format, self.weight.shape[0]
        codes, scales = unpack_hopper_weight(self.weight.view(torch.uint8), self.weight_scale.view(rows, -1), fmt)
        # Clones, as a saved view would bring the padding with it.
        codes = codes[: self.out_features, : self.in_features // fmt.elements_per_byte]
        scales = scales[: self.out_features, : self.in_features // fmt.block_size]
        scales = scale_layouts.swizzle(scales, scale_layouts.SWIZZLED_128X4)
        return codes.clone(memory_format=torch.contiguous_format).view(self.weight.dtype), self._shaped(scales)

    def _shaped(self, scales: Tensor) -> Tensor:
        """Scales with the dimensions that ``weight_scale`` has."""
        return scales.flatten() if self.weight_scale.dim() == 1 else scales

    def forward(self, x: Tensor) -> Tensor:
        """``x @ dequantize(weight).T + bias``.

        Args:
            x: bfloat16, float16 or float32 ``[..., in_features]``, one dimension or more.

        Returns:
            ``[..., out_features]`` of x's dtype; the bias is added in that dtype.

        Raises:
            ValueError: another dtype or last dimension.
            NotImplementedError: x requires grad, grad is enabled, and the activations are to be quantised.
        """
        name = type(self).__name__
        # A parent that casts its input to `weight.dtype` ends here, not in arithmetic on codes.
        if x.dtype not in _FLOATS:
            raise ValueError(f"{name}: the input is {x.dtype}; allowed: {allowed_values(_FLOATS)}")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"{name}: the input is of shape {tuple(x.shape)}; allowed: [..., {self.in_features}]")
        # The operator sees two dimensions whatever the rank, so that a rank is no new case to it.
        out = self._product(x.reshape(-1, self.in_features))
        if self.weight_layout != "plain":
            out = out[:, : self.out_features]
        out = out.reshape(*x.shape[:-1], self.out_features)
        # A plain add, which Inductor can fuse with what follows.
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _product(self, x: Tensor) -> Tensor:
        """``x @ dequantize(weight).T`` of 2-D x, in x's dtype; more columns where the layout pads the weight."""
        raise NotImplementedError

    @classmethod
    def _require_quantizable(cls, linear: nn.Linear, fmt: BlockFormat) -> None:
        where = f"{cls.__name__}.from_linear"
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{where}: linear is a {type(linear).__name__}; allowed: nn.Linear")
        reason = why_not_quantizable(linear, fmt)
        if reason is not None:
            raise ValueError(f"{where}: {reason}")

    def _take_over(self, linear: nn.Linear, weight: Tensor, weight_scale: Tensor, prepare: bool) -> None:
        self.weight, self.weight_scale, self.bias = weight, weight_scale, linear.bias
        self.train(linear.training)
        if prepare:
            self.prepare(best_layout(weight.device, self._product_op))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `module.to(dtype)` casts every floating-point buffer, float8 included. Codes and scales mean something in
        # their own dtype only, so they pass as bytes.
        buffers = {id(b) for b in self._buffers.values()}
        return super()._apply(lambda t: _apply_to_bytes(fn, t) if id(t) in buffers else fn(t), recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_layout != "plain":
            destination[prefix + "weight"], destination[prefix + "weight_scale"] = self._plain_weight()

    def _load_from_state_dict(self, *args: Any) -> None:
        layout = self.weight_layout
        self.prepare("plain")
        try:
            self._load_plain(*args)
        finally:
            self.prepare(layout)

    def _load_plain(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name)
            if isinstance(buffer, Tensor) and isinstance(given, Tensor) and given.dtype != buffer.dtype:
                # Copying would convert the values and so take, say, an unquantised weight for codes.
                error_msgs.append(f"{prefix}{name} is {given.dtype}; allowed: {buffer.dtype}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        layout = "" if self.weight_layout == "plain" else f"weight_layout={self.weight_layout!r}, "
        return f"{sizes}, {self._describe()}, bias={self.bias is not None}, {layout}weight_nbytes={self.weight_nbytes}"

    def _describe(self) -> str:
        return f"format={self.format!r}"


def _apply_to_bytes(fn: Callable[[Tensor], Tensor], buffer: Tensor) -> Tensor:
    as_bytes = buffer.view(torch.uint8)
    result = fn(as_bytes)
    if result is as_bytes:
        return buffer
    if result.dtype != torch.uint8:  # `module.type(dtype)` casts integers too
        result = as_bytes.to(result.device)
    return result.view(buffer.dtype)
