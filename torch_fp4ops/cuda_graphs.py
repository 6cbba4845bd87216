"""CUDA graphs around the ops: piecewise capture by Inductor's graph partition, padding to captured sizes, warm-up.

torch does the compiling, partitioning, capturing and replaying; this module says to it which sizes and which splits.
A whole function is captured with ``torch.cuda.graph`` as any other, after :func:`warmup`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from ._partition_graphs import PartitionGraphs
from .capture import Decisions, FirstUseInCapture, record_decisions
from .codecs import as_bytes

__all__ = ["FirstUseInCapture", "Piecewise", "pad_to", "piecewise", "record_decisions", "warmup"]

# The first call of a size warms up and the second one records, whoever replays.
_CALLS_TO_RECORD = 2
# Inductor reads these when a graph runs, where the options of torch.compile no longer hold. Its warning about many
# sizes is for sizes that nobody listed.
_RECORDING = {"triton.cudagraph_or_error": True, "triton.cudagraph_dynamic_shape_warn_limit": None}
_NOT_CAPTURED = {"triton.cudagraph_capture_sizes": ()}
_REPLAYS = ("inductor", "direct")


def _checked_sizes(where: str, sizes: Iterable[int]) -> tuple[int, ...]:
    listed = tuple(sizes)
    if not listed or not all(type(n) is int and n > 0 for n in listed):
        raise ValueError(f"{where}: sizes is {listed}; allowed: one or more ints above zero")
    return tuple(sorted(set(listed)))


class Piecewise:
    """What :func:`piecewise` returns.

    Attributes:
        function: what is compiled.
        sizes: the sizes that are captured, ascending.
        decisions: by size, the backends that its ops took when it was warmed up and captured: what its graphs run,
            whatever ``set_backend`` says later. ``torch_fp4ops.explain`` prints them.
    """

    def __init__(
        self, function: Callable[..., Any], sizes: tuple[int, ...], split: tuple[str, ...], dim: int, replay: str
    ):
        self.function = function
        self.sizes = sizes
        self.decisions: dict[int, Decisions] = {}
        self._dim = dim
        self._to_record = dict.fromkeys(sizes, _CALLS_TO_RECORD)
        options: dict[str, Any] = {
            "triton.cudagraphs": True,
            "triton.cudagraph_or_error": True,
            "graph_partition": True,
            "custom_should_partition_ops": list(split),
        }
        self._direct = PartitionGraphs(function, sizes, options) if replay == "direct" else None
        self._compiled = self._direct or torch.compile(function, fullgraph=True, options=options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        size = self._size(args, kwargs)
        if self._direct is not None:
            self._direct.size = size
        left = self._to_record.get(size)
        if left == 0:
            return self._compiled(*args, **kwargs)
        if left is None:
            # Sizes that are not listed run without graphs. Inductor's own list compares every dynamic size of a
            # partition, and not at all in a graph without any, so the choice is made here.
            with inductor_config.patch(_NOT_CAPTURED):
                return self._compiled(*args, **kwargs)
        with record_decisions(self.decisions.setdefault(size, Decisions())), inductor_config.patch(_RECORDING):
            out = self._compiled(*args, **kwargs)
        self._to_record[size] = left - 1
        return out

    def _size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Tensor):
                try:
                    return argument.size(self._dim)
                except IndexError:
                    given = f"of shape {tuple(argument.shape)}"
                    allowed = f"one with dimension {self._dim}"
                    raise ValueError(f"piecewise: the first tensor is {given}; allowed: {allowed}") from None
        raise ValueError("piecewise: there is no tensor among the arguments; allowed: one or more")


def piecewise(
    function: Callable[..., Any],
    sizes: Iterable[int],
    split: Iterable[str] = (),
    dim: int = 0,
    replay: str = "inductor",
) -> Piecewise:
    """Compile a model or function as one graph that runs as CUDA graphs between the ops named in ``split``.

    A split op (attention with metadata of its own, say) runs as it would in eager mode; everything else is captured,
    once for each of ``sizes``, and replayed. The first call of a size warms up, the second one captures
    (:func:`warmup` makes both); more sizes share one memory pool. A call of a size that is not listed runs the same
    compiled code without graphs: :func:`pad_to` brings it to one that is.

    The output's memory belongs to the graphs: the next call overwrites it, so clone what has to stay. Tensors that
    are written in place (caches) must be buffers of the model, or marked by
    ``torch._dynamo.mark_static_address`` as transformers' ``StaticCache`` is; otherwise capturing raises.

    torch's rules on dynamic sizes hold: the first size compiles, the second one compiles for all sizes, and the
    sizes 0 and 1 may compile once more unless they come first. ``torch._dynamo.decorators.mark_unbacked(x, dim)``
    before the first call makes it one compilation for all. Call it from one thread: Inductor's graphs belong to the
    thread that captured them, and before torch 2.13 no thread but the main one can capture.

    ``replay="direct"`` captures and replays the partitions without Inductor's CUDA graph trees, which takes about half
    the host's time; worth it where a step's kernels take no longer than the host does. It has rules of its own. A
    parameter, a buffer or a tensor marked as static that is elsewhere than when it was captured raises, and so does a
    size other than that of ``dim`` that has changed. Nothing checks that the output of an earlier call is no longer
    used, except that it may not be an argument: clone it. Outputs live as long as the graphs, those with this object
    (and until ``torch._dynamo.reset()``). There are no gradients. Replays run on the current stream.

    On the CPU there are no graphs: the function is compiled, nothing is captured, and ``split`` changes nothing.

    Args:
        function: an ``nn.Module`` or a function; it must compile without a graph break.
        sizes: to capture, in ``dim`` of the first tensor argument, positional or keyword: batch sizes, say.
        split: names ``"namespace::op"`` or ``"namespace::op.overload"`` of ops that Inductor calls as they are: custom
            ops, not ATen ops that it decomposes, such as ``aten::scaled_dot_product_attention``.
        dim: the dimension that ``sizes`` are of.
        replay: ``"inductor"``, by Inductor's CUDA graph trees, or ``"direct"``.

    Raises:
        ValueError: sizes that are not positive, a name in ``split`` of which there is no op, or an unknown ``replay``.
        RuntimeError: with ``"direct"``, if this torch lacks what it needs; at a call, where torch can't capture
            (``cudagraph_or_error``), with torch's reason, or where what was captured can't be replayed.

    Source: Inductor's ``graph_partition``, ``custom_should_partition_ops`` and CUDA graph trees; for ``"direct"`` its
    ``set_customized_partition_wrappers``, which torch calls unstable.
    """
    if replay not in _REPLAYS:
        raise ValueError(f"piecewise: replay is {replay!r}; allowed: {', '.join(map(repr, _REPLAYS))}")
    names = tuple(split)
    for name in names:
        namespace, separator, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        found = getattr(getattr(torch.ops, namespace), packet, None) if separator and packet else None
        if not isinstance(found, torch._ops.OpOverloadPacket) or (overload and overload not in found.overloads()):
            raise ValueError(f"piecewise: split has {name!r}; allowed: names of registered ops, 'namespace::op'")
    return Piecewise(function, _checked_sizes("piecewise", sizes), names, dim, replay)


def pad_to(sizes: Iterable[int], dim: int = 0) -> Callable[..., Tensor]:
    """A function ``pad(x, value=0)`` that pads a tensor's ``dim`` to the next of ``sizes``.

    The padding holds ``value``; ``-1`` is for slots that a KV store is to skip. A tensor whose size is listed or above
    all listed is returned as it is. Take the first ``x.shape[dim]`` rows of the result: torch itself never pads.

    Raises:
        ValueError: sizes that are not positive ints; from ``pad``, a tensor without that dimension.
    """
    listed = _checked_sizes("pad_to", sizes)

    def pad(x: Tensor, value: float = 0) -> Tensor:
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"pad_to: x is of shape {tuple(x.shape)}; allowed: one with a dimension {dim}")
        n = x.shape[dim]
        missing = next((size - n for size in listed if size >= n), 0)
        if not missing:
            return x
        after = (x.dim() - 1 - dim) if dim >= 0 else -1 - dim
        padding = (0, 0) * after + (0, missing)
        if value == 0:  # torch cannot fill all of its 4-bit and 8-bit dtypes
            return torch.nn.functional.pad(as_bytes(x), padding).view(x.dtype)
        return torch.nn.functional.pad(x, padding, value=value)

    return pad


def warmup(
    function: Callable[..., Any],
    shapes: Iterable[Any],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
) -> None:
    """Call ``function`` on each of ``shapes``, so that nothing is left to do once when it is captured.

    This compiles kernels, probes backends, allocates workspaces and, for a :class:`Piecewise`, captures: each call is
    made twice, under the grad mode and ``set_backend`` of the caller. Kernels are specialised on sizes (1 and
    multiples of 16 among others), strides and alignment, so warm up the very shapes that will be captured.

    Args:
        function: a model, a function, an op or what :func:`piecewise` returned.
        shapes: an entry a call: a shape, for a function of one tensor; or the call's arguments, a tuple or a dict.
            The arguments' values count only where the function minds them: a cache is written to.
        dtype, device: of the tensors of zeros that are made of shapes; the device is by default that of the
            function's parameters or buffers, and where it has none, the GPU if there is one.
    """
    where: Any = device
    if where is None:
        model = function.function if isinstance(function, Piecewise) else function
        tensors = (*model.parameters(), *model.buffers()) if isinstance(model, torch.nn.Module) else ()
        where = tensors[0].device if tensors else ("cuda" if torch.cuda.is_available() else "cpu")
    for entry in shapes:
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(entry, dict):
            kwargs = entry
        elif isinstance(entry, tuple) and not all(type(n) is int for n in entry):
            args = entry
        elif isinstance(entry, (tuple, list)) and all(type(n) is int for n in entry):
            args = (torch.zeros(entry, dtype=dtype, device=where),)
        else:
            given = f"a {type(entry).__name__}"
            raise ValueError(f"warmup: an entry of shapes is {given}; allowed: a shape, a tuple or dict of arguments")
        for _ in range(_CALLS_TO_RECORD):
            function(*args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
