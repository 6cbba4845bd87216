"""FlashInfer's kernels on a Hopper GPU: layouts byte for byte, values, trust, torch.compile and CUDA graphs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_fp4ops import OPS, BackendUnavailable, nvfp4_kv_dequantize, probe, scale_layouts, weight_layouts
from torch_fp4ops.block_quantization import quantize_mx
from torch_fp4ops.formats import MXFP4
from torch_fp4ops.ops import _flashinfer
from torch_fp4ops.ops.cutlass_fused_moe import cutlass_fused_moe
from torch_fp4ops.ops.fp4_quantize import fp4_quantize
from torch_fp4ops.probe import prepare
from torch_fp4ops.selection import choose
from torch_fp4ops.testing import assert_right, assert_same_bytes, samples
from torch_fp4ops.testing.samples import values

pytestmark = pytest.mark.gpu
pytest.importorskip("flashinfer", reason="FlashInfer is not installed", exc_type=ImportError)


@pytest.fixture(autouse=True)
def hopper():
    if torch.version.hip is not None or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these tests are for compute capability 9.0")


def need(*modules: str) -> None:
    """Skip where a module of FlashInfer would have to be compiled first: that can take hours."""
    for module in modules:
        if not _flashinfer._is_built(module):
            pytest.skip(f"FlashInfer's module {module} is not built here")


def some_bytes(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).cuda()


def replayed(function: Any, inputs: list[Tensor], blank: list[Tensor]) -> Any:
    """Captured over blank inputs, replayed over the real ones."""
    static = [t.clone() for t in blank]
    function(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*static)
    for target, source in zip(static, inputs, strict=True):
        target.copy_(source)
    graph.replay()
    torch.cuda.synchronize()
    return out


# Layouts


@pytest.mark.parametrize("quant_type", ["fp4", "int4", "fp4_fp8"])
@pytest.mark.parametrize("shape", [(1, 16, 32), (3, 80, 96), (2, 256, 512)])
def test_sm90_weight_interleave(quant_type, shape):
    need("fused_moe_90")
    from flashinfer.fused_moe import interleave_moe_weights_for_sm90_mixed_gemm

    weight = some_bytes(*shape)
    theirs = interleave_moe_weights_for_sm90_mixed_gemm(weight, quant_type)
    ours = weight_layouts.interleave_moe_weights_for_sm90_mixed_gemm(weight, quant_type)
    assert_same_bytes(ours, theirs)
    assert_same_bytes(weight_layouts.deinterleave_moe_weights_for_sm90_mixed_gemm(theirs, quant_type), weight)


@pytest.mark.parametrize("shape", [(1, 64, 4), (3, 128, 12), (2, 256, 92)])
def test_sm90_scale_interleave(shape):
    from flashinfer.fused_moe import interleave_moe_scales_for_sm90_mixed_gemm

    scales = some_bytes(*shape)
    theirs = interleave_moe_scales_for_sm90_mixed_gemm(scales)
    assert_same_bytes(weight_layouts.interleave_moe_scales_for_sm90_mixed_gemm(scales), theirs.contiguous())


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 5), (257, 64), (3, 130, 7)])
def test_block_scale_interleave(shape):
    need("fp4_quantization_90")
    import flashinfer

    scales = some_bytes(*shape)
    theirs = flashinfer.block_scale_interleave(scales)
    assert_same_bytes(scale_layouts.swizzle(scales, "128x4").flatten(), theirs.flatten())


@pytest.mark.parametrize("tile", [128, 64])
def test_trtllm_shuffle(tile):
    need("fp4_quantization_90")
    import flashinfer

    weight, scales = some_bytes(256, 48), some_bytes(256, 12)
    assert_same_bytes(weight_layouts.shuffle_matrix_a(weight, tile), flashinfer.shuffle_matrix_a(weight, tile))
    theirs = flashinfer.shuffle_matrix_sf_a(scales, tile)
    assert_same_bytes(weight_layouts.shuffle_matrix_sf_a(scales, tile), theirs.flatten())


# Trust


@pytest.mark.parametrize(
    ("name", "module"), [("fp4_quantize", "fp4_quantization_90"), ("mxfp8_quantize", "mxfp8_quantization_sm100")]
)
def test_the_probe_finds_that_the_quantisers_write_nothing(name, module, monkeypatch):
    need(module)
    monkeypatch.setattr(_flashinfer, "DEFECTS", ())  # the probe's own finding, without what is known
    verdict = probe.probe(OPS[name], "cuda", torch.device("cuda", 0))
    assert verdict is not None and verdict.startswith("leaves its output unwritten"), verdict


def test_a_call_by_name_is_refused_with_the_known_defect():
    with pytest.raises(BackendUnavailable, match="leaves its output unwritten"):
        fp4_quantize(values(0, 4, 64).cuda(), torch.ones(1, device="cuda"), backend="flashinfer")


def test_an_unprobed_backend_is_refused_in_a_capture(monkeypatch):
    need("fp4_kv_dequant")
    monkeypatch.setattr(probe, "_verdicts", {})
    sample = next(s for s in samples(nvfp4_kv_dequantize, "cuda") if s.args[0].numel())
    graph = torch.cuda.CUDAGraph()
    refused = pytest.raises(BackendUnavailable, match="can't happen while a CUDA graph is being captured")
    with torch.cuda.graph(graph), refused:
        nvfp4_kv_dequantize(*sample.args, **sample.kwargs, backend="flashinfer")


@pytest.mark.parametrize("name", sorted(OPS))
def test_auto_chooses_flashinfer_for_its_own_layouts_only(name):
    op = OPS[name]
    for sample in samples(op, "cuda"):
        decision = choose(op, op.check(*sample.args, **sample.kwargs))
        if "flashinfer" in sample.name:
            continue  # weights in a layout of its own
        assert decision.backend in ("gluon", "triton", "reference") and "flashinfer" not in decision.rejected


def test_auto_does_not_import_flashinfer_here():
    code = (
        "import sys, torch, torch_fp4ops as f\n"
        "x, s = torch.randn(4, 64, device='cuda').bfloat16(), torch.ones(1, device='cuda')\n"
        "a, sf = f.fp4_quantize(x, s)\n"
        "b, bsf = f.fp4_quantize(x.repeat(8, 1), s)\n"
        "f.mm_fp4(a, b.T, sf, bsf.T, s)\n"
        "assert 'flashinfer' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# nvfp4_kv_dequantize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 16), (33, 128), (5, 7, 64)])
def test_kv_dequantize_is_exact_eager_compiled_and_captured(dtype, shape, fresh_dynamo):
    need("fp4_kv_dequant")
    assert prepare("nvfp4_kv_dequantize", "flashinfer") is None
    global_scale = torch.tensor([0.01], device="cuda")
    codes, scales = torch.ops.fp4.nvfp4_kv_quantize(values(1, *shape).cuda(), global_scale, backend="reference")

    def run(codes, scales, global_scale):
        return torch.ops.fp4.nvfp4_kv_dequantize(codes, scales, global_scale, dtype, backend="flashinfer")

    inputs = [codes, scales, global_scale]
    wanted = nvfp4_kv_dequantize(*inputs, dtype, backend="reference")
    assert_same_bytes(run(*inputs), wanted)
    assert_same_bytes(torch.compile(run, fullgraph=True)(*inputs), wanted)
    assert_same_bytes(replayed(run, inputs, [torch.zeros_like(t) for t in inputs]), wanted)


# Paged caches


@pytest.mark.parametrize(
    ("name", "module"), [("nvfp4_kv_dequantize_paged", "fp4_kv_dequant"), ("nvfp4_kv_quantize_store", "page")]
)
def test_paged_caches(name, module):
    need(module)
    op, taken = OPS[name], 0
    assert prepare(name, "flashinfer") is None
    for sample in samples(op, "cuda"):
        if op.why_not("flashinfer", op.check(*sample.args, **sample.kwargs)) is None:
            assert_right(op, sample, "flashinfer")
            taken += 1
    assert taken


# cutlass_fused_moe, W4A16 MXFP4. H and I are multiples of every tile, whatever tactic is the default one.

EXPERTS, HIDDEN, INTER, TOP_K = 8, 512, 1024, 3


def moe_call(tokens: int, extras: bool, ep_rank: int | None = None, experts: int = EXPERTS) -> dict[str, Any]:
    w1, w2 = values(1, experts, 2 * INTER, HIDDEN, scale=0.05), values(2, experts, HIDDEN, INTER, scale=0.05)
    (q1, s1), (q2, s2) = quantize_mx(w1.float(), MXFP4), quantize_mx(w2.float(), MXFP4)
    generator = torch.Generator().manual_seed(tokens)
    total = experts * (1 if ep_rank is None else 2)
    scales, ids = torch.rand(tokens, total, generator=generator).topk(TOP_K, dim=1)
    call = {
        "input": values(3, tokens, HIDDEN),
        "token_selected_experts": ids.int(),
        "token_final_scales": scales / scales.sum(1, keepdim=True),
        "fc1_expert_weights": weight_layouts.interleave_moe_weights_for_sm90_mixed_gemm(q1),
        "fc2_expert_weights": weight_layouts.interleave_moe_weights_for_sm90_mixed_gemm(q2),
        "output_dtype": torch.bfloat16,
        "quant_scales": [weight_layouts.interleave_moe_scales_for_sm90_mixed_gemm(s) for s in (s1, s2)],
        "use_w4_group_scaling": True,
    }
    if extras:
        call |= {
            "fc1_expert_biases": values(4, experts, 2 * INTER, scale=0.1),
            "fc2_expert_biases": values(5, experts, HIDDEN, scale=0.1),
            "swiglu_alpha": torch.full((experts,), 1.702),
            "swiglu_beta": torch.ones(experts),
            "swiglu_limit": torch.linspace(0.5, 7.0, experts),
        }
    if ep_rank is not None:
        call |= {"ep_size": 2, "ep_rank": ep_rank}
    return call


def on_gpu(call: dict[str, Any]) -> dict[str, Any]:
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.cuda, call)


def assert_moe_close(out: Tensor, call: dict[str, Any], tolerance: float = 0.01) -> None:
    wanted = cutlass_fused_moe(**call, backend="reference").double()
    error = ((out.cpu().double() - wanted).norm() / wanted.norm()).item()
    assert error <= tolerance, f"relative error {error:.4f}"


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias-swiglu"])
@pytest.mark.parametrize("tokens", [1, 17, 130])
def test_moe_w4a16(tokens, extras):
    need("fused_moe_90")
    call = moe_call(tokens, extras)
    assert_moe_close(cutlass_fused_moe(**on_gpu(call), backend="flashinfer"), call)


@pytest.mark.parametrize("rank", [0, 1])
def test_moe_w4a16_expert_parallel(rank):
    need("fused_moe_90")
    call = moe_call(17, True, ep_rank=rank)
    assert_moe_close(cutlass_fused_moe(**on_gpu(call), backend="flashinfer"), call)


def test_moe_w4a16_tensor_parallel_rank_adds_no_second_bias():
    need("fused_moe_90")
    call = moe_call(17, True) | {"tp_size": 2, "tp_rank": 1}
    assert_moe_close(cutlass_fused_moe(**on_gpu(call), backend="flashinfer"), call)


def test_moe_w4a16_compiled_and_captured(fresh_dynamo):
    need("fused_moe_90")
    call = moe_call(17, True)
    given = on_gpu(call)
    names = ("input", "token_selected_experts", "token_final_scales")
    fixed = {k: v for k, v in given.items() if k not in names}
    inputs = [given[n] for n in names]

    def run(x, ids, scales):
        return cutlass_fused_moe.default(x, ids, scales, **fixed, backend="flashinfer")

    eager = run(*inputs)
    assert_moe_close(eager, call)
    assert_same_bytes(torch.compile(run, fullgraph=True)(*inputs), eager)
    assert_same_bytes(replayed(run, inputs, [torch.zeros_like(t) for t in inputs]), eager)


# W4A8. FlashInfer prepares the weights itself; scales span few enough exponents for nothing to be lost.


def w4a8_call(tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The call in W4A8 on the GPU, and the same weights in W4A16."""
    from flashinfer.fused_moe import preprocess_moe_weights_for_sm90_mixed_gemm_humming

    w1, w2 = values(1, EXPERTS, 2 * INTER, HIDDEN, scale=0.05), values(2, EXPERTS, HIDDEN, INTER, scale=0.05)
    scales, weights = [], []
    for w in (w1, w2):
        codes, raw = quantize_mx(w.float(), MXFP4)
        payload, offsets, residual = preprocess_moe_weights_for_sm90_mixed_gemm_humming(codes.cuda(), raw.cuda())
        weights.append(payload)
        scales += [offsets, residual.float() * 64]
    call = moe_call(tokens, False)
    prepared = {
        "fc1_expert_weights": weights[0],
        "fc2_expert_weights": weights[1],
        "quant_scales": [*scales[:2], torch.ones((), device="cuda"), *scales[2:]],
        "use_wfp4afp8_humming": True,
    }
    return on_gpu(call) | prepared, call


@pytest.fixture
def has_w4a8():
    need("fused_moe_90")
    if not _flashinfer.accepted("cutlass_fused_moe", use_wfp4afp8_humming=True):
        pytest.skip("this version of FlashInfer has no use_wfp4afp8_humming")


@pytest.mark.parametrize("tokens", [1, 17, 130])
def test_moe_w4a8(tokens, has_w4a8):
    call, w4a16 = w4a8_call(tokens)
    out = cutlass_fused_moe(**call, backend="flashinfer")
    on_cpu = torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, call)
    assert_moe_close(out, on_cpu, tolerance=0.04)  # both round to E4M3, at other moments
    assert_moe_close(out, w4a16, tolerance=0.08)  # without that rounding: 0.046 measured at hidden 2944


def test_moe_w4a8_compiled_and_captured(has_w4a8, fresh_dynamo):
    call, _ = w4a8_call(17)
    names = ("input", "token_selected_experts", "token_final_scales")
    fixed = {k: v for k, v in call.items() if k not in names}
    inputs = [call[n] for n in names]

    def run(x, ids, scales):
        return cutlass_fused_moe.default(x, ids, scales, **fixed, backend="flashinfer")

    eager = run(*inputs)
    assert_same_bytes(torch.compile(run, fullgraph=True)(*inputs), eager)
    assert_same_bytes(replayed(run, inputs, [torch.zeros_like(t) for t in inputs]), eager)
