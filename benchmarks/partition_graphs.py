"""A runner of Inductor's graph partitions with little work a replay: a candidate for ``cuda_graphs.piecewise``.

Inductor's CUDA graph trees look, at each replay of each partition, at which outputs of all partitions before are alive,
at the addresses of inputs in several steps, and at settings. Where the same partitions run in one order every time,
and the caller keeps no output beyond the next call, only addresses have to be looked at. Partitions are handed over by
``torch._inductor.utils.set_customized_partition_wrappers``, which torch calls unstable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import set_customized_partition_wrappers

Partition = Callable[[list[Any]], Any]


class PartitionGraphs:
    """``function``, compiled and split at the ops in ``split``; a size's first call warms up, its second captures."""

    def __init__(
        self, function: Callable[..., Any], sizes: Iterable[int], split: Iterable[str], options: dict[str, Any]
    ):
        self.function = function
        self._left_to_do = dict.fromkeys(sizes, 2)
        self._options = {
            "triton.cudagraphs": True,
            "triton.cudagraph_or_error": True,
            "graph_partition": True,
            "custom_should_partition_ops": list(split),
            **options,
        }
        self._compiled = torch.compile(function, fullgraph=True, options=self._options)
        self._pool: Any = None
        self._stream: Any = None
        self._size: int | None = None
        self._capturing = False
        self._fixed: set[int] = set()
        """Of storages that stay where they are: parameters, buffers, and what the captured partitions gave so far."""

    def __call__(self, *args: Any) -> Any:
        size = args[0].shape[0]
        left = self._left_to_do.get(size)
        self._size = size if left is not None else None
        self._capturing = left == 1
        if self._capturing:
            self._fixed = {_address(t) for t in self._tensors_of_the_function()}
        set_customized_partition_wrappers(self._wrap)
        try:
            out = self._compiled(*args)
        finally:
            set_customized_partition_wrappers(None)
        if left:
            self._left_to_do[size] = left - 1
        return out

    def _tensors_of_the_function(self) -> Iterator[Tensor]:
        if isinstance(self.function, torch.nn.Module):
            yield from self.function.parameters()
            yield from self.function.buffers()

    def _wrap(self, partition: Partition, metadata: Any) -> Partition:
        _require_fixed_addresses()
        graphs: dict[int, CapturedPartition] = {}

        def run(inputs: list[Any]) -> Any:
            captured = graphs.get(self._size)
            if captured is not None:
                return captured.replay(inputs)
            if not self._capturing:
                return partition(inputs)
            captured = graphs[self._size] = CapturedPartition(partition, inputs, self._fixed, self._capture)
            return captured.first_outputs()

        return run

    def _capture(self, run: Callable[[], Any]) -> tuple[Any, Any]:
        """A graph of ``run`` in the pool that all share, and what it returned."""
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = run()
        return graph, out


class CapturedPartition:
    """A graph of one partition at one size. ``fixed`` has addresses that are trusted to stay, and gets the outputs'."""

    def __init__(self, partition: Partition, inputs: list[Any], fixed: set[int], capture: Callable[..., Any]):
        tensors = [(i, t) for i, t in enumerate(inputs) if isinstance(t, Tensor)]
        moving = [i for i, t in tensors if _address(t) not in fixed and not _marked_static(t)]
        given = list(inputs)
        self._buffers = [torch.empty_like(inputs[i]).copy_(inputs[i]) for i in moving]
        for i, buffer in zip(moving, self._buffers, strict=True):
            given[i] = buffer
            fixed.add(_address(buffer))
        self._moving = moving
        self._trusted = [i for i, t in tensors if i not in moving]
        self._addresses = [t.data_ptr() if isinstance(t, Tensor) else None for t in inputs]
        inputs.clear()
        self._graph, outputs = capture(lambda: partition(list(given)))
        self._graph.replay()
        fixed.update(_address(t) for t in outputs if isinstance(t, Tensor))
        # The next partitions may use this memory again once their inputs are dead, as they do at every replay. So the
        # owning tensors go to the caller, and what replays give out owns nothing.
        self._first: Any = outputs
        self._outputs = tuple(_not_owning(t) if isinstance(t, Tensor) else t for t in outputs)

    def first_outputs(self) -> Any:
        outputs, self._first = self._first, None
        return outputs

    def replay(self, inputs: list[Any]) -> Any:
        if not torch._C._tensors_data_ptrs_at_indices_equal(inputs, self._addresses, self._trusted):
            raise RuntimeError("a parameter, a buffer or another partition's output is not where it was captured")
        if self._moving:
            torch._foreach_copy_(self._buffers, [inputs[i] for i in self._moving])
        inputs.clear()
        self._graph.replay()
        return self._outputs


def _require_fixed_addresses() -> None:
    """While the function is compiled: raise if it writes into an argument that may be elsewhere at the next call."""
    context = torch._guards.TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    if metadata is None:
        raise RuntimeError("torch does not say which arguments are written in place, so nothing is captured")
    written = {i for i, info in enumerate(metadata.input_info) if info.mutates_data or info.mutates_storage_metadata}
    if not written <= set(metadata.static_input_indices):
        raise RuntimeError(
            "a tensor that is neither a parameter nor a buffer is written in place; mark it by "
            "torch._dynamo.mark_static_address"
        )


def _marked_static(t: Tensor) -> bool:
    return getattr(t, "_dynamo_static_input_type", None) is not None


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


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
