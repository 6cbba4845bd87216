"""When a call is replayed, and what makes one that can't be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_fp4ops import OPS, replay, set_backend
from torch_fp4ops.capture import record_decisions
from torch_fp4ops.contracts import Call, Out
from torch_fp4ops.registry import op
from torch_fp4ops.replay import Plan

RUNS: list[str] = []


def _contract(call: Call) -> Out:
    call.require_rank("x", 2)
    return Out(call.x.shape, call.x.dtype)


def replay_probe(x: Tensor, y: Tensor | None = None, times: int = 1, *, backend: str = "auto") -> Tensor:
    return x * times


replay_probe.__annotations__ = {
    "x": Tensor, "y": Tensor | None, "times": int, "backend": str, "return": Tensor
}  # fmt: skip
PROBE = op(contract=_contract)(replay_probe)
OPS.pop("replay_probe")


def _launch(out: Tensor, x: Tensor, factor: float) -> None:
    """Stands for a kernel: it sees tensors where Triton sees addresses."""
    trace = replay.tracing()

    def kernel(target: Tensor, source: Tensor, by: float) -> None:
        target.copy_(source * by)

    if trace is None:
        kernel(out, x, factor)
    else:
        with trace.pause():
            kernel(out, x, factor)
        trace.launched(kernel, [out, x, factor], addresses=False)


def kernels(x: Tensor, y: Tensor | None = None, times: int = 1, *, backend: str = "auto") -> Tensor:
    RUNS.append("kernels")
    first, out = torch.empty_like(x), x.new_empty(x.shape)
    _launch(first, x if y is None else y, 3.0)
    # The lower half of the rows by themselves: a place within an allocation.
    half = x.shape[0] // 2
    _launch(out[half:], first[half:], 2.0 * times)
    _launch(out[:half], first[:half], 2.0 * times)
    return out.view(-1).view(x.shape)


def calls_torch(x: Tensor, y: Tensor | None = None, times: int = 1, *, backend: str = "auto") -> Tensor:
    """Torch's functions between launches: new tensors, in place, several outputs, lists, views of what they made."""
    RUNS.append("calls_torch")
    first = torch.empty_like(x)
    _launch(first, x.clone(), 2.0)
    largest, where = torch.stack([first, x.neg()]).max(0)
    out = torch.where(where[:, :1] == 0, largest, -largest)
    scaled = torch.zeros_like(out)
    _launch(scaled, out.mul_(times), 1.0)
    return scaled


def reads(x: Tensor, y: Tensor | None = None, times: int = 1, *, backend: str = "auto") -> Tensor:
    RUNS.append("reads")
    out = torch.empty_like(x)
    _launch(out, x, float(x[0, 0]))
    return out


def selects(x: Tensor, y: Tensor | None = None, times: int = 1, *, backend: str = "auto") -> Tensor:
    RUNS.append("selects")
    out = torch.empty_like(x)
    _launch(out, x, float(len(x[x > 1])))
    return out


for backend in (kernels, calls_torch, reads, selects):
    backend.__annotations__ = replay_probe.__annotations__
    PROBE.backend(backend.__name__, unsupported=lambda call: None, replayable=True)(backend)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(replay, "ON_CPU", True)
    PROBE.forget()
    RUNS.clear()
    yield
    PROBE.forget()


def call(x: Tensor, *args, backend: str = "kernels") -> Tensor:
    return PROBE.default(x, *args, backend=backend)


def test_the_third_call_of_a_kind_is_replayed():
    for i in range(5):
        x = torch.full((4, 3), float(i))
        out = call(x)
        assert torch.equal(out, x * 6) and out.data_ptr() != x.data_ptr()
    assert RUNS == ["kernels"] * 2
    ((run, written),) = PROBE._known.values()
    assert type(run) is Plan and written == []


def test_an_output_of_a_replay_is_its_own():
    x = torch.ones(4, 3)
    outs = [call(x * i) for i in range(5)]
    assert len({o.untyped_storage().data_ptr() for o in outs}) == 5
    assert [float(o[0, 0]) for o in outs] == [0, 6, 12, 18, 24]


def test_kinds_differ_by_metadata_and_arguments():
    x = torch.ones(4, 3)
    kinds = (
        lambda: call(x),
        lambda: call(x.double()),
        lambda: call(torch.ones(3, 4).t()),
        lambda: call(torch.ones(6, 3)),
        lambda: call(torch.ones(13)[1:].view(4, 3)),  # another alignment
        lambda: call(x, None, 2),
        lambda: call(x, torch.ones(4, 3)),
    )
    for kind in kinds:
        RUNS.clear()
        for _ in range(4):
            kind()
        assert RUNS == ["kernels"] * 2


def test_functions_of_torch_are_called_again():
    for i in range(5):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(i))
        first = x * 2
        wanted = torch.where((first >= -x)[:, :1], torch.maximum(first, -x), -torch.maximum(first, -x)) * 3
        assert torch.equal(call(x, None, 3, backend="calls_torch"), wanted)
    assert RUNS == ["calls_torch"] * 2
    ((run, _),) = PROBE._known.values()
    assert type(run) is Plan


@pytest.mark.parametrize(("backend", "factor"), [("reads", 3.0), ("selects", 12.0)])
def test_what_depends_on_data_is_not_replayed_but_its_backend_is_remembered(monkeypatch, backend, factor):
    checks = []
    monkeypatch.setattr(PROBE, "_check", lambda *a, check=PROBE._check: checks.append(1) or check(*a))
    x = torch.full((4, 3), 3.0)
    for _ in range(4):
        assert torch.equal(call(x, backend=backend), x * factor)
    assert [backend] * 4 == RUNS
    ((run, _),) = PROBE._known.values()
    assert type(run) is not Plan


def test_one_tensor_twice_is_not_replayed():
    """The next call may have two."""
    x = torch.ones(4, 3)
    for _ in range(4):
        call(x, x)
    assert RUNS == ["kernels"] * 4
    y = torch.full((4, 3), 5.0)
    assert torch.equal(call(x, y), y * 6)


def writes(x: Tensor, y: Tensor, *, backend: str = "auto") -> None:
    RUNS.append("writes")
    _launch(x, x, 2.0)
    _launch(y, y, 3.0)


def test_tensors_of_one_memory_that_are_written_are_not_replayed():
    """Only what checks the call again can refuse them."""
    writes.__annotations__ = {"x": Tensor, "y": Tensor, "backend": str, "return": None}
    probe = op(contract=lambda call: None, mutates=("x", "y"))(writes)
    OPS.pop("writes")
    probe.backend("kernels", unsupported=lambda call: None, replayable=True)(writes)
    x, y = torch.ones(2, 3), torch.ones(2, 3)
    for _ in range(3):
        probe.default(x, y, backend="kernels")
    assert RUNS == ["writes"] * 2 and x[0, 0] == 8 and y[0, 0] == 27
    probe.default(x, x.view(2, 3), backend="kernels")
    assert RUNS == ["writes"] * 3


def test_records_see_every_call():
    x = torch.ones(4, 3)
    with record_decisions() as decisions:
        for _ in range(4):
            call(x)
    assert RUNS == ["kernels"] * 4 and not PROBE._known
    assert "4 x" in str(decisions)


def test_a_choice_of_backend_makes_kinds_of_its_own():
    x = torch.ones(4, 3)
    for _ in range(2):
        for name in ("reads", "kernels"):
            with set_backend(name):
                for _ in range(3):
                    PROBE.default(x)
    # "reads" runs at every call, "kernels" at the first two.
    assert "".join(name[0] for name in RUNS) == "rrrkkrrr"
    assert len(PROBE._known) == 2


def test_what_is_forgotten_is_worked_out_anew():
    x = torch.ones(4, 3)
    for _ in range(3):
        call(x)
    PROBE.forget()
    call(x)
    assert RUNS == ["kernels"] * 3


def test_a_new_backend_and_the_environment_make_it_forget(monkeypatch):
    from torch_fp4ops.selection import read_environment

    x = torch.ones(4, 3)
    for _ in range(3):
        call(x)
    assert PROBE._known
    read_environment({"replay_probe": PROBE})
    assert not PROBE._known


def test_kinds_are_bounded(monkeypatch):
    from torch_fp4ops import registry

    monkeypatch.setattr(registry, "_MOST_KINDS", 8)
    for n in range(1, 30):
        for _ in range(3):
            call(torch.ones(n, 3))
    assert len(PROBE._known) <= 8 and len(PROBE._seen) <= 10


def test_bad_input_is_refused_every_time():
    for _ in range(4):
        with pytest.raises(ValueError, match="x is of shape"):
            call(torch.ones(3))


def test_without_grad_and_with_it():
    x = torch.ones(4, 3)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            for _ in range(4):
                assert torch.equal(call(x), x * 6)
    y = x.clone().requires_grad_()
    for _ in range(4):
        with pytest.raises(NotImplementedError, match="has no backward"):
            call(y).sum().backward()
