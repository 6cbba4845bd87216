"""Is an output right? Asked before anything is timed: an empty kernel is the fastest of all."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torch_fp4ops import OPS
from torch_fp4ops.codecs import as_bytes
from torch_fp4ops.ops._activations import rms_norm, silu_and_mul
from torch_fp4ops.testing import Sample, assert_matmul_close, assert_same_bytes

from .cases import Case
from .inputs import Weight

# What a peer's output may differ by: other roundings are fine, other results are not.
PEER_BYTES = 1e-3
PEER_ERROR = 1e-2

_ROWS_AT_A_TIME = 1024
_MOE_TOKENS = 4


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors are filled with NaN or the largest integer, so that bytes a kernel leaves out are wrong for sure.

    Without this they may hold what another backend wrote there a moment before, which is right.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Expected:
    """What a case's inputs give, by the reference; kept for all backends of the case."""

    def __init__(self, case: Case, sample: Sample):
        self.case = case
        self.sample = sample
        self._operands: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._outputs: list[Tensor] | None = None

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A GEMM's exact fp32 ``(a [m, k], b [n, k], alpha)``."""
        if self._operands is None:
            self._operands = _gemm_operands(self.case.op, self.sample)
        return self._operands

    @property
    def outputs(self) -> list[Tensor]:
        """The reference's outputs and, for ops that write, the arguments after the call."""
        if self._outputs is None:
            copy = self.sample.clone()
            out = OPS[self.case.op].run_backend("reference", *copy.args, **copy.kwargs)
            self._outputs = tensors(out, copy)
        return self._outputs

    def check(self, out: Any, sample: Sample) -> None:
        """Raise AssertionError unless a backend's result on ``sample``, a copy of the inputs, is right."""
        if self.case.op.startswith("mm_"):
            a, b, alpha = self.operands
            b = b.double()
            for start in range(0, max(1, len(a)), _ROWS_AT_A_TIME):
                rows = slice(start, start + _ROWS_AT_A_TIME)
                assert_matmul_close(out[rows], a[rows], b, alpha)
        elif self.case.op == "cutlass_fused_moe":
            self._check_moe(out)
        elif self.case.op == "fp4_kv_attention_decode":
            self._check_attention(out)
        else:
            for i, (given, wanted) in enumerate(zip(tensors(out, sample), self.outputs, strict=True)):
                if not _same(given, wanted):
                    assert_same_bytes(given, wanted, f"tensor {i} of outputs and arguments")

    def check_peer(self, out: Any) -> str:
        """Raise AssertionError if a peer's result is another one; returns how it differs, "" if it doesn't."""
        if self.case.op.startswith("mm_"):
            a, b, alpha = self.operands
            exact = a @ b.T * (1.0 if alpha is None else alpha)
            error = float((out.float() - exact).norm() / exact.norm())
            assert error <= PEER_ERROR, f"relative error {error:.2g}"
            return f"relative error {error:.1g}"
        if self.case.op == "fp4_kv_attention_decode":
            self._check_attention(out)
            return ""
        wanted = self.outputs
        given = tensors(out, Sample("", ()))
        differing = total = 0
        for i, reference in enumerate(wanted[: len(given)]):
            sizes = given[i].nbytes, reference.nbytes
            assert sizes[0] == sizes[1], f"output {i} has {sizes[0]} bytes, not {sizes[1]}"
            differing += int((_flat_bytes(given[i]) != _flat_bytes(reference)).sum())
            total += reference.nbytes
        if differing <= PEER_BYTES * total:
            return f"{differing / total:.1g} of the bytes differ" if differing else ""
        assert self.case.op in _VALUES, f"{differing} of {total} bytes differ"
        # Another recipe for the scales, or rounding in between, is fine, if it loses no more.
        theirs, ours = (self._quantization_error(*outputs[:2]) for outputs in (given, wanted))
        errors = f"relative error {theirs:.3g}, the reference's {ours:.3g}"
        message = f"{differing / total:.2g} of the bytes differ; {errors}"
        assert theirs <= 1.25 * ours, message
        return message

    def _quantization_error(self, codes: Tensor, scales: Tensor) -> float:
        values, global_scale = _VALUES[self.case.op](*self.sample.args)
        decoded = OPS["fp4_dequantize"].run_backend("reference", codes, scales, global_scale, **self.sample.kwargs)
        return float((decoded - values).norm() / values.norm())

    def _check_moe(self, out: Tensor) -> None:
        """Every token roughly, against the reference; some of them within the oracle's bound, which takes long."""
        (wanted,) = self.outputs[:1]
        error = (out.float() - wanted.float()).norm(dim=1) / wanted.float().norm(dim=1)
        assert bool((error <= PEER_ERROR).all()), f"relative error of a token {float(error.max()):.2g}"
        x, ids, final, fc1, fc2, dtype, scales = self.sample.args
        tokens = torch.linspace(0, len(x) - 1, min(len(x), _MOE_TOKENS), device=x.device).long()
        used, local_ids = ids[tokens].unique(return_inverse=True)
        used = used.long()
        assert_close = importlib.import_module(f"{OPS[self.case.op].__module__}.samples").assert_close
        few = (x[tokens], local_ids.int(), final[tokens], fc1[used], fc2[used], dtype, [s[used] for s in scales])
        assert_close(out[tokens], *few, **self.sample.kwargs)

    def _check_attention(self, out: Tensor) -> None:
        """Some sequences within the oracle's bound: float64 keys and values of all would not fit."""
        q, *caches, tables, lengths, k_scale, v_scale = self.sample.args
        assert_close = importlib.import_module(f"{OPS[self.case.op].__module__}.samples").assert_close
        for i in sorted({0, len(q) // 2, len(q) - 1}):
            one = slice(i, i + 1)
            assert_close(out[one], q[one], *caches, tables[one], lengths[one], k_scale, v_scale)


_VALUES: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "fp4_quantize": lambda x, scale: (x.float(), scale),
    "silu_and_mul_fp4_quantize": lambda x, scale: (silu_and_mul(x), scale),
    "rms_norm_fp4_quantize": lambda x, weight, scale: (rms_norm(x, weight, 1e-6), scale),
}
"""Of the quantisers to FP4, by their arguments: what they quantise, in fp32, and the global scale."""


def tensors(out: Any, sample: Sample) -> list[Tensor]:
    """Outputs, then arguments: ops that write give nothing back, and no op may write elsewhere."""
    return [t for t in tree_leaves((out, sample.args)) if isinstance(t, Tensor)]


def _same(given: Tensor, wanted: Tensor) -> bool:
    """The quick way, on the device; where this is False, ``assert_same_bytes`` says why."""
    same_kind = (given.shape, given.dtype, given.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
    return same_kind and torch.equal(_flat_bytes(given), _flat_bytes(wanted))


def _flat_bytes(t: Tensor) -> Tensor:
    return as_bytes(t.contiguous().reshape(-1)).view(torch.uint8)


def _gemm_operands(op_name: str, sample: Sample) -> tuple[Tensor, Tensor, Tensor | None]:
    alpha = None if op_name == "mm_mxfp8" else sample.args[-1]
    return activation_values(op_name, sample), weight_values(Weight.of(op_name, sample)), alpha


def weight_values(weight: Weight) -> Tensor:
    """Exact, in fp32 ``[n, k]``; of a plain weight."""
    if weight.fmt == "mxfp8":
        return _mxfp8_values(weight.elements, weight.scales)
    return _fp4_values(weight.elements, weight.scales, weight.fmt == "mxfp4")


def activation_values(op_name: str, sample: Sample) -> Tensor:
    """What a GEMM's op is given as ``a``, exact in fp32 ``[m, k]``."""
    a = sample.args[0]
    if op_name == "mm_bf16_fp4":
        return a.float()
    if op_name == "mm_mxfp8":
        return _mxfp8_values(a, sample.args[2])
    return _fp4_values(a, sample.args[2], sample.kwargs["block_size"] == 32)


def _fp4_values(codes: Tensor, scales: Tensor, ue8m0: bool) -> Tensor:
    one = None if ue8m0 else torch.ones(1, device=codes.device)
    return OPS["fp4_dequantize"].run_backend("reference", codes, scales, one, 32 if ue8m0 else 16, ue8m0)


def _mxfp8_values(elements: Tensor, scales: Tensor) -> Tensor:
    return OPS["mxfp8_dequantize"].run_backend("reference", elements.contiguous(), scales)
