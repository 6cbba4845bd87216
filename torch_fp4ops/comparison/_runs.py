"""Run a model in several ways and compare what its layers give."""

from __future__ import annotations

import contextlib
import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..capture import record_decisions, unrecorded
from ..registry import OPS
from ..selection import set_backend
from ._result import OUTPUT, Comparison, Distance, Row, distance

__all__ = ["compare"]

Make = Callable[[], nn.Module]
Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class _Run:
    name: str
    model: nn.Module
    backends: Mapping[str, str] | None
    """By op, "*" for all; None: whatever is selected outside."""

    @property
    def eager(self) -> nn.Module:
        """What ``torch.compile`` wraps, with the names that the layers have there."""
        wrapped: nn.Module = getattr(self.model, "_orig_mod", self.model)
        return wrapped

    def active(self) -> contextlib.AbstractContextManager[None]:
        if self.backends is None:
            return contextlib.nullcontext()
        return set_backend(self.backends.get("*", "auto"), **{op: b for op, b in self.backends.items() if op != "*"})


class _Key(NamedTuple):
    layer: str
    call: int


def compare(
    model: nn.Module | Make,
    inputs: Any,
    backends: Sequence[str | Mapping[str, str]] = ("reference", "triton"),
    *,
    baseline: nn.Module | Make | None = None,
    baseline_name: str = "baseline",
    layers: str | Filter = "quantized",
    local: bool = True,
    warmup: int = 1,
    repeats: int = 5,
) -> Comparison:
    """Run a model in several ways and say, layer by layer, how far the others drift from the first.

    The first run is the ``baseline`` if there is one, else the model on the first of the backends. Every other run
    feeds itself, so that errors accumulate; with ``local``, every layer is also run alone on what it got in the first
    run, so that a wrong layer stands out from those behind it. Models run in eval mode, without gradients and, but for
    the times, eagerly even if they are compiled; they are left as they were.

    Args:
        model: any module, quantised or calling ``torch.ops.fp4`` itself. A function that makes one (the same each
            time) where a call changes state, such as a KV cache: every run then gets a fresh model.
        inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments, where the model is. Each call
            gets copies, also of other objects in them (a KV cache), if those can be copied.
        backends: for each run a backend for all ops ("auto" included), or a dict by op, ``{"mm_fp4": "mine"}``, in
            which "*" stands for the others (default "auto").
        baseline: a module or function as ``model``, with layers of the same names: the model before ``quantize_``.
        baseline_name: what the result calls it.
        layers: ``"quantized"``: modules that call ``torch.ops.fp4`` themselves, leaves if there are none;
            ``"leaves"``: modules without children; or a function of a module and its name.
        local: whether layers are also run alone. Not for layers that change state or their arguments.
        warmup, repeats: calls of each run before, and while, time is taken; they come after the comparison.

    Returns:
        A :class:`Comparison`.

    Raises:
        ValueError: an argument that is not allowed, an unknown backend, or a model without floating-point outputs.
        BackendUnavailable: a backend that can't take a call; the message has the reason.

    Floating-point outputs of every layer of the first run are kept, in the memory of the CPU.
    """
    args, kwargs = _arguments(inputs)
    if warmup < 0:
        raise ValueError(f"compare: warmup is {warmup}; allowed: 0 or more")
    if repeats < 1:
        raise ValueError(f"compare: repeats is {repeats}; allowed: 1 or more")
    runs = _runs(model, backends, baseline, baseline_name)
    with torch.no_grad(), _evaluating(run.model for run in runs):
        with torch.compiler.set_stance("force_eager"):
            selected = _select(layers, runs[-1], None if isinstance(model, nn.Module) else model, args, kwargs)
            found = _compared(runs, selected, args, kwargs, local)
        times = {run.name: _times(run, args, kwargs, warmup, repeats) for run in runs}
    return Comparison(tuple(run.name for run in runs), times=times, **found)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    raise ValueError(f"compare: inputs is a {type(inputs).__name__}; allowed: a tensor, a tuple, a list or a dict")


def _runs(
    model: nn.Module | Make,
    backends: Sequence[str | Mapping[str, str]],
    baseline: nn.Module | Make | None,
    baseline_name: str,
) -> list[_Run]:
    if isinstance(backends, (str, Mapping)):
        backends = (backends,)
    allowed = "names of backends, or dicts of names by op"
    if not isinstance(backends, Sequence):
        raise ValueError(f"compare: backends is {backends!r}; allowed: {allowed}")
    for wanted in backends:
        names_of = wanted.values() if isinstance(wanted, Mapping) else (wanted,)
        if not names_of or not all(isinstance(name, str) for name in names_of):
            raise ValueError(f"compare: backends has {wanted!r}; allowed: {allowed}")
    least = 2 if baseline is None else 1
    if len(backends) < least:
        why = "without a baseline" if baseline is None else "with a baseline"
        raise ValueError(f"compare: backends is {backends!r}; allowed: {least} or more {why}")
    runs = [] if baseline is None else [_Run(baseline_name, _made("baseline", baseline), None)]
    names = Counter(run.name for run in runs)
    for wanted in backends:
        by_op = {"*": wanted} if isinstance(wanted, str) else dict(wanted)
        for op_name, backend in by_op.items():
            _require_backend(op_name, backend)
        name = ", ".join(b if op_name == "*" else f"{op_name}={b}" for op_name, b in by_op.items())
        names[name] += 1
        unique = name if names[name] == 1 else f"{name} ({names[name]})"
        runs.append(_Run(unique, _made("model", model), by_op))
    return runs


def _require_backend(op_name: str, backend: str) -> None:
    """Raise unless an op of that name, or any op for "*", has the backend."""
    if op_name != "*" and op_name not in OPS:
        raise ValueError(f"compare: backends names the op {op_name!r}; allowed: '*', {', '.join(sorted(OPS))}")
    ops = OPS.values() if op_name == "*" else (OPS[op_name],)
    if backend == "auto":
        return
    for op in ops:
        with contextlib.suppress(ValueError):
            op.find_backend(backend, "compare")
            return
    known = sorted({b for op in ops for b in op.backend_names()})
    raise ValueError(f"compare: backends names {backend!r}; allowed: 'auto', {', '.join(map(repr, known))}")


def _made(argument: str, model: nn.Module | Make) -> nn.Module:
    made = model if isinstance(model, nn.Module) or not callable(model) else model()
    if not isinstance(made, nn.Module):
        raise ValueError(f"compare: {argument} is a {type(made).__name__}; allowed: an nn.Module or what makes one")
    return made


@contextlib.contextmanager
def _evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _fresh(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies for one call, which may write into them."""
    copies: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(_copied, (args, kwargs))
    return copies


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.clone()
    try:
        return copy.deepcopy(leaf)
    except Exception:  # what says in a way of its own that there can be one only
        return leaf


class _Callers(TorchDispatchMode):
    """Notes the innermost module that is running when an operator of this package is called."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.found: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fp4" and self.running:
            self.found[self.running[-1]] = None
        return func(*args, **(kwargs or {}))


def _select(
    layers: str | Filter, run: _Run, make: Make | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, str]:
    """The compared layers' names and kinds, in the order of ``named_modules``."""
    modules = {name: module for name, module in run.eager.named_modules() if name}
    kinds = {name: type(module).__name__ for name, module in modules.items()}
    if callable(layers):
        chosen = [name for name, module in modules.items() if layers(module, name)]
        if not chosen:
            raise ValueError("compare: layers selects no module")
        return {name: kinds[name] for name in chosen}
    if layers not in ("quantized", "leaves"):
        raise ValueError(f"compare: layers is {layers!r}; allowed: 'quantized', 'leaves' or a function")
    chosen = []
    if layers == "quantized":
        # Whoever makes models hands out fresh ones because a call changes them.
        model = run.model if make is None else _made("model", make).eval()
        callers = _callers(_Run(run.name, model, run.backends), args, kwargs)
        chosen = [name for name in modules if name in callers]
    return {name: kinds[name] for name in chosen or (n for n, m in modules.items() if not any(m.children()))}


def _callers(run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, None]:
    callers = _Callers()

    def leave(*_: Any) -> None:
        callers.running.pop()

    handles = []
    for name, module in run.eager.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: callers.running.append(name)))
        handles.append(module.register_forward_hook(leave))
    args, kwargs = _fresh(args, kwargs)
    try:
        with run.active(), callers:
            run.eager(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return callers.found


def _compared(
    runs: Sequence[_Run], selected: Mapping[str, str], args: tuple[Any, ...], kwargs: dict[str, Any], local: bool
) -> dict[str, Any]:
    """The fields of :class:`Comparison` but for names and times."""
    first, *others = runs
    kept: dict[_Key, list[Tensor]] = {}
    alone: dict[tuple[str, _Key], Distance | str] = {}
    unmatched = []

    def keep(key: _Key, args: Any, kwargs: Any, out: Any) -> None:
        kept[key] = [t.to("cpu", copy=True) for t in _floats(out)]
        if not kept[key]:
            return
        for other in others if local else ():
            with other.active(), unrecorded():
                again = _floats(other.eager.get_submodule(key.layer)(*args, **kwargs))
            alone[other.name, key] = _distance_or_reason(again, kept[key])

    everywhere = []
    for name in selected:
        if not all(_has(run.eager, name) for run in runs):
            unmatched.append(f"{name}, which not every model has")
        else:
            everywhere.append(name)
    for run in runs:
        for name, others_of in _one_module(run, everywhere).items():
            # Which of its calls is which layer's, the module does not tell.
            unmatched.append(f"{name}, which is one module with {', '.join(others_of)} in {run.name}")
            everywhere.remove(name)
    backends = {}
    output, backends[first.name] = _watched(first, args, kwargs, everywhere, keep)
    whole = [t.to("cpu", copy=True) for t in _floats(output)]
    if not whole:
        raise ValueError(f"compare: the model gives a {type(output).__name__} without floating-point tensors")
    rows = []
    for other in others:
        found: dict[_Key, Distance | str] = {}

        def against_first(key: _Key, args: Any, kwargs: Any, out: Any, found: Any = found) -> None:
            found[key] = _distance_or_reason(_floats(out), kept.get(key))

        output, backends[other.name] = _watched(other, args, kwargs, everywhere, against_first)
        for key in dict.fromkeys([*kept, *found]):
            result = found.get(key, f"{other.name} does not make it")
            if isinstance(result, str):
                unmatched.append(f"call {key.call + 1} of {key.layer}: {result}")
            else:
                by_itself = alone.get((other.name, key))
                by_itself = None if isinstance(by_itself, str) else by_itself
                rows.append(Row(other.name, key.layer, selected[key.layer], key.call, result, by_itself))
        kind = type(other.eager).__name__
        rows.append(Row(other.name, OUTPUT, kind, 0, distance(_floats(output), whole), None))
    return {"rows": tuple(rows), "backends": backends, "unmatched": tuple(unmatched)}


def _distance_or_reason(given: list[Tensor], wanted: list[Tensor] | None) -> Distance | str:
    if wanted is None:
        return "the first run does not make it"
    if not wanted:
        return "it gives no floating-point tensors"
    try:
        return distance(given, wanted)
    except ValueError as error:
        return str(error)


def _one_module(run: _Run, names: Sequence[str]) -> dict[str, list[str]]:
    """Those of the names that a run's model has one module for, each with the others."""
    of: dict[int, list[str]] = {}
    for name in names:
        of.setdefault(id(run.eager.get_submodule(name)), []).append(name)
    return {name: [other for other in same if other != name] for same in of.values() if len(same) > 1 for name in same}


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _watched(
    run: _Run,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: Sequence[str],
    saw: Callable[[_Key, Any, Any, Any], None],
) -> tuple[Any, dict[str, list[str]]]:
    """Run the model, telling ``saw`` of every call of a layer; its output, and the backends that each op took."""
    calls: Counter[str] = Counter()
    given: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    inside = False  # a layer that is run alone, by ``saw``, is no call of the model's

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not inside:
            given[name].append((args, kwargs))  # as they are before hooks of the layer's own change them

    def hook(name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        nonlocal inside
        if inside:
            return
        inside = True
        try:
            saw(_Key(name, calls[name]), *given[name].pop(), out)
        finally:
            inside = False
        calls[name] += 1

    handles = []
    for name in names:
        module = run.eager.get_submodule(name)
        handles.append(module.register_forward_pre_hook(partial(before, name), prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(partial(hook, name), with_kwargs=True))
    args, kwargs = _fresh(args, kwargs)
    try:
        with run.active(), record_decisions() as decisions:
            out = run.eager(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return out, {op: sorted(taken) for op, taken in sorted(decisions.backends().items())}


def _floats(out: Any) -> list[Tensor]:
    return [t for t in tree_leaves(out) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]


def _times(run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any], warmup: int, repeats: int) -> tuple[float, ...]:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    with run.active():
        for _ in range(warmup + repeats):
            fresh = _fresh(args, kwargs)
            synchronize()
            start = time.perf_counter()
            run.model(*fresh[0], **fresh[1])
            synchronize()
            times.append(time.perf_counter() - start)
    return tuple(times[warmup:])
