"""An Inductor pass that finds an activation or a normalisation followed by ``fp4_quantize``, and fuses the pair.

It has to be asked for, because the fused ops keep fp32 where the separate ones round to the model's dtype in between:
the codes may differ by that rounding (and are nearer to the exact ones). Where it applies, nothing else changes::

    model = torch.compile(model, options=compile_passes.options())      # or
    with compile_passes.enabled("rms_norm"):
        compiled(x)  # the call that compiles

What is found, in the graph that Inductor has after its decompositions:

* ``"silu_and_mul"``: ``silu(gate) * up``, gate and up being the halves of one tensor's last dimension, gate first
  (slices, ``chunk``, ``split``);
* ``"rms_norm"``: ``F.rms_norm``, ``nn.RMSNorm`` and RMS norms written out, with or without a weight.

Casts between bfloat16, float16 and float32, and views that keep the last dimension, may lie between. The pair stays as
it is if anything else uses the product or the normalised values, if their last dimension is not a fixed number, or if
the fused op would not take the call. ``torch._dynamo.utils.counters["fp4_fusions"]`` counts the pairs fused, by name,
but not those of a compiled graph that comes out of Inductor's cache.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import registry

__all__ = ["FUSIONS", "FuseIntoFp4Quantize", "enabled", "options"]

aten, prims = torch.ops.aten, torch.ops.prims

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_CASTS = (prims.convert_element_type.default, aten._to_copy.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_MULTIPLY = (aten.mul.Tensor,)
_ADD = (aten.add.Tensor, aten.add.Scalar)
_POWER = (aten.pow.Tensor_Scalar,)


class _Found(NamedTuple):
    """What computes the values that are quantised: the fused op, its arguments before and beside fp4_quantize's."""

    op: Any
    x: Node
    more: dict[str, Any]


def options(*fusions: str) -> dict[str, Any]:
    """For ``torch.compile(options=...)``: the pass for the named fusions, all of them if none is named.

    A pass that ``torch._inductor.config.post_grad_custom_pre_pass`` holds now runs before it.

    Raises:
        ValueError: a name that is no fusion.
    """
    return {"post_grad_custom_pre_pass": FuseIntoFp4Quantize(*fusions, after=inductor_config.post_grad_custom_pre_pass)}


@contextlib.contextmanager
def enabled(*fusions: str) -> Iterator[None]:
    """What is compiled inside is compiled with :func:`options`.

    torch.compile compiles when the compiled function is first called, so that call belongs inside; what was compiled
    before stays as it is.
    """
    with inductor_config.patch(options(*fusions)):
        yield


class FuseIntoFp4Quantize(CustomGraphPass):
    """The pass itself, for ``post_grad_custom_pre_pass``; ``after`` is a pass, or a list of them, that runs first."""

    def __init__(self, *fusions: str, after: Any = None):
        for name in fusions:
            if name not in FUSIONS:
                raise ValueError(f"compile_passes: there is no fusion {name!r}; allowed: {', '.join(FUSIONS)}")
        self.fusions = fusions or tuple(FUSIONS)
        self.before = list(after) if isinstance(after, (list, tuple)) else [] if after is None else [after]

    def uuid(self) -> Any:
        others = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.before]
        if None in others:
            return None  # no caching
        return (get_hash_for_files((__file__,)), tuple(sorted(self.fusions)), tuple(others))

    def __call__(self, graph: Graph) -> None:
        for other in self.before:
            other(graph)
        for quantize in graph.find_nodes(op="call_function", target=torch.ops.fp4.fp4_quantize.default):
            for name in self.fusions:
                if _fuse(graph, quantize, name):
                    counters["fp4_fusions"][name] += 1
                    break


def _fuse(graph: Graph, quantize: Node, name: str) -> bool:
    arguments = _arguments(quantize)
    given = arguments.pop("input")
    values = given
    while values.target in _VIEWS and _columns(values) == _columns(values.args[0]):
        values = values.args[0]
    found = FUSIONS[name](values) if _columns(values) is not None else None
    if found is None or not _only_quantized(values) or not _used_inside_only(values, found):
        return False

    created: list[Node] = []
    with graph.inserting_before(quantize):
        x = found.x
        try:
            if not _taken(found, arguments):
                return False
            if given is not values:
                created.append(_call(graph, given.target, (x, [*given.args[1][:-1], _columns(x)]), {}))
                x = created[-1]
            created.append(_call(graph, found.op, (x,), {**found.more, **arguments}))
        except (ValueError, RuntimeError):  # not for these dtypes and sizes, or this x can't be viewed so
            for node in reversed(created):
                graph.erase_node(node)
            return False
    quantize.replace_all_uses_with(created[-1])
    graph.erase_node(quantize)
    _erase_unused(graph, given)
    return True


def _taken(found: _Found, arguments: dict[str, Any]) -> bool:
    """Whether the backend that the quantiser names, or one that "auto" prefers, takes the fused call.

    It may not: a row of a norm has to fit into a program.
    """
    op = registry.OPS[found.op._schema.name.partition("::")[2]]
    args, kwargs = torch.fx.node.map_arg(((found.x,), {**found.more, **arguments}), lambda n: n.meta["val"])
    call = op._bind(args, kwargs)
    names = [call.backend] if call.backend != "auto" else [row.backend for row in op.preferences_on(call.device)]
    return not names or any(op.find_backend(name, "backend=").unsupported(call) is None for name in names)


def _arguments(node: Any) -> dict[str, Any]:
    """By name, those not given left out."""
    names = [a.name for a in node.target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _call(graph: Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """A new node with the metadata that running it on fakes gives; raises what that raises."""
    fakes = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    with args[0].meta["val"].fake_mode:
        value = target(*fakes[0], **fakes[1])
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = value
    return node


# The patterns


def _silu_and_mul(values: Any) -> _Found | None:
    for activated, up in _operands(_uncast(values), _MULTIPLY):
        gate = _argument_of_silu(_uncast(activated))
        if gate is None:
            continue
        x = _whole(_widened(gate), _widened(up))
        if x is not None:
            return _Found(torch.ops.fp4.silu_and_mul_fp4_quantize.default, x, {})
    return None


def _argument_of_silu(node: Any) -> Node | None:
    """The gate of ``silu(gate)``, ``gate * sigmoid(gate)`` or ``gate / (1 + exp(-gate))``."""
    if node.target is aten.silu.default:
        return node.args[0]
    for gate, sigmoid in _operands(node, _MULTIPLY):
        sigmoid = _uncast(sigmoid)
        if sigmoid.target is aten.sigmoid.default and _same(sigmoid.args[0], gate):
            return gate
    if node.target is aten.div.Tensor:
        gate, divisor = node.args
        for power, one in _operands(divisor, _ADD):
            if power.target is aten.exp.default and one == 1:
                negative = power.args[0]
                if negative.target is aten.neg.default and _same(negative.args[0], gate):
                    return gate
    return None


def _whole(gate: Any, up: Any) -> Node | None:
    """The tensor whose last dimension is gate, then up; None if there is none."""
    x, other = _viewed(gate), _viewed(up)
    if x is None or x is not other:
        return None
    g, u, whole = (n.meta["val"] for n in (gate, up, x))
    k = g.shape[-1]
    if (_columns(gate), _columns(up), _columns(x)) != (k, k, 2 * k):
        return None
    start = whole.storage_offset()
    wanted = (start, start + k * whole.stride(-1), *whole.stride(), *whole.stride(), *whole.shape[:-1])
    is_so = (g.storage_offset(), u.storage_offset(), *g.stride(), *u.stride(), *g.shape[:-1])
    if len(wanted) != len(is_so) or not all(statically_known_true(a == b) for a, b in zip(wanted, is_so, strict=True)):
        return None
    return _widened(x)


def _viewed(node: Any) -> Node | None:
    """What a slice or a part of a split is taken from."""
    if node.target is aten.slice.Tensor:
        return node.args[0]
    if node.target is operator.getitem:
        parts = node.args[0]
        if parts.target in (aten.split.Tensor, aten.split_with_sizes.default):
            return parts.args[0]
    return None


def _rms_norm(values: Any) -> _Found | None:
    node = _uncast(values)
    candidates: list[tuple[Node, Node | None]] = [(node, None)]
    candidates += [(_uncast(n), _widened(w)) for n, w in _operands(node, _MULTIPLY) if _is_row(w, _columns(values))]
    for normalized, weight in candidates:
        found = _normalized(normalized)
        if found is not None:
            x, eps = found
            more = {"weight": weight, "eps": eps}
            return _Found(torch.ops.fp4.rms_norm_fp4_quantize.default, x, more)
    return None


def _is_row(node: Any, columns: int | None) -> bool:
    return isinstance(node, Node) and _columns(node) == columns is not None and node.meta["val"].dim() == 1


def _normalized(node: Any) -> tuple[Node, float] | None:
    """x and eps of ``x / sqrt(mean(x^2) + eps)``."""
    for x, factor in _operands(node, _MULTIPLY):
        factor = _uncast(factor)
        if factor.target is aten.rsqrt.default or (factor.target in _POWER and factor.args[1] == -0.5):
            found = _mean_square(_uncast(factor.args[0]))
            if found is not None and _same(found[0], x):
                return _widened(x), found[1]
    return None


def _mean_square(node: Any) -> tuple[Node, float] | None:
    """x and eps of ``mean(x^2) + eps`` over the last dimension, which is kept."""
    for mean, eps in ((node, 0.0), *_operands(node, _ADD)):
        mean = _uncast(mean)
        if mean.target is not aten.mean.dim or not (_arguments(mean).get("keepdim")):
            continue
        square, dims = mean.args[0], mean.args[1]
        if dims not in ([-1], [square.meta["val"].dim() - 1]):
            continue
        square = _uncast(square)
        if square.target in _POWER and square.args[1] == 2:
            return square.args[0], float(eps)
        if square.target in _MULTIPLY and square.args[0] is square.args[1]:
            return square.args[0], float(eps)
    return None


FUSIONS = {"silu_and_mul": _silu_and_mul, "rms_norm": _rms_norm}
"""What can be fused, by name: each finds the fused op and its arguments for the node of the quantised values."""


# Nodes


def _columns(node: Any) -> int | None:
    """Size of the last dimension; None where it is no fixed number."""
    value = node.meta.get("val")
    size = value.shape[-1] if isinstance(value, Tensor) and value.dim() else None
    return size if type(size) is int else None


def _operands(node: Any, targets: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """Both orders of the operands of a product (two nodes) or a sum (a node and a number), if the node is one."""
    if not isinstance(node, Node) or node.target not in targets or len(node.args) != 2 or node.kwargs:
        return []
    a, b = node.args
    second = Node if targets is _MULTIPLY else (int, float)
    return [(m, n) for m, n in ((a, b), (b, a)) if isinstance(m, Node) and isinstance(n, second)]


def _is_cast(node: Any) -> bool:
    return node.target in _CASTS and all(n.meta["val"].dtype in _FLOATS for n in (node, node.args[0]))


def _uncast(node: Any) -> Any:
    """What a float was before casts to other floats."""
    while isinstance(node, Node) and _is_cast(node):
        node = node.args[0]
    return node


def _widened(node: Any) -> Any:
    """What a value was before casts that lose nothing."""
    while _is_cast(node) and node.args[0].meta["val"].dtype.itemsize < node.meta["val"].dtype.itemsize:
        node = node.args[0]
    return node


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, Node) and isinstance(b, Node) and _widened(a) is _widened(b)


def _only_quantized(node: Any) -> bool:
    """Whether every user is an fp4_quantize of these values, or a view of which that is true."""
    for user in node.users:
        if user.target is torch.ops.fp4.fp4_quantize.default:
            if _arguments(user)["input"] is not node:
                return False
        elif user.target not in _VIEWS or _columns(user) != _columns(node) or not _only_quantized(user):
            return False
    return True


def _used_inside_only(values: Node, found: _Found) -> bool:
    """Whether what is computed on the way from x to the values has no other use, so that it goes away."""
    ends = {found.x, *(a for a in found.more.values() if isinstance(a, Node))}
    inside: set[Node] = set()
    pending = [values]
    while pending:
        node = pending.pop()
        if node not in ends and node not in inside:
            inside.add(node)
            pending += node.all_input_nodes
    for node in inside - {values}:
        is_computed = isinstance(node.meta.get("val"), Tensor) and _viewed(node) is None and _widened(node) is node
        if is_computed and any(user not in inside for user in node.users):
            return False
    return True


def _erase_unused(graph: Graph, node: Node) -> None:
    """The node, then its inputs, as far as nothing uses them."""
    pending = [node]
    erased = set()
    while pending:
        node = pending.pop()
        if node not in erased and node.op == "call_function" and not node.users and not node.is_impure():
            erased.add(node)
            pending += node.all_input_nodes
            graph.erase_node(node)
