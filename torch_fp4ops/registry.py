"""One op, said once: from a typed function and its contract come the schema, the fake, the validation, the
dispatch to backends and the error that backward raises."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from . import replay
from .backends import Backend, WithBackends
from .capture import FirstUseInCapture, capturing, recorders, untraced
from .codecs import as_bytes, is_native
from .contracts import Call, Out
from .no_backward import INFERENCE_ONLY, NoBackward, any_requires_grad, refuse_tangents, refuse_transforms
from .replay import Plan, Trace, kind_of
from .schemas import in_place_of_none, with_none_for_defaults
from .selection import Decision, Preference, choose, overridden, requested

__all__ = ["OPS", "Backend", "Op", "find_op", "op"]

OPS: dict[str, Op] = {}
"""Every registered op by name."""

_LIBRARY = torch.library.Library("fp4", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

Contract = Callable[[Call], "Out | tuple[Out, ...] | None"]
NativeDtypes = Callable[[Mapping[str, Any]], Sequence[torch.dtype]]
"""By a call's arguments, which of torch's native FP4/FP8 dtypes an argument of bytes may have instead of uint8."""


class Op(WithBackends):
    """An operator ``torch.ops.fp4.<name>``; calling it accepts torch's native FP4/FP8 dtypes for packed bytes."""

    def __init__(
        self,
        function: Callable[..., Any],
        contract: Contract,
        check_values: Callable[[Call], None] | None,
        byte_arguments: Mapping[str, NativeDtypes],
        mutates: Sequence[str],
        preferences: Sequence[Preference],
    ):
        self.name = function.__name__
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self.__module__ = function.__module__
        self.__wrapped__ = function
        self.signature = inspect.signature(function)
        self.schema = torch.library.infer_schema(function, mutates_args=tuple(mutates))
        self._mutates = tuple(mutates)
        self.contract = contract
        self.preferences = tuple(preferences)
        self._preferences_on: dict[torch.device, tuple[Preference, ...]] = {}
        self._check_values = check_values
        self._byte_arguments = dict(byte_arguments)
        super().__init__(function)
        self._seen: set[tuple[Any, ...]] = set()
        self._known: dict[tuple[Any, ...], tuple[Plan | Callable[..., Any], list[int]]] = {}
        """By kind of call, how it is carried out and which of its tensors are written."""

        _LIBRARY.define(f"{self.name}{with_none_for_defaults(self.schema)}", tags=_TAGS)
        self.default = getattr(torch.ops.fp4, self.name).default
        arguments = self.default._schema.arguments
        self._names = tuple(a.name for a in arguments)
        self._defaults = {n: p.default for n, p in self.signature.parameters.items() if p.default is not p.empty}
        self._for_none = in_place_of_none(arguments, self._defaults)
        self._tensor_names = tuple(a.name for a in arguments if "Tensor" in str(a.type))
        self._may_be_none = frozenset(a.name for a in arguments if "Optional" in str(a.type))
        _LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        _LIBRARY.impl(self.name, self._run_with_autograd, "Autograd", with_keyset=True)
        torch.library.register_fake(f"fp4::{self.name}", self._fake, lib=_LIBRARY)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._with_bytes(args, kwargs)
        return self.default(*args, **kwargs)

    def _with_bytes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with those of native dtypes viewed as bytes."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        for name in self._byte_arguments:
            argument = given.get(name)
            if is_native(argument) or isinstance(argument, (list, tuple)):
                as_given = self._to_bytes(name, argument, given)
                if name in kwargs:
                    kwargs[name] = as_given
                else:
                    i = self._names.index(name)
                    args = (*args[:i], as_given, *args[i + 1 :])
        return args, kwargs

    def __reduce__(self) -> tuple[Any, ...]:
        return find_op, (self.name, "pickle")

    def __repr__(self) -> str:
        return f"torch.ops.fp4.{self.name}{self.schema}"

    def _to_bytes(self, name: str, argument: Any, given: dict[str, Any]) -> Any:
        """Bytes of an argument, or of each of a list, refused if their dtype is that of another format."""
        some = argument if isinstance(argument, (list, tuple)) else [argument]
        natives = [(i, a.dtype) for i, a in enumerate(some) if is_native(a)]
        if natives:
            said = {n: a for n, a in given.items() if a is not None}
            allowed = self._byte_arguments[name]({**self._defaults, **said})
            for i, dtype in natives:
                if dtype not in allowed:
                    which = name if some is not argument else f"{name}[{i}]"
                    dtypes = " or ".join(map(str, (torch.uint8, *allowed)))
                    raise ValueError(f"torch.ops.fp4.{self.name}: {which} is {dtype}; allowed: {dtypes}")
        return [as_bytes(a) for a in some] if some is argument else as_bytes(argument)

    # One call

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        arguments = self._defaults.copy()
        arguments.update(zip(self._names, args))  # noqa: B905  (strict= costs time, and fewer arguments are right)
        arguments.update(kwargs)
        for _, name, default in self._for_none:
            if arguments[name] is None:
                arguments[name] = default
        first = arguments[self._names[0]]
        if first is None:
            raise self._none_given(self._names[0])
        return Call(self.name, first, arguments)

    def _none_given(self, name: str) -> ValueError:
        return ValueError(f"torch.ops.fp4.{self.name}: {name} is None; allowed: a tensor")

    def _validate(self, call: Call) -> Any:
        arguments = call.__dict__
        device = call.device
        for name in self._tensor_names:
            given = arguments[name]
            if given is None:
                if name not in self._may_be_none:
                    raise self._none_given(name)
                continue
            for t in given if type(given) is list else (given,):
                if t.device != device:
                    call.require(False, name, t.device, f"{device}, where {self._names[0]} is")
                if t.layout is not torch.strided:
                    call.require(False, name, t.layout, "torch.strided")
        if call.backend != "auto":
            self.find_backend(call.backend, "backend=")
        return self.contract(call)

    def check(self, *args: Any, **kwargs: Any) -> Call:
        """Validate a call exactly as running it would, without running it.

        Raises TypeError where torch's schema would refuse the arguments: one too many, unknown or missing.
        """
        return self._check(*self._bound(args, kwargs))

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"torch.ops.fp4.{self.name}: {error}; its arguments are {self.signature}") from None
        return self._with_bytes(args, kwargs)

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        call = self._bind(args, kwargs)
        self._validate(call)
        if self._check_values is not None and call.device.type == "cpu":
            self._check_values(call)
        return call

    @untraced
    def _run(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs[self._names[0]]
        if first is None:
            raise self._none_given(self._names[0])
        device = first.get_device()
        kind_of_device = "cpu" if device < 0 else "cuda"
        if torch.is_autocast_enabled(kind_of_device):  # else it would change what a backend asks torch to multiply
            with torch.autocast(kind_of_device, enabled=False):
                return self._run(*args, **kwargs)
        if (device < 0 and not replay.ON_CPU) or recorders.get():
            return self._run_checked(args, kwargs)
        try:
            kind, given = kind_of(args, kwargs)
        except RuntimeError:  # a tensor without strides or memory, which validation names
            return self._run_checked(args, kwargs)
        if overridden():
            kind = (requested(self.name), *kind)
        known = self._known.get(kind)
        if known is None:
            return self._run_of_unknown_kind(kind, given, args, kwargs)
        if device < 0:
            self._check(args, kwargs)
        elif _gpus() > 1 and device != torch.cuda.current_device():
            return self._run_checked(args, kwargs)  # which makes it the current one
        run, written = known
        if written and len({given[i].data_ptr() for i in written}) < len(written):
            return self._run_checked(args, kwargs)  # a kind says nothing of what shares memory
        try:
            if isinstance(run, Plan):
                result = run.carry_out(given)
            else:
                args, kwargs = self._with_defaults(args, kwargs)
                result = run(*args, **kwargs)
        except FirstUseInCapture:
            return self._run_checked(args, kwargs)  # which says which call it was
        if written:
            _written(given[i] for i in written)
        return result

    def _run_checked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, decision = self._decide(args, kwargs)
        args, kwargs = self._with_defaults(args, kwargs)
        return self._run_decided(call, decision, args, kwargs)

    def _decide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Decision]:
        call = self._check(args, kwargs)
        decision = choose(self, call)
        if decision.rejected and decision.backend == "reference":
            _warn_reference(self.name, "; ".join(f"{n}: {why}" for n, why in decision.rejected.items()))
        return call, decision

    def _run_decided(self, call: Call, decision: Decision, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for recording in recorders.get():
            recording.add(call, decision)
        backend = self._backends[decision.backend]
        try:
            if backend.trust is None:
                result = backend.run(*args, **kwargs)
            else:
                result = backend.trust.run(backend.run, call, args, kwargs)
        except FirstUseInCapture as error:
            raise FirstUseInCapture(error.work, call, decision.backend) from None
        _written(getattr(call, name) for name in self._mutates)
        return result

    def _run_of_unknown_kind(
        self, kind: tuple[Any, ...], given: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a call, and remember how if it is the second of its kind: many are the only one."""
        # What selection says during a capture does not hold for good: there, nothing is probed.
        if kind not in self._seen or capturing():
            self._seen.add(kind)
            return self._run_checked(args, kwargs)
        if len(self._seen) > _MOST_KINDS:
            self.forget()
        call, decision = self._decide(args, kwargs)
        args, kwargs = self._with_defaults(args, kwargs)
        backend = self._backends[decision.backend]
        plan = None
        if backend.replayable:
            with Trace(given) as trace:
                result = self._run_decided(call, decision, args, kwargs)
            plan = trace.plan(result)
        else:
            result = self._run_decided(call, decision, args, kwargs)
        mutated = [getattr(call, name) for name in self._mutates]
        self._known[kind] = plan or backend.run, [i for i, t in enumerate(given) if any(t is m for m in mutated)]
        return result

    def forget(self) -> None:
        """Forget how calls were carried out: what was decided for them may not hold any longer."""
        self._known.clear()
        self._seen.clear()

    def _with_defaults(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the function's default for a None that only torch's schema knows."""
        if not self._for_none:
            return args, kwargs
        for i, name, default in self._for_none:
            if i < len(args):
                if args[i] is None:
                    args = (*args[:i], default, *args[i + 1 :])
            elif kwargs.get(name, default) is None:
                kwargs = {**kwargs, name: default}
        return args, kwargs

    def _fake(self, *args: Any, **kwargs: Any) -> Any:
        call = self._bind(args, kwargs)
        promised = self._validate(call)
        if promised is None:
            return None
        if isinstance(promised, Out):
            return torch.empty(promised.shape, dtype=promised.dtype, device=call.device)
        return tuple(torch.empty(o.shape, dtype=o.dtype, device=call.device) for o in promised)

    @untraced
    def _run_with_autograd(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_tangents(self.name, tree_leaves((args, kwargs)))
        if torch.is_grad_enabled() and (any_requires_grad(args) or (kwargs and any_requires_grad(kwargs.values()))):
            self._require_a_floating_output(args, kwargs)
            needing = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
            refuse_transforms(self.name, needing)
            return NoBackward.apply(self.name, lambda: self._below_autograd(keyset, args, kwargs), *needing)
        if keyset.raw_repr() in _straight_to_kernel:
            return self._run(*args, **kwargs)
        return self._below_autograd(keyset, args, kwargs)

    def _below_autograd(self, keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        below = keyset & torch._C._after_autograd_keyset
        if below.highestPriorityTypeId() in (DispatchKey.CPU, DispatchKey.CUDA):
            # Plain tensors outside of any tracing: nothing lies between autograd and the kernel, and the next call
            # with these keys need not go through the dispatcher twice, which costs 2 us.
            _straight_to_kernel.add(keyset.raw_repr())
        with torch._C._AutoDispatchBelowAutograd():
            return self.default.redispatch(below, *args, **kwargs)

    def _require_a_floating_output(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        promised = self._validate(self._bind(args, kwargs))
        outputs = (promised,) if isinstance(promised, Out) else promised or ()
        if not any(o.dtype.is_floating_point for o in outputs):
            raise NotImplementedError(
                f"torch.ops.fp4.{self.name} was given a tensor that requires grad, but its outputs are integer "
                f"codes, which carry no gradient: it would be lost silently. {INFERENCE_ONLY}"
            )

    def why_not(self, name: str, call: Call, *, launch: bool = False) -> str | None:
        """Why the backend can't take the call here and now, None if it can. One that would have to be compiled first
        can't. A foreign one that was not probed yet counts as right, or is probed now with ``launch``."""
        backend = self.find_backend(name, "auto")
        reason = backend.unsupported(call)
        if reason is None and backend.trust is not None:
            reason = backend.trust.why_not(self, backend.name, call, named=False, launch=launch)
        return reason

    def run_backend(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run one backend past selection, with the op's validation: for tests and benchmarks."""
        args, kwargs = self._bound(args, kwargs)
        self._check(args, kwargs)
        return self.find_backend(name, "run_backend").run(*args, **kwargs)

    def preferences_on(self, device: torch.device) -> tuple[Preference, ...]:
        """The preference rows that hold for a device, in order."""
        rows = self._preferences_on.get(device)
        if rows is None:
            rows = self._preferences_on[device] = tuple(row for row in self.preferences if row.holds_on(device))
        return rows


def op(
    *,
    contract: Contract,
    check_values: Callable[[Call], None] | None = None,
    byte_arguments: Mapping[str, NativeDtypes] | None = None,
    mutates: Sequence[str] = (),
    preferences: Sequence[Preference] = (),
) -> Callable[[Callable[..., Any]], Op]:
    """Register the decorated function, the op's reference, as ``torch.ops.fp4.<its name>``.

    Args:
        contract: checks a :class:`Call` and returns the outputs it promises; sees shapes, dtypes, strides and
            devices, real or symbolic, never data.
        check_values: checks that read data; run where that costs no synchronisation, on CPU tensors.
        byte_arguments: arguments that the Python function views as uint8 where they have one of these native dtypes.
        mutates: arguments written in place; the function then returns None.
        preferences: what ``backend="auto"`` tries, in order; the reference is always last.
    """

    def register(function: Callable[..., Any]) -> Op:
        new = Op(function, contract, check_values, byte_arguments or {}, mutates, preferences)
        OPS[new.name] = new
        return new

    return register


def find_op(op: Any, asked_by: str) -> Op:
    """The op of a name, of ``torch.ops.fp4.<name>``, or an op itself. Raises ValueError if there is none."""
    if isinstance(op, Op):
        return op
    name = str(op).removeprefix("fp4.").removesuffix(".default")
    if name not in OPS:
        raise ValueError(f"{asked_by}: there is no op {name!r}; the ops are {', '.join(sorted(OPS))}")
    return OPS[name]


_straight_to_kernel: set[int] = set()
_warned: set[str] = set()
_MOST_KINDS = 1 << 12


def _warn_reference(op_name: str, reasons: str) -> None:
    if op_name not in _warned:
        _warned.add(op_name)
        warnings.warn(
            f"torch.ops.fp4.{op_name} runs its pure-PyTorch reference, which is slow. {reasons}", stacklevel=3
        )


@functools.cache
def _gpus() -> int:
    return torch.cuda.device_count()


def _written(tensors: Iterable[Tensor]) -> None:
    for t in tensors:
        if not t.is_inference():  # those have no version counter
            torch.autograd.graph.increment_version(t)
