"""The candidate runner of graph partitions, without a GPU: partitions are real, and a graph is what calls its part again."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._inductor import scheduler

from benchmarks import decoder, partition_graphs
from benchmarks.partition_graphs import PartitionGraphs

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which can capture"),
    pytest.mark.skipif(not decoder.CAN_MARK_BATCH, reason="this torch can't mark two tensors' batch as the same"),
]
SHAPE = decoder.Shape(64, 2, 4, 2, 128, 32, batch=4, length=16)


class Graph:
    """Replays by calling again, and puts what comes out where the first outputs were, as a graph does."""

    def __init__(self, run):
        self.run, self.outputs, self.replays = run, run(), 0

    def replay(self):
        self.replays += 1
        for before, now in zip(self.outputs, self.run(), strict=True):
            if isinstance(now, Tensor) and now.data_ptr() != before.data_ptr():
                before.copy_(now)


@pytest.fixture
def graphs(monkeypatch):
    captured = []

    def capture(self, run):
        captured.append(Graph(run))
        return captured[-1], captured[-1].outputs

    def same_addresses(tensors, addresses, indices):
        return all(tensors[i].data_ptr() == addresses[i] for i in indices)

    monkeypatch.setattr(PartitionGraphs, "_capture", capture)
    monkeypatch.setattr(torch._C, "_tensors_data_ptrs_at_indices_equal", same_addresses, raising=False)
    monkeypatch.setattr(scheduler.BaseSchedulerNode, "is_gpu", lambda self: True)
    with (
        torch.no_grad(),
        torch._inductor.config.patch("fx_graph_cache", False),  # what lies there was compiled for a CPU
        mock.patch("torch._inductor.cudagraph_utils.check_multiple_devices_or_any_cpu_nodes", lambda *given: None),
    ):
        yield captured


def steps(function, model, batch: int, first_token: int = 0) -> list[Tensor]:
    model.clear()
    outs = []
    for i in range(4):
        tokens = torch.arange(batch) + first_token + i
        positions = torch.full_like(tokens, i)
        decoder.mark_batch(tokens, positions)
        outs.append(function(tokens, positions).clone())
    return outs


def test_a_decoder_replays_with_new_inputs_and_sizes(graphs):
    torch.manual_seed(0)
    model = decoder.Decoder(SHAPE).eval()
    pieces = PartitionGraphs(model, [4, 2], [decoder.ATTENTION], {})
    for batch, captured in ((4, 3), (2, 6), (3, 6), (4, 6)):
        steps(pieces, model, batch)
        for given, wanted in zip(steps(pieces, model, batch, 7), steps(model, model, batch, 7), strict=True):
            torch.testing.assert_close(given, wanted, atol=0.05, rtol=0.05)
        assert len(graphs) == captured
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    # Of 16 and 8 steps the first one warmed up.
    assert [g.replays for g in graphs] == [15] * 3 + [7] * 3


def test_a_parameter_that_has_moved_raises(graphs):
    torch.manual_seed(0)
    model = decoder.Decoder(SHAPE).eval()
    pieces = PartitionGraphs(model, [4], [decoder.ATTENTION], {})
    steps(pieces, model, 4)
    model.norm.weight.data = model.norm.weight.data.clone()
    with pytest.raises(RuntimeError, match="not where it was captured"):
        steps(pieces, model, 4)


def test_an_argument_that_is_written_must_be_marked(graphs):
    def attend(x, cache):
        cache.add_(x)
        q = (x * 2).view(4, 2, 8)
        keys = cache.view(4, 1, 2, 8)
        return decoder.decode_attention(q, keys, keys, torch.zeros_like(x[:, 0], dtype=torch.int64)) + 1

    x, cache = torch.ones(4, 16), torch.zeros(4, 16)
    with pytest.raises(Exception, match="neither a parameter nor a buffer is written in place"):
        PartitionGraphs(attend, [4], [decoder.ATTENTION], {})(x, cache)
    torch._dynamo.reset()
    torch._dynamo.mark_static_address(cache, guard=False)
    pieces = PartitionGraphs(attend, [4], [decoder.ATTENTION], {})
    for _ in range(4):
        out = pieces(x.clone(), cache)
        torch.testing.assert_close(out, cache.view(4, 2, 8) + 1)
    assert len(graphs) == 2
    assert partition_graphs._marked_static(cache)
