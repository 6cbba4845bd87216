"""Preference rows that several ops have."""

from __future__ import annotations

from ..selection import Preference

# FlashInfer is asked from 10.0 on only, so that other GPUs never wait for its import.
FLASHINFER = Preference(
    "flashinfer", "cuda", "kernels made for the hardware's tensor cores; not measured by this project", (10, 0)
)
TRTLLM = Preference("trtllm", "cuda", "reads b_layout='trtllm'", (10, 0))


def gluon(few: float, many: float) -> Preference:
    """The kernels of 9.0; ``few`` and ``many``: how many times as fast as cuBLAS in bf16, up to 64 rows and above."""
    speed = f"NVIDIA H200: {few} times as fast as bf16 in cuBLAS up to 64 rows, {many} times above (geometric means)"
    return Preference("gluon", "cuda", f"reads b_layout='hopper'; {speed}", (9, 0))
