"""Linear layers with block-scaled weights, and :func:`quantize_`, which puts them into a model. For inference."""

from __future__ import annotations

from .linear import FP4Linear, MXFP8Linear
from .quantize import quantize_

__all__ = ["FP4Linear", "MXFP8Linear", "quantize_"]
