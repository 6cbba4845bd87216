"""CUDA graphs of Inductor's graph partitions with little work a replay: ``piecewise(..., replay="direct")``.

Inductor's CUDA graph trees look, at each replay of each partition, at which outputs of all partitions before are alive,
at the addresses of inputs in several steps, and at settings. Where the same partitions run in one order every time,
and the caller keeps no output beyond the next call, only addresses have to be looked at.
"""

from __future__ import annotations

import pkgutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["PartitionGraphs"]

Partition = Callable[[list[Any]], Any]

# What this needs of torch that torch does not promise to keep.
_NEEDED = (
    "torch._inductor.utils:_unstable_customized_partition_wrapper",
    "torch._inductor.utils:set_customized_partition_wrappers",
    "torch._inductor.compile_fx:compile_fx",
    "torch._functorch.config:enable_autograd_cache",
    "torch._guards:TracingContext.try_get",
)
_NEEDED_OF_CUDA = (
    "torch._C:_tensors_data_ptrs_at_indices_equal",
    "torch._C:_construct_storage_from_data_pointer",
    "torch._C:_construct_CUDA_Tensor_From_Storage_And_Metadata",
)
_IN_THIS_THREAD: Any = {"capture_error_mode": "thread_local"}  # what other threads do does not end a capture
_ALIGNMENT = 16  # bytes, which Inductor's kernels count on


@dataclass
class _New:
    """What a call adds to what is there, if it returns."""

    entries: list[tuple[dict[int, Any], int, Any]] = field(default_factory=list)
    """A dict, the key, the entry."""
    fixed: set[int] = field(default_factory=set)
    """Storages that stay where they are: those of the function, and the outputs of partitions captured before."""
    copied: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Arguments, and the buffers into which partitions captured before copy them."""


class PartitionGraphs:
    """``function``, compiled and split; each partition has a graph for each of ``sizes``, all in one memory pool.

    Of a compilation the first call of a size warms up and the second one captures. If a call raises, nothing of it is
    kept, and the next one tries again.

    Args:
        function: what is compiled.
        sizes: that are captured. The caller sets the attribute ``size`` before each call.
        options: of Inductor.

    Raises:
        RuntimeError: if this torch lacks something that is needed; while compiling, if gradients are wanted or an
            argument is written in place; while capturing and replaying, if an input can't be what was captured.

    Source: the hook ``torch._inductor.utils.set_customized_partition_wrappers``, which torch calls unstable.
    """

    def __init__(self, function: Callable[..., Any], sizes: Iterable[int], options: dict[str, Any]):
        _require_of_torch(_NEEDED + (_NEEDED_OF_CUDA if torch.cuda.is_available() else ()))
        self.size = 0
        self._sizes = frozenset(sizes)
        self._options = options
        self._function = function
        # A backend of its own: functions that are compiled twice are told apart by it.
        self._compiled = torch.compile(function, fullgraph=True, backend=self._compile)
        self._pool: Any = None
        self._keeps_pool: Any = None
        self._stream: Any = None
        self._device: torch.device | None = None
        self._new: _New | None = None
        self._arguments: tuple[Any, ...] = ()
        self._made: dict[int, bool] = {}
        """Addresses of storages within the graphs' memory that are given out."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = (*args, *kwargs.values()) if kwargs else args
        for given in arguments:
            if type(given) is Tensor and given.untyped_storage().data_ptr() in self._made:
                raise RuntimeError(
                    "piecewise: an argument is what an earlier call returned, which this call writes over; clone it"
                )
        self._arguments = arguments
        try:
            out = self._compiled(*args, **kwargs)
            if self._new is not None:
                for entries, key, entry in self._new.entries:
                    entries[key] = entry
            return out
        finally:
            self._arguments = ()
            self._new = None

    def _compile(self, graph: Any, inputs: list[Any]) -> Callable[..., Any]:
        """The backend of torch.compile: Inductor, which hands over each partition where this can capture it."""
        from torch._inductor import utils
        from torch._inductor.compile_fx import compile_fx

        inductor: Any = compile_fx  # its type has results of other uses, too
        if not _on_gpu(inputs):
            return inductor(graph, inputs, config_patches=self._options)
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
            raise RuntimeError("piecewise: direct replays give no gradients; call it under torch.no_grad()")
        warm: dict[int, bool] = {}

        def wrap(partition: Partition, metadata: Any) -> Partition:
            return self._wrapped(partition, warm)

        # Set while this function is compiled, and not while it runs: a split op may compile functions of its own.
        before: Any = utils._unstable_customized_partition_wrapper.wrapper
        # What AOTAutograd finds in its cache does not say which arguments are written. Inductor's own cache is used.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            utils.set_customized_partition_wrappers(wrap)
            try:
                return inductor(graph, inputs, config_patches=self._options)
            finally:
                utils.set_customized_partition_wrappers(before)

    def _wrapped(self, partition: Partition, warm: dict[int, bool]) -> Partition:
        _require_fixed_addresses()
        graphs: dict[int, Partition] = {}

        def run(inputs: list[Any]) -> Any:
            replay = graphs.get(self.size)
            if replay is not None:
                return replay(inputs)
            size = self.size
            if size in self._sizes:
                new = self._new = self._new or _New()
                if size in warm:
                    outputs, replay = self._captured(partition, inputs, new)
                    new.entries.append((graphs, size, replay))
                    return outputs
                new.entries.append((warm, size, True))
            # Where Inductor wraps partitions itself it does this, too.
            inputs[:] = [_strided_copy(t) if _misaligned(t) else t for t in inputs]
            return partition(inputs)

        return run

    def _captured(self, partition: Partition, inputs: list[Any], new: _New) -> tuple[Any, Partition]:
        """What ``partition`` gives now, and what replays it."""
        if not new.fixed and isinstance(self._function, torch.nn.Module):
            new.fixed.update(_address(t) for t in (*self._function.parameters(), *self._function.buffers()))
        tensors = [(i, t) for i, t in enumerate(inputs) if isinstance(t, Tensor)]
        self._require_one_device(tensors)
        given = list(inputs)
        trusted: list[int] = []
        copied: list[tuple[int, Tensor]] = []
        for i, t in tensors:
            is_argument = any(t is a for a in self._arguments)
            if _marked_static(t) or (_address(t) in new.fixed and not is_argument):
                trusted.append(i)
                continue
            # Arguments are not written, so what a partition before copied still holds.
            buffer = next((kept for seen, kept in new.copied if seen is t), None)
            if buffer is None:
                buffer = _strided_copy(t)
                copied.append((i, buffer))
                if is_argument:
                    new.copied.append((t, buffer))
            given[i] = buffer
        here = {_address(inputs[i]) for i in trusted}
        addresses = [t.data_ptr() if isinstance(t, Tensor) else None for t in inputs]
        numbers = [(i, n) for i, n in enumerate(inputs) if not isinstance(n, Tensor)]
        inputs.clear()
        launch, outputs = self._capture(partition, given)
        launch()
        made = {_address(t) for t in outputs if isinstance(t, Tensor)}
        new.fixed |= made
        new.entries += [(self._made, address, True) for address in made - here if address]
        # The next partitions may use this memory again once their inputs are dead, as they do at every replay. So the
        # owning tensors go to the caller, and what replays give out owns nothing.
        with torch.inference_mode(False):
            kept = tuple(_not_owning(t) if isinstance(t, Tensor) else t for t in outputs)
        return outputs, _replay(launch, kept, addresses, trusted, copied, numbers)

    def _require_one_device(self, tensors: list[tuple[int, Tensor]]) -> None:
        devices = {t.device for _, t in tensors} | ({self._device} if self._device else set())
        if len(devices) > 1:
            given = ", ".join(sorted(map(str, devices)))
            raise RuntimeError(f"piecewise: tensors are on {given}; allowed for direct replays: one device")
        self._device = next(iter(devices), None)

    def _capture(self, partition: Partition, inputs: list[Any]) -> tuple[Callable[[], None], Any]:
        """What launches a graph of ``partition``, in the pool that all share, and what it returned."""
        with torch.cuda.device(self._device):
            if self._pool is None:
                pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
                # A pool is there as long as a graph of it, and this one outlives a first capture that fails.
                self._keeps_pool = torch.cuda.CUDAGraph()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that the graph is empty
                    with torch.cuda.graph(self._keeps_pool, pool=pool, stream=self._stream, **_IN_THIS_THREAD):
                        pass
                self._pool = pool
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, **_IN_THIS_THREAD):
                out = partition(list(inputs))
        return graph.replay, out


def _replay(
    launch: Callable[[], None],
    outputs: tuple[Any, ...],
    addresses: list[int | None],
    trusted: list[int],
    copied: list[tuple[int, Tensor]],
    numbers: list[tuple[int, Any]],
) -> Partition:
    """A function that takes a partition's inputs and replays its graph. It runs for each partition of each step."""
    same_addresses: Any = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
    copy = torch._foreach_copy_
    buffers = tuple(_without_repeats(buffer) for _, buffer in copied)
    positions = [i for i, _ in copied]
    expanded = any(0 in buffer.stride() for _, buffer in copied)

    def replay(inputs: list[Any]) -> Any:
        if trusted and not same_addresses(inputs, addresses, trusted):
            raise RuntimeError(_moved(inputs, addresses, trusted))
        for i, number in numbers:
            if inputs[i] != number:
                raise RuntimeError(
                    f"piecewise: a size is {inputs[i]} where it was {number} when this was captured; pad it, too"
                )
        if buffers:
            sources = [inputs[i] for i in positions]
            copy(buffers, [_without_repeats(t) for t in sources] if expanded else sources)
        inputs.clear()
        launch()
        return outputs

    return replay


def _moved(inputs: list[Any], addresses: list[int | None], trusted: list[int]) -> str:
    moved = next(inputs[i] for i in trusted if inputs[i].data_ptr() != addresses[i])
    given = f"{str(moved.dtype).removeprefix('torch.')} {list(moved.shape)}"
    return (
        f"piecewise: a parameter, a buffer or a tensor marked as static, {given}, is not where it was captured; "
        "write the new values into the old tensor, or make a new piecewise"
    )


def _require_of_torch(names: Iterable[str]) -> None:
    for name in names:
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing = name.replace(":", ".")
            lacks = f"which torch {torch.__version__} lacks"
            raise RuntimeError(f"piecewise: replay='direct' needs {missing}, {lacks}") from None


def _require_fixed_addresses() -> None:
    """While the function is compiled: raise if it writes into an argument that may be elsewhere at the next call."""
    context = torch._guards.TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    if metadata is None:
        raise RuntimeError("piecewise: torch does not say which arguments are written in place, so nothing is captured")
    written = {i for i, info in enumerate(metadata.input_info) if info.mutates_data or info.mutates_storage_metadata}
    if not written <= set(metadata.static_input_indices):
        raise RuntimeError(
            "piecewise: a tensor that is neither a parameter nor a buffer is written in place; mark it by "
            "torch._dynamo.mark_static_address"
        )


def _on_gpu(inputs: list[Any]) -> bool:
    return any(isinstance(t, Tensor) and t.is_cuda for t in inputs)


def _marked_static(t: Tensor) -> bool:
    """By ``mark_static_address``, or by Dynamo, which does it to the parameters and buffers that it meets."""
    return getattr(t, "_dynamo_static_input_type", None) is not None


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _misaligned(t: Any) -> bool:
    return isinstance(t, Tensor) and t.data_ptr() % _ALIGNMENT != 0 and not _marked_static(t)


def _strided_copy(t: Tensor) -> Tensor:
    """With the strides of ``t``, which are part of compiled code. It can be written in any mode."""
    with torch.inference_mode(False), torch.no_grad():
        copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        _without_repeats(copy).copy_(_without_repeats(t))
    return copy


def _without_repeats(t: Tensor) -> Tensor:
    """The same memory without expanded dimensions, since torch copies into no element twice."""
    for dim, stride in enumerate(t.stride()):
        if stride == 0 and t.shape[dim] > 1:
            t = t.narrow(dim, 0, 1)
    return t


def _not_owning(t: Tensor) -> Tensor:
    """The same elements, without keeping the memory from being given to others."""
    if not t.is_cuda:
        return t
    storage = t.untyped_storage()
    metadata = {
        "nbytes": storage.nbytes(),
        "data_ptr": storage.data_ptr(),
        "size": t.shape,
        "stride": t.stride(),
        "dtype": t.dtype,
        "device": t.device,
        "storage_offset": t.storage_offset(),
    }
    owner = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), t.device, storage.nbytes())
    return torch._C._construct_CUDA_Tensor_From_Storage_And_Metadata(metadata, owner)
