"""Who decides which backend runs, in which order, and what explain says of it."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import Tensor

from torch_fp4ops import BackendUnavailable, explain, selection, set_backend
from torch_fp4ops.contracts import Call, Out
from torch_fp4ops.registry import OPS, op
from torch_fp4ops.selection import Preference, choose, parse_overrides


@op(
    contract=lambda call: Out(call.x.shape, torch.float32),
    preferences=[Preference("big", "cpu", "big is fast"), Preference("small", "cpu", "small is faster than nothing")],
)
def _test_pick(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Pick."""
    return x + 0


pick = OPS.pop("_test_pick")


def _not_small(call: Call) -> str | None:
    return None if call.x.numel() >= 10 else "fewer than 10 elements"


@pick.backend("big", unsupported=_not_small)
def _big(x: Tensor, *, backend: str = "auto") -> Tensor:
    return x + 1


@pick.backend("small", unsupported=lambda call: "more than 5 elements" if call.x.numel() > 5 else None)
def _small(x: Tensor, *, backend: str = "auto") -> Tensor:
    return x + 2


@pytest.fixture(autouse=True)
def known_op(monkeypatch):
    monkeypatch.setitem(OPS, "_test_pick", pick)


@pytest.fixture
def environment(monkeypatch):
    def set_variable(text: str) -> None:
        monkeypatch.setenv(selection.ENVIRONMENT_VARIABLE, text)
        selection.read_environment(OPS)

    yield set_variable
    monkeypatch.undo()
    selection.read_environment(OPS)


def decide(n: int, backend: str = "auto"):
    return choose(pick, pick.check(torch.zeros(n), backend=backend))


def test_rows_in_order_with_the_reasons_of_those_passed_over():
    assert decide(10) == selection.Decision("big", {}, "auto")
    assert decide(3) == selection.Decision("small", {"big": "fewer than 10 elements"}, "auto")
    none = decide(7)
    assert none.backend == "reference" and set(none.rejected) == {"big", "small"}


def test_call_beats_context_beats_environment(environment):
    environment("_test_pick=small")
    assert (decide(3).backend, decide(3).decided_by) == ("small", "TORCH_FP4OPS_BACKEND")
    with set_backend("reference"):
        assert (decide(3).backend, decide(3).decided_by) == ("reference", "set_backend")
        assert (decide(3, "small").backend, decide(3, "small").decided_by) == ("small", "backend=")
        with set_backend(_test_pick="small"):
            assert decide(3).backend == "small"
        with set_backend("auto"):
            assert decide(10).backend == "big"
    with pytest.raises(BackendUnavailable, match="asked for by TORCH_FP4OPS_BACKEND.*more than 5"):
        decide(10)


def test_one_op_beats_all_ops(environment):
    environment("*=small, _test_pick=reference")
    assert decide(3).backend == "reference"
    with set_backend("small", _test_pick="reference"):
        assert decide(3).backend == "reference"


def test_context_is_per_thread_and_restored_after_an_error():
    seen = []
    with set_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(decide(3).backend))
        thread.start()
        thread.join()
    assert seen == ["small"]
    with pytest.raises(RuntimeError, match="inside"), set_backend("reference"):
        raise RuntimeError("inside")
    assert decide(3).backend == "small"


def test_context_reaches_compiled_code(fresh_dynamo):
    compiled = torch.compile(lambda t: torch.ops.fp4._test_pick(t) * 1, fullgraph=True, backend="aot_eager")
    x = torch.zeros(3)
    assert compiled(x)[0] == 2
    with set_backend("reference"):
        assert compiled(x)[0] == 0


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"no op 'mm_fp5'.*mm_fp4"), set_backend(mm_fp5="triton"):
        pass
    with (
        set_backend("cuda"),
        pytest.raises(ValueError, match=r"_test_pick: backend is 'cuda' \(set_backend\).*'big', 'small'"),
    ):
        decide(3)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("", {}),
        ("triton", {"*": "triton"}),
        ("mm_fp4=triton,*=flashinfer", {"mm_fp4": "triton", "*": "flashinfer"}),
        (" mm_fp4 = triton , ", {"mm_fp4": "triton"}),
    ],
)
def test_parse_overrides(text, overrides):
    assert parse_overrides(text) == overrides


@pytest.mark.parametrize("text", ["mm_fp4=", "=triton", "="])
def test_parse_overrides_rejects_half_an_entry(text):
    with pytest.raises(ValueError, match="TORCH_FP4OPS_BACKEND.*is not of the form"):
        parse_overrides(text)


def test_an_unknown_backend_in_the_environment_warns_and_counts_as_auto(environment, monkeypatch):
    monkeypatch.setattr(selection, "_warned", set())
    environment("_test_pick=trtlmm")
    with pytest.warns(UserWarning, match=r"_test_pick: backend is 'trtlmm' \(TORCH_FP4OPS_BACKEND\).*on with 'auto'"):
        assert decide(10) == selection.Decision("big", {}, "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no second warning
        assert decide(3).backend == "small"


def test_rows_hold_from_a_compute_capability_on(monkeypatch):
    row = Preference("big", "cuda", "new hardware", (10, 0))
    for capability, holds in (((9, 0), False), ((10, 0), True), ((12, 1), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert row.holds_on(torch.device("cuda", 0)) is holds
    assert not row.holds_on(torch.device("cpu"))


def test_environment_is_read_at_import_and_an_unknown_op_warns():
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "try:\n    import torch_fp4ops\nexcept UserWarning as w:\n    print(w)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"TORCH_FP4OPS_BACKEND": "mm_fp5=triton", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "TORCH_FP4OPS_BACKEND names the op 'mm_fp5'; the ops are cutlass_fused_moe" in run.stdout


def test_explain_names_every_backend_and_its_reason():
    assert explain(pick, torch.zeros(3)).splitlines() == [
        "_test_pick on cpu: small (decided by auto)",
        "  reference: can take it; what auto ends at",
        "  big: fewer than 10 elements",
        "  preference 1: big, because big is fast",
        "  preference 2: small, because small is faster than nothing",
    ]
    with set_backend("big"):
        named = explain(pick, torch.zeros(10)).splitlines()
    assert named[:3] == [
        "_test_pick on cpu: big (decided by set_backend)",
        "  reference: can take it; another one is named",
        "  small: more than 5 elements",
    ]
    assert "none. torch.ops.fp4._test_pick: backend 'small'" in explain(pick, torch.zeros(9), backend="small")
