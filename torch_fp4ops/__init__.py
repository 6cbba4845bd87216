"""NVFP4, MXFP4 and MXFP8 operators for PyTorch: importing this package registers ``torch.ops.fp4.*``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import ops as _ops  # noqa: F401  (registers the operators)
from .comparison import Comparison, compare
from .extern import register_extern
from .formats import MXFP4, MXFP8, NVFP4, BlockFormat
from .prepared_weights import PreparedWeight, prepare_fp4_weight, prepare_sm90_moe_weights
from .registry import OPS, Op
from .selection import BackendUnavailable, Decision, explain, read_environment, set_backend

__version__ = "0.1.0"

__all__ = [
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "OPS",
    "BackendUnavailable",
    "BlockFormat",
    "Comparison",
    "Decision",
    "Op",
    "PreparedWeight",
    "compare",
    "explain",
    "prepare_fp4_weight",
    "prepare_sm90_moe_weights",
    "register_extern",
    "set_backend",
    *OPS,
]

globals().update(OPS)
read_environment(OPS)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Op: ...
