"""Whole models after ``quantize_``: one graph, no breaks, at most two compilations whatever the sizes."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("transformers")

from torch_fp4ops.testing import assert_same_bytes

from . import architectures

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_grad")

SIZES = (1, 2, 17, 128, 129, 4096)
# Eager takes as long as compiled code here; the largest size is there for its compilation.
COMPARED = SIZES[:-1]
KINDS = [("llama", "nvfp4", "bf16"), ("qwen_moe", "nvfp4", "bf16"), ("dit", "nvfp4", "same"), ("bert", "mxfp8", "same")]
every_kind = pytest.mark.parametrize(("name", "weight_format", "activations"), KINDS, ids=[k[0] for k in KINDS])


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def breaks() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["graph_break"])


@every_kind
def test_at_most_two_compilations_for_all_sizes(name, weight_format, activations):
    model = architectures.quantized(name, weight_format, activations)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for size in SIZES:
        given = architectures.inputs(name, size)
        out = architectures.output(compiled(**given))
        if size in COMPARED:
            assert_same_bytes(out, architectures.output(model(**given)))
    assert counter.frame_count <= 2
    assert not breaks()


@every_kind
def test_one_compilation_with_unbacked_sizes(name, weight_format, activations):
    model = architectures.quantized(name, weight_format, activations, attention="opaque")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for size in SIZES:
        given = architectures.inputs(name, size, mask=True)
        torch._dynamo.decorators.mark_unbacked(*architectures.dynamic_input(name, given))
        out = architectures.output(compiled(**given))
        if size in COMPARED:
            assert_same_bytes(out, architectures.output(model(**given)))
    assert counter.frame_count == 1
    assert not breaks()


@pytest.mark.parametrize("name", ["llama", "qwen_moe"])
def test_prefill_and_decoding_compile_once_each(name):
    """A static cache, as decoding needs it: prefill, then 16 steps."""
    import transformers

    model = architectures.quantized(name)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    tokens = torch.randint(architectures.VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(1))

    def decode(function):
        cache = transformers.StaticCache(config=model.config, max_cache_len=32)
        cache.early_initialization(2, 2, 16, torch.bfloat16, torch.device("cpu"))
        for start, end in ((0, 7), *((n, n + 1) for n in range(7, 23))):
            positions = torch.arange(start, end)[None]
            step = function(
                input_ids=tokens[:, start:end], position_ids=positions, past_key_values=cache, use_cache=True
            )
            yield step.logits

    for given, wanted in zip(decode(compiled), decode(model), strict=True):
        # transformers itself makes other masks under compile, which take torch's attention another way.
        torch.testing.assert_close(given, wanted, atol=0.02, rtol=0.05)
    assert counter.frame_count == 2
    assert not breaks()


@every_kind
def test_quantized_is_close_to_unquantized(name, weight_format, activations):
    """The models compute what they did: layers and experts are where they belong."""
    given = architectures.inputs(name, 17)
    outs = [
        m(**given) for m in (architectures.quantized(name, weight_format, activations), architectures.unquantized(name))
    ]
    given, wanted = (architectures.output(o).float() for o in outs)
    assert torch.nn.functional.cosine_similarity(given, wanted, dim=-1).mean() > 0.9


def test_experts_are_close_to_those_of_the_model():
    layer = architectures.unquantized("qwen_moe").model.layers[0].mlp
    x = torch.randn(17, architectures.HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, weights, ids = layer.gate(x)
    # Weights as they are initialised are so small that the experts vanish beside the residual stream.
    given = architectures.FusedExperts(layer.experts)(x, ids, weights).float()
    wanted = layer.experts(x, ids, weights).float()
    assert torch.nn.functional.cosine_similarity(given, wanted, dim=-1).min() > 0.95


def test_inductor_gives_a_model_in_one_compilation():
    model = architectures.quantized("llama", attention="opaque")
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for size in (1, 2, 17):
        given = architectures.inputs("llama", size, mask=True)
        torch._dynamo.decorators.mark_unbacked(*architectures.dynamic_input("llama", given))
        out, wanted = compiled(**given).logits, model(**given).logits
        # Inductor keeps fp32 between fused operations where eager mode rounds to bfloat16.
        torch.testing.assert_close(out, wanted, atol=0.02, rtol=0.05)
    assert counter.frame_count == 1
