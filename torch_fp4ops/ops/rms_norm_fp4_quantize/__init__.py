"""rms_norm_fp4_quantize: RMS normalisation, quantised to NVFP4 or MXFP4."""

from __future__ import annotations

from torch import Tensor

from ...contracts import Call, Out
from ...registry import op
from ...selection import Preference
from .. import _scales
from .._activations import rms_norm
from ..fp4_quantize import fp4_quantize


def _contract(call: Call) -> tuple[Out, Out]:
    fmt = _scales.require_fp4_format(call)
    x = call.input
    call.require_dtype("input", _scales.FLOATS)
    call.require(x.dim() >= 2, "input", x.shape, "two dimensions or more")
    if call.weight is not None:
        call.require_dtype("weight", _scales.FLOATS)
        call.require_shape("weight", (x.shape[-1],), ": one for each of the K columns")
    call.require(call.eps >= 0, "eps", call.eps, "zero or more")
    return _scales.fp4_outputs(call, fmt, x.shape[:-1], x.shape[-1])


_PREFERENCES = (Preference("triton", "cuda", "NVIDIA H200: 32.2 us for 8192 x 4096 to NVFP4, the unfused pair 67.1"),)


@op(preferences=_PREFERENCES, contract=_contract, check_values=_scales.require_positive_global_scale)
def rms_norm_fp4_quantize(
    input: Tensor,
    weight: Tensor | None,
    global_scale: Tensor | None = None,
    eps: float = 1e-6,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    is_global_scale_inversed: bool = False,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RMS normalisation along the last dimension, times a weight, quantised to NVFP4 or MXFP4.

    The normalised values stay in fp32: it is what :func:`fp4_quantize` would give for the fp32 tensor, byte for byte.
    Every operation but the sum is rounded to fp32 once::

        y = (x * (1 / sqrt(sum(x^2) / K + eps))) * weight
        codes, scales = fp4_quantize(y, ...)

    The sum has a fixed arithmetic of its own, whatever the order (``torch_fp4ops.ops._activations.rms_norm`` has it),
    so that every backend and device gives the same bytes; y is within a relative 2^-21 of the exact one where the mean
    square, or eps, is above 2^-100. Rounding y to bfloat16 first, as separate ops do, would move it by up to 2^-9.

    Args:
        input: ``[..., K]``, two dimensions or more, K a multiple of ``sf_vec_size``; bfloat16, float16 or float32, any
            strides.
        weight: ``[K]``; bfloat16, float16 or float32; None for ones.
        global_scale: as in :func:`fp4_quantize`, by the largest magnitude of y.
        eps: added to the mean square; zero or more, rounded to fp32.
        sf_vec_size: block size, 16 (NVFP4) or 32 (MXFP4).
        sf_use_ue8m0: UE8M0 block scales (MXFP4) instead of E4M3 (NVFP4).
        is_sf_swizzled_layout: scales in the 128x4 layout (8x4 with ``is_sf_8x4_layout``) instead of linear.
        is_global_scale_inversed: ``global_scale`` is the *decode* scale.
        backend: ``"auto"`` or a backend's name. Triton takes rows of up to 32768 values.

    Returns:
        ``(codes, scales)``, uint8, as :func:`fp4_quantize` gives them for ``[..., K]``.

    A NaN makes all scales of its row NaN, an infinity that of its block; the rest of such a row is zero. So is a row
    whose squares overflow fp32.

    Raises:
        ValueError: a wrong dtype, rank, K, weight, eps, flag combination or global scale; on the CPU also a global
            scale that is not finite and above zero.

    Source: FlashInfer ``rmsnorm`` (names and default of input, weight and eps) followed by ``fp4_quantize``;
    ``eps`` is third there and comes after ``global_scale`` here. FlashInfer's own fusion, ``rmsnorm_fp4quant``, rounds
    ``x * weight`` to 16 bits before the norm's factor and leaves the padding of swizzled scales unwritten.
    """
    flags = (sf_vec_size, sf_use_ue8m0, is_sf_swizzled_layout, is_sf_8x4_layout, is_global_scale_inversed)
    return fp4_quantize.__wrapped__(rms_norm(input, weight, eps), global_scale, *flags)
