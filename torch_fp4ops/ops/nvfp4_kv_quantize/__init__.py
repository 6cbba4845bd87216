"""nvfp4_kv_quantize: keys or values to NVFP4 with linear scales."""

from __future__ import annotations

import torch
from torch import Tensor

from ...block_quantization import quantize_nvfp4
from ...contracts import Call, Out
from ...formats import NVFP4
from ...registry import op
from ...selection import Preference
from .. import _scales


def _contract(call: Call) -> tuple[Out, Out]:
    x = call.input
    call.require_dtype("input", _scales.FLOATS)
    call.require(x.dim() >= 2, "input", x.shape, "two dimensions or more")
    k = x.shape[-1]
    _scales.require_blocks(call, "input", k, NVFP4)
    call.require_scalar("global_scale")
    leading = x.shape[:-1]
    return Out((*leading, k // 2), torch.uint8), Out((*leading, k // NVFP4.block_size), torch.uint8)


def _check_values(call: Call) -> None:
    call.require_positive("global_scale")


_PREFERENCES = (
    Preference(
        "triton",
        "cuda",
        "the kernel of fp4_quantize with linear scales: NVIDIA H200: 81 us for 1048576 x 128, 99% of the copy rate",
    ),
)


@op(preferences=_PREFERENCES, contract=_contract, check_values=_check_values)
def nvfp4_kv_quantize(input: Tensor, global_scale: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Quantise keys or values to NVFP4 along the last dimension, with a *decode* global scale and linear scales.

    As :func:`fp4_quantize` for NVFP4 with ``is_global_scale_inversed``: ``SF = e4m3((1/gs) * (amax *
    fp32(1/6)))``, ``code = e2m1(x * min(1 / (SF * gs), FLT_MAX))``. NaN and infinity as there.

    Args:
        input: ``[..., K]``, two dimensions or more, K a multiple of 16; bfloat16, float16 or float32, any strides.
        global_scale: float32, one element, ``amax / 2688`` to use the whole range.
        backend: ``"auto"`` or a backend's name.

    Returns:
        ``(codes [..., K/2], scales [..., K/16])``, both uint8.

    Raises:
        ValueError: a wrong dtype, rank, K or global scale; on the CPU also one that is not finite and above zero.

    Source: FlashInfer ``nvfp4_kv_quantize`` (two dimensions, bfloat16 and float16, SM100 and later).
    """
    decode = global_scale.reshape(())
    return quantize_nvfp4(input, 1.0 / decode, decode)
