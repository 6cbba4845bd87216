"""A foreign backend is probed once before it runs: what the probe catches, when it happens, what auto may not set off."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_fp4ops import BackendUnavailable, capture, explain, mm_mxfp8, nvfp4_kv_quantize, probe
from torch_fp4ops.cuda_graphs import FirstUseInCapture, warmup
from torch_fp4ops.probe import Probed, prepare
from torch_fp4ops.registry import Op
from torch_fp4ops.selection import Preference, choose

CPU = torch.device("cpu")
X, GLOBAL = torch.randn(4, 32, dtype=torch.bfloat16), torch.ones(1)


@pytest.fixture
def foreign(monkeypatch):
    """Adds backends to an op for one test; nothing that was found out about them stays."""

    def add(op: Op, run, name: str = "foreign", unsupported=lambda call: None, **trust):
        op.backend_names()  # loads the op's own first, or they would go with the copy
        monkeypatch.setattr(op, "_backends", dict(op._backends))
        adapter = _with_signature_of(op, run)
        op.backend(name, unsupported=unsupported, trust=Probed(**trust))(adapter)
        return op

    monkeypatch.setattr(probe, "_verdicts", {})
    monkeypatch.setattr(probe, "_built", set())
    return add


def _with_signature_of(op: Op, run):
    def adapter(*args, **kwargs):
        return run(*args, **kwargs)

    adapter.__signature__ = op.signature
    adapter.__annotations__ = op.__wrapped__.__annotations__
    return adapter


def right(*args, **kwargs):
    return nvfp4_kv_quantize.__wrapped__(*args, **kwargs)


def writes_nothing(input: Tensor, global_scale: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    *leading, k = input.shape
    return tuple(torch.empty(*leading, n, dtype=torch.uint8) for n in (k // 2, k // 16))


def leaves_scales_unwritten(input: Tensor, global_scale: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    codes, scales = right(input, global_scale)
    return codes, torch.empty_like(scales)


def swaps_nibbles(input: Tensor, global_scale: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    codes, scales = right(input, global_scale)
    return (codes << 4) | (codes >> 4), scales


def raises(input: Tensor, global_scale: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (writes_nothing, r"leaves its output unwritten: \d+ of \d+ elements keep their poison \(output 0 of the probe"),
        (leaves_scales_unwritten, r"leaves its output unwritten.*\(output 1"),
        (swaps_nibbles, r"is wrong: \d+ of \d+ elements differ \(output 0"),
        (raises, r"failed its probe: RuntimeError: no kernel image"),
    ],
)
def test_what_is_wrong_is_named_and_remembered(foreign, run, reason):
    calls = []
    op = foreign(nvfp4_kv_quantize, lambda *a, **k: calls.append(1) or run(*a, **k))
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match=reason):
            op(X, GLOBAL, backend="foreign")
    assert len(calls) == 1
    assert not torch.are_deterministic_algorithms_enabled()  # the poison is gone again


def test_a_right_backend_runs_after_one_probe(foreign):
    calls = []
    op = foreign(nvfp4_kv_quantize, lambda *a, **k: calls.append(a[0].shape) or right(*a, **k))
    for _ in range(2):
        codes, _ = op(X, GLOBAL, backend="foreign")
        assert torch.equal(codes, right(X, GLOBAL)[0])
    assert len(calls) == 3 and calls[1:] == [X.shape, X.shape]
    assert prepare(op, "foreign", "cpu") is None and len(calls) == 3
    assert prepare(op, "reference", "cpu") is None


def test_a_float_result_may_differ_by_the_tolerance(foreign):
    for error, passes in ((0.005, True), (0.05, False)):

        def close(*args, error=error, **kwargs):
            return mm_mxfp8.__wrapped__(*args, **kwargs) * (1 + error)

        probe._verdicts.clear()
        op = foreign(mm_mxfp8, close, f"off by {error}")
        reason = prepare(op, f"off by {error}", "cpu")
        assert reason is None if passes else "is wrong: relative error 0.05, where 0.02 is allowed" in reason


def test_a_share_of_the_bytes_may_differ(foreign):
    def off_by_a_few(*args, **kwargs):
        codes, scales = right(*args, **kwargs)
        flat = codes.view(-1)
        flat[: len(flat) // 25] ^= 1
        return codes, scales

    op = foreign(nvfp4_kv_quantize, off_by_a_few, "off by 4%")
    assert "elements differ" in prepare(op, "off by 4%", "cpu")
    op = foreign(nvfp4_kv_quantize, off_by_a_few, "off by the 4% allowed", differing=0.05)
    assert prepare(op, "off by the 4% allowed", "cpu") is None


def test_auto_sets_off_neither_compilation_nor_download(foreign, monkeypatch):
    op = foreign(nvfp4_kv_quantize, right, first_use=lambda device: "compile module x")
    monkeypatch.setattr(op, "preferences", (Preference("foreign", "cpu", "a row for the test"),))
    monkeypatch.setattr(op, "_preferences_on", {})
    monkeypatch.delenv(probe.OFFLINE_VARIABLE, raising=False)
    call = op.check(X, GLOBAL)
    decision = choose(op, call)
    assert (
        decision.backend == "reference" and "first use would compile module x: naming" in decision.rejected["foreign"]
    )
    assert "foreign: its first use would compile module x" in explain(op, X, GLOBAL)
    assert prepare(op, "foreign", "cpu") is None  # now it is compiled
    assert choose(op, call).backend == "foreign"


def test_offline_forbids_it_to_a_named_backend_too(foreign, monkeypatch):
    op = foreign(nvfp4_kv_quantize, right, first_use=lambda device: "download cubins")
    monkeypatch.setenv(probe.OFFLINE_VARIABLE, "1")
    with pytest.raises(BackendUnavailable, match="its first use would download cubins, which TORCH_FP4OPS_OFFLINE"):
        op(X, GLOBAL, backend="foreign")
    monkeypatch.setenv(probe.OFFLINE_VARIABLE, "0")
    op(X, GLOBAL, backend="foreign")


def builds_for_k(call):
    return "compile kernel k", call.input.shape[-1]


def test_what_is_built_for_each_k_is_built_before_a_capture_or_not_at_all(foreign, monkeypatch):
    calls = []
    op = foreign(nvfp4_kv_quantize, lambda *a, **k: calls.append(1) or right(*a, **k), builds=builds_for_k)
    other = X.repeat(1, 2)
    op(X, GLOBAL, backend="foreign")
    calls.clear()
    pattern = r"nvfp4_kv_quantize, backend 'foreign': it might compile kernel k while .* for input bfloat16 \[4, 64\]"
    with monkeypatch.context() as captured:
        captured.setattr(capture, "capturing", lambda: True)
        with pytest.raises(FirstUseInCapture, match=pattern):
            op(other, GLOBAL, backend="foreign")
        assert not calls
        op(X[:2], GLOBAL, backend="foreign")  # another M is the same kernel
    warmup(op.default, [{"input": other, "global_scale": GLOBAL, "backend": "foreign"}])
    monkeypatch.setattr(capture, "capturing", lambda: True)
    op(other, GLOBAL, backend="foreign")


def test_a_call_that_failed_has_built_nothing(foreign, monkeypatch):
    op = foreign(nvfp4_kv_quantize, raises, builds=builds_for_k)
    probe._verdicts[op.name, "foreign", CPU, ""] = probe._PASSED
    with pytest.raises(RuntimeError, match="no kernel image"):
        op(X, GLOBAL, backend="foreign")
    monkeypatch.setattr(capture, "capturing", lambda: True)
    with pytest.raises(FirstUseInCapture, match="it might compile kernel k"):
        op(X, GLOBAL, backend="foreign")


def test_offline_forbids_what_is_yet_to_be_built_of_a_backend_that_has_run(foreign, monkeypatch):
    op = foreign(nvfp4_kv_quantize, right, first_use=lambda device: "compile kernel k", builds=builds_for_k)
    op(X, GLOBAL, backend="foreign")
    monkeypatch.setenv(probe.OFFLINE_VARIABLE, "1")
    op(X[:2], GLOBAL, backend="foreign")
    reason = "a call like this one has not run yet and would compile kernel k, which TORCH_FP4OPS_OFFLINE forbids"
    with pytest.raises(BackendUnavailable, match=reason):
        op(X.repeat(1, 2), GLOBAL, backend="foreign")


def test_explain_launches_nothing(foreign):
    op = foreign(nvfp4_kv_quantize, raises)
    assert "foreign (decided by backend=)" in explain(op, X, GLOBAL, backend="foreign")
    assert not probe._verdicts


def test_nothing_is_probed_while_a_graph_is_captured(foreign, monkeypatch):
    op = foreign(nvfp4_kv_quantize, raises)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    trust = op.find_backend("foreign", "test").trust
    reason = trust._first_time(op, (op.name, "foreign", torch.device("cuda", 0), ""), named=True)
    assert "has not been probed yet, which can't happen while a CUDA graph is being captured" in reason


def test_each_part_of_a_backend_is_probed_by_itself(foreign):
    """Kernels of two kinds under one name: that one of them is wrong says nothing of the other."""

    def wrong_for_matrices(input, global_scale, *, backend):
        return (swaps_nibbles if input.dim() == 2 else right)(input, global_scale, backend=backend)

    op = foreign(nvfp4_kv_quantize, wrong_for_matrices, part=lambda call: f"{call.input.dim()}-D")
    cube = X.unsqueeze(0)
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="is wrong: .* elements differ"):
            op(X, GLOBAL, backend="foreign")
        assert torch.equal(op(cube, GLOBAL, backend="foreign")[0], right(cube, GLOBAL)[0])
    assert {key[-1] for key in probe._verdicts} == {"2-D", "3-D"}
    assert prepare(op, "foreign", "cpu").startswith("2-D: is wrong")
    assert op.why_not("foreign", op.check(X[:1], GLOBAL)) is not None  # known by now
    probe._verdicts.clear()
    call = op.check(X, GLOBAL)
    assert op.why_not("foreign", call) is None and "is wrong" in op.why_not("foreign", call, launch=True)


def test_a_part_without_a_sample_is_not_trusted(foreign):
    op = foreign(nvfp4_kv_quantize, right, part=lambda call: str(call.input.shape[0]))
    with pytest.raises(BackendUnavailable, match="can't be probed: the op has no sample for it"):
        op(X.repeat(1000, 1), GLOBAL, backend="foreign")


def test_a_backend_that_takes_no_sample_is_not_trusted(foreign):
    op = foreign(nvfp4_kv_quantize, right, unsupported=lambda call: None if call.input.shape == X.shape else "only X")
    with pytest.raises(BackendUnavailable, match="can't be probed: only X"):
        op(X, GLOBAL, backend="foreign")
    assert prepare(op, "foreign", "cpu") == "only X"


def test_unknown_names():
    with pytest.raises(ValueError, match="prepare: there is no op 'mm_fp5'"):
        prepare("mm_fp5", "foreign")
    with pytest.raises(ValueError, match="backend is 'foreign'"):
        prepare("mm_fp4", "foreign", "cpu")
