"""``torch.nn.Linear`` with FP4 or MXFP8 weights.

The layers are for inference: run them under ``torch.no_grad()`` or ``torch.inference_mode()``. The operators have no
backward, and quantising activations that require grad raises at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import MXFP4, MXFP8, NVFP4, BlockFormat
from ._block_scaled import BlockScaledLinear, allowed_values, can_hold

__all__ = ["ACTIVATIONS", "FP4Linear", "MXFP8Linear"]

ACTIVATIONS = ("same", "bf16")
_GLOBAL_SCALES = ("weight_global_scale", "input_global_scale")
_FP4_FORMATS = {f.name: f for f in (NVFP4, MXFP4)}

_ENCODED_MAX = 448.0 * 6.0
"""The largest magnitude in NVFP4 before the global scale: E4M3's times E2M1's."""
_SMALLEST_AMAX = _ENCODED_MAX / 2.0**63
"""Below it the encode scale stays at 2^63: the product of two such scales is still finite in fp32."""


def encode_scale(x: Tensor) -> Tensor:
    """The NVFP4 encode scale of a whole tensor: ``2688 / amax``, float32 ``[1]``, without a synchronisation.

    ``x`` is ``[M, K]`` with K > 0; M may be 0. The result is finite and above zero whatever x holds: an amax of 0
    (or below 3e-16) counts as 3e-16 and an infinity as the largest float32; with a NaN it is 1.
    """
    # One more zero, since the maximum over no rows has no value.
    amax = nn.functional.pad(x.abs().amax(-1).float(), (0, 1)).amax(0, keepdim=True)
    amax = amax.nan_to_num(nan=_ENCODED_MAX, posinf=torch.finfo(torch.float32).max)
    return _ENCODED_MAX / amax.clamp(min=_SMALLEST_AMAX)


def _mark(t: Tensor) -> tuple[int, int] | None:
    """Changes with every write in place that torch sees; inference tensors have none."""
    return None if t.is_inference() else (t._version, t.data_ptr())


def _fp4_format(name: str) -> BlockFormat:
    if name not in list(_FP4_FORMATS):  # a list, as what is given may have no hash
        raise ValueError(f"FP4Linear: weight_format is {name!r}; allowed: {allowed_values(list(_FP4_FORMATS))}")
    return _FP4_FORMATS[name]


def _out_dtype(x: Tensor) -> torch.dtype | None:
    """x's dtype as the operators take it: None stands for bfloat16 where x is that.

    AOTInductor before torch 2.13 passes a dtype that is given as another one.
    """
    return None if x.dtype == torch.bfloat16 else x.dtype


class FP4Linear(BlockScaledLinear):
    """``torch.nn.Linear`` with NVFP4 or MXFP4 weights, for inference (no backward; use ``torch.no_grad()``).

    A new layer holds zeros: :meth:`from_linear` quantises trained weights, ``load_state_dict`` reads quantised ones.

    Args:
        in_features: K, a positive multiple of the block size: 16 for NVFP4, 32 for MXFP4.
        out_features: N, 1 or more.
        bias: whether there is one.
        weight_format: ``"nvfp4"`` or ``"mxfp4"``.
        activations: ``"same"`` quantises the activations to the weights' format (W4A4). ``"bf16"`` keeps them in
            16 bits (W4A16): bfloat16 and float16 as they are, float32 rounded to bfloat16.
        device: of the buffers and the bias.
        dtype: of the bias.

    Attributes:
        weight: uint8 ``[N, K/2]``, even k in the low nibble.
        weight_scale: uint8 block scales in the 128x4 layout, ``[round_up(N, 128), round_up(K/block size, 4)]``.
        weight_global_scale: float32 ``[1]``, the encode scale ``2688 / amax(weight)``; None for MXFP4.
        alpha: float32 ``[1]``, what the product is multiplied by: the reciprocal of the global scales; not in the state
            dict. Assigning to a global scale and loading a state dict renew it; where one was written in place (not by
            way of ``.data`` or NumPy, which torch does not see), replaced for a call
            (``torch.func.functional_call``), or is an inference tensor, calls work it out. What is compiled or exported
            after a write in place keeps it as it was; so does what ``torch.export`` makes, unless strict, after a
            tensor was put into ``_buffers`` itself. None where there is no global scale, or each call has one of its
            own.
        input_global_scale: float32 ``[1]``, the encode scale of every input, say ``2688 / amax`` over calibration
            data; NVFP4 with activations ``"same"`` only. None: ``2688 / amax`` of each call's whole input, so that
            the result for a row depends a little on the rows beside it; an infinite value in one row, or one some
            10^7 times theirs, makes those rows zeros.
        weight_layout: ``"plain"``, as above, or another after :meth:`prepare`, with padded sizes and scales of other
            dimensions, which tell it: weight and scales of either layout can be given for a call, both of them.
        bias: a Parameter ``[N]``, or None.

    Casts (``.to(dtype)``, ``.half()``) reach the bias alone.

    Raises:
        ValueError: a size, a format or a kind of activations that is not allowed.
    """

    weight_global_scale: Tensor | None
    input_global_scale: Tensor | None
    alpha: Tensor | None
    _alpha_of: list[tuple[Tensor, tuple[int, int] | None]]
    """The global scales that alpha is of, and their marks."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_format: str = "nvfp4",
        activations: str = "same",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        fmt = _fp4_format(weight_format)
        if activations not in ACTIVATIONS:
            raise ValueError(f"FP4Linear: activations is {activations!r}; allowed: {allowed_values(ACTIVATIONS)}")
        super().__init__(in_features, out_features, bias, fmt, device, dtype)
        self.activations = activations
        self._alpha_of = []
        with torch.inference_mode(False):  # writes to the scale are to be seen
            scale = torch.ones(1, dtype=torch.float32, device=device) if fmt.has_global_scale else None
        self.register_buffer("weight_global_scale", scale)
        self.register_buffer("input_global_scale", None)
        self.register_buffer("alpha", None, persistent=False)
        self._renew_alpha()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self._renew_alpha_if_of(name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent)
        self._renew_alpha_if_of(name)

    def _renew_alpha_if_of(self, name: str) -> None:
        if name in _GLOBAL_SCALES and "alpha" in self._buffers:
            self._renew_alpha()

    def _renew_alpha(self) -> None:
        """Work out what a product's sums are multiplied by, here and not in each call: a kernel less."""
        if len({t.device for t in self._global_scales()}) > 1:
            return  # one of them has been moved or loaded, and the other one comes next
        old, new = self.alpha, self._worked_out_alpha()
        if old is not None and new is not None and self._scales_are_those_of_alpha() and can_hold(old, new):
            old.copy_(new)  # as the scales were written in place, for CUDA graphs that read them where they are
        else:
            self.alpha = new
        self._remember_scales()

    def _global_scales(self) -> list[Tensor]:
        named = self._buffers  # as attributes they cost each call a microsecond more
        return [t for n in _GLOBAL_SCALES if (t := named.get(n)) is not None]

    def _remember_scales(self) -> None:
        self._alpha_of = [(t, _mark(t)) for t in self._global_scales()]

    def _alpha_is_current(self) -> bool:
        scales, before = self._global_scales(), self._alpha_of
        return len(scales) == len(before) and all(
            t is u and v is not None and _mark(t) == v for t, (u, v) in zip(scales, before, strict=True)
        )

    def _scales_are_those_of_alpha(self) -> bool:
        scales, before = self._global_scales(), self._alpha_of
        return len(scales) == len(before) and all(t is u for t, (u, _) in zip(scales, before, strict=True))

    def _alpha_is_of_graph(self) -> bool:
        """Whether a graph that is being made may read alpha, by what is known of tensors without data."""
        scales, alpha = self._global_scales(), self.alpha
        if alpha is None or any(t.device != alpha.device for t in scales):
            return False
        if torch.compiler.is_dynamo_compiling():
            return self._scales_are_those_of_alpha()
        return len(scales) == len(self._alpha_of)  # torch.export puts tensors of its own in their place

    def _worked_out_alpha(self) -> Tensor | None:
        scale, input_scale = self.weight_global_scale, self.input_global_scale
        if self.activations == "same" and scale is not None:
            scale = None if input_scale is None else input_scale * scale
        return None if scale is None else 1.0 / scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        current, had_data = self._alpha_is_current(), not self.weight.is_meta
        result = super()._apply(fn, recurse)
        if current and (had_data or self.weight.is_meta):  # alpha has moved with them, and graphs go on with it
            self._remember_scales()
        elif not had_data:  # what comes from the meta device has no values yet
            self._alpha_of = []
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._renew_alpha()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        weight_format: str = "nvfp4",
        activations: str = "same",
        input_global_scale: Tensor | None = None,
        prepare: bool = True,
    ) -> FP4Linear:
        """Quantise the weight of ``linear``, which stays as it is; the bias Parameter is shared, not copied.

        Args:
            linear: weight bfloat16, float16 or float32 ``[N, K]`` on any device, meta included.
            weight_format, activations: as for the class.
            input_global_scale: float32, one element, above zero; for NVFP4 with activations ``"same"``.
            prepare: on a GPU whose fastest kernels read a weight layout of their own, bring the weight into it (see
                :meth:`prepare`), unless ``set_backend`` or the environment asks for another backend.

        Raises:
            ValueError: an argument that is not allowed, a weight that is not finite, or hooks, modules, tensors or a
                forward of its own that ``linear`` has, which would be lost.
        """
        cls._require_quantizable(linear, _fp4_format(weight_format))
        sizes = (linear.in_features, linear.out_features, False)
        new = cls(*sizes, weight_format=weight_format, activations=activations, device="meta")
        weight = linear.weight.detach()
        if input_global_scale is not None:
            new.input_global_scale = new._checked_input_scale(input_global_scale).to(weight.device)
        if new._block_format.has_global_scale:
            with torch.inference_mode(False):  # writes to the scale are to be seen
                new.weight_global_scale = encode_scale(weight)
        # No kernel of another layout multiplies float16 and MXFP4.
        prepare = prepare and not (weight.dtype == torch.float16 and activations == "bf16" and weight_format == "mxfp4")
        codes, scales = new._quantize(weight, new.weight_global_scale)
        new._take_over(linear, codes, scales, prepare)
        return new

    def _checked_input_scale(self, scale: Tensor) -> Tensor:
        if not self._block_format.has_global_scale or self.activations != "same":
            given = f"given with weight_format={self.format!r}, activations={self.activations!r}"
            raise ValueError(f"FP4Linear: input_global_scale is {given}; allowed: None but for 'nvfp4' and 'same'")
        ok = isinstance(scale, Tensor) and scale.dtype == torch.float32 and scale.numel() == 1
        if not ok or not (scale.is_meta or 0 < scale.item() < float("inf")):
            raise ValueError(
                f"FP4Linear: input_global_scale is {scale}; allowed: a float32 tensor of one finite element above zero"
            )
        return scale.detach().reshape(1).clone()  # the layer's own: a state dict is loaded into it

    def _quantize(self, x: Tensor, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.fp4.fp4_quantize(
            input=x,
            global_scale=global_scale,
            sf_vec_size=self._block_format.block_size,
            sf_use_ue8m0=self._block_format.scale == "ue8m0",
        )

    @property
    def _product_op(self) -> str:
        return "mm_bf16_fp4" if self.activations == "bf16" else "mm_fp4"

    def _product(self, x: Tensor, layout: str) -> Tensor:
        block_size = self._block_format.block_size
        compiling = torch.compiler.is_compiling()
        known = self._alpha_is_of_graph() if compiling else self._alpha_is_current()
        alpha = self.alpha if known else self._worked_out_alpha()
        if self.activations == "bf16":
            return torch.ops.fp4.mm_bf16_fp4(
                a=x if x.dtype == torch.float16 else x.to(torch.bfloat16),
                b=self.weight,
                b_descale=self.weight_scale,
                alpha=alpha,
                out_dtype=_out_dtype(x),
                block_size=block_size,
                b_layout=layout,
            )
        input_global = self.input_global_scale
        if self.weight_global_scale is not None and input_global is None:
            input_global = encode_scale(x)
            alpha = 1.0 / (input_global * self.weight_global_scale)
        codes, scales = self._quantize(x, input_global)
        return torch.ops.fp4.mm_fp4(
            a=codes,
            b=self.weight.T,
            a_descale=scales,
            b_descale=self.weight_scale.T if layout == "plain" else self.weight_scale,
            alpha=alpha,
            out_dtype=_out_dtype(x),
            block_size=block_size,
            use_nvfp4=self.format == NVFP4.name,
            b_layout=layout,
        )

    def _load(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Whether there is a static scale is the checkpoint's to say, as far as this layer could use one.
        given = state_dict.get(prefix + "input_global_scale")
        usable = self.weight_global_scale is not None and self.activations == "same"
        new = self.input_global_scale is None and isinstance(given, Tensor) and usable
        if new:
            self.input_global_scale = torch.ones(1, dtype=torch.float32, device=self.weight.device)
        errors = rest[-1]
        before = len(errors)
        super()._load(state_dict, prefix, *rest)
        if new and len(errors) > before:
            self.input_global_scale = None
        self._renew_alpha()

    def _describe(self) -> str:
        return f"{super()._describe()}, activations={self.activations!r}"


class MXFP8Linear(BlockScaledLinear):
    """``torch.nn.Linear`` with MXFP8 weights and activations, for inference (no backward; use ``torch.no_grad()``).

    A new layer holds zeros: :meth:`from_linear` quantises trained weights, ``load_state_dict`` reads quantised ones.

    Args:
        in_features: K, a positive multiple of 32.
        out_features: N, 1 or more.
        bias: whether there is one.
        device: of the buffers and the bias.
        dtype: of the bias.

    Attributes:
        weight: float8_e4m3fn ``[N, K]``.
        weight_scale: uint8 UE8M0 block scales in the 128x4 layout, flat:
            ``[round_up(N, 128) * round_up(K/32, 4)]``.
        weight_layout: ``"plain"``, as above, or another after :meth:`prepare`, with padded sizes and scales of other
            dimensions, which tell it: weight and scales of either layout can be given for a call, both of them.
        bias: a Parameter ``[N]``, or None.

    Casts (``.to(dtype)``, ``.half()``) reach the bias alone.

    Raises:
        ValueError: a size that is not allowed.
    """

    _plain_scale_dim = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, MXFP8, device, dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, prepare: bool = True) -> MXFP8Linear:
        """Quantise the weight of ``linear``, which stays as it is; the bias Parameter is shared, not copied.

        Args:
            linear: weight bfloat16, float16 or float32 ``[N, K]`` on any device, meta included.
            prepare: on a GPU whose fastest kernels read a weight layout of their own, bring the weight into it (see
                :meth:`prepare`), unless ``set_backend`` or the environment asks for another backend.

        Raises:
            ValueError: K not a multiple of 32, a weight that is not finite, or hooks, modules, tensors or a forward of
                its own that ``linear`` has, which would be lost.
        """
        cls._require_quantizable(linear, MXFP8)
        new = cls(linear.in_features, linear.out_features, False, device="meta")
        codes, scales = torch.ops.fp4.mxfp8_quantize(input=linear.weight.detach())
        new._take_over(linear, codes, scales, prepare)
        return new

    _product_op = "mm_mxfp8"

    def _product(self, x: Tensor, layout: str) -> Tensor:
        codes, scales = torch.ops.fp4.mxfp8_quantize(input=x)
        return torch.ops.fp4.mm_mxfp8(
            a=codes,
            b=self.weight.T,
            a_descale=scales,
            b_descale=self.weight_scale if layout == "plain" else self.weight_scale.flatten(),
            out_dtype=_out_dtype(x),
            b_layout=layout,
        )

    # Python's pickle writes float8 tensors that torch can't read back; bytes it can.

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_buffers"] = {**self._buffers, "weight": self.weight.view(torch.uint8)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.weight = self.weight.view(torch.float8_e4m3fn)
