"""For CUDA graphs: which backends a capture took, and a refusal of first-time work within one. For ``torch.compile``:
what Dynamo must leave alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .contracts import Call
    from .selection import Decision

__all__ = ["Decisions", "FirstUseInCapture", "capturing", "record_decisions", "refuse_first_use", "untraced"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def untraced(function: _Function) -> _Function:
    """What Dynamo neither traces nor compiles, and nothing that it calls, wherever it is called from.

    For what the dispatcher calls. In a frame of the user's that Dynamo runs as it is, since a graph breaks in a loop,
    say, it would compile frames below an op as well: the reference with Inductor's arithmetic, and launches of kernels.
    """
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
    except ImportError:  # private names; the public one takes time at each call
        return torch.compiler.disable(function)
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return function


class FirstUseInCapture(RuntimeError):
    """A CUDA graph was being captured when an op needed work that is done once: compiling a kernel, say.

    Nothing was launched. Call the op with these shapes before the capture: ``torch_fp4ops.cuda_graphs.warmup``.
    """

    def __init__(self, work: str, call: Call | None = None, backend: str = ""):
        self.work = work
        message = f"{work} while a CUDA graph is being captured"
        if call is not None:
            message = f"torch.ops.fp4.{call.op_name}, backend {backend!r}: {message}, for {describe(call)}"
        hint = "Warm it up with these shapes before the capture: torch_fp4ops.cuda_graphs.warmup(function, [arguments])"
        super().__init__(f"{message}. {hint}")

    def __reduce__(self) -> tuple[Any, ...]:  # as worker processes send it home, with its message made
        return RuntimeError.__new__, (type(self), *self.args), self.__dict__


def refuse_first_use(work: str) -> None:
    """Raise :class:`FirstUseInCapture` if the current stream is being captured.

    For backends, where they are about to do work that is done once (compiling, tuning, probing, allocating a
    workspace), never on the way of every call. ``work`` says what, as a clause: "kernel x would be compiled". The op
    and the shapes are added on the way out.
    """
    if capturing():
        raise FirstUseInCapture(work)


def capturing() -> bool:
    """Whether the current stream is being captured."""
    # A build without CUDA has no is_current_stream_capturing.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def describe(call: Call) -> str:
    """The tensors of a call: names, dtypes and shapes."""
    parts = []
    for name, given in call.__dict__.items():
        for t in given if isinstance(given, list) else (given,):
            if isinstance(t, Tensor):
                parts.append(f"{name} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}")
    return ", ".join(parts)


class Decisions:
    """Which backend each call took; ``explain`` prints it. Calls that differ in data alone are counted as one."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, str, str, str], int] = {}

    def add(self, call: Call, decision: Decision) -> None:
        rejected = "; ".join(f"{name}: {why}" for name, why in decision.rejected.items())
        key = (call.op_name, decision.backend, decision.decided_by, describe(call), rejected)
        self._counts[key] = self._counts.get(key, 0) + 1

    def backends(self) -> dict[str, set[str]]:
        """The backends that each op took."""
        taken: dict[str, set[str]] = {}
        for op_name, backend, *_ in self._counts:
            taken.setdefault(op_name, set()).add(backend)
        return taken

    def __len__(self) -> int:
        return len(self._counts)

    def __str__(self) -> str:
        lines = []
        for (op_name, backend, decided_by, shapes, rejected), count in self._counts.items():
            lines.append(f"{op_name}: {backend} (decided by {decided_by}), {count} x {shapes}")
            if rejected:
                lines.append(f"  not {rejected}")
        return "\n".join(lines) or "no op of torch_fp4ops was called"


recorders: ContextVar[tuple[Decisions, ...]] = ContextVar("torch_fp4ops_recorders", default=())


@contextlib.contextmanager
def record_decisions(into: Decisions | None = None) -> Iterator[Decisions]:
    """Record which backend each call inside takes, in this thread; an outer recording has them, too.

    Selection happens when an op runs, and a CUDA graph keeps what it was when the graph was captured: around
    ``torch.cuda.graph`` this is what the graph runs for good. ``torch_fp4ops.explain`` prints it.
    """
    decisions = Decisions() if into is None else into
    token = recorders.set((*(each for each in recorders.get() if each is not decisions), decisions))
    try:
        yield decisions
    finally:
        recorders.reset(token)


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Calls inside are kept from what records those outside."""
    token = recorders.set(())
    try:
        yield
    finally:
        recorders.reset(token)
