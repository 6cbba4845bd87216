"""Where Inductor splits a graph for CUDA graphs, seen without a GPU: it is told that CPU nodes are a GPU's."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch._inductor import scheduler

from benchmarks import decoder
from torch_fp4ops.cuda_graphs import piecewise
from torch_fp4ops.nn import quantize_
from torch_fp4ops.testing import assert_same_bytes

from . import architectures

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and test_on_gpu.py"),
]


@pytest.fixture
def partitions(monkeypatch):
    """For each compilation the number of its parts, and what is written in place without being at a fixed address.

    Then every call of a part: its number and the sizes by which its graphs would be told apart.
    """
    compilations: list[tuple[int, set[int]]] = []
    calls: list[tuple[int, list[int]]] = []

    def instead_of_capturing(example_inputs, compiled_graph, *others):
        assert not compiled_graph.cudagraph_info.cudagraph_fail_reasons
        parts = range(len(compiled_graph.partition_maps))
        unfixed = set(compiled_graph.mutated_input_idxs) - set(compiled_graph.fx_kwargs["static_input_idxs"])
        compilations.append((len(parts), unfixed))

        def recorder(part):
            def wrap(function):
                def run(inputs):
                    calls.append((part, [n for n in inputs if isinstance(n, int)]))
                    return function(inputs)

                return run

            return wrap

        compiled_graph.recursively_apply_fns([recorder(part) for part in parts])

    monkeypatch.setattr(scheduler.BaseSchedulerNode, "is_gpu", lambda self: True)
    utils, output_code = "torch._inductor.cudagraph_utils", "torch._inductor.output_code"
    with (
        torch.no_grad(),
        torch._inductor.config.patch("fx_graph_cache", False),  # what lies there was compiled for a CPU
        mock.patch(f"{utils}.check_multiple_devices_or_any_cpu_nodes", lambda *given: None),
        mock.patch(f"{output_code}.cudagraph_partition_post_compile", instead_of_capturing),
    ):
        yield compilations, calls


@pytest.mark.skipif(not decoder.CAN_MARK_BATCH, reason="this torch can't mark two tensors' batch as the same")
@pytest.mark.parametrize("kv_cache", ["nvfp4", "bf16"])
def test_a_decoder_is_split_at_attention_and_nowhere_else(partitions, kv_cache):
    compilations, calls = partitions
    shape = decoder.Shape(64, 3, 4, 2, 128, 32, batch=4, length=16)
    torch.manual_seed(0)
    model = quantize_(decoder.Decoder(shape, kv_cache), "nvfp4", "bf16", lambda module, name: name != "head")
    step = piecewise(model, [4], split=[decoder.ATTENTION])
    tokens = torch.arange(4)
    given = tokens, torch.zeros_like(tokens)
    decoder.mark_batch(*given)
    first = step(*given)
    # Caches are written within the parts, where only an address that stays can be captured.
    assert compilations == [(shape.layers + 1, set())]
    calls.clear()
    assert_same_bytes(step(*given), first)
    step(tokens[:3], given[1][:3])
    assert calls == [(part, [size]) for size in (4, 3) for part in range(shape.layers + 1)]


def test_a_model_of_transformers_is_split_at_attention_and_nowhere_else(partitions):
    pytest.importorskip("transformers")
    compilations, calls = partitions
    model = architectures.quantized("qwen_moe", attention="opaque")
    step = piecewise(model, [2], split=["torch_fp4ops_tests::attention"])
    given = architectures.inputs("qwen_moe", 2, mask=True)
    torch._dynamo.decorators.mark_unbacked(*architectures.dynamic_input("qwen_moe", given))
    step(**given)
    assert compilations == [(3, set())]  # two layers
    calls.clear()
    step(**architectures.inputs("qwen_moe", 5, mask=True))
    assert calls == [(part, [5]) for part in range(3)]


def test_without_a_split_there_is_one_part(partitions):
    compilations, _ = partitions
    step = piecewise(lambda x: torch.ops.fp4.mxfp8_quantize(x * 2)[0].float() + 1, [4])
    step(torch.ones(4, 32))
    assert compilations == [(1, set())]
