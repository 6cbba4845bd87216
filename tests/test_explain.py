"""What ``explain`` says for GPUs of every kind, none of which is needed: capability is pretended, tensors are fake."""

from __future__ import annotations

import pytest
import torch

from torch_fp4ops import OPS, cli, explain
from torch_fp4ops.ops import _flashinfer
from torch_fp4ops.selection import choose
from torch_fp4ops.testing import samples

CAPABILITIES = [(7, 5), (8, 0), (9, 0), (10, 0), (12, 0)]
every_capability = pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"{c[0]}.{c[1]}")


def call_of(name: str, sizes: tuple[int, ...] = ()) -> tuple:
    return cli._example(name)(torch.device("cuda"), *sizes)


def test_a_call_is_checked_as_the_op_would():
    x, scale = torch.ones(4, 32), torch.ones(1)
    right = explain("fp4_quantize", x, scale)
    packet = torch.ops.fp4.fp4_quantize
    assert (
        explain(OPS["fp4_quantize"], x, scale)
        == explain(packet, x, scale)
        == explain(packet.default, x, scale)
        == right
    )
    for args, kwargs, why in (
        ((x, scale), {"backnd": "triton"}, "unexpected keyword argument 'backnd'"),
        ((x, scale), {"input": x}, "multiple values for argument 'input'"),
        ((x, scale, 16, False, True, False, False, "reference"), {}, "too many positional"),
        ((), {}, "missing a required argument: 'input'"),
    ):
        with pytest.raises(TypeError, match=rf"torch.ops.fp4.fp4_quantize: .*{why}.*; its arguments are"):
            explain("fp4_quantize", *args, **kwargs)
    codes = torch.zeros(4, 16, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    block_scales = torch.ones(4, 2).to(torch.float8_e4m3fn)
    assert "reference" in explain("nvfp4_kv_dequantize", codes, block_scales, scale)
    out = OPS["nvfp4_kv_dequantize"].run_backend("reference", codes, block_scales, scale)
    assert torch.equal(out, OPS["nvfp4_kv_dequantize"](codes, block_scales, scale))
    for other in ("add", torch.ops.aten.add):
        with pytest.raises(ValueError, match=r"explain: there is no op '.*add'; the ops are cutlass_fused_moe, "):
            explain(other, x)


@pytest.mark.parametrize("name", sorted(OPS))
def test_a_check_does_not_depend_on_the_default_device(name):
    sample = samples(OPS[name])[0]
    with torch.device("meta"):
        assert OPS[name].check(*sample.args, **sample.kwargs).device.type == "cpu"


@every_capability
@pytest.mark.parametrize("name", sorted(OPS))
def test_every_backend_has_its_line(name, capability, pretend_gpu):
    pretend_gpu(capability)
    op, arguments = OPS[name], call_of(name)
    title, *lines = explain(name, *arguments).splitlines()
    call = op.check(*arguments)
    decision = choose(op, call, launch=False)
    assert (
        title
        == f"{name} on cuda:0 (compute capability {capability[0]}.{capability[1]}): {decision.backend} (decided by auto)"
    )
    assert decision.backend == ("reference" if capability < (8, 0) and "triton" in op.backend_names() else "triton")
    said = {}
    for names, _, reason in (
        line.strip().partition(": ") for line in lines if "preference " not in line.partition(":")[0]
    ):
        said |= dict.fromkeys(names.split(", "), reason)
    assert set(said) == set(op.backend_names()) - {decision.backend}
    for backend, reason in said.items():
        why = op.why_not(backend, call)
        assert reason == why if why is not None else reason.startswith("can take it; ")
    rows = op.preferences_on(call.device)
    assert lines[len(lines) - len(rows) :] == [
        f"  preference {i}: {row.backend}, because {row.because}" for i, row in enumerate(rows, 1)
    ]


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch):
    monkeypatch.setattr(_flashinfer, "_is_built", lambda name: False)


@pytest.fixture
def built(monkeypatch, nothing_is_built):
    pytest.importorskip("flashinfer", reason="FlashInfer is not installed", exc_type=ImportError)
    monkeypatch.setattr(_flashinfer, "_is_built", lambda name: True)
    monkeypatch.setattr(_flashinfer, "has_package", lambda name: True)


def test_a_foreign_backend_is_said_to_be_probed_first(pretend_gpu, built, monkeypatch):
    pretend_gpu((10, 0))
    text = explain("mm_fp4", *call_of("mm_fp4"))
    assert "(compute capability 10.0): flashinfer (decided by auto)\n  probed against the reference before its" in text
    assert "  triton: can take it; comes later in the preferences" in text.splitlines()
    assert "  cutlass: can take it; no preference for it here" in text.splitlines()
    monkeypatch.setattr(_flashinfer, "_is_built", lambda name: False)
    named = explain("mm_fp4", *call_of("mm_fp4"), backend="cutlass")
    assert "cutlass (decided by backend=)" in named and "reference, triton: can take it; another one is named" in named
    assert "its first use would compile FlashInfer's module fp4_gemm_cutlass" in named.splitlines()[2]


def test_weights_that_only_a_foreign_backend_reads(pretend_gpu, built):
    sample = next(s for s in samples(OPS["cutlass_fused_moe"]) if s.name == "w4a16-mxfp4-flashinfer")
    pretend_gpu((9, 0))
    on_gpu = sample.map_tensors(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
    text = explain("cutlass_fused_moe", *on_gpu.args, **on_gpu.kwargs)
    assert "(compute capability 9.0): flashinfer (decided by auto)" in text  # Triton reads no interleaved weights


def test_the_command_on_a_gpu(pretend_gpu, capsys):
    pretend_gpu((9, 0))
    assert cli.main(["explain", "--device", "cuda"]) == 0
    out = capsys.readouterr().out
    for name, op in OPS.items():
        assert f"\n{name} on cuda:0 (compute capability 9.0): triton (decided by auto)\n" in out
        for row in op.preferences:
            assert (row.because in out) is row.holds_on(torch.device("cuda", 0)) or row.backend == "flashinfer"
    assert "m=16, n=4096, k=4096: alpha float32 [1], a uint8 [16, 2048], b uint8 [2048, 4096], " in out


def test_a_device_that_is_not_there(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for command, device, message in (
        ("explain", "cuda", "torch sees no GPU here; allowed: cpu"),
        ("check", "cuda", "torch sees no GPU here; allowed: cpu"),
        ("explain", "tpu", "no device 'tpu'; allowed: cpu"),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main([command, "mm_fp4", "--device", device])
        assert exit_.value.code == 2 and message in capsys.readouterr().err
