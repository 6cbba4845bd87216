"""How far two runs of a model drift apart, layer by layer: two backends, or a quantised model and its original."""

from __future__ import annotations

from ._result import OUTPUT, Comparison, Distance, Row, distance
from ._runs import compare

__all__ = ["OUTPUT", "Comparison", "Distance", "Row", "compare", "distance"]
