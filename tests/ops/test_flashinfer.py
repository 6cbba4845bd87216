"""The FlashInfer adapters, as far as a machine without their GPUs can prove them.

Capability is pretended, and FlashInfer's functions are stood in for by what their documentation says, over the
reference: each stand-in binds the call to the installed function's real signature and takes its arguments in FlashInfer's
form. So a wrong name, order, layout, dtype or flag of an adapter shows.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest
import torch

from torch_fp4ops import OPS, BackendUnavailable, capture, explain, probe
from torch_fp4ops.cuda_graphs import FirstUseInCapture
from torch_fp4ops.ops import _flashinfer
from torch_fp4ops.ops.cutlass_fused_moe import cutlass_fused_moe
from torch_fp4ops.registry import Op
from torch_fp4ops.testing import assert_right, comparable, samples
from torch_fp4ops.testing.samples import values

from .flashinfer_stand_ins import INSTALLED, exists

flashinfer = pytest.importorskip("flashinfer", reason="FlashInfer is not installed", exc_type=ImportError)
ADAPTED = [
    *("fp4_quantize", "mxfp8_quantize", "mm_fp4", "mm_mxfp8", "mm_bf16_fp4"),
    *("nvfp4_kv_quantize", "nvfp4_kv_dequantize", "cutlass_fused_moe"),
    *("nvfp4_kv_quantize_store", "nvfp4_kv_dequantize_paged", "silu_and_mul_fp4_quantize"),
]


def adapter_of(name: str) -> Any:
    return importlib.import_module(f"torch_fp4ops.ops.{name}.flashinfer")


# What the installed package has


@pytest.mark.parametrize("name", _flashinfer.SIGNATURES)
def test_every_argument_that_is_forwarded_exists(name):
    if not exists(name):
        with pytest.raises(ImportError, match=f"no {name}"):
            _flashinfer.function(name)
        return
    parameters = inspect.signature(_flashinfer.function(name)).parameters
    missing = set(_flashinfer.SIGNATURES[name].arguments.split()) - set(parameters)
    assert not missing
    if INSTALLED >= (0, 7):
        assert set(_flashinfer.SIGNATURES[name].newer) <= set(parameters)


@pytest.mark.parametrize("name", ADAPTED)
def test_capabilities_are_among_flashinfer_s_own(name):
    for backend, kernel in adapter_of(name).KERNELS.items():
        if not exists(kernel.function):
            continue
        run = _flashinfer.function(kernel.function)
        choices = _flashinfer.choices(kernel.function)
        if kernel.choice in (None, "auto") or (choices and kernel.choice not in choices):
            asks = getattr(run, "is_compute_capability_supported", None) if kernel.choice is None else None
        else:
            supported = getattr(run, "is_backend_supported", None)
            asks = supported and (lambda c, supported=supported, kernel=kernel: supported(kernel.choice, c))
        for capability in kernel.capabilities if asks and INSTALLED >= (0, 7) else ():
            assert asks(capability), f"{backend} on {capability}"


def test_the_numbers_of_the_activations_are_forwarded_by_name():
    """They have moved between versions: 7 was Identity, and is SwigluStep."""
    from torch_fp4ops.ops.cutlass_fused_moe import _modes

    known = adapter_of("cutlass_fused_moe")._activations()
    assert {"Swiglu", "SwigluBias", "Geglu", "Silu", "Gelu", "Relu", "Relu2"} <= set(known)
    if INSTALLED >= (0, 7):
        assert {i: a.name for i, a in _modes.ACTIVATIONS.items()} == {
            int(known[a.name]): a.name for a in _modes.ACTIVATIONS.values()
        }


def test_the_shuffle_is_flashinfer_s():
    from torch_fp4ops.weight_layouts import shuffle_matrix_a

    x = values(0, 256, 8)
    for tile in (128, 64):
        assert torch.equal(shuffle_matrix_a(x, tile), flashinfer.shuffle_matrix_a(x, tile))


# What the adapters forward


def able(op: Op, sample) -> list[str]:
    call = op.check(*sample.args, **sample.kwargs)
    foreign = [b for b in op.backend_names() if b not in ("reference", "triton") and comparable(op, sample, b)]
    return [b for b in foreign if op.find_backend(b, "test").unsupported(call) is None]


@pytest.mark.parametrize("capability", [80, 90, 100, 103, 110, 120, 121])
@pytest.mark.parametrize("name", ADAPTED)
def test_every_call_that_an_adapter_takes_means_the_same_to_flashinfer(name, capability, pretend):
    calls = pretend(capability)
    op, taken = OPS[name], set()
    for sample in samples(op):
        for backend in able(op, sample):
            taken.add(backend)
            assert_right(op, sample, backend)
    if not any(exists(kernel.function) for kernel in adapter_of(name).KERNELS.values()):
        assert not taken
        return
    wanted = {
        **dict.fromkeys(("nvfp4_kv_dequantize", "nvfp4_kv_dequantize_paged", "nvfp4_kv_quantize_store"), 80),
        "cutlass_fused_moe": 90,
    }
    assert ("flashinfer" in taken) is (capability >= wanted.get(name, 100))
    if INSTALLED >= (0, 7):
        kernels = adapter_of(name).KERNELS
        assert taken - {"flashinfer"} == {
            b
            for b, k in kernels.items()
            if b != "flashinfer" and capability in k.capabilities and not (capability == 90 and "quantize" in name)
        }
    assert bool(calls) is bool(taken)


@pytest.mark.parametrize(
    ("capability", "packages", "choice"),
    [(100, ("cutlass",), "cute-dsl"), (103, ("cutlass",), "cute-dsl"), (100, (), "cuda"), (120, ("cutlass",), "cuda")],
)
def test_the_quantisers_pick_cute_dsl_on_10_0_and_10_3_and_cuda_elsewhere(capability, packages, choice, pretend):
    calls = pretend(capability, packages)
    x, scale = values(0, 4, 64), torch.ones(1)
    torch.ops.fp4.fp4_quantize(x, scale, backend="flashinfer")
    torch.ops.fp4.mxfp8_quantize(x, backend="flashinfer")
    assert {(name, given["backend"]) for name, given in calls} == {
        ("fp4_quantize", choice),
        ("mxfp8_quantize", choice),
    }
    calls.clear()
    torch.ops.fp4.fp4_quantize(x, scale, is_global_scale_inversed=True, backend="flashinfer")
    assert calls[-1][1]["backend"] == "cuda"  # the other ignores the flag


def test_a_library_s_prefix_is_an_alias(pretend, monkeypatch):
    from torch_fp4ops import selection

    calls = pretend(100)
    sample = next(s for s in samples(OPS["mm_fp4"]) if s.name == "trtllm")
    for alias in ("trtllm", "flashinfer_trtllm", "flashinfer-trtllm"):
        torch.ops.fp4.mm_fp4(*sample.args, **sample.kwargs, backend=alias)
        monkeypatch.setattr(selection, "_environment", {"mm_fp4": alias})
        torch.ops.fp4.mm_fp4(*sample.args, **sample.kwargs)
        monkeypatch.setattr(selection, "_environment", {})
    assert {given["backend"] for _, given in calls} == {"trtllm"}


@pytest.mark.parametrize("name", ["mm_fp4", "mm_mxfp8"])
def test_backends_refuse_the_weight_layout_that_they_cannot_read(name, pretend):
    pretend(100)
    plain, shuffled = (next(s for s in samples(OPS[name]) if s.name.endswith(n)) for n in ("round", "trtllm"))
    with pytest.raises(BackendUnavailable, match="trtllm reads weights of b_layout='trtllm', not 'plain'"):
        OPS[name](*plain.args, **plain.kwargs, backend="trtllm")
    for backend in ("cutlass", "cudnn", "cute-dsl", "flashinfer") if INSTALLED >= (0, 7) else ("cutlass",):
        with pytest.raises(BackendUnavailable, match=f"{backend} reads weights of b_layout='plain', not 'trtllm'"):
            OPS[name](*shuffled.args, **shuffled.kwargs, backend=backend)


@pytest.mark.parametrize("name", ["mm_fp4", "mm_mxfp8", "mm_bf16_fp4"])
def test_no_backend_reads_the_layout_of_another_gpu(name, pretend):
    if not exists(name):
        pytest.skip(f"this FlashInfer has no {name}")
    pretend(100)
    sample = next(s for s in samples(OPS[name]) if s.name.startswith("hopper"))
    call = OPS[name].check(*sample.args, **sample.kwargs)
    assert re.search(r"plain.* not (b_layout=)?'hopper'", OPS[name].why_not("flashinfer", call))


def test_one_alpha_a_row_is_for_cute_dsl(pretend):
    calls = pretend(100)
    sample = next(s for s in samples(OPS["mm_fp4"]) if s.name == "nvfp4-round")
    a, b, a_sf, b_sf, alpha = sample.args
    rows = alpha * torch.arange(1, 6)
    with pytest.raises(BackendUnavailable, match="an alpha for each row is for cute-dsl"):
        torch.ops.fp4.mm_fp4(a, b, a_sf, b_sf, rows, backend="cutlass")
    if INSTALLED >= (0, 7):
        torch.ops.fp4.mm_fp4(a, b, a_sf, b_sf, rows, backend="cute-dsl")
        assert calls[-1][1]["alpha"].shape == (5,)


# Trust


@pytest.mark.parametrize("name", ["fp4_quantize", "mxfp8_quantize"])
def test_the_quantisers_are_refused_on_9_0_with_the_measurement(name, pretend):
    calls = pretend(90)
    x = values(0, 4, 64)
    args = (x, torch.ones(1)) if name == "fp4_quantize" else (x,)
    with pytest.raises(BackendUnavailable, match="leaves its output unwritten.*NVIDIA H200, 0.6.18.post1"):
        OPS[name](*args, backend="flashinfer")
    assert "flashinfer: FlashInfer's" in explain(name, *args) and not calls


def test_an_empty_launch_is_caught_by_the_probe(pretend, monkeypatch):
    """Were the known defect not known."""
    pretend(90)
    monkeypatch.setattr(_flashinfer, "DEFECTS", ())

    def empty_launch(name):
        def run(input, **rest):
            return torch.empty(input.shape[0], input.shape[1] // 2, dtype=torch.uint8), torch.empty(
                -(-input.shape[0] // 128) * 128, -(-input.shape[1] // 64) * 4, dtype=torch.uint8
            )

        return run

    real = _flashinfer.function
    monkeypatch.setattr(_flashinfer, "function", lambda name: empty_launch(name))
    monkeypatch.setattr(_flashinfer, "accepted", lambda name, **optional: {})
    _flashinfer.why_not.cache_clear()
    with pytest.raises(BackendUnavailable, match="leaves its output unwritten: "):
        torch.ops.fp4.fp4_quantize(values(0, 4, 64), torch.ones(1), backend="cuda")
    monkeypatch.setattr(_flashinfer, "function", real)


def test_what_is_not_built_is_said_and_not_set_off_by_auto(pretend, monkeypatch):
    pretend(100)
    monkeypatch.setattr(_flashinfer, "_is_built", lambda name: False)
    sample = next(s for s in samples(OPS["mm_fp4"]) if s.name == "nvfp4-round")
    text = explain("mm_fp4", *sample.args)
    assert "cutlass: its first use would compile FlashInfer's module fp4_gemm_cutlass" in text
    if INSTALLED >= (0, 7):
        assert re.search("  cute-dsl.*: its first use would compile a kernel with CuTe DSL", text)
    monkeypatch.setattr(_flashinfer, "has_package", lambda name: name != "flashinfer_cubin")
    _flashinfer.why_not.cache_clear()
    shuffled = next(s for s in samples(OPS["mm_fp4"]) if s.name == "trtllm")
    assert "trtllm: its first use would download FlashInfer's cubins" in explain(
        "mm_fp4", *shuffled.args, **shuffled.kwargs
    )
    monkeypatch.setenv(probe.OFFLINE_VARIABLE, "1")
    with pytest.raises(BackendUnavailable, match="would compile.*which TORCH_FP4OPS_OFFLINE forbids"):
        torch.ops.fp4.mm_fp4(*sample.args, backend="cutlass")


def no_kernel_for_a_new_k_in_a_capture(name, backend, given, new, calls, monkeypatch, work):
    """``given`` and ``new``: arguments. Also that a new M counts as new."""
    op = OPS[name]
    op(*given, backend=backend)
    calls.clear()
    for arguments in (new, [new[0][:2], *new[1:]]):
        with monkeypatch.context() as captured:
            captured.setattr(capture, "capturing", lambda: True)
            op(*given, backend=backend)
            assert calls
            calls.clear()
            shape = re.escape(str(list(arguments[0].shape)))
            pattern = f"fp4.{name}, backend '{backend}': it might {work} while a CUDA .*, for .*{shape}.*warmup"
            with pytest.raises(FirstUseInCapture, match=pattern):
                op(*arguments, backend=backend)
            assert not calls
        op(*arguments, backend=backend)
        monkeypatch.setenv(probe.OFFLINE_VARIABLE, "1")  # what has run is there
        with monkeypatch.context() as captured:
            captured.setattr(capture, "capturing", lambda: True)
            op(*arguments, backend=backend)
        monkeypatch.delenv(probe.OFFLINE_VARIABLE)
        calls.clear()


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *(("fp4_quantize", "cute-dsl"), ("fp4_quantize", "flashinfer"), ("mxfp8_quantize", "cute-dsl")),
        ("silu_and_mul_fp4_quantize", "flashinfer"),
    ],
)
def test_a_capture_compiles_no_quantiser_for_a_new_k(name, backend, pretend, monkeypatch):
    if not all(exists(kernel.function) for kernel in adapter_of(name).KERNELS.values()):
        pytest.skip(f"this FlashInfer has no {name}")
    calls = pretend(100)
    scale = () if name == "mxfp8_quantize" else (torch.ones(1),)
    given, new = ([values(0, 4, k), *scale] for k in (64, 128))
    no_kernel_for_a_new_k_in_a_capture(name, backend, given, new, calls, monkeypatch, "compile a kernel with CuTe DSL")


@pytest.mark.parametrize(
    ("backend", "work"),
    [
        *(("cute-dsl", "compile a kernel with CuTe DSL"), ("cudnn", "build a cuDNN graph")),
        ("flashinfer", "build what FlashInfer chooses for it"),
    ],
)
def test_a_capture_builds_no_product_of_a_new_k(backend, work, pretend, monkeypatch):
    if INSTALLED < (0, 7):
        pytest.skip("which of them this FlashInfer has is tested elsewhere")
    calls = pretend(100)

    def product(k: int) -> list[torch.Tensor]:
        (a, a_sf), (b, b_sf) = (torch.ops.fp4.fp4_quantize(values(0, n, k), torch.ones(1)) for n in (4, 32))
        return [a, b.T, a_sf, b_sf.T, torch.ones(1)]

    no_kernel_for_a_new_k_in_a_capture("mm_fp4", backend, product(64), product(128), calls, monkeypatch, work)


def test_an_unbuilt_kernel_is_refused_offline_after_the_first_one(pretend, monkeypatch):
    pretend(100)
    torch.ops.fp4.fp4_quantize(values(0, 4, 64), torch.ones(1), backend="cute-dsl")
    monkeypatch.setenv(probe.OFFLINE_VARIABLE, "1")
    torch.ops.fp4.fp4_quantize(values(0, 4, 64), torch.ones(1), backend="cute-dsl")
    with pytest.raises(BackendUnavailable, match="not run yet and would compile a kernel with CuTe DSL, which TORCH_"):
        torch.ops.fp4.fp4_quantize(values(0, 4, 128), torch.ones(1), backend="cute-dsl")
    torch.ops.fp4.fp4_quantize(values(0, 4, 128), torch.ones(1), backend="cuda")


def test_a_capture_takes_any_shape_where_nothing_is_built_for_it(pretend, monkeypatch):
    calls = pretend(100)
    torch.ops.fp4.fp4_quantize(values(0, 4, 64), torch.ones(1), backend="cuda")
    calls.clear()
    monkeypatch.setattr(capture, "capturing", lambda: True)
    torch.ops.fp4.fp4_quantize(values(0, 4, 128), torch.ones(1), backend="cuda")
    assert calls


def test_reasons_that_need_no_import(pretend, monkeypatch):
    sample = samples(OPS["mm_fp4"])[-1]
    call = OPS["mm_fp4"].check(*sample.args, **sample.kwargs)
    kernel = adapter_of("mm_fp4").KERNELS["cutlass"]
    assert kernel.why_not(call) == "FlashInfer's kernels run on NVIDIA GPUs"
    pretend(90)

    def no_import(name):
        raise AssertionError("imported")

    monkeypatch.setattr(_flashinfer, "function", no_import)
    assert "is for compute capability 10.0, 10.3, 10.7, 11.0, 12.0, 12.1, not 9.0" in kernel.why_not(call)
    pretend(100, packages=())
    assert "needs the package 'cudnn'" in adapter_of("mm_fp4").KERNELS["cudnn"].why_not(call)
    for version, reason in ((None, "not installed"), ((0, 6, 10), "0.6.10 is installed; 0.6.11 or later is needed")):
        monkeypatch.setattr(_flashinfer, "version", lambda version=version: version)
        _flashinfer.why_not.cache_clear()
        assert reason in kernel.why_not(call)


def test_parameters_that_an_activation_has_no_use_for_are_left_out(pretend):
    calls = pretend(90)
    sample = next(s for s in samples(cutlass_fused_moe) if s.name == "bf16-activation4")
    numbers = {f"swiglu_{n}": torch.full((3,), 0.5) for n in ("alpha", "beta", "limit")}
    given = sample.args[:8], {**sample.kwargs, **numbers}
    wanted = cutlass_fused_moe(*given[0], **given[1], backend="reference")
    assert torch.equal(cutlass_fused_moe(*given[0], **given[1], backend="flashinfer"), wanted)
    assert not any(calls[-1][1][name] is not None for name in numbers)


def test_flashinfer_is_handed_what_its_kernels_read_without_asking(pretend):
    """Experts' ids and parameters without gaps, whole sixteen bits of codes."""
    calls = pretend(90)
    sample = next(s for s in samples(cutlass_fused_moe) if s.name == "w4a16-mxfp4-flashinfer")
    x, ids, *others = sample.args
    gaps = {name: t.repeat_interleave(2)[::2] for name, t in sample.kwargs.items() if name.startswith("swiglu")}
    assert gaps and not any(t.is_contiguous() for t in gaps.values())
    wanted = cutlass_fused_moe(*sample.args, **sample.kwargs, backend="reference")
    for given in (ids.T.contiguous().T, ids.repeat(1, 2)[:, : ids.shape[1]], ids.long().T.contiguous().T):
        out = cutlass_fused_moe(x, given, *others, **{**sample.kwargs, **gaps}, backend="flashinfer")
        assert not given.is_contiguous() and torch.equal(out, wanted)
    dequantize = OPS["nvfp4_kv_dequantize"]
    odd, *rest = torch.arange(33).byte()[1:].view(4, 8), torch.full((4, 1), 0x38, dtype=torch.uint8), torch.ones(1)
    assert odd.data_ptr() % 2
    assert torch.equal(dequantize(odd, *rest, backend="flashinfer"), dequantize(odd, *rest, backend="reference"))
    assert calls[-1][1]["fp4_data"].data_ptr() % 2 == 0


def test_flashinfer_s_dequantiser_counts_in_32_bits(pretend):
    pretend(90)
    op = OPS["nvfp4_kv_dequantize"]
    for rows, reason in (((1 << 24) - 1, None), (1 << 24, "counts elements in 32 bits")):
        codes, scales = (torch.empty(rows, k, dtype=torch.uint8, device="meta") for k in (64, 8))
        call = op.check(codes, scales, torch.ones(1, device="meta"))
        assert op.find_backend("flashinfer", "test").unsupported(call) == (reason and f"FlashInfer's kernel {reason}")


def test_moe_reasons(pretend):
    by_name = {s.name: s for s in samples(cutlass_fused_moe)}

    def reason(name: str, **change: Any) -> str | None:
        sample = by_name[name]
        call = cutlass_fused_moe.check(*sample.args, **{**sample.kwargs, **change})
        return cutlass_fused_moe.why_not("flashinfer", call)

    pretend(90)
    assert reason("w4a16-mxfp4-flashinfer") is None
    assert "reads weight_layout 'sm90_interleaved'" in reason("w4a16-mxfp4-linear")
    assert "w4a4_nvfp4 is for compute capability 10.0 on" in reason("w4a4-nvfp4")
    assert reason("bf16-1") is None and reason("bf16-activation0") is None
    assert "one dtype for input, weights and output" in reason("bf16-ep-rank1")
    bias = by_name["bf16-bias-swiglu"].args[8]
    assert "biases of both products or of none" in reason("bf16-1", fc2_expert_biases=bias)
    assert "need a row" in reason("bf16-0")
    assert "cutlass_fused_moe has no mode w4a16_nvfp4" in reason("w4a16-nvfp4")
    pretend(100)
    assert reason("bf16-1") is None
    assert "w4a16_mxfp4 is for compute capability 9.0" in reason("w4a16-mxfp4-flashinfer")
    assert reason("w4a4-nvfp4") is None and reason("mxfp4-mxfp8-quantized-input") is None
    assert "input quantised to MXFP8 already" in reason("mxfp4-mxfp8")
