"""silu_and_mul_fp4_quantize: the gated activation, quantised to NVFP4 or MXFP4."""

from __future__ import annotations

from torch import Tensor

from ...contracts import Call, Out
from ...registry import op
from ...selection import Preference
from .. import _scales
from .._activations import silu_and_mul
from ..fp4_quantize import fp4_quantize


def _contract(call: Call) -> tuple[Out, Out]:
    fmt = _scales.require_fp4_format(call)
    x = call.input
    call.require_dtype("input", _scales.FLOATS)
    call.require(x.dim() >= 2, "input", x.shape, "two dimensions or more")
    call.require(x.shape[-1] % 2 == 0, "input", x.shape, "an even last dimension: gate and up, K values each")
    return _scales.fp4_outputs(call, fmt, x.shape[:-1], x.shape[-1] // 2)


_PREFERENCES = (Preference("triton", "cuda", "NVIDIA H200: 142 us for 8192 x 14336 to NVFP4, the unfused pair 686"),)


@op(preferences=_PREFERENCES, contract=_contract, check_values=_scales.require_positive_global_scale)
def silu_and_mul_fp4_quantize(
    input: Tensor,
    global_scale: Tensor | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    is_global_scale_inversed: bool = False,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``silu(input[..., :K]) * input[..., K:]``, quantised to NVFP4 or MXFP4.

    The product stays in fp32: it is what :func:`fp4_quantize` would give for the fp32 tensor, byte for byte. With
    ``g = max(gate, -86)`` and every operation rounded to fp32 once::

        y = (g * (1 / (1 + exp(-min(g, 86))))) * up
        codes, scales = fp4_quantize(y, ...)

    where ``exp`` is a fixed chain of fp32 operations (``torch_fp4ops.ops._activations.silu_and_mul`` has it), so that
    every device gives the same bytes, and every backend but FlashInfer's. Its error leaves the silu within a relative
    ``2^-21 + |gate| * 2^-26`` of the exact one; a gate below -86 has the silu -4e-36. Rounding y to bfloat16 first, as
    separate ops do, would move it by up to 2^-9.

    Args:
        input: ``[..., 2K]``, two dimensions or more, gate first, K a multiple of ``sf_vec_size``; bfloat16, float16
            or float32, any strides.
        global_scale: as in :func:`fp4_quantize`, by the largest magnitude of y.
        sf_vec_size: block size, 16 (NVFP4) or 32 (MXFP4).
        sf_use_ue8m0: UE8M0 block scales (MXFP4) instead of E4M3 (NVFP4).
        is_sf_swizzled_layout: scales in the 128x4 layout (8x4 with ``is_sf_8x4_layout``) instead of linear.
        is_global_scale_inversed: ``global_scale`` is the *decode* scale.
        backend: ``"auto"`` or a backend's name. ``"flashinfer"`` is for compute capability 10.0 and later: NVFP4 of
            bfloat16 or float16, one encode scale. It rounds y to the input's dtype (float16 may overflow), which alone
            changes about 1% of the bytes of codes and 2% of the scales for normal values in bfloat16.

    Returns:
        ``(codes, scales)``, uint8, as :func:`fp4_quantize` gives them for ``[..., K]``.

    A NaN in gate or up makes its block's scale NaN.

    Raises:
        ValueError: a wrong dtype, rank, size, flag combination or global scale; on the CPU also a global scale
            that is not finite and above zero.

    Source: FlashInfer ``silu_and_mul_nvfp4_quantize``, which has NVFP4 only and so no ``sf_use_ue8m0``: its fourth
    argument is ``is_sf_swizzled_layout``, so name the flags.
    """
    flags = (sf_vec_size, sf_use_ue8m0, is_sf_swizzled_layout, is_sf_8x4_layout, is_global_scale_inversed)
    return fp4_quantize.__wrapped__(silu_and_mul(input), global_scale, *flags)
