"""Direct replays of graph partitions, without a GPU: partitions are real, and a graph is what calls its part again."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import scheduler, utils

from benchmarks import decoder
from torch_fp4ops import _partition_graphs
from torch_fp4ops._partition_graphs import PartitionGraphs
from torch_fp4ops.cuda_graphs import piecewise, warmup

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which can capture"),
]
SHAPE = decoder.Shape(64, 2, 4, 2, 128, 32, batch=4, length=16)
_LIBRARY = torch.library.Library("torch_fp4ops_partition_tests", "FRAGMENT")
_LIBRARY.define("negated(Tensor x) -> Tensor")
NEGATED = "torch_fp4ops_partition_tests::negated"
negated = torch.ops.torch_fp4ops_partition_tests.negated
while_running: list = []
"""Functions that the split op calls."""


def _negate(x: Tensor) -> Tensor:
    for function in while_running:
        function()
    out = -x
    _alive.append(out)  # so that its memory is not given out again, and the next one is elsewhere
    return out


_alive: list[Tensor] = []
_LIBRARY.impl("negated", _negate, "CompositeExplicitAutograd")
torch.library.register_fake(NEGATED, torch.empty_like, lib=_LIBRARY)


class Graph:
    """Replays by calling again, and puts what comes out where the first outputs were, as a graph does."""

    def __init__(self, partition, inputs):
        self.partition, self.inputs, self.replays = partition, list(inputs), 0
        storages = [t.untyped_storage() for t in inputs if isinstance(t, Tensor)]
        before = [storage.clone() for storage in storages]
        self.outputs = partition(list(inputs))
        for storage, saved in zip(storages, before, strict=True):  # capturing runs nothing
            storage.copy_(saved)

    def replay(self):
        self.replays += 1
        for before, now in zip(self.outputs, self.partition(list(self.inputs)), strict=True):
            if isinstance(now, Tensor) and now.data_ptr() != before.data_ptr():
                before.copy_(now)


class Captured:
    def __init__(self):
        self.graphs: list[Graph] = []
        self.buffers: list[tuple[int, ...]] = []
        """The shapes of what has been copied into memory of the partitions."""
        self.fail_at = -1

    def __len__(self):
        return len(self.graphs)


@pytest.fixture
def graphs(monkeypatch):
    captured = Captured()
    strided_copy = _partition_graphs._strided_copy

    def capture(self, partition, inputs):
        if len(captured) == captured.fail_at:
            raise ValueError("no memory for a graph")
        captured.graphs.append(Graph(partition, inputs))
        return captured.graphs[-1].replay, captured.graphs[-1].outputs

    def copy(t):
        captured.buffers.append(tuple(t.shape))
        return strided_copy(t)

    def same_addresses(tensors, addresses, indices):
        return all(tensors[i].data_ptr() == addresses[i] for i in indices)

    monkeypatch.setattr(PartitionGraphs, "_capture", capture)
    monkeypatch.setattr(_partition_graphs, "_strided_copy", copy)
    monkeypatch.setattr(_partition_graphs, "_on_gpu", lambda inputs: True)
    monkeypatch.setattr(torch._C, "_tensors_data_ptrs_at_indices_equal", same_addresses, raising=False)
    monkeypatch.setattr(scheduler.BaseSchedulerNode, "is_gpu", lambda self: True)
    with (
        torch.no_grad(),
        torch._inductor.config.patch("fx_graph_cache", False),  # what lies there was compiled for a CPU
        mock.patch("torch._inductor.cudagraph_utils.check_multiple_devices_or_any_cpu_nodes", lambda *given: None),
    ):
        yield captured
    _alive.clear()
    while_running.clear()
    assert utils._unstable_customized_partition_wrapper.wrapper is None


def direct(function, sizes=(4,), split=(NEGATED,)):
    return piecewise(function, sizes, split, replay="direct")


def numbers(*shape: int, start: int = 0) -> Tensor:
    n = torch.Size(shape).numel()
    return torch.arange(start, start + n, dtype=torch.float32).view(shape)


def check(step, function, *shapes: tuple[int, ...], calls: int = 4) -> None:
    for call in range(calls):
        args = [numbers(*shape, start=10 * call + i) for i, shape in enumerate(shapes)]
        torch.testing.assert_close(step(*args), function(*args))


def in_three_parts(x: Tensor, y: Tensor) -> Tensor:
    """``y`` is read in all, and what the split op gives in two."""
    first = negated(x * 2 + y)
    second = negated(first + y)
    return first * 3 + second + y


def steps(function, model, batch: int, first_token: int = 0) -> list[Tensor]:
    model.clear()
    outs = []
    for i in range(4):
        tokens = torch.arange(batch) + first_token + i
        positions = torch.full_like(tokens, i)
        decoder.mark_batch(tokens, positions)
        outs.append(function(tokens, positions).clone())
    return outs


@pytest.mark.skipif(not decoder.CAN_MARK_BATCH, reason="this torch can't mark two tensors' batch as the same")
def test_a_decoder_replays_with_new_inputs_and_sizes(graphs):
    torch.manual_seed(0)
    model = decoder.Decoder(SHAPE).eval()
    step = direct(model, [4, 2], [decoder.ATTENTION])
    for batch, captured in ((4, 3), (2, 6), (3, 6), (4, 6)):
        steps(step, model, batch)
        for given, wanted in zip(steps(step, model, batch, 7), steps(model, model, batch, 7), strict=True):
            torch.testing.assert_close(given, wanted, atol=0.05, rtol=0.05)
        assert len(graphs) == captured
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    # Of 16 and 8 steps the first one warmed up.
    assert [g.replays for g in graphs.graphs] == [15] * 3 + [7] * 3


def test_arguments_are_copied_once_and_the_split_ops_outputs_where_they_are_read(graphs):
    step = direct(in_three_parts)
    check(step, in_three_parts, (4, 3), (4, 3))
    assert len(graphs) == 3
    assert len(graphs.buffers) == 4


def test_sizes_and_objects_are_captured_in_any_order(graphs):
    one, two = direct(in_three_parts, [2, 5, 7]), direct(in_three_parts, [5, 3])
    for step, size in ((one, 5), (two, 3), (one, 2), (two, 5), (one, 7), (one, 3), (two, 2)):
        check(step, in_three_parts, (size, 3), (size, 3), calls=1)
    for _ in range(3):
        for size in (7, 3, 2, 5, 4):
            for step in (one, two):
                check(step, in_three_parts, (size, 3), (size, 3), calls=2)
    captured = len(graphs)
    assert captured >= 5 * 3
    for size in (7, 3, 2, 5, 4):
        for step in (one, two):
            check(step, in_three_parts, (size, 3), (size, 3))
    assert len(graphs) == captured


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: lambda x: model(x)], ids=["module", "closure"])
def test_weights_are_not_copied_and_must_stay(graphs, wrap):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).requires_grad_(False)
    step = direct(wrap(model))
    check(step, model, (4, 8))
    assert graphs.buffers == [(4, 8)]
    model[0].weight.copy_(torch.ones(8, 8))
    check(step, model, (4, 8))
    model[0].weight.data = model[0].weight.data.clone()
    with pytest.raises(RuntimeError, match=r"a parameter, .* float32 \[8, 8\], is not where it was captured"):
        step(numbers(4, 8))


def test_an_argument_that_is_written_must_be_marked(graphs):
    def attend(x, cache):
        cache.add_(x)
        return negated(x * 2) + cache

    x, cache = torch.ones(4, 16), torch.zeros(4, 16)
    with pytest.raises(RuntimeError, match="neither a parameter nor a buffer is written in place"):
        direct(attend)(x, cache)
    torch._dynamo.reset()
    torch._dynamo.mark_static_address(cache, guard=False)
    step = direct(attend)
    for _ in range(4):
        torch.testing.assert_close(step(x.clone(), cache), cache - 2)
    assert len(graphs) == 2
    with pytest.raises(RuntimeError, match="marked as static, .* is not where it was captured"):
        step(x, torch.zeros(4, 16))


def test_what_a_part_writes_into_a_split_ops_output_is_seen_by_the_next_ones(graphs):
    def function(x):
        first = negated(x + 1)
        first[0] = 7
        second = negated(first)
        return first + second * 2

    check(direct(function), function, (4, 3))


def test_another_size_than_that_of_dim_has_to_stay(graphs):
    def function(x, y):
        return negated(x * 2).sum() + y * 3

    step = direct(function)
    for length in (5, 6):
        check(step, function, (4, 2), (length, 2), calls=1)
    check(step, function, (4, 2), (6, 2))
    with pytest.raises(RuntimeError, match="a size is 9 where it was 6 when this was captured"):
        step(numbers(4, 2), numbers(9, 2))
    check(step, function, (4, 2), (6, 2))


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_after_a_failed_capture_the_next_call_tries_again(graphs, fail_at):
    step = direct(in_three_parts)
    check(step, in_three_parts, (4, 3), (4, 3), calls=1)
    graphs.fail_at = fail_at
    x, y = numbers(4, 3), numbers(4, 3)
    with pytest.raises(ValueError, match="no memory for a graph"):
        step(x, y)
    del graphs.graphs[:]
    graphs.fail_at = -1
    x.add_(1)
    torch.testing.assert_close(step(x, y), in_three_parts(x, y))
    check(step, in_three_parts, (4, 3), (4, 3))
    assert [g.replays for g in graphs.graphs] == [5] * 3  # one at the capture, so that it gives something


def test_a_split_op_that_raises_leaves_what_was_captured(graphs):
    step = direct(in_three_parts)

    def fail():
        raise ValueError("the split op failed")

    for _ in range(3):
        while_running.append(fail)
        with pytest.raises(ValueError, match="the split op failed"):
            step(numbers(4, 3), numbers(4, 3))
        while_running.clear()
        check(step, in_three_parts, (4, 3), (4, 3), calls=1)
    assert len(graphs) == 4  # the first part of the capture that failed, and then three


def test_outputs_may_be_arguments_views_and_none(graphs):
    weight = nn.Parameter(numbers(4, 3), requires_grad=False)

    def function(x, maybe=None):
        y = negated(x + weight) * 2
        return x, y, y[1:], None, weight, (y.t(), maybe)

    check(direct(function), function, (4, 3))


def test_an_output_that_comes_back_as_an_argument_is_refused(graphs):
    x = numbers(4, 3)
    step = direct(lambda x, y: negated(x + 1) + y * 2)
    outs = [step(x, x.clone()) for _ in range(3)]
    assert outs[1].data_ptr() == outs[2].data_ptr()
    for out in (outs[2], outs[2][:]):
        with pytest.raises(RuntimeError, match="an argument is what an earlier call returned.*clone it"):
            step(x, out)
        with pytest.raises(RuntimeError, match="an argument is what an earlier call returned.*clone it"):
            step(x, y=out)
    step(x, outs[2].clone())


def test_tensors_within_arguments(graphs):
    def function(x, others, *, named):
        return negated(x + others[0]) * others[1] + negated(x * 2) * named["z"]

    step = direct(function)
    for call in range(4):
        x, y, w, z = (numbers(4, 3, start=call * i) for i in range(4))
        torch.testing.assert_close(step(x, [y, w], named={"z": z}), function(x, [y, w], named={"z": z}))
    assert len(graphs) == 2


def test_arguments_may_share_memory_with_each_other_and_with_a_buffer(graphs):
    model = nn.Linear(3, 3, bias=False).requires_grad_(False)
    model.register_buffer("table", numbers(12, 3))
    model.forward = lambda x, y: negated(x @ model.weight + model.table[:4]) + x * y
    step = direct(model)
    for start in range(5):
        x, y = model.table[start : start + 4], model.table[start + 2 : start + 6]
        torch.testing.assert_close(step(x, y), model.forward(x, y))
    assert len(graphs) == 2


def test_code_from_a_cache_is_captured_as_well(graphs):
    with utils.fresh_cache(), torch._inductor.config.patch("fx_graph_cache", True):
        for captured in (3, 6):
            torch._dynamo.reset()
            check(direct(in_three_parts), in_three_parts, (4, 3), (4, 3))
            assert len(graphs) == captured
    assert torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"] == 1


def test_strides_of_arguments_are_kept(graphs):
    def function(x, y, z):
        return negated(x * 2 + y) + z

    step = direct(function)
    for call in range(4):
        args = numbers(4, 1, start=call).expand(4, 6), numbers(6, 4, start=call).t(), numbers(4, 12, start=call)[:, ::2]
        torch.testing.assert_close(step(*args), function(*args))
    assert len(graphs) == 2


def test_without_a_graph_what_is_not_aligned_is_copied(graphs):
    step = direct(lambda x: negated(x * 2) + 1)
    for _ in range(2):
        step(numbers(3, 4))
    assert not graphs.buffers
    step(numbers(13)[1:].view(3, 4))
    assert graphs.buffers == [(3, 4)]


def test_grad_modes(graphs):
    linear = nn.Linear(8, 8)
    with torch.enable_grad():
        with pytest.raises(RuntimeError, match=r"no gradients; call it under torch.no_grad\(\)"):
            direct(linear)(numbers(4, 8))
        torch._dynamo.reset()
        step = direct(in_three_parts)
        check(step, in_three_parts, (4, 3), (4, 3))
    with torch.inference_mode():
        check(step, in_three_parts, (4, 3), (4, 3))
    check(step, in_three_parts, (4, 3), (4, 3))
    step = direct(linear)
    with torch.inference_mode():
        warmup(step, [(4, 8)], dtype=torch.float32, device="cpu")
    check(step, linear, (4, 8))


def test_a_split_op_may_compile_a_function_of_its_own(graphs):
    inner = direct(lambda x: negated_quietly(x * 3) + 1, [4])
    negated_quietly = torch.neg
    plain = torch.compile(lambda x: x * 3 + 1)

    def run_others():
        with contextlib.ExitStack() as stack:
            functions, while_running[:] = while_running[:], []
            stack.callback(while_running.extend, functions)
            assert utils._unstable_customized_partition_wrapper.wrapper is None
            torch.testing.assert_close(plain(numbers(4, 3)), numbers(4, 3) * 3 + 1)
            torch.testing.assert_close(inner(numbers(4, 3)), numbers(4, 3) * -3 + 1)

    while_running.append(run_others)
    step = direct(in_three_parts)
    for _ in range(4):
        step(numbers(4, 3), numbers(4, 3))
    while_running.clear()
    check(step, in_three_parts, (4, 3), (4, 3))


def test_a_wrapper_of_somebody_else_is_put_back(graphs, monkeypatch):
    theirs = mock.Mock(side_effect=lambda partition, metadata: partition)
    utils.set_customized_partition_wrappers(theirs)
    try:
        check(direct(in_three_parts), in_three_parts, (4, 3), (4, 3))
        torch._dynamo.reset()
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", mock.Mock(side_effect=ValueError("no compiler")))
        with pytest.raises(Exception, match="no compiler"):
            direct(in_three_parts)(numbers(4, 3), numbers(4, 3))
        assert utils._unstable_customized_partition_wrapper.wrapper is theirs
    finally:
        utils.set_customized_partition_wrappers(None)
    assert not theirs.called


@pytest.mark.parametrize("name", _partition_graphs._NEEDED)
def test_a_torch_that_lacks_a_piece_is_named_at_once(name, monkeypatch):
    monkeypatch.setattr(_partition_graphs.pkgutil, "resolve_name", _resolve_all_but(name))
    with pytest.raises(RuntimeError, match=rf"needs {name.replace(':', '.')}, which torch .* lacks"):
        direct(in_three_parts)


def _resolve_all_but(missing):
    def resolve(name):
        if name == missing:
            raise AttributeError(name)

    return resolve
