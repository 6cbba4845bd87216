"""Weights brought into the form that a GEMM backend reads, once, when a model is loaded.

Checkpoints differ in nibble order and scale layout, backends in the order of rows: nothing in the bytes tells. So the
result carries its layout, and the op refuses a backend that can't read it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import scale_layouts
from .codecs import NATIVE_DTYPES, as_bytes
from .formats import MXFP4, MXFP8, NVFP4
from .weight_layouts import (
    GEMM_LAYOUTS,
    interleave_moe_scales_for_sm90_mixed_gemm,
    interleave_moe_weights_for_sm90_mixed_gemm,
    pack_hopper_weight,
    shuffle_matrix_a,
    shuffle_matrix_sf_a,
    swap_nibbles,
)

__all__ = ["PreparedWeight", "SM90MoEWeights", "prepare_fp4_weight", "prepare_sm90_moe_weights"]

NIBBLE_ORDERS = ("low_first", "high_first")
SCALE_LAYOUTS = (scale_layouts.LINEAR, scale_layouts.SWIZZLED_128X4)
_SHUFFLED_ROWS = 128
_SCALE_COLUMNS = 4
_ONE_AS_UE8M0 = 127


@dataclass(frozen=True, eq=False)  # tensors have no one truth value to compare by
class PreparedWeight:
    """A weight ``[n, k]`` as one layout of :func:`mm_fp4`, :func:`mm_bf16_fp4` or :func:`mm_mxfp8` stores it.

    Attributes:
        weight: uint8 ``[N, K/2]`` (FP4) or float8_e4m3fn ``[N, K]`` (MXFP8), N and K padded where the layout wants it.
        scale: uint8 block scales in the 128x4 layout (of shuffled rows for ``"trtllm"``), ``[round_up(N, 128),
            round_up(K / block_size, 4)]``, or ``[N, K / block_size]`` for ``"hopper"``; the only copy of them.
        layout: ``b_layout`` of the ops.
        n, k: sizes without padding.
        block_size: 16 for NVFP4, 32 for MXFP4 and MXFP8.
    """

    weight: Tensor
    scale: Tensor
    layout: str
    n: int
    k: int
    block_size: int

    def mm(
        self,
        a: Tensor,
        a_descale: Tensor | None = None,
        alpha: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        *,
        use_8x4_sf_layout: bool = False,
        backend: str = "auto",
    ) -> Tensor:
        """``dequantize(a) @ weight.T * alpha`` by :func:`mm_fp4`, or :func:`mm_mxfp8` for MXFP8 (``alpha`` None).

        16-bit activations, without ``a_descale``, are multiplied by :func:`mm_bf16_fp4`.

        Args and errors as there; ``a`` is ``(m, k)`` without padding, its scales swizzled and so padded already; both
        may have the format's native dtype, and MXFP8's ``a`` may be uint8.
        ``out_dtype`` None is that of 16-bit activations, and otherwise bfloat16. Works under
        ``torch.compile(fullgraph=True)``.

        Returns:
            ``(m, n)``, a view of the padded product where n was padded.
        """
        mxfp8 = self.weight.dtype == torch.float8_e4m3fn
        if mxfp8 and alpha is not None:
            raise ValueError("PreparedWeight.mm: alpha is given; allowed: None, as MXFP8 has no global scale")
        sixteen_bits = a.dtype in (torch.bfloat16, torch.float16)
        if sixteen_bits and (mxfp8 or a_descale is not None or use_8x4_sf_layout):
            given = f"{a.dtype} with " + ("MXFP8 weights" if mxfp8 else "scales of a")
            raise ValueError(f"PreparedWeight.mm: a is {given}; allowed: 16 bits for FP4 weights, without scales")
        if not sixteen_bits:
            if a.dtype in (torch.float32, torch.float64):
                allowed = "codes with their scales" + ("" if mxfp8 else ", or torch.bfloat16 or torch.float16")
                raise ValueError(f"PreparedWeight.mm: a is {a.dtype}; allowed: {allowed}")
            if a_descale is None:
                raise ValueError(f"PreparedWeight.mm: a_descale is None with a of {a.dtype}; allowed: the scales of a")
            fmt = MXFP8 if mxfp8 else NVFP4 if self.block_size == 16 else MXFP4
            for name, t, code in (("a", a, fmt.element), ("a_descale", a_descale, fmt.scale)):
                if t.dtype not in (torch.uint8, NATIVE_DTYPES[code]):
                    allowed = f"torch.uint8 or {NATIVE_DTYPES[code]} for {fmt.name}"
                    raise ValueError(f"PreparedWeight.mm: {name} is {t.dtype}; allowed: {allowed}")
            a_descale = as_bytes(a_descale)
        data = as_bytes(a)
        wanted = self.k if sixteen_bits or mxfp8 else self.k // 2
        if data.dim() != 2 or data.shape[1] != wanted:
            raise ValueError(f"PreparedWeight.mm: a is of shape {tuple(data.shape)}; allowed: (m, {wanted})")
        if self.layout != "hopper":
            missing = self.weight.shape[1] * (2 if sixteen_bits else 1) - data.shape[1]
            if missing:  # zeros, whose scales are the zeros that pad a_descale
                data = F.pad(data, (0, missing))
        how = {"b_layout": self.layout, "backend": backend}
        if sixteen_bits:
            out = torch.ops.fp4.mm_bf16_fp4(
                data, self.weight, self.scale, alpha, out_dtype=out_dtype, block_size=self.block_size, **how
            )
        elif mxfp8:
            out = torch.ops.fp4.mm_mxfp8(
                data.view(torch.float8_e4m3fn),
                self.weight.T,
                a_descale,
                self.scale.flatten(),
                out_dtype=out_dtype or torch.bfloat16,
                use_8x4_sf_layout=use_8x4_sf_layout,
                **how,
            )
        else:
            out = torch.ops.fp4.mm_fp4(
                data,
                self.weight.T,
                a_descale,
                self.scale.T,
                alpha,
                out_dtype or torch.bfloat16,
                block_size=self.block_size,
                use_8x4_sf_layout=use_8x4_sf_layout,
                use_nvfp4=self.block_size == 16,
                **how,
            )
        return out if self.weight.shape[0] == self.n else out[:, : self.n]

    def to(self, device: torch.device | str) -> PreparedWeight:
        """The same weight on another device. ValueError for a dtype: what bytes mean, no cast keeps."""
        try:
            device = torch.device(device)
        except (TypeError, RuntimeError):
            raise ValueError(f"PreparedWeight.to: device is {device!r}; allowed: a device") from None
        return replace(self, weight=self.weight.to(device), scale=self.scale.to(device))

    # As bytes: torch's float8 tensors can't be read back by pickle alone.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weight": as_bytes(self.weight), "dtype": self.weight.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        dtype = state.pop("dtype")
        self.__dict__.update(state, weight=state["weight"].view(dtype))


def prepare_fp4_weight(
    weight: Tensor,
    scale: Tensor,
    layout: str = "trtllm",
    nibble_order: str = "low_first",
    scale_layout: str = "linear",
    *,
    block_size: int | None = None,
    rebind: bool = False,
) -> PreparedWeight:
    """Bring a checkpoint's weight and block scales into the form that a backend reads.

    For ``"trtllm"`` rows are padded to 128, scale columns to 4 and the payload with them, then both are shuffled by
    ``shuffle_matrix_a`` and ``shuffle_matrix_sf_a``. ``"hopper"`` is what the GEMM of compute capability 9.0 reads:
    n padded to 128, k to 256, and ``pack_hopper_weight``. For ``"plain"`` (every other backend) scales are swizzled and
    the payload stays as it is. Padding is zero, so it adds nothing to a product.

    Args:
        weight: ``[N, K/2]`` packed FP4 (uint8 or float4_e2m1fn_x2), or float8_e4m3fn ``[N, K]`` (MXFP8); any
            device, the CPU included.
        scale: its block scales, uint8, float8_e4m3fn (NVFP4) or float8_e8m0fnu (MXFP4, MXFP8), on the same device:
            ``[N, K / block_size]``, or 128x4 swizzled (padded, 2-D or flat).
        layout: ``"trtllm"``, ``"hopper"`` or ``"plain"``.
        nibble_order: ``"low_first"`` if even k is in the low nibble, as everywhere here, or ``"high_first"``, as some
            diffusion checkpoints have it; their nibbles are swapped.
        scale_layout: ``"linear"`` or ``"128x4"``, how ``scale`` comes.
        block_size: 16 (NVFP4) or 32 (MXFP4, MXFP8); None: 16 for packed FP4, 32 for MXFP8.
        rebind: make the two tensors (parameters of a module, say) refer to the prepared bytes, so that the old ones
            are freed and no second copy stays.

    Returns:
        A :class:`PreparedWeight`.

    Raises:
        ValueError: an unknown layout or order, a dtype, shape or device that does not fit, or an MX weight with values
            that ``"hopper"`` can't store (see ``pack_hopper_weight``); nothing is changed then.

    Source: what FlashInfer's backends of ``mm_fp4`` and ``mm_mxfp8`` expect of a weight.
    """
    _require(layout in GEMM_LAYOUTS, "layout", layout, GEMM_LAYOUTS)
    _require(nibble_order in NIBBLE_ORDERS, "nibble_order", nibble_order, NIBBLE_ORDERS)
    _require(scale_layout in SCALE_LAYOUTS, "scale_layout", scale_layout, SCALE_LAYOUTS)
    mxfp8 = weight.dtype == torch.float8_e4m3fn
    packed = weight.dtype in (torch.uint8, getattr(torch, "float4_e2m1fn_x2", None))
    _require(mxfp8 or packed, "weight", weight.dtype, "uint8, float4_e2m1fn_x2 or float8_e4m3fn")
    _require(weight.dim() == 2, "weight", tuple(weight.shape), "two dimensions")
    _require(not (mxfp8 and nibble_order != "low_first"), "nibble_order", nibble_order, "'low_first' for MXFP8")
    block = (32 if mxfp8 else 16) if block_size is None else block_size
    _require(block == 32 or (block == 16 and not mxfp8), "block_size", block_size, "16 (NVFP4) or 32 (MXFP4, MXFP8)")
    n, k = weight.shape[0], weight.shape[1] * (1 if mxfp8 else 2)
    _require(k % block == 0, "weight", f"of K = {k}", f"K a multiple of {block}")
    native = NATIVE_DTYPES["e4m3" if block == 16 else "ue8m0"]
    _require(
        scale.dtype in (torch.uint8, native), "scale", scale.dtype, f"torch.uint8 or {native} for blocks of {block}"
    )
    _require(scale.device == weight.device, "scale", scale.device, f"{weight.device}, where weight is")
    blocks = k // block
    shape = scale_layouts.scale_shape(n, blocks, scale_layout)
    flat = scale_layout != scale_layouts.LINEAR and tuple(scale.shape) == (shape[0] * shape[1],)
    _require(flat or tuple(scale.shape) == shape, "scale", tuple(scale.shape), f"{shape} ({scale_layout})")

    data = as_bytes(weight.detach())
    if nibble_order == "high_first":
        data = swap_nibbles(data)
    linear = scale_layouts.unswizzle(as_bytes(scale.detach()), n, blocks, scale_layout)
    if layout == "trtllm":
        rows = scale_layouts.round_up(n, _SHUFFLED_ROWS) - n
        columns = scale_layouts.round_up(blocks, _SCALE_COLUMNS) - blocks
        data = shuffle_matrix_a(F.pad(data, (0, columns * (block if mxfp8 else block // 2), 0, rows)))
        linear = F.pad(linear, (0, columns, 0, rows))
        scales = shuffle_matrix_sf_a(linear).view(linear.shape)
    elif layout == "hopper":
        data, scales = pack_hopper_weight(data, linear, MXFP8 if mxfp8 else NVFP4 if block == 16 else MXFP4)
    else:
        scales = scale_layouts.swizzle(linear, scale_layouts.SWIZZLED_128X4)
    prepared = data.contiguous().view(torch.float8_e4m3fn) if mxfp8 else data.contiguous()
    if rebind:
        weight.data = prepared.view(weight.dtype)
        scale.data = scales.view(scale.dtype)
    return PreparedWeight(prepared, scales, layout, n, k, block)


def _require(condition: bool, argument: str, given: object, allowed: object) -> None:
    if not condition:
        if isinstance(allowed, tuple):
            allowed = " or ".join(map(repr, allowed))
        raise ValueError(f"prepare_fp4_weight: {argument} is {given!r}; allowed: {allowed}")


class SM90MoEWeights(NamedTuple):
    """Arguments of :func:`cutlass_fused_moe` in W4A16 on compute capability 9.0; sizes are padded."""

    fc1_expert_weights: Tensor
    fc2_expert_weights: Tensor
    quant_scales: list[Tensor]
    fc1_expert_biases: Tensor | None
    fc2_expert_biases: Tensor | None


def prepare_sm90_moe_weights(
    fc1: Tensor,
    fc1_scale: Tensor,
    fc2: Tensor,
    fc2_scale: Tensor,
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
) -> SM90MoEWeights:
    """Pad MXFP4 experts to multiples of 128 and interleave them for the SM90 mixed-input GEMM.

    The input of the op is then ``[tokens, H']``, padded with zeros, and of its output the first H columns count.
    Padding adds nothing: payload and biases are zero, and a scale that multiplies zeros is 1.

    Args:
        fc1: uint8 ``[E, 2 * I, H/2]``, the up rows before the gate rows (see ``weight_layouts.reorder_gate_up``).
        fc1_scale: uint8 UE8M0 ``[E, 2 * I, H/32]``.
        fc2, fc2_scale: uint8 ``[E, H, I/2]`` and ``[E, H, I/32]``.
        fc1_bias, fc2_bias: float ``[E, 2 * I]`` and ``[E, H]``, or None.

    Returns:
        A :class:`SM90MoEWeights` for ``cutlass_fused_moe(..., use_w4_group_scaling=True)``.

    Raises:
        ValueError: a dtype or shape that does not fit the others.

    Source: what FlashInfer's ``cutlass_fused_moe`` expects on SM90, by its ``interleave_moe_*_for_sm90_mixed_gemm``.
    """
    if fc2.dim() != 3:
        given = f"fc2 is of shape {tuple(fc2.shape)}"
        raise ValueError(f"prepare_sm90_moe_weights: {given}; allowed: three dimensions, (E, H, I/2)")
    experts, hidden, packed_inter = fc2.shape
    inter = packed_inter * 2
    shapes = {
        "fc1": (experts, 2 * inter, hidden // 2),
        "fc1_scale": (experts, 2 * inter, hidden // 32),
        "fc2": (experts, hidden, inter // 2),
        "fc2_scale": (experts, hidden, inter // 32),
        "fc1_bias": (experts, 2 * inter),
        "fc2_bias": (experts, hidden),
    }
    for name, t in zip(shapes, (fc1, fc1_scale, fc2, fc2_scale, fc1_bias, fc2_bias), strict=True):
        if t is None:
            continue
        if not name.endswith("bias") and t.dtype != torch.uint8:
            raise ValueError(f"prepare_sm90_moe_weights: {name} is {t.dtype}; allowed: torch.uint8")
        if experts == 0 or hidden % 32 or inter % 32 or tuple(t.shape) != shapes[name]:
            allowed = f"{shapes[name]} by the shape of fc2, H and I multiples of 32"
            raise ValueError(f"prepare_sm90_moe_weights: {name} is of shape {tuple(t.shape)}; allowed: {allowed}")
    more_h, more_i = (scale_layouts.round_up(size, _SHUFFLED_ROWS) - size for size in (hidden, inter))

    def halves(t: Tensor, value: int = 0) -> Tensor:
        """Pad the up rows and the gate rows, each for itself; they are the second dimension."""
        padding = (0,) * (2 * (t.dim() - 2)) + (0, more_i)
        return F.pad(t.unflatten(1, (2, inter)), padding, value=value).flatten(1, 2)

    payload = halves(F.pad(fc1, (0, more_h // 2))), F.pad(fc2, (0, more_i // 2, 0, more_h))
    scales = (
        halves(F.pad(fc1_scale, (0, more_h // 32), value=_ONE_AS_UE8M0), _ONE_AS_UE8M0),
        F.pad(fc2_scale, (0, more_i // 32, 0, more_h), value=_ONE_AS_UE8M0),
    )
    return SM90MoEWeights(
        interleave_moe_weights_for_sm90_mixed_gemm(payload[0]),
        interleave_moe_weights_for_sm90_mixed_gemm(payload[1]),
        [interleave_moe_scales_for_sm90_mixed_gemm(s) for s in scales],
        None if fc1_bias is None else halves(fc1_bias),
        None if fc2_bias is None else F.pad(fc2_bias, (0, more_h)),
    )
