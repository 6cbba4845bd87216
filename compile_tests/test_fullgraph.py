"""Every op in a full graph: compiled equals eager, one compilation for all numbers of rows, export, errors, caches."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import torch_fp4ops
from torch_fp4ops import OPS
from torch_fp4ops.testing import assert_same_bytes, samples
from torch_fp4ops.testing.samples import values

from .models import CHAINS

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

CASES = [pytest.param(name, i, id=f"{name}-{s}") for name in OPS for i, s in enumerate(samples(OPS[name]))]
ROWS = (0, 1, 2, 127, 128, 129)


@functools.cache
def cached_samples(name: str):
    return samples(OPS[name])


def assert_equal_trees(given: object, wanted: object) -> None:
    for a, b in zip(tree_leaves(given), tree_leaves(wanted), strict=True):
        if isinstance(b, Tensor):
            assert_same_bytes(a, b)


@pytest.mark.parametrize(("name", "i"), CASES)
def test_compiled_equals_eager(name, i):
    """Through AOTAutograd, functionalisation and fakes; Inductor has fewer, below, for its compile time."""
    op = getattr(torch.ops.fp4, name)
    eager, compiled = cached_samples(name)[i].clone(), cached_samples(name)[i].clone()
    wanted = op(*eager.args, **eager.kwargs)
    out = torch.compile(lambda a, k: op(*a, **k), fullgraph=True, backend="aot_eager")(compiled.args, compiled.kwargs)
    assert_equal_trees((out, compiled.args), (wanted, eager.args))


@pytest.mark.parametrize("name", OPS)
def test_nothing_of_an_op_is_compiled_where_a_frame_runs_as_it_is(name):
    """Dynamo gives a frame up whose graph breaks in a loop, and compiles what it calls."""
    op = getattr(torch.ops.fp4, name)

    def give_up(args, kwargs):
        for _ in range(2):
            torch._dynamo.graph_break()
            out = op(*args, **kwargs)
        return out

    eager, compiled = cached_samples(name)[-1].clone(), cached_samples(name)[-1].clone()
    wanted = give_up(eager.args, eager.kwargs)
    counters.clear()
    out = torch.compile(give_up, backend="aot_eager")(compiled.args, compiled.kwargs)
    assert not counters["stats"], "frames below the op were compiled"
    assert_equal_trees((out, compiled.args), (wanted, eager.args))


@pytest.mark.parametrize("name", OPS)
def test_python_functions_compile_too(name):
    """``torch_fp4ops.<op>``, which views native dtypes, traces like ``torch.ops.fp4.<op>``."""
    sample = cached_samples(name)[-1]
    copies = sample.clone(), sample.clone()
    wanted = OPS[name](*copies[0].args, **copies[0].kwargs)
    call = torch.compile(lambda a, k: OPS[name](*a, **k), fullgraph=True, backend="aot_eager")
    assert_equal_trees(call(copies[1].args, copies[1].kwargs), wanted)


def test_python_functions_compile_with_native_dtypes():
    data, scale = torch_fp4ops.mxfp8_quantize(values(0, 4, 64), True)
    other = torch_fp4ops.mxfp8_quantize(values(1, 8, 64), True)
    native = torch.float8_e8m0fnu
    call = torch.compile(torch_fp4ops.mm_mxfp8, fullgraph=True, backend="aot_eager")
    out = call(data, other[0].T, scale.view(native), other[1].view(native))
    assert_same_bytes(out, torch_fp4ops.mm_mxfp8(data, other[0].T, scale, other[1]))
    with pytest.raises(
        Exception, match="b_descale is torch.float8_e4m3fn; allowed: torch.uint8 or torch.float8_e8m0fnu"
    ):
        call(data, other[0].T, scale, other[1].view(torch.float8_e4m3fn))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("chain", CHAINS, ids=lambda f: f.__name__)
def test_one_compilation_for_every_number_of_rows(chain, backend):
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(chain, backend=counter, fullgraph=True)
    for m in ROWS:
        x = values(m, m, 64)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        assert_equal_trees(compiled(x), chain(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("chain", CHAINS, ids=lambda f: f.__name__)
def test_marked_dynamic_compiles_at_most_three_times(chain):
    """torch itself specialises 0 and 1 rows; nothing beyond that."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(chain, backend=counter, fullgraph=True)
    for m in ROWS:
        x = values(m, m, 64)
        if m > 1:
            torch._dynamo.mark_dynamic(x, 0)
        assert_equal_trees(compiled(x), chain(x))
    assert counter.frame_count <= 3


class Module(torch.nn.Module):
    def __init__(self, chain):
        super().__init__()
        self.chain = chain

    def forward(self, x):
        return self.chain(x)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda f: f.__name__)
def test_export_with_dynamic_rows(chain):
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(Module(chain), (values(0, 17, 64),), dynamic_shapes=({0: rows},), strict=False)
    names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert any(n.startswith("fp4.") for n in names)
    for m in (2, 17, 129):
        assert_equal_trees(program.module()(values(m, m, 64)), chain(values(m, m, 64)))


@pytest.mark.parametrize("grad", [True, False])
def test_an_op_is_one_node(grad):
    """The graph that a backend gets holds the op itself: nothing of its reference is traced."""
    nodes = []

    def backend(module, example_inputs):
        nodes.extend(str(n.target) for n in module.graph.nodes if n.op == "call_function")
        return module

    x, scale = values(0, 5, 64), torch.tensor([100.0])
    with torch.set_grad_enabled(grad):
        torch.compile(lambda t: torch.ops.fp4.fp4_quantize(t, scale)[0], fullgraph=True, backend=backend)(x)
    assert [n for n in nodes if "getitem" not in n] == ["fp4.fp4_quantize"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: torch.ops.fp4.fp4_quantize(x), "fp4_quantize: global_scale is None"),
        (lambda x: torch.ops.fp4.fp4_quantize(x[:, :40], x[0, :1].float()), "fp4_quantize: input is of K = 40"),
        (lambda x: torch.ops.fp4.mxfp8_quantize(x.double()), "mxfp8_quantize: input is torch.float64"),
        (lambda x: torch.ops.fp4.mxfp8_quantize(x, backend="nope"), "mxfp8_quantize: backend is 'nope'"),
        (
            lambda x: torch.ops.fp4.mm_bf16_fp4(x, torch.zeros(8, 16).byte(), torch.zeros(128, 4).byte()),
            r"mm_bf16_fp4: b is of shape \(8, 16\); allowed",
        ),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_errors_name_op_and_argument_under_compile(call, message, dynamic):
    x = values(0, 5, 64)
    if dynamic:
        torch._dynamo.decorators.mark_unbacked(x, 0)
    with pytest.raises(Exception, match=message):
        torch.compile(call, fullgraph=True, backend="aot_eager")(x)


def test_a_wrong_size_after_a_right_one_is_refused():
    """A graph of dynamic sizes does not run where the contract would have refused."""
    compiled = torch.compile(torch.ops.fp4.mm_bf16_fp4.default, fullgraph=True, backend="aot_eager")
    b, b_sf = OPS["fp4_quantize"](values(0, 8, 64), torch.ones(1))
    x, alpha = values(0, 5, 64), torch.ones(5)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(alpha, 0)
    compiled(x, b, b_sf, alpha)
    with pytest.raises(Exception, match=r"mm_bf16_fp4: alpha is of shape .*one for each of the"):
        compiled(x, b, b_sf, torch.ones(4))


def test_ops_keep_strides_that_they_are_given():
    """needs_fixed_stride_order: a column-major weight stays column-major through Inductor."""
    a, a_sf = OPS["fp4_quantize"](values(0, 5, 64), torch.ones(1))
    b, b_sf = OPS["fp4_quantize"](values(1, 8, 64), torch.ones(1))

    def step(a, b, a_sf, b_sf):
        return torch.ops.fp4.mm_fp4(a, (b ^ 0).t(), a_sf, (b_sf ^ 0).t())

    assert_equal_trees(torch.compile(step, fullgraph=True)(a, b, a_sf, b_sf), step(a, b, a_sf, b_sf))
