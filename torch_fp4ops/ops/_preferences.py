"""Preference rows that several ops have."""

from __future__ import annotations

from ..selection import Preference

# FlashInfer is asked from 10.0 on only, so that other GPUs never wait for its import.
FLASHINFER = Preference(
    "flashinfer", "cuda", "kernels made for the hardware's tensor cores; not measured by this project", (10, 0)
)
TRTLLM = Preference("trtllm", "cuda", "reads b_layout='trtllm'", (10, 0))
GLUON = Preference("gluon", "cuda", "the only kernels that read b_layout='hopper'", (9, 0))
