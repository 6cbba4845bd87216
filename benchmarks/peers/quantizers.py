"""Peers of the quantisers, the dequantisers and the fused quantisers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_fp4ops import OPS
from torch_fp4ops.testing import Sample

from ..cases import Case
from ..verify import Expected
from ._peer import Peer, Prepared, Run, Unsuitable, imported


def _compiled_reference(case: Case, samples: Sequence[Sample], expected: Expected) -> Prepared:
    """The reference body through torch.compile: what one has without writing a kernel."""
    if not case.compiled:
        raise Unsuitable("not compiled for this case, to save time")
    torch._dynamo.reset()  # else the limit on recompilations makes it silently eager
    compiled = torch.compile(OPS[case.op].__wrapped__, dynamic=False, fullgraph=True)
    return Prepared([lambda s=s: compiled(*s.args, **s.kwargs) for s in samples], poison=False)


def _unfused(case: Case, samples: Sequence[Sample], expected: Expected) -> Prepared:
    """The activation or norm by torch, rounded to bf16, then fp4_quantize."""
    pair = _PAIRS[case.op]
    return Prepared([lambda s=s: pair(*s.args, **s.kwargs) for s in samples])


def _unfused_compiled(case: Case, samples: Sequence[Sample], expected: Expected) -> Prepared:
    """The same pair, where Inductor makes one kernel of the activation or norm."""
    if not case.compiled:
        raise Unsuitable("not compiled for this case, to save time")
    torch._dynamo.reset()
    pair = torch.compile(_PAIRS[case.op], dynamic=False, fullgraph=True)
    return Prepared([lambda s=s: pair(*s.args, **s.kwargs) for s in samples], poison=False)


def _silu_pair(x: Tensor, scale: Tensor | None, **flags: Any) -> Any:
    gate, up = x.chunk(2, dim=-1)
    return torch.ops.fp4.fp4_quantize(F.silu(gate) * up, scale, **flags)


def _norm_pair(x: Tensor, weight: Tensor, scale: Tensor | None, **flags: Any) -> Any:
    return torch.ops.fp4.fp4_quantize(F.rms_norm(x, weight.shape, weight, 1e-6), scale, **flags)


_PAIRS = {"silu_and_mul_fp4_quantize": _silu_pair, "rms_norm_fp4_quantize": _norm_pair}


def _other_cache(fmt: str, dtype: torch.dtype) -> Callable[[Case, Sequence[Sample], Expected], Prepared]:
    def prepare(case: Case, samples: Sequence[Sample], expected: Expected) -> Prepared:
        """The op's own kernels over a paged cache of the same values in another format: what FP4 saves."""
        attend = imported("torch_fp4ops.ops.fp4_kv_attention_decode.triton").attend

        def closure(sample: Sample) -> Run:
            q, *cache, _, _ = sample.args
            tables, lengths = cache[4:]
            page = cache[0].shape[1]
            dense = OPS["nvfp4_kv_dequantize_paged"](*sample.args[1:], output_dtype=dtype)
            caches = tuple(t.view(-1, page, *t.shape[2:]) for t in dense)
            order = torch.arange(tables.numel(), dtype=torch.int32, device=q.device)
            order = order[torch.randperm(len(order), device=q.device)]
            caches = tuple(torch.empty_like(t).index_copy_(0, order.long(), t) for t in _as_bytes(caches))
            scale = q.shape[2] ** -0.5
            rows = order.view(tables.shape)
            return lambda: attend(q, caches, None, rows, lengths, (None, None), "NHD", scale, -1, None, fmt)

        # Sets of a larger format: fewer make the same footprint.
        return Prepared([closure(s) for s in samples[: max(1, len(samples) // 2)]])

    return prepare


def _as_bytes(caches: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.view(torch.uint8) for t in caches)


def flashinfer(case: Case, samples: Sequence[Sample], expected: Expected) -> Prepared:
    """FlashInfer's function of the same name; the ops have its arguments."""
    function = getattr(imported("flashinfer"), case.op, None)
    if function is None:
        raise Unsuitable("this FlashInfer has no such function")
    names = inspect.signature(function).parameters
    positional = OPS[case.op].signature.parameters
    missing = {name for s in samples[:1] for name in s.kwargs} - set(names)
    if missing:
        raise Unsuitable(f"FlashInfer's function has no argument {', '.join(sorted(missing))}")

    def run(s: Sample) -> Any:
        arguments = dict(zip(positional, s.args, strict=False))
        return function(**arguments, **s.kwargs)

    return Prepared([lambda s=s: run(s) for s in samples])


def _gemlite(case: Case, samples: Sequence[Sample], expected: Expected) -> Prepared:
    """gemlite's activation quantisers give linear scales; measured with a global scale of 1."""
    quantizers = imported("gemlite.quant_utils")
    fmt, _, layout = case.family.partition("-")
    if layout != "linear":
        raise Unsuitable("gemlite's scales are linear")
    function = getattr(quantizers, f"scale_activations_{fmt}_triton_v5")
    if fmt == "nvfp4":
        one = torch.ones(1, device=samples[0].args[0].device)
        runs = [lambda s=s: function(s.args[0], one) for s in samples]
    else:
        runs = [lambda s=s: function(s.args[0]) for s in samples]
    blocks = case.k // (16 if fmt == "nvfp4" else 32)

    def compare(out: Any) -> tuple[Tensor, Tensor]:
        return out[0][: case.m], out[1].view(torch.uint8).reshape(-1, blocks)[: case.m].contiguous()

    expected = expected if fmt == "mxfp4" else Expected(case, Sample("", (samples[0].args[0], one), samples[0].kwargs))
    return Prepared(runs, compare, expected=expected)


def _torchao(case: Case, samples: Sequence[Sample], expected: Expected) -> Prepared:
    """torchao's NVFP4 quantiser under torch.compile, as its users run it; linear scales."""
    if not case.compiled:
        raise Unsuitable("not compiled for this case, to save time")
    if case.family != "nvfp4-linear":
        raise Unsuitable("compared on NVFP4 with linear scales")
    quantize = imported("torchao.prototype.mx_formats.nvfp4_tensor").nvfp4_quantize
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, scale: quantize(x, 16, scale), dynamic=False)
    decode = [(1 / s.args[1]).reshape(()) for s in samples]  # its per-tensor scale is the decode scale

    def compare(out: Any) -> tuple[Tensor, Tensor]:
        scales, codes = out
        return codes.view(torch.uint8), scales.view(torch.uint8).reshape(case.m, case.k // 16)

    runs = [lambda s=s, d=d: compiled(s.args[0], d) for s, d in zip(samples, decode, strict=True)]
    return Prepared(runs, compare, poison=False)


_QUANTIZED = ("fp4_quantize", "mxfp8_quantize", "nvfp4_kv_quantize")
_DEQUANTIZED = ("fp4_dequantize", "mxfp8_dequantize", "nvfp4_kv_dequantize")

QUANTIZERS = (
    Peer("torch.compile", (*_QUANTIZED, *_DEQUANTIZED), _compiled_reference, needs_gpu=False),
    Peer("flashinfer-direct", (*_QUANTIZED, "nvfp4_kv_dequantize"), flashinfer),
    Peer("attend-bf16-cache", ("fp4_kv_attention_decode",), _other_cache("plain", torch.bfloat16)),
    Peer("attend-e4m3-cache", ("fp4_kv_attention_decode",), _other_cache("e4m3", torch.float8_e4m3fn)),
    Peer("unfused", tuple(_PAIRS), _unfused, needs_gpu=False),
    Peer("unfused-compiled", tuple(_PAIRS), _unfused_compiled, needs_gpu=False),
    Peer("gemlite", ("fp4_quantize",), _gemlite),
    Peer("torchao", ("fp4_quantize",), _torchao),
)
