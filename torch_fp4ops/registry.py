"""One op, said once: from a typed function and its contract come the schema, the fake, the validation, the
dispatch to backends and the error that backward raises."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._pytree import tree_leaves

from .capture import FirstUseInCapture, recorder
from .codecs import as_bytes
from .contracts import Call, Out
from .selection import Preference, Trust, choose

__all__ = ["OPS", "Backend", "Op", "op"]

OPS: dict[str, Op] = {}
"""Every registered op by name."""

_LIBRARY = torch.library.Library("fp4", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_MODULES_THAT_ARE_NO_BACKEND = {"samples"}

Contract = Callable[[Call], "Out | tuple[Out, ...] | None"]
Unsupported = Callable[[Call], "str | None"]


@dataclass(frozen=True)
class Backend:
    """An implementation of an op. ``unsupported`` says why it can't take a call (capability, never preference);
    ``trust`` decides whether a foreign library's code may run, and ``exact`` is False where it is not held to the
    reference's very bytes."""

    name: str
    run: Callable[..., Any]
    unsupported: Unsupported
    trust: Trust | None = None
    exact: bool = True


class Op:
    """An operator ``torch.ops.fp4.<name>``; calling it accepts torch's native FP4/FP8 dtypes for packed bytes."""

    def __init__(
        self,
        function: Callable[..., Any],
        contract: Contract,
        check_values: Callable[[Call], None] | None,
        byte_arguments: Sequence[str],
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
        self.contract = contract
        self.preferences = tuple(preferences)
        self._preferences_on: dict[torch.device, tuple[Preference, ...]] = {}
        self._check_values = check_values
        self._byte_arguments = frozenset(byte_arguments)
        self._backends = {"reference": Backend("reference", function, lambda call: None)}
        self.unimportable: dict[str, str] = {}  # backend name -> why its module does not import
        self._loaded = False

        _LIBRARY.define(f"{self.name}{_with_none_for_defaults(self.schema)}", tags=_TAGS)
        self.default = getattr(torch.ops.fp4, self.name).default
        arguments = self.default._schema.arguments
        self._names = tuple(a.name for a in arguments)
        self._defaults = {n: p.default for n, p in self.signature.parameters.items() if p.default is not p.empty}
        self._for_none = tuple(
            (i, a.name, self._defaults[a.name])
            for i, a in enumerate(arguments)
            if a.has_default_value() and a.default_value is None and self._defaults[a.name] is not None
        )
        # All but the first, whose device is the call's.
        self._tensor_names = tuple(a.name for a in arguments[1:] if "Tensor" in str(a.type))
        self._mutates = tuple(mutates)
        _LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        _LIBRARY.impl(self.name, self._run_with_autograd, "Autograd", with_keyset=True)
        torch.library.register_fake(f"fp4::{self.name}", self._fake, lib=_LIBRARY)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = tuple(self._to_bytes(name, a) for name, a in zip(self._names, args, strict=False))
        kwargs = {name: self._to_bytes(name, a) for name, a in kwargs.items()}
        return self.default(*args, **kwargs)

    def __repr__(self) -> str:
        return f"torch.ops.fp4.{self.name}{self.schema}"

    def _to_bytes(self, name: str, argument: Any) -> Any:
        if name not in self._byte_arguments:
            return argument
        if isinstance(argument, (list, tuple)):
            return [as_bytes(a) for a in argument]
        return as_bytes(argument) if isinstance(argument, Tensor) else argument

    # One call

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        arguments = self._defaults.copy()
        arguments.update(zip(self._names, args))  # noqa: B905  (strict= costs time, and fewer arguments are right)
        arguments.update(kwargs)
        for _, name, default in self._for_none:
            if arguments[name] is None:
                arguments[name] = default
        return Call(self.name, args[0] if args else kwargs[self._names[0]], arguments)

    def _validate(self, call: Call) -> Any:
        arguments = call.__dict__
        device = call.device
        for name in self._tensor_names:
            given = arguments[name]
            if given is None:
                continue
            for t in given if type(given) is list else (given,):
                if t.device != device:
                    call.require(False, name, t.device, f"{device}, where {self._names[0]} is")
        if call.backend != "auto":
            self.find_backend(call.backend, "backend=")
        return self.contract(call)

    def check(self, *args: Any, **kwargs: Any) -> Call:
        """Validate a call exactly as running it would, without running it."""
        return self._check(args, kwargs)

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        call = self._bind(args, kwargs)
        self._validate(call)
        if self._check_values is not None and call.device.type == "cpu":
            self._check_values(call)
        return call

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        call = self._check(args, kwargs)
        decision = choose(self, call)
        if decision.rejected and decision.backend == "reference":
            _warn_reference(self.name, "; ".join(f"{n}: {why}" for n, why in decision.rejected.items()))
        recording = recorder.get()
        if recording is not None:
            recording.add(call, decision)
        if self._for_none:
            args, kwargs = self._with_defaults(args, kwargs)
        try:
            result = self._backends[decision.backend].run(*args, **kwargs)
        except FirstUseInCapture as error:
            raise FirstUseInCapture(error.work, call, decision.backend) from None
        for name in self._mutates:
            t = getattr(call, name)
            if not t.is_inference():  # those have no version counter
                torch.autograd.graph.increment_version(t)
        return result

    def _with_defaults(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the function's default for a None that only torch's schema knows."""
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

    def _run_with_autograd(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and (_any_requires_grad(args) or (kwargs and _any_requires_grad(kwargs.values()))):
            self._require_a_floating_output(args, kwargs)
            needing = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
            return _NoBackward.apply(self, keyset, args, kwargs, *needing)
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
                f"codes, which carry no gradient: it would be lost silently. {_INFERENCE_ONLY}"
            )

    # Backends

    def backend(
        self, name: str, *, unsupported: Unsupported, trust: Trust | None = None, exact: bool = True
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function as this op's backend ``name``. Decorators may be stacked: the function
        sees which backend it runs as in its argument ``backend``.

        Args:
            name: what ``backend=`` and the environment call it.
            unsupported: why it can't take a call, by metadata alone; None if it can.
            trust: whether code that is not this package's may run; None for own code.
            exact: whether quantised bytes must equal the reference's.

        Raises:
            TypeError: its schema or defaults differ from the op's.
            ValueError: the name is taken.
        """

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            schema = torch.library.infer_schema(function, mutates_args=self._mutates)
            if schema != self.schema:
                raise TypeError(f"backend {name!r} of {self.name} has the schema {schema}; the op has {self.schema}")
            if name in self._backends or name == "auto":
                raise ValueError(f"{self.name} has a backend named {name!r} already")
            run = function if trust is None else _running_as(name, function)
            self._backends[name] = Backend(name, run, unsupported, trust, exact)
            return function

        return register

    def _load_backends(self) -> None:
        """Import the modules beside the op's spec: each registers one backend. Lazy, as they import Triton and such."""
        if self._loaded:
            return
        self._loaded = True
        package = sys.modules[self.__module__]
        for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
            if module.name in _MODULES_THAT_ARE_NO_BACKEND or module.name.startswith("_"):
                continue
            try:
                importlib.import_module(f"{package.__name__}.{module.name}")
            except ImportError as error:
                self.unimportable[module.name] = f"not importable: {error}"

    def backend_names(self) -> list[str]:
        """Every backend that this op has, the ones that can't be imported here included."""
        self._load_backends()
        return [*self._backends, *self.unimportable]

    def find_backend(self, name: str, asked_by: str) -> Backend:
        """The backend with that name, "auto" excepted; ``flashinfer_<name>`` is FlashInfer's <name>.

        Raises ValueError if there is none.
        """
        backend = self._backends.get(name)
        if backend is not None:
            return backend
        self._load_backends()
        backend = self._backends.get(name) or self._backends.get(_without_library(name))
        if backend is not None:
            return backend
        if name in self.unimportable:
            reason = self.unimportable[name]
            return Backend(name, _never_runs, lambda call: reason)
        names = ["auto", *self._backends]
        raise ValueError(
            f"torch.ops.fp4.{self.name}: backend is {name!r} ({asked_by}); "
            f"allowed: {', '.join(map(repr, [*names, *self.unimportable]))}"
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
        self.check(*args, **kwargs)
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
    byte_arguments: Sequence[str] = (),
    mutates: Sequence[str] = (),
    preferences: Sequence[Preference] = (),
) -> Callable[[Callable[..., Any]], Op]:
    """Register the decorated function, the op's reference, as ``torch.ops.fp4.<its name>``.

    Args:
        contract: checks a :class:`Call` and returns the outputs it promises; sees shapes, dtypes, strides and
            devices, real or symbolic, never data.
        check_values: checks that read data; run where that costs no synchronisation, on CPU tensors.
        byte_arguments: arguments whose native FP4/FP8 dtypes the Python function views as uint8.
        mutates: arguments written in place; the function then returns None.
        preferences: what ``backend="auto"`` tries, in order; the reference is always last.
    """

    def register(function: Callable[..., Any]) -> Op:
        new = Op(function, contract, check_values, byte_arguments, mutates, preferences)
        OPS[new.name] = new
        return new

    return register


_straight_to_kernel: set[int] = set()
_warned: set[str] = set()
_INFERENCE_ONLY = "These ops are for inference: use torch.no_grad() or torch.inference_mode(), or detach() the input."


def _with_none_for_defaults(schema: str) -> str:
    """The schema with None as the default where AOTInductor loses another one.

    It hands a dtype that is left out on as a number, and a keyword-only int that is left out to the call but not to
    the callee; both are refused when the package is loaded or run.
    """
    positional, star, keyword_only = schema.partition(" *,")
    keyword_only = re.sub(r"SymInt (\w+)=-?\d+", r"SymInt? \1=None", keyword_only)
    return re.sub(r"ScalarType (\w+)=\w+", r"ScalarType? \1=None", positional + star + keyword_only)


def _any_requires_grad(arguments: Iterable[Any]) -> bool:
    for argument in arguments:
        if isinstance(argument, Tensor):
            if argument.requires_grad:
                return True
        elif type(argument) is list and _any_requires_grad(argument):
            return True
    return False


def _warn_reference(op_name: str, reasons: str) -> None:
    if op_name not in _warned:
        _warned.add(op_name)
        warnings.warn(
            f"torch.ops.fp4.{op_name} runs its pure-PyTorch reference, which is slow. {reasons}", stacklevel=3
        )


def _running_as(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function told which backend it runs as, however that was chosen."""

    def run(*args: Any, **kwargs: Any) -> Any:
        kwargs["backend"] = name
        return function(*args, **kwargs)

    return run


def _without_library(name: str) -> str:
    for prefix in ("flashinfer_", "flashinfer-"):
        if name.startswith(prefix):
            return name[len(prefix) :].replace("cute_dsl", "cute-dsl")
    return "cute-dsl" if name == "cute_dsl" else name


def _never_runs(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this backend can't be imported, so it is never chosen")


class _NoBackward(torch.autograd.Function):
    """Gives the outputs a grad_fn that raises, so that backward never yields silent zeros."""

    @staticmethod
    def forward(ctx: Any, op: Op, keyset: Any, args: Any, kwargs: Any, *needing: Tensor) -> Any:
        ctx.op_name = op.name
        ctx.inputs = [(t.shape, t.dtype, t.device) for t in needing]
        return op._below_autograd(keyset, args, kwargs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad = next(g for g in grads if g is not None)
        # An op of its own, so that tracing a joint graph succeeds and only running the backward raises.
        unavailable = torch.ops.fp4.backward_unavailable.default
        return (None,) * 4 + tuple(unavailable(grad, *meta, ctx.op_name) for meta in ctx.inputs)


def _backward_unavailable(grad: Tensor, shape: Any, dtype: Any, device: Any, op_name: str) -> Tensor:
    raise NotImplementedError(f"torch.ops.fp4.{op_name} has no backward. {_INFERENCE_ONLY}")


_LIBRARY.define(
    "backward_unavailable(Tensor grad, SymInt[] shape, ScalarType dtype, Device device, str op_name) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.impl("backward_unavailable", _backward_unavailable, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fp4::backward_unavailable",
    lambda grad, shape, dtype, device, op_name: torch.empty(shape, dtype=dtype, device=device),
    lib=_LIBRARY,
)
