"""How a call was carried out, remembered by its metadata, so that the next one like it is not worked out anew.

An op's host code (validation, selection, tiling, Triton's specialisation) sees metadata, never data: CUDA graphs need
that. So calls that are alike in metadata allocate the same memory and launch the same kernels on the same places of
their arguments. The first call of a kind runs as always, the second one is traced, and from the third on only what was
traced is done again: some ten microseconds on the host in place of fifty and more.

A trace counts only if all that happened was memory being allocated, views and launches that the backend reported
(:func:`tracing`); for other calls, the backend that was chosen is remembered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Plan", "Trace", "kind_of", "tracing"]

Run = Callable[..., None]
"""Launches a kernel with these values for its parameters."""

ON_CPU = False
"""Whether calls on the CPU are replayed: where Triton's kernels are interpreted, they are."""

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


class _Place(NamedTuple):
    """A number of bytes after the start of a tensor: of an argument, or of what was allocated, in this order."""

    tensor: int
    offset: int


class Trace(TorchDispatchMode):
    """Watches one run of a backend, given the tensors among its arguments."""

    def __init__(self, given: list[Tensor]):
        super().__init__()
        self.obstacle = ""
        """Why what happened can't be done again without the backend."""
        self._paused = False
        self._given = len(given)
        self._tensors = list(given)
        self._launches: list[_Launch] = []

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
            self._tensors.append(out)
        elif not _only_views(func):
            self.obstacle = f"{func} was called"
        return out

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
        launch = _Launch(run, list(values), [], [])
        self._launches.append(launch)
        for i, value in enumerate(values):
            described = getattr(value, "base", None)
            pointer = described if described is not None else value
            if not isinstance(pointer, Tensor):
                continue
            place = self._place(pointer)
            if place is None:
                self.obstacle = f"parameter {i} of a kernel is no part of one argument or allocation"
                return
            launch.values[i] = None
            if described is not None:
                launch.others.append((i, place, _moved_descriptor(value)))
            elif addresses:
                launch.pointers.append((i, *place))
            else:
                launch.others.append((i, place, _moved_tensor(_Metadata.of(pointer))))

    def _place(self, t: Tensor) -> _Place | None:
        address = t.data_ptr()
        if not address:
            return None
        same = [i for i, base in enumerate(self._tensors) if base.data_ptr() == address]
        if not same:
            memory = t.untyped_storage().data_ptr()
            same = [i for i, base in enumerate(self._tensors) if base.untyped_storage().data_ptr() == memory]
        # Of two arguments in the same place the next call may have two places.
        return _Place(same[0], address - self._tensors[same[0]].data_ptr()) if len(same) == 1 else None

    def plan(self, out: Any) -> Plan | None:
        """How to do it again; None if that can't be. ``out`` is what the backend returned: nothing, or new tensors."""
        if self.obstacle or not self._launches:
            return None
        made = self._tensors[self._given :]
        outputs: list[_Output] = []
        for t in () if out is None else (out,) if isinstance(out, Tensor) else out:
            place = self._place(t)
            if place is None or place.tensor < self._given:
                return None
            base, metadata = made[place.tensor - self._given], _Metadata.of(t)
            whole = not place.offset and metadata == _Metadata.of(base)
            view = None if whole else _moved_tensor(metadata)
            outputs.append((place.tensor - self._given, place.offset, view))
        allocations = [(_Metadata.of(t), t.device) for t in made]
        return Plan(self._given, allocations, self._launches, outputs, out is None or isinstance(out, Tensor))


_Output = tuple[int, int, "Callable[[Tensor, int], Tensor] | None"]
"""Which allocation, the offset in it, and what is made of it there; None: it itself."""


class _Launch(NamedTuple):
    run: Run
    values: list[Any]
    """Of the kernel's parameters; those that differ from call to call are put in."""
    pointers: list[tuple[int, int, int]]
    """Parameter, tensor, offset."""
    others: list[tuple[int, _Place, Callable[[Tensor, int], Any]]]
    """Parameter, place, and what to make of the tensor and the offset."""


class Plan:
    """Memory to allocate, kernels to launch and outputs to return, as straight code.

    ``carry_out`` does it with a list of tensors as arguments, on their device, which must be the current one.
    """

    __slots__ = ("carry_out",)

    def __init__(
        self,
        given: int,
        allocations: list[tuple[_Metadata, torch.device]],
        launches: list[_Launch],
        outputs: list[_Output],
        single: bool,
    ):
        # Written out, since loops over what is the same in every call take 4 us of 12.
        known: dict[str, Any] = {}

        def say(value: Any) -> str:
            if value is None or type(value) in (bool, int, str):
                return repr(value)
            name = f"known_{len(known)}"
            known[name] = value
            return name

        tensors = [f"t{i}" for i in range(given + len(allocations))]
        lines = [f"[{', '.join(tensors[:given])}] = given"]
        for name, (metadata, device) in zip(tensors[given:], allocations, strict=True):
            size, stride, dtype = map(say, metadata)
            if device.type == "cuda" and _empty_strided_cuda is not None:
                lines.append(f"{name} = {say(_empty_strided_cuda)}({size}, {stride}, {dtype})")
            else:
                where = f"dtype={dtype}, device={say(device)}"
                lines.append(f"{name} = {say(torch.empty_strided)}({size}, {stride}, {where})")
        for launch in launches:
            values = [say(value) for value in launch.values]
            for i, tensor, offset in launch.pointers:
                values[i] = f"{tensors[tensor]}.data_ptr() + {offset}"
            for i, place, moved in launch.others:
                values[i] = f"{say(moved)}({tensors[place.tensor]}, {place.offset})"
            lines.append(f"{say(launch.run)}({', '.join(values)})")
        made = [
            tensors[given + i] if view is None else f"{say(view)}({tensors[given + i]}, {offset})"
            for i, offset, view in outputs
        ]
        returned = f"({', '.join(made)},)" if not single else made[0] if made else "None"
        lines.append(f"return {returned}")
        exec("def carry_out(given):\n    " + "\n    ".join(lines), known)
        self.carry_out: Callable[[list[Tensor]], Any] = known["carry_out"]


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
