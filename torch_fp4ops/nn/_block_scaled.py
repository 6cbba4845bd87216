"""What the quantised layers share: sizes, bias, shapes around the operator, and buffers whose bytes no cast touches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import scale_layouts
from ..formats import FORMATS, BlockFormat
from ..hopper_layout import NotStorableError, pack_hopper_weight, unpack_hopper_weight
from ..selection import requested

__all__ = ["LAYOUTS", "BlockScaledLinear", "allowed_values", "best_layout", "can_hold", "why_not_quantizable"]

LAYOUTS = ("hopper", "plain")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_WEIGHT = ("weight", "weight_scale")


def allowed_values(values: Sequence[Any]) -> str:
    return " or ".join(str(v) if isinstance(v, torch.dtype) else repr(v) for v in values)


def why_not_quantizable(linear: nn.Linear, fmt: BlockFormat) -> str | None:
    """Why a layer can't be brought into ``fmt``; None if it can. Reads the weight (a synchronisation on a GPU)."""
    lost = _lost_by_conversion(linear)
    if lost is not None:
        return f"{lost}, which the new layer would lose"
    weight = linear.weight
    if linear.in_features == 0 or linear.in_features % fmt.block_size:
        return f"in_features is {linear.in_features}; allowed: a positive multiple of {fmt.block_size} ({fmt.name})"
    if linear.out_features == 0:
        return "out_features is 0; allowed: 1 or more"
    if is_traceable_wrapper_subclass(weight):
        return f"weight is a {type(weight).__name__}; allowed: a plain tensor"
    if weight.layout != torch.strided:
        return f"weight is {weight.layout}; allowed: torch.strided"
    if weight.dtype not in _FLOATS:
        return f"weight is {weight.dtype}; allowed: {allowed_values(_FLOATS)}"
    if weight.shape != (linear.out_features, linear.in_features):
        return f"weight is of shape {tuple(weight.shape)}; allowed: ({linear.out_features}, {linear.in_features})"
    if not weight.is_meta and not bool(weight.detach().isfinite().all()):
        return "weight holds NaN or infinite values; allowed: finite values"
    return None


def _lost_by_conversion(linear: nn.Linear) -> str | None:
    """What a layer has beside the weight and the bias of an ``nn.Linear``; None if nothing."""
    if "forward" in linear.__dict__ or type(linear).forward is not nn.Linear.forward:
        return "it has a forward of its own"
    tensors = (*linear.named_parameters(recurse=False), *linear.named_buffers(recurse=False))
    more = [name for name, _ in (*linear.named_children(), *tensors) if name not in ("weight", "bias")]
    if more:
        return f"it has more than a weight and a bias ({', '.join(more)})"
    hooks = [name.strip("_") for name, value in vars(linear).items() if name.endswith("hooks") and value]
    return f"it has hooks ({', '.join(hooks)})" if hooks else None


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
    _plain_scale_dim: ClassVar[int] = 2
    """Dimensions of ``weight_scale``; the other layout's scales have one less or one more, so that they tell it."""

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
        self.register_buffer("weight_scale", self._plain_form(torch.zeros(shape, dtype=torch.uint8, device=device)))
        values = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values, requires_grad=False))

    @property
    def _block_format(self) -> BlockFormat:
        return FORMATS[self.format]

    @property
    def _product_op(self) -> str:
        """The name of the GEMM."""
        raise NotImplementedError

    @property
    def weight_layout(self) -> str:
        """``"plain"``, as the class describes it, or ``"hopper"`` after :meth:`prepare`."""
        # Told by the tensors, so that what replaces them (``functional_call`` with a state dict) is read as what it is.
        scale: Any = self._buffers["weight_scale"]  # as an attribute it costs each call half a microsecond more
        return "plain" if scale.dim() == self._plain_scale_dim else "hopper"

    @property
    def weight_nbytes(self) -> int:
        """Bytes of the weight with its scales, padding included; without the bias."""
        return sum(b.nbytes for name, b in self.named_buffers(recurse=False) if name.startswith("weight"))

    def prepare(self, layout: str = "hopper") -> bool:
        """Bring the weight and its scales, in place, into the layout that a GEMM reads.

        ``"hopper"`` is for compute capability 9.0 (see ``torch_fp4ops.hopper_layout``): elsewhere only the reference
        reads it, slowly. ``"plain"`` undoes it. It can be done on any device, and again and again: what is done
        already is left. ``state_dict()`` and ``load_state_dict()`` speak of the plain weight in both layouts: the
        state dict of a prepared layer is a snapshot, of its bias, too (but for ``keep_vars=True``), and what is loaded
        goes where the packed weight is. Prepare before compiling or exporting.

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
            self.weight = weight.view(self.weight.dtype)
            self.weight_scale = scale if self._plain_scale_dim == 1 else scale.flatten()
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
        return codes.clone(memory_format=torch.contiguous_format).view(self.weight.dtype), self._plain_form(scales)

    def _plain_form(self, scales: Tensor) -> Tensor:
        return scales.flatten() if self._plain_scale_dim == 1 else scales

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
        layout = self.weight_layout
        out = self._product(x.reshape(-1, self.in_features), layout)
        if layout != "plain":
            out = out[:, : self.out_features]
        out = out.reshape(*x.shape[:-1], self.out_features)
        # A plain add, which Inductor can fuse with what follows.
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _product(self, x: Tensor, layout: str) -> Tensor:
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
        if self.weight_layout == "plain":
            return
        # The plain weight is a copy, and so is all beside it: who wrote into these would change half of the layer.
        plain = dict(zip(_WEIGHT, self._plain_weight(), strict=True))
        for name in self._buffers if keep_vars else (*self._buffers, *self._parameters):
            key = prefix + name
            if key in destination:
                destination[key] = plain[name] if name in plain else destination[key].clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        args = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        hooks = self._load_state_dict_pre_hooks
        for hook in hooks.values():  # now, as they may bring about what is looked at here
            hook(*args)
        self._load_state_dict_pre_hooks = OrderedDict()
        try:
            self._load(*args)
        finally:
            self._load_state_dict_pre_hooks = hooks

    def _load(self, *args: Any) -> None:
        """What is given, or nothing of it: a layer is not left with codes of one weight and scales of another one."""
        state_dict, prefix, local_metadata, *_, error_msgs = args
        layout, packed = self.weight_layout, (self.weight, self.weight_scale)
        repack = layout != "plain" and any(prefix + name in state_dict for name in _WEIGHT)
        if repack:
            self.prepare("plain")
        errors = self._why_not_loadable(state_dict, prefix, local_metadata.get("assign_to_params_buffers", False))
        if errors:
            error_msgs.extend(errors)
        else:
            super()._load_from_state_dict(*args)
        if repack and errors:
            self.weight, self.weight_scale = packed
        elif repack and self.prepare(layout):
            for name, old in zip(_WEIGHT, packed, strict=True):
                new = getattr(self, name)
                if can_hold(old, new):
                    setattr(self, name, old.copy_(new))  # CUDA graphs read it where it was

    def _why_not_loadable(self, state_dict: dict[str, Any], prefix: str, assign: bool) -> list[str]:
        errors = []
        for name, own in (*self._buffers.items(), *self._parameters.items()):
            if own is None or prefix + name not in state_dict or name in self._non_persistent_buffers_set:
                continue
            given = state_dict[prefix + name]
            if not isinstance(given, Tensor):
                errors.append(f"{prefix}{name} is a {type(given).__name__}; allowed: a tensor")
            elif name in self._buffers and given.dtype != own.dtype:
                # Copying would convert the values and so take, say, an unquantised weight for codes.
                errors.append(f"{prefix}{name} is {given.dtype}; allowed: {own.dtype}")
            elif given.shape != own.shape:
                sizes = f"{tuple(given.shape)}; allowed: {tuple(own.shape)}"
                errors.append(f"size mismatch for {prefix}{name}: it is of shape {sizes}")  # torch's words first
            elif given.layout != own.layout:
                errors.append(f"{prefix}{name} is {given.layout}; allowed: {own.layout}")
            elif given.is_meta and not own.is_meta and not assign:
                errors.append(f"{prefix}{name} is on the meta device; allowed: a tensor with data, or assign=True")
        return errors

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


def can_hold(old: Tensor, new: Tensor) -> bool:
    """Whether ``new`` can be copied into ``old`` and no one see a difference but in values."""
    same = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
    return same and not old.is_inference()
