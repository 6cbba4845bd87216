"""How a call was carried out, remembered by its metadata, so that the next one like it is not worked out anew.

An op's host code (validation, selection, tiling, Triton's specialisation) sees metadata, never data: CUDA graphs need
that. So calls that are alike in metadata allocate the same memory and launch the same kernels on the same places of
their arguments. The first call of a kind runs as always, the second one is traced, and from the third on only what was
traced is done again: some ten microseconds on the host in place of fifty and more.

A trace counts only if all that happened was memory being allocated, views, launches that the backend reported
(:func:`tracing`), and functions of torch whose outputs have the same metadata whatever the data; for other calls, the
backend that was chosen is remembered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

__all__ = ["Plan", "Trace", "kind_of", "tracing"]

Run = Callable[..., None]
"""Launches a kernel with these values for its parameters."""

ON_CPU = False
"""Whether calls on the CPU are replayed: where Triton's kernels are interpreted, they are."""

# Functions whose outputs differ in metadata or on purpose from call to call.
_DEPEND_ON_MORE = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}
_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
# Inductor's own way to memory, without the dispatcher: 1.0 instead of 1.8 us. On the current device.
_empty_strided_cuda = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
_tracing: ContextVar[Trace | None] = ContextVar("torch_fp4ops_trace", default=None)


def tracing() -> Trace | None:
    """The trace to which launches are to be reported, if there is one."""
    return _tracing.get()


def kind_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """What calls that are carried out in the same way have in common, and the tensors among the arguments.

    Kernels are specialised on the alignment of addresses to 16 bytes.
    """
    key: list[Any] = [*kwargs]
    tensors: list[Tensor] = []
    for argument in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(argument, Tensor):
            tensors.append(argument)
            where = argument.get_device(), argument.data_ptr() & 15
            key += (argument.shape, argument.stride(), argument.dtype, *where)
        elif type(argument) is list:
            more, listed = kind_of(tuple(argument), {})
            key += (len(argument), *more)
            tensors += listed
        else:
            key.append(argument)
    return tuple(key), tensors


class _Metadata(NamedTuple):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor) -> _Metadata:
        return cls(tuple(t.shape), t.stride(), t.dtype)


class _Pointer(NamedTuple):
    """An address: so many bytes after the start of a tensor, of which arguments come first, then what was made."""

    tensor: int
    offset: int


class _Part(NamedTuple):
    """What is made of the memory at a place; None: the tensor itself."""

    tensor: int
    offset: int
    view: Callable[[Tensor, int], Any] | None


class _Step(NamedTuple):
    """Something to do again, given constants, :class:`_Pointer` and :class:`_Part`."""

    run: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any] = MappingProxyType({})
    made: Sequence[int | None] = ()
    """Which tensors it returns; None for one that there was before."""
    single: bool = True
    """Whether a single tensor is returned as it is."""


class Trace(TorchDispatchMode):
    """Watches one run of a backend, given the tensors among its arguments."""

    def __init__(self, given: list[Tensor]):
        super().__init__()
        self.obstacle = ""
        """Why what happened can't be done again without the backend."""
        self._paused = False
        self._given = len(given)
        self._tensors = list(given)
        self._steps: list[_Step] = []

    def __enter__(self) -> Trace:
        self._token = _tracing.set(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _tracing.reset(self._token)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._paused:
            pass
        elif func in _ALLOCATIONS:
            self._steps.append(_allocation(out, len(self._tensors)))
            self._tensors.append(out)
        elif not _only_views(func):
            self._called(func, args, kwargs or {}, out)
        return out

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        device = self._tensors[0].device
        if _DEPEND_ON_MORE & set(func.tags) or not all(isinstance(t, Tensor) and t.device == device for t in outputs):
            self.obstacle = f"{func} was called"
            return
        known_args, known_kwargs = tree_map_only(Tensor, self._part_or_obstacle, (args, kwargs))
        made: list[int | None] = []
        for t, returned in zip(outputs, func._schema.returns, strict=True):
            made.append(len(self._tensors) if returned.alias_info is None else None)
            if returned.alias_info is None:
                self._tensors.append(t)
        self._steps.append(_Step(func, known_args, known_kwargs, made, isinstance(out, Tensor)))

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """While Triton launches: what it does beside that (its interpreter copies tensors) is its own affair."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def launched(self, run: Run, values: Sequence[Any], addresses: bool = True) -> None:
        """A kernel was launched with these values of its parameters; ``run`` launches it again, and takes pointers as
        ``addresses`` or as tensors."""
        args: list[Any] = []
        for i, value in enumerate(values):
            described = getattr(value, "base", None)
            pointer = described if described is not None else value
            if not isinstance(pointer, Tensor):
                args.append(value)
                continue
            place = self._place(pointer)
            if place is None:
                self.obstacle = f"parameter {i} of a kernel is no part of one argument or allocation"
            elif described is not None:
                args.append(_Part(*place, _moved_descriptor(value)))
            else:
                args.append(place if addresses else self._part(pointer))
        self._steps.append(_Step(run, args))

    def _place(self, t: Tensor) -> _Pointer | None:
        address = t.data_ptr()
        if not address:
            return None
        same = [i for i, base in enumerate(self._tensors) if base.data_ptr() == address]
        if not same:
            memory = t.untyped_storage().data_ptr()
            same = [i for i, base in enumerate(self._tensors) if base.untyped_storage().data_ptr() == memory]
        # Of two arguments in the same place the next call may have two places.
        return _Pointer(same[0], address - self._tensors[same[0]].data_ptr()) if len(same) == 1 else None

    def _part(self, t: Tensor) -> _Part | None:
        place = self._place(t)
        if place is None:
            return None
        metadata = _Metadata.of(t)
        whole = not place.offset and metadata == _Metadata.of(self._tensors[place.tensor])
        return _Part(*place, None if whole else _moved_tensor(metadata))

    def _part_or_obstacle(self, t: Tensor) -> _Part | None:
        part = self._part(t)
        if part is None:
            self.obstacle = "a function of torch was given what is no part of one argument or allocation"
        return part

    def plan(self, out: Any) -> Plan | None:
        """How to do it again; None if that can't be. ``out`` is what the backend returned: nothing, or new tensors."""
        if self.obstacle or not self._steps:
            return None
        parts = [self._part(t) for t in (() if out is None else (out,) if isinstance(out, Tensor) else out)]
        outputs = [part for part in parts if part is not None and part.tensor >= self._given]
        if len(outputs) != len(parts):
            return None
        return Plan(self._given, self._steps, outputs, out is None or isinstance(out, Tensor))


class Plan:
    """Memory to allocate, kernels to launch and outputs to return, as straight code.

    ``carry_out`` does it with a list of tensors as arguments, on their device, which must be the current one.
    """

    __slots__ = ("carry_out",)

    def __init__(self, given: int, steps: list[_Step], outputs: list[_Part], single: bool):
        # Written out, since loops over what is the same in every call took 4 us of 12.
        known: dict[str, Any] = {}

        def say(value: Any) -> str:
            if isinstance(value, _Pointer):
                return f"t{value.tensor}.data_ptr() + {value.offset}"
            if isinstance(value, _Part):
                whole = f"t{value.tensor}"
                return whole if value.view is None else f"{say(value.view)}({whole}, {value.offset})"
            if type(value) in (list, tuple) and any(isinstance(v, (_Part, list, tuple)) for v in value):
                return f"[{', '.join(map(say, value))}]"
            if value is None or type(value) in (bool, int, str):
                return repr(value)
            name = f"known_{len(known)}"
            known[name] = value
            return name

        lines = [f"[{', '.join(f't{i}' for i in range(given))}] = given"]
        for step in steps:
            args = [*map(say, step.args), *(f"{name}={say(value)}" for name, value in step.kwargs.items())]
            made = ", ".join("_" if i is None else f"t{i}" for i in step.made)
            target = "" if not made else f"{made} = " if step.single else f"[{made}] = "
            lines.append(f"{target}{say(step.run)}({', '.join(args)})")
        returned = list(map(say, outputs))
        lines.append("return " + (f"({', '.join(returned)},)" if not single else returned[0] if returned else "None"))
        exec("def carry_out(given):\n    " + "\n    ".join(lines), known)
        self.carry_out: Callable[[list[Tensor]], Any] = known["carry_out"]


def _allocation(t: Tensor, index: int) -> _Step:
    size, stride, dtype = _Metadata.of(t)
    if t.is_cuda and _empty_strided_cuda is not None:
        return _Step(_empty_strided_cuda, (size, stride, dtype), {}, [index])
    return _Step(torch.empty_strided, (size, stride), {"dtype": dtype, "device": t.device}, [index])


def _only_views(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class _Address(int):
    """What Triton asks for its address."""

    def data_ptr(self) -> int:
        return int(self)


def _moved_descriptor(descriptor: Any) -> Callable[[Tensor, int], Any]:
    """A TMA descriptor, the same but for its base."""
    kind, fields = type(descriptor), dict(vars(descriptor), base=None)

    def moved(tensor: Tensor, offset: int) -> Any:
        new = object.__new__(kind)
        new.__dict__.update(fields)
        new.base = _Address(tensor.data_ptr() + offset)
        return new

    return moved


def _moved_tensor(metadata: _Metadata) -> Callable[[Tensor, int], Tensor]:
    def moved(tensor: Tensor, offset: int) -> Tensor:
        new = torch.empty(0, dtype=metadata.dtype, device=tensor.device)
        start = tensor.storage_offset() * tensor.element_size() + offset
        return new.set_(tensor.untyped_storage(), start // new.element_size(), metadata.size, metadata.stride)

    return moved
