"""Static FP4 caches under torch.compile: one graph for a prompt's every decoding step, and captured ones on a GPU."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from torch_fp4ops.capture import record_decisions
from torch_fp4ops.cuda_graphs import warmup
from torch_fp4ops.kv_cache import KVScales, get_fp4_kv_cache_quant_method
from torch_fp4ops.testing import assert_same_bytes
from torch_fp4ops.testing.samples import values

transformers = pytest.importorskip("transformers")

from torch_fp4ops.kv_cache.transformers import FP4Cache, calibrate_kv_scales  # noqa: E402

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

METHODS = ("nvfp4", "mxfp4", "fp4_mx_block16")
STEPS, ROOM = 16, 48


@functools.cache
def model(dtype: torch.dtype = torch.float32, device: str = "cpu"):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=96,
        vocab_size=97,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval().to(device, dtype)


def prompt(device: str = "cpu", tokens: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(1, 97, (2, tokens), generator=generator).to(device)


def cache_of(method: str, device: str = "cpu") -> FP4Cache:
    scales = KVScales(torch.full((2,), 9 / 2688), torch.full((2,), 6 / 2688), "amax/2688")
    return FP4Cache(model().config, method, max_cache_len=ROOM, scales=scales if method == "nvfp4" else None)


@torch.no_grad()
def decode(step, cache: FP4Cache, ids: Tensor, steps: int = STEPS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The prompt eagerly, then ``steps`` tokens through ``step``: the same ones whatever it computes."""
    out = [model(dtype, ids.device.type)(ids, past_key_values=cache).logits]
    for i in range(steps):
        out.append(step((ids[:, :1] + i) % 97, past_key_values=cache).logits.clone())
    return out


@pytest.mark.parametrize(
    ("method", "backend"),
    # Inductor sees an opaque op in MXFP4 as in NVFP4, and the arithmetic itself in blocks of 16.
    [*((m, "aot_eager") for m in METHODS), ("nvfp4", "inductor"), ("fp4_mx_block16", "inductor")],
)
def test_one_graph_for_every_step(method, backend):
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(model(), fullgraph=True, backend=counter)
    cache = cache_of(method)
    compiled = decode(step, cache, prompt())
    for a, b in zip(compiled, decode(model(), cache_of(method), prompt()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert int(cache.get_seq_length()) == 5 + STEPS
    # Another sequence in the same cache, longer at the start.
    cache.reset()
    decode(step, cache, prompt(tokens=9))
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_generate_compiles_the_steps():
    """As it does by itself on a GPU."""
    config = transformers.CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    options = {"attention_mask": torch.ones_like(prompt()), "max_new_tokens": STEPS, "do_sample": False}
    compiled = model().generate(prompt(), past_key_values=cache_of("nvfp4"), compile_config=config, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    eager = model().generate(prompt(), past_key_values=cache_of("nvfp4"), disable_compile=True, **options)
    assert torch.equal(compiled, eager)


@torch.no_grad()
def test_a_prompt_compiles_too_once_the_cache_is_there():
    """``early_initialization``, as transformers has it for export and for prompts in chunks."""
    cache, counter = cache_of("nvfp4"), CompileCounterWithBackend("aot_eager")
    cache.early_initialization(2, 2, 64, torch.float32, torch.device("cpu"))
    step = torch.compile(model(), fullgraph=True, backend=counter)
    wanted = model()(prompt(), past_key_values=cache_of("nvfp4")).logits
    torch.testing.assert_close(step(prompt(), past_key_values=cache).logits, wanted, rtol=1e-3, atol=1e-3)
    for i in range(4):
        step(prompt()[:, i : i + 1], past_key_values=cache)
    assert counter.frame_count == 2  # the prompt, and every step


def test_one_graph_in_16_bits():
    """Where the cache is read by ``nvfp4_kv_dequantize_paged``, with the rounding of bfloat16."""
    sixteen, counter = model(torch.bfloat16), CompileCounterWithBackend("aot_eager")
    step = torch.compile(sixteen, fullgraph=True, backend=counter)
    compiled = decode(step, cache_of("nvfp4"), prompt(), dtype=torch.bfloat16)
    for a, b in zip(compiled, decode(sixteen, cache_of("nvfp4"), prompt(), dtype=torch.bfloat16), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    assert counter.frame_count == 1


@pytest.mark.parametrize("method", METHODS)
def test_methods_trace_as_they_are(method):
    """Storing and reading without a cache object, for any number of rows."""
    quant = get_fp4_kv_cache_quant_method(method)

    def step(buffers, loc, keys, new_values):
        quant.quantize_and_store(buffers, loc, keys, new_values)
        return quant.dequantize_prev_kv(buffers, loc=loc)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    pair = [quant.create_buffers(64, 2, 64, 1, "cpu", page_size=8, kv_layout="HND")[0] for _ in range(2)]
    for rows in (3, 5, 17):
        loc, new = torch.randperm(64)[:rows], (values(rows, rows, 2, 64), values(rows + 1, rows, 2, 64))
        for t in (loc, *new):
            torch._dynamo.mark_dynamic(t, 0)
        for a, b in zip(compiled(pair[0], loc, *new), step(pair[1], loc, *new), strict=True):
            assert_same_bytes(a, b)
    assert_same_bytes(pair[0].v_sf, pair[1].v_sf)
    assert counter.frame_count == 1


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_generate_compiles_by_itself_and_agrees(method):
    """transformers compiles the decoding steps of a static cache on a GPU, and captures them."""
    gpu_model, ids = model(torch.float32, "cuda"), prompt("cuda")
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": STEPS, "do_sample": False}

    def generate(**more):
        cache = cache_of(method)
        out = gpu_model.generate(
            ids, past_key_values=cache, output_logits=True, return_dict_in_generate=True, **options, **more
        )
        assert int(cache.get_seq_length()) == ids.shape[1] + STEPS - 1
        return out

    eager, compiled = generate(disable_compile=True), generate()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch.equal(eager.sequences, compiled.sequences)
    for a, b in zip(eager.logits, compiled.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_growing_and_static_caches_agree_on_a_gpu():
    ids = prompt("cuda")
    scales = calibrate_kv_scales(model(torch.float32, "cuda"), [ids])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": STEPS, "do_sample": False}
    caches = [FP4Cache(model().config, scales=scales, max_cache_len=length) for length in (None, ROOM)]
    growing, static = (
        model(torch.float32, "cuda").generate(ids, past_key_values=c, disable_compile=True, **options) for c in caches
    )
    assert torch.equal(growing, static)
    on_cpu = model().generate(
        ids.cpu(),
        past_key_values=FP4Cache(model().config, scales=scales),
        **{**options, "attention_mask": options["attention_mask"].cpu()},
    )
    assert (growing.cpu() == on_cpu).double().mean() > 0.6  # the two machines round differently


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("method", METHODS)
def test_no_recompilation_on_a_gpu(method, mode):
    """With ``reduce-overhead`` Inductor captures what it compiled: the cache is written at static addresses."""
    gpu_model, ids = model(torch.float32, "cuda"), prompt("cuda")
    step = torch.compile(gpu_model, fullgraph=True, mode=mode)
    compiled = decode(step, cache_of(method), ids)
    for a, b in zip(compiled, decode(gpu_model, cache_of(method), ids), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_one_captured_step_replays_as_the_sequence_grows(method, dtype):
    gpu_model, ids = model(dtype, "cuda"), prompt("cuda")
    wanted = decode(gpu_model, cache_of(method), ids, dtype=dtype)
    cache = cache_of(method)
    gpu_model(ids, past_key_values=cache)
    token = ids[:, :1].clone()
    warmup(lambda: gpu_model(token, past_key_values=cache), [{}])
    cache.reset()
    gpu_model(ids, past_key_values=cache)
    graph = torch.cuda.CUDAGraph()
    with record_decisions() as decisions, torch.cuda.graph(graph):
        out = gpu_model(token, past_key_values=cache).logits
    assert decisions.backends()["nvfp4_kv_quantize_store"] == {"triton"}
    for i in range(STEPS):
        token.copy_((ids[:, :1] + i) % 97)
        graph.replay()
        torch.testing.assert_close(out, wanted[1 + i], rtol=1e-3, atol=1e-3)
    assert int(cache.get_seq_length()) == ids.shape[1] + STEPS


@pytest.mark.gpu
@torch.no_grad()
def test_past_the_end_eager_calls_raise_and_compiled_ones_drop_on_a_gpu():
    """Nothing is written into the next sequence's room."""
    gpu_model, ids = model(torch.float32, "cuda"), prompt("cuda")
    for step in (gpu_model, torch.compile(gpu_model, fullgraph=True)):
        cache = FP4Cache(model().config, max_cache_len=6)
        gpu_model(ids, past_key_values=cache)
        step(ids[:, :1], past_key_values=cache)
        before = [t.clone() for t in cache.layers[0]._bytes()]
        if step is gpu_model:
            with pytest.raises(ValueError, match="max_cache_len is 6 with 1 tokens for a cache of 6; allowed: 7"):
                step(ids[:, :1], past_key_values=cache)
        else:
            step(ids[:, :1], past_key_values=cache)
        for a, b in zip(cache.layers[0]._bytes(), before, strict=True):
            assert_same_bytes(a, b)
