"""Which backend runs a call: one pure function, used by dispatch, ``explain``, the CLI and the tests alike.

Order: the call's own ``backend=``, then ``with set_backend(...)``, then the environment variable
``TORCH_FP4OPS_BACKEND``, then the op's preference rows. A backend that was named and can't take the call raises
with its reason; only ``"auto"`` falls through, and ends at the reference. A name in the environment that an op does not
have gives a warning and counts as ``"auto"``: one variable serves ops with different backends.
"""

from __future__ import annotations

import contextlib
import os
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .capture import Decisions

if TYPE_CHECKING:
    from .contracts import Call
    from .registry import Op

__all__ = ["BackendUnavailable", "Decision", "Preference", "Trust", "choose", "set_backend"]

ENVIRONMENT_VARIABLE = "TORCH_FP4OPS_BACKEND"


class BackendUnavailable(RuntimeError):
    """A backend was named that can't take the call; the message has its reason."""


@dataclass(frozen=True)
class Preference:
    """One row of an op's preferences: ``auto`` tries the rows of the call's device type in order."""

    backend: str
    device_type: str
    because: str
    """The measurement or the fact that the row rests on."""
    capability: tuple[int, int] | None = None
    """The oldest compute capability for which the row holds; None for every device of the type."""

    def holds_on(self, device: torch.device) -> bool:
        if device.type != self.device_type:
            return False
        if self.capability is None:
            return True
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= self.capability


class Trust(Protocol):
    """Whether a backend that is another library's code may run on a device."""

    def why_not(self, op: Op, backend: str, call: Call, *, named: bool, launch: bool) -> str | None:
        """Why it may not run, None if it may.

        ``named``: asked for by name, so what takes long (compiling) may happen now. ``launch``: what is not known yet
        may be found out by running the backend; otherwise it counts as right.
        """

    def run(self, backend: Callable[..., Any], call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the backend's function for a call that :meth:`why_not` has let pass.

        Raises:
            FirstUseInCapture: it would have to build something, and a CUDA graph is being captured.
        """


@dataclass(frozen=True)
class Decision:
    """What was chosen, and why everything tried before it was not."""

    backend: str
    rejected: Mapping[str, str] = field(default_factory=dict)
    decided_by: str = "auto"


_REFERENCE = Decision("reference")


def parse_overrides(text: str, source: str = ENVIRONMENT_VARIABLE) -> dict[str, str]:
    """``"mm_fp4=triton,*=flashinfer"`` as a dict; a lone name means every op.

    Raises ValueError that names ``source`` on an entry without a name on either side.
    """
    overrides = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        op_name, separator, backend = (part.strip() for part in entry.rpartition("="))
        if not backend or (separator and not op_name):
            raise ValueError(f"{source}: {entry!r} is not of the form op=backend or backend")
        overrides[op_name or "*"] = backend
    return overrides


_environment: dict[str, str] = {}
_context: ContextVar[Mapping[str, str] | None] = ContextVar("torch_fp4ops_backend", default=None)


def read_environment(known_ops: Mapping[str, Op]) -> None:
    """Read ``TORCH_FP4OPS_BACKEND`` (done once, when the package is imported); an op it doesn't know warns."""
    _environment.clear()
    for op in known_ops.values():
        op.forget()
    _environment.update(parse_overrides(os.environ.get(ENVIRONMENT_VARIABLE, "")))
    for name in _environment.keys() - known_ops.keys() - {"*"}:
        warnings.warn(
            f"{ENVIRONMENT_VARIABLE} names the op {name!r}; the ops are {', '.join(sorted(known_ops))}",
            stacklevel=2,
        )


@contextlib.contextmanager
def set_backend(backend: str | None = None, /, **per_op: str) -> Iterator[None]:
    """Choose backends for the calls made inside: ``set_backend("triton")``, ``set_backend(mm_fp4="reference")``.

    A name for all ops and names for single ops may be combined; inner contexts win over outer ones, and
    ``"auto"`` takes an outer choice back. The choice is made when an op runs, so it also holds for compiled
    models that run inside, but not for CUDA graphs that were captured before. Per thread and asyncio task.
    """
    from .registry import OPS

    for name in per_op:
        if name not in OPS:
            raise ValueError(f"set_backend: there is no op {name!r}; the ops are {', '.join(sorted(OPS))}")
    outer = {} if backend is not None else dict(_context.get() or {})
    token = _context.set({**outer, **({"*": backend} if backend is not None else {}), **per_op})
    try:
        yield
    finally:
        _context.reset(token)


def _requested(op_name: str, call_backend: str) -> tuple[str, str]:
    """The backend asked for and who asked."""
    if call_backend != "auto":
        return call_backend, "backend="
    for overrides, who in ((_context.get(), "set_backend"), (_environment, ENVIRONMENT_VARIABLE)):
        if overrides:
            name = overrides.get(op_name, overrides.get("*"))
            if name is not None:
                return name, who
    return "auto", "auto"


def overridden() -> bool:
    """Whether a ``set_backend`` is in force."""
    return _context.get() is not None


def requested(op_name: str) -> str:
    """The backend that ``set_backend`` or the environment names for an op; "auto" where neither does."""
    return _requested(op_name, "auto")[0]


def choose(op: Op, call: Call, *, launch: bool = True) -> Decision:
    """Choose the backend of ``op`` that runs ``call``. Looks at shapes, dtypes and devices, never at data.

    A foreign backend is probed before it is chosen for the first time, unless ``launch`` is False: then one that is
    not known to be wrong counts as right.

    Raises:
        ValueError: the requested backend is none of this op's.
        BackendUnavailable: the requested backend can't take this call.
    """
    if call.backend == "auto" and not _environment and not overridden():
        name = "auto"
    else:
        name, who = _requested(op.name, call.backend)
    if name != "auto" and who == ENVIRONMENT_VARIABLE:
        name = _known_or_auto(op, name)
    if name != "auto":
        backend = op.find_backend(name, who)
        reason = backend.unsupported(call)
        if reason is None and backend.trust is not None:
            reason = backend.trust.why_not(op, backend.name, call, named=True, launch=launch)
        if reason is not None:
            raise BackendUnavailable(
                f"torch.ops.fp4.{op.name}: backend {name!r}, asked for by {who}, can't take this call: {reason}"
            )
        return Decision(backend.name, {}, who)
    rows = op.preferences_on(call.device)
    if not rows:
        return _REFERENCE
    rejected: dict[str, str] = {}
    for row in rows:
        backend = op.find_backend(row.backend, "auto")
        reason = backend.unsupported(call)
        if reason is None and backend.trust is not None:
            reason = backend.trust.why_not(op, row.backend, call, named=False, launch=launch)
        if reason is None:
            return Decision(row.backend, rejected)
        rejected[row.backend] = reason
    return Decision("reference", rejected)


_warned: set[tuple[str, str]] = set()


def _known_or_auto(op: Op, name: str) -> str:
    """The environment's backend for an op, or "auto" with one warning where the op has none of that name."""
    try:
        op.find_backend(name, ENVIRONMENT_VARIABLE)
    except ValueError as error:
        if (op.name, name) not in _warned:
            _warned.add((op.name, name))
            warnings.warn(f"{error}. Going on with 'auto'.", stacklevel=5)
        return "auto"
    return name


def explain(op: Op | str | Any, *args: Any, **kwargs: Any) -> str:
    """A few lines of text: which backend the op would take for these arguments, why not each other one, and what the
    preferences of ``"auto"`` rest on.

    ``op`` is a name, the op itself or ``torch.ops.fp4.<name>``. The arguments are the op's own; they are checked as the
    op would check them, and nothing is launched. Given what ``record_decisions`` or ``piecewise`` (of
    ``torch_fp4ops.cuda_graphs``) returned, and no arguments: which backends were taken when that was captured.
    """
    from .registry import find_op

    if isinstance(op, Decisions):
        return str(op)
    if not isinstance(op, str) and hasattr(op, "decisions"):
        sizes = [f"size {size}:\n{textwrap.indent(str(taken), '  ')}" for size, taken in sorted(op.decisions.items())]
        return "\n".join(sizes) or "nothing has been captured yet"
    op = find_op(op, "explain")
    call = op.check(*args, **kwargs)
    title, chosen, named = f"{op.name} on {_described(call.device)}", "", True
    try:
        decision = choose(op, call, launch=False)
        chosen, named = decision.backend, decision.decided_by != "auto"
        lines = [f"{title}: {chosen} (decided by {decision.decided_by})", *_of_foreign_code(op, chosen, call)]
    except (BackendUnavailable, ValueError) as error:
        lines = [f"{title}: none. {error}"]
    others: dict[str, list[str]] = {}
    for name in op.backend_names():
        if name != chosen:
            others.setdefault(op.why_not(name, call) or _able(op, name, call, named), []).append(name)
    lines += [f"  {', '.join(names)}: {reason}" for reason, names in others.items()]
    rows = op.preferences_on(call.device)
    lines += [f"  preference {i}: {row.backend}, because {row.because}" for i, row in enumerate(rows, 1)]
    if not rows:
        lines.append(f"  no preference for {call.device.type}: auto takes the reference")
    return "\n".join(lines)


def _described(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip is not None:
        return str(device)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} (compute capability {major}.{minor})"


def _of_foreign_code(op: Op, chosen: str, call: Call) -> list[str]:
    """What the first call of a chosen backend does beside its work, if that is another library's."""
    trust = op.find_backend(chosen, "explain").trust
    if trust is None:
        return []
    obstacle = trust.why_not(op, chosen, call, named=False, launch=False)
    return ["  probed against the reference before its first use", *([f"  {obstacle}"] if obstacle else [])]


def _able(op: Op, name: str, call: Call, named: bool) -> str:
    """Why a backend that can take the call is not chosen."""
    if named:
        return "can take it; another one is named"
    if name == "reference":
        return "can take it; what auto ends at"
    for row in op.preferences:
        if row.backend == name and row.device_type == call.device.type:
            if row.holds_on(call.device):
                return "can take it; comes later in the preferences"
            assert row.capability is not None
            return f"can take it; preferred from compute capability {row.capability[0]}.{row.capability[1]} on"
    return "can take it; no preference for it here"
