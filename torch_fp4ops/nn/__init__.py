"""Linear layers with block-scaled weights, and :func:`quantize_`, which puts them into a model. For inference."""

from __future__ import annotations

from .linear import FP4Linear, MXFP8Linear
from .quantize import prepare_, quantize_

__all__ = ["FP4Linear", "MXFP8Linear", "prepare_", "quantize_"]
