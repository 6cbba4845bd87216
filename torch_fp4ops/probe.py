"""Probe code that is not this package's before it is trusted.

A library's kernel may be absent for a GPU and still launch: it then leaves its output as it was, without an error. So
a foreign backend's first call is preceded by a tiny one into poisoned memory, compared with the reference. That
happens once per process, op, backend, device and part of the backend; the verdict is kept.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .capture import refuse_first_use
from .codecs import as_bytes
from .contracts import Call
from .registry import Op, find_op
from .testing.samples import Sample, samples

__all__ = ["OFFLINE_VARIABLE", "Probed", "prepare", "probe"]

OFFLINE_VARIABLE = "TORCH_FP4OPS_OFFLINE"
_PASSED = ""
_verdicts: dict[tuple[str, str, torch.device, str], str] = {}  # reason, or _PASSED
_built: set[Hashable] = set()
"""For what calls have run that had something built or fetched for them."""
_lock = threading.RLock()


@dataclass(frozen=True)
class Probed:
    """The :class:`~torch_fp4ops.selection.Trust` of a foreign backend: it may run once a probe has passed.

    Attributes:
        first_use: what the first call on a device would have to fetch or build ("compile fused_moe_90"), None for
            nothing. Only a call that names the backend, or :func:`prepare`, sets that off; ``auto`` never does.
        tolerance: relative (Frobenius) error that floating-point outputs may have.
        part: which part of a backend a call uses, where one name stands for kernels of several kinds: each is probed
            on a sample of its own. None: there is one.
        differing: share of quantised bytes that may differ. With 1% a kernel that rounds otherwise at ties passes, one
            that does something else does not.
        builds: what a call has to fetch or build even after the first one, and for what: where that is equal, so is
            what was built. None for nothing. Such a call is refused in a capture unless one like it has run before.
    """

    first_use: Callable[[torch.device], str | None] = lambda device: None
    tolerance: float = 0.02
    part: Callable[[Call], str] | None = None
    differing: float = 0.01
    builds: Callable[[Call], tuple[str, Hashable] | None] = lambda call: None

    def why_not(self, op: Op, backend: str, call: Call, *, named: bool, launch: bool) -> str | None:
        key = (op.name, backend, call.device, "" if self.part is None else self.part(call))
        verdict = _verdicts.get(key)
        if verdict is not None:
            return verdict or self._not_built_offline(call)
        return self._first_time(op, key, named) if launch else self._obstacle(call.device, named)

    def run(self, backend: Callable[..., Any], call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        built = self.builds(call)
        if built is None or built[1] in _built:
            return backend(*args, **kwargs)
        refuse_first_use(f"it might {built[0]}")
        result = backend(*args, **kwargs)
        _built.add(built[1])
        return result

    def _not_built_offline(self, call: Call) -> str | None:
        """Why a call of a backend that has run before may not, where building is forbidden by now."""
        if not _offline():
            return None
        work, built = self.first_use(call.device), self.builds(call)
        if work is None or built is None or built[1] in _built:
            return None
        return f"a call like this one has not run yet and would {work}, which {OFFLINE_VARIABLE} forbids"

    def _obstacle(self, device: torch.device, named: bool) -> str | None:
        work = self.first_use(device)
        if work is None:
            return None
        if _offline():
            return f"its first use would {work}, which {OFFLINE_VARIABLE} forbids"
        if not named:
            return f"its first use would {work}: naming the backend, or torch_fp4ops.probe.prepare, has that done"
        return None

    def _first_time(self, op: Op, key: tuple[str, str, torch.device, str], named: bool) -> str | None:
        _, backend, device, part = key
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return (
                "it has not been probed yet, which can't happen while a CUDA graph is being captured: "
                "run the op once, or torch_fp4ops.probe.prepare, before"
            )
        obstacle = self._obstacle(device, named)
        if obstacle is not None:
            return obstacle
        with _lock:
            if key not in _verdicts:
                _verdicts[key] = probe(op, backend, device, self.tolerance, part, self.differing) or _PASSED
                op.forget()
            return _verdicts[key] or None


def _offline() -> bool:
    return os.environ.get(OFFLINE_VARIABLE, "") not in ("", "0")


def prepare(op: Op | str, backend: str, device: torch.device | str = "cuda") -> str | None:
    """Do now what a foreign backend's first calls would: build, load and probe it. For before a capture.

    What is built for a call's shapes is left to calls of these shapes: see ``torch_fp4ops.cuda_graphs.warmup``.

    Returns:
        Why the backend, or a part of it, may not run, None if all of it may (own backends always).

    Raises:
        ValueError: the op or backend does not exist.
    """
    op = find_op(op, "prepare")
    found = op.find_backend(backend, "prepare")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if found.trust is None:
        return None
    accepted = _accepted(op, backend, device)
    if isinstance(accepted, str):
        return accepted
    reasons = []
    for part, (_, call) in accepted.items():
        reason = found.trust.why_not(op, found.name, call, named=True, launch=True)
        if reason is not None:
            reasons.append(f"{part}: {reason}" if part else reason)
    return "; ".join(reasons) or None


def probe(
    op: Op, backend: str, device: torch.device, tolerance: float = 0.02, part: str = "", differing: float = 0.01
) -> str | None:
    """Run a backend on the largest of the op's samples that it takes, in poisoned memory, against the reference.

    Args:
        op, backend, device: what is probed, and where.
        tolerance, part, differing: see :class:`Probed`; only samples of the part count.

    Returns:
        What is wrong, None if nothing is. Nothing is cached, and nothing but ``unsupported`` is asked first.
    """
    accepted = _accepted(op, backend, device)
    if isinstance(accepted, str):
        return f"can't be probed: {accepted}"
    if part not in accepted:
        return "can't be probed: the op has no sample for it"
    sample, _ = accepted[part]
    found = op.find_backend(backend, "probe")
    with torch.no_grad(), _poisoned():
        try:
            out = found.run(*sample.args, **sample.kwargs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # whatever a library raises, it is a reason not to use it
            return f"failed its probe: {type(error).__name__}: {error}"
        poisons = [torch.empty(1, dtype=t.dtype, device=t.device).cpu() for t in _tensors(out)]
    on_cpu = sample.map_tensors(lambda t: t.cpu())
    wanted = op.run_backend("reference", *on_cpu.args, **on_cpu.kwargs)
    outputs, references = _tensors(out), _tensors(wanted)
    if len(outputs) != len(references):
        return f"failed its probe: {len(outputs)} outputs, not {len(references)}"
    for i, (given, reference, poison) in enumerate(zip(outputs, references, poisons, strict=True)):
        wrong = _difference(given.cpu(), reference, poison, tolerance, differing)
        if wrong is not None:
            return f"{wrong} (output {i} of the probe {sample.name!r})"
    return None


def _tensors(tree: object) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _accepted(op: Op, backend: str, device: torch.device) -> dict[str, tuple[Sample, Call]] | str:
    """By part, the op's largest finite sample that the backend takes, and its call; or why it takes none."""
    found = op.find_backend(backend, "probe")
    part_of = getattr(found.trust, "part", None)
    best: dict[str, tuple[Sample, Call]] = {}
    sizes: dict[str, int] = {}
    reason = "the op has no sample for it"
    for sample in samples(op, device):
        call = op.check(*sample.args, **sample.kwargs)
        why = found.unsupported(call)
        if why is not None:
            reason = why
            continue
        tensors = _tensors((sample.args, sample.kwargs))
        elements, part = sum(t.numel() for t in tensors), "" if part_of is None else part_of(call)
        finite = all(bool(t.float().isfinite().all()) for t in tensors if t.is_floating_point())
        if elements > sizes.get(part, 0) and finite:
            best[part], sizes[part] = (sample, call), elements
    return best or reason


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Memory that torch allocates comes filled with NaN or the largest integer."""
    previous = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(previous[0], warn_only=previous[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def _difference(given: Tensor, wanted: Tensor, poison: Tensor, tolerance: float, allowed: float) -> str | None:
    if (given.shape, given.dtype) != (wanted.shape, wanted.dtype):
        return f"gives {given.dtype} {tuple(given.shape)}, not {wanted.dtype} {tuple(wanted.shape)}"
    got, reference, untouched = (_rows_of_bytes(t) for t in (given, wanted, poison))
    kept = (got == untouched).all(1)
    differing = (got != reference).any(1)
    if bool(differing.any()) and bool(kept[differing].all()):
        return f"leaves its output unwritten: {int(kept.sum())} of {len(kept)} elements keep their poison"
    if given.dtype in (torch.bfloat16, torch.float16, torch.float32):
        error = float((given.double() - wanted.double()).norm() / wanted.double().norm())
        return None if error <= tolerance else f"is wrong: relative error {error:.3g}, where {tolerance:g} is allowed"
    wrong = int(differing.sum())
    return None if wrong <= int(len(differing) * allowed) else f"is wrong: {wrong} of {len(differing)} elements differ"


def _rows_of_bytes(t: Tensor) -> Tensor:
    """``[elements, bytes of one]``."""
    return as_bytes(t.reshape(-1).contiguous()).view(torch.uint8).reshape(t.numel(), t.element_size())
