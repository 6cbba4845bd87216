"""What the Gluon backends of the GEMMs share: which calls they take."""

from __future__ import annotations

from ..contracts import Call
from ._hopper_launch import product, unavailable
from ._matmul import HOPPER

__all__ = ["product", "why_not"]


def why_not(call: Call) -> str | None:
    if call.b_layout != HOPPER:
        return f"the kernels read weights of b_layout='hopper', not {call.b_layout!r}; see prepare_fp4_weight"
    return unavailable(call.device)
