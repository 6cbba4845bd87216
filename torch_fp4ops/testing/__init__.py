"""What the package tests itself with, public so that other kernels can be tested the same way.

``samples`` gives valid calls of every op, ``strategies`` draws hard data for Hypothesis, ``numerics`` holds the
assertions. Importing ``strategies`` needs Hypothesis.
"""

from __future__ import annotations

from .numerics import (
    assert_attention_close,
    assert_matmul_close,
    assert_nearly_same,
    assert_same_bytes,
    attention_and_bound,
    matmul_bound,
)
from .samples import Sample, assert_right, comparable, samples

__all__ = [
    "Sample",
    "assert_attention_close",
    "assert_matmul_close",
    "assert_nearly_same",
    "assert_right",
    "assert_same_bytes",
    "attention_and_bound",
    "comparable",
    "matmul_bound",
    "samples",
]
