"""What only a GPU can show of capture: partitions, replays, pools, streams, threads, and the guard."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

from benchmarks import decoder
from torch_fp4ops import OPS, explain, set_backend
from torch_fp4ops.cuda_graphs import FirstUseInCapture, pad_to, piecewise, record_decisions, warmup
from torch_fp4ops.nn import quantize_
from torch_fp4ops.testing import assert_same_bytes
from torch_fp4ops.testing.samples import values

from . import architectures

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo", "triton_without_grad")]

SHAPE = decoder.Shape(hidden=256, layers=2, heads=4, kv_heads=2, intermediate=512, vocabulary=128, batch=16, length=32)
SIZES = (1, 2, 4, 16)


@pytest.fixture
def triton_without_grad():
    with torch.no_grad(), set_backend("triton"):
        yield
    torch.cuda.synchronize()


def quantized_decoder(kv_cache: str = "nvfp4") -> decoder.Decoder:
    torch.manual_seed(0)
    model = decoder.Decoder(SHAPE, kv_cache, "cuda").eval()
    return quantize_(model, "nvfp4", "bf16", lambda module, name: name != "head")


def step_inputs(batch: int, step: int = 0) -> tuple[Tensor, Tensor]:
    tokens = (torch.arange(batch, device="cuda") * 7 + step * 3) % SHAPE.vocabulary
    return tokens, torch.full_like(tokens, step)


def recorded_graphs() -> int:
    """How many CUDA graphs Inductor holds on this device and thread."""
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    nodes = [] if manager is None else [n for roots in manager.roots.values() for n in roots]
    count = 0
    while nodes:
        count += 1
        nodes += [child for children in nodes.pop().children.values() for child in children]
    return count


class Attend:
    """Quantised projections around an attention to itself: nothing for Inductor to round otherwise than eager mode."""

    def __init__(self):
        scale = torch.tensor([100.0], device="cuda")
        self.alpha = 1 / scale
        weights = (values(i, n, 64).cuda() for i, n in enumerate((64, 32)))
        self.w, self.v = (OPS["fp4_quantize"](w, scale) for w in weights)

    def __call__(self, x):
        q = torch.ops.fp4.mm_bf16_fp4(x, *self.w, self.alpha).view(-1, 4, 16)
        positions = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
        out = decoder.decode_attention(q, q.unsqueeze(1), q.unsqueeze(1), positions)
        return torch.ops.fp4.mm_bf16_fp4(out.flatten(1), *self.v, self.alpha)


@pytest.mark.parametrize("marked", [False, True], ids=["automatic", "unbacked"])
def test_partitions_sizes_and_replays_of_piecewise(marked):
    """Split at attention: two graphs for each listed size, none for others, and always eager's bytes."""
    attend = Attend()
    step = piecewise(attend, SIZES, split=[decoder.ATTENTION])
    for done, size in enumerate(SIZES, start=1):
        for call in range(4):
            x = values(100 * size + call, size, 64).cuda()
            if marked:
                torch._dynamo.decorators.mark_unbacked(x, 0)
            if size == 1 and call == 0:
                out, (code,) = run_and_get_code(step, x)
                assert code.count("def partition_") == 2
            else:
                out = step(x)
            assert_same_bytes(out, attend(x))
        assert recorded_graphs() == 2 * done
    for size in (3, 17):
        x = values(size, size, 64).cuda()
        for _ in range(3):
            assert_same_bytes(step(x), attend(x))
        assert_same_bytes(pad_to(SIZES)(x)[:size], x)
    assert recorded_graphs() == 2 * len(SIZES)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if marked else 2)
    assert not torch._dynamo.utils.counters["graph_break"]
    for size in SIZES:
        assert step.decisions[size].backends() == {"mm_bf16_fp4": {"triton"}}
    assert "size 16:\n  mm_bf16_fp4: triton (decided by set_backend)" in explain(step)


@pytest.mark.parametrize("kv_cache", ["nvfp4", "bf16"])
def test_a_decoder_in_pieces_equals_itself_without_graphs(kv_cache):
    model = quantized_decoder(kv_cache)
    step = piecewise(model, [4], split=[decoder.ATTENTION])

    def decode() -> list[Tensor]:
        model.clear()
        return [step(*step_inputs(4, i)).clone() for i in range(6)]

    with inductor_config.patch("triton.cudagraph_capture_sizes", ()):
        wanted = decode()
    assert recorded_graphs() == 0
    # The same compiled code, which torch finds by the function and the options, from now on with graphs.
    step = piecewise(model, [4], split=[decoder.ATTENTION])
    decode()
    for given, expected in zip(decode(), wanted, strict=True):
        assert_same_bytes(given, expected)
    assert recorded_graphs() == SHAPE.layers + 1
    model.clear()
    torch.testing.assert_close(wanted[0], model(*step_inputs(4)), atol=0.1, rtol=0.1)


# Direct replays


@pytest.mark.parametrize("replay", ["inductor", "direct"])
@pytest.mark.parametrize("marked", [False, True], ids=["automatic", "unbacked"])
def test_either_replay_gives_eagers_bytes(replay, marked):
    """Sizes in turn, each time with other inputs; what is not listed runs without graphs."""
    attend = Attend()
    step = piecewise(attend, SIZES, split=[decoder.ATTENTION], replay=replay)
    for call in range(6):
        for size in (*SIZES, 3):
            x = values(100 * size + call, size, 64).cuda()
            if marked:
                torch._dynamo.decorators.mark_unbacked(x, 0)
            assert_same_bytes(step(x), attend(x))
    for size in SIZES:
        assert step.decisions[size].backends() == {"mm_bf16_fp4": {"triton"}}
    assert "size 16:\n  mm_bf16_fp4: triton (decided by set_backend)" in explain(step)
    if replay == "direct":
        assert recorded_graphs() == 0


@pytest.mark.skipif(not decoder.CAN_MARK_BATCH, reason="this torch can't mark two tensors' batch as the same")
@pytest.mark.parametrize("kv_cache", ["nvfp4", "bf16"])
def test_direct_replays_of_a_decoder_give_what_the_parts_give_without_graphs(kv_cache):
    model = quantized_decoder(kv_cache)

    def decode(step, batch: int) -> list[Tensor]:
        model.clear()
        outs = []
        for i in range(6):
            given = step_inputs(batch, i)
            decoder.mark_batch(*given)
            outs.append(step(*given).clone())
        return outs

    sizes = (4, 2)
    plain, pieces, others = (
        piecewise(model, listed, [decoder.ATTENTION], replay="direct") for listed in ((16,), sizes, sizes)
    )
    wanted = {batch: decode(plain, batch) for batch in (*sizes, 3)}
    for step in (pieces, others):
        for batch in (*sizes, 3, *sizes):
            decode(step, batch)
            for given, expected in zip(decode(step, batch), wanted[batch], strict=True):
                assert_same_bytes(given, expected)
    for batch in sizes:  # each object's graphs have memory of their own
        model.clear()
        for i, expected in enumerate(wanted[batch]):
            given = step_inputs(batch, i)
            decoder.mark_batch(*given)
            one, other = pieces(*given), others(*given)
            assert_same_bytes(one, expected)
            assert_same_bytes(other, expected)


def test_direct_replays_in_either_mode_and_after_a_capture_that_failed(monkeypatch):
    attend = Attend()
    step = piecewise(attend, [4], split=[decoder.ATTENTION], replay="direct")
    x = values(0, 4, 64).cuda()
    with torch.inference_mode():
        step(x)
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                step(x)
        for call in range(3):
            x = values(call, 4, 64).cuda()
            assert_same_bytes(step(x), attend(x))
    for call in range(3):
        x = values(call, 4, 64).cuda()
        assert_same_bytes(step(x), attend(x))
    with pytest.raises(RuntimeError, match="what an earlier call returned.*clone it"):
        step(step(x))


def test_direct_replays_refuse_a_parameter_that_was_replaced():
    model = quantized_decoder("bf16")
    step = piecewise(model, [4], split=[decoder.ATTENTION], replay="direct")
    warmup(step, [step_inputs(4)])
    weight = model.norm.weight
    model.norm.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    with pytest.raises(RuntimeError, match="a parameter, .* is not where it was captured"):
        step(*step_inputs(4))
    model.norm.weight = weight
    step(*step_inputs(4))


def test_a_mixture_of_experts_in_pieces_equals_itself_without_graphs():
    pytest.importorskip("transformers")
    with set_backend("auto"):  # the weights are quantised on the CPU
        model = architectures.quantized("qwen_moe", attention="opaque").cuda()
    split = ["torch_fp4ops_tests::attention"]
    inputs = {}
    for size in (2, 5):
        made = architectures.inputs("qwen_moe", size, mask=True)
        inputs[size] = {name: t.cuda() if isinstance(t, Tensor) else t for name, t in made.items()}
        torch._dynamo.decorators.mark_unbacked(*architectures.dynamic_input("qwen_moe", inputs[size]))
    with inductor_config.patch("triton.cudagraph_capture_sizes", ()):
        step = piecewise(model, inputs, split)
        wanted = {size: step(**given).logits.clone() for size, given in inputs.items()}
    step = piecewise(model, inputs, split)
    for size, given in inputs.items():
        for _ in range(3):
            assert_same_bytes(step(**given).logits, wanted[size])
    assert recorded_graphs() == len(inputs) * 3  # two layers
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert step.decisions[5].backends() == {op: {"triton"} for op in ("mm_bf16_fp4", "cutlass_fused_moe")}


@pytest.mark.parametrize("replay", ["inductor", "direct"])
def test_replays_allocate_nothing(replay):
    model = quantized_decoder()
    step = piecewise(model, [4], split=[decoder.ATTENTION], replay=replay)
    given = step_inputs(4)
    for _ in range(10):
        step(*given)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(1000):
        step(*given)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def _store(key, slots, caches):
    scale = torch.ones(1, device="cuda")
    torch.ops.fp4.nvfp4_kv_quantize_store(key, key, slots, *caches, scale, scale)
    return key * 2


def _caches() -> list[Tensor]:
    return [torch.zeros(8, 16, 2, last, dtype=torch.uint8, device="cuda") for last in (32, 32, 4, 4)]


def test_what_cannot_be_captured_raises():
    """A cache that is an argument may be elsewhere at the next call."""
    with pytest.raises(RuntimeError, match="mutated inputs"):
        piecewise(_store, [4])(values(0, 4, 2, 64).cuda(), torch.arange(4, device="cuda"), _caches())


def test_a_cache_at_a_static_address_is_captured():
    given = values(0, 4, 2, 64).cuda(), torch.arange(4, device="cuda")
    caches, wanted = _caches(), _caches()
    for cache in caches:
        torch._dynamo.mark_static_address(cache)
    with inductor_config.patch(force_disable_caches=True):  # the same graph may be cached with caches that move
        step = piecewise(_store, [4])
        for _ in range(3):
            step(*given, caches)
    assert recorded_graphs() == 1
    _store(*given, wanted)
    for a, b in zip(caches, wanted, strict=True):
        assert_same_bytes(a, b)


# Whole graphs, without torch.compile


def eager_steps(model: decoder.Decoder, batch: int, steps: int) -> list[Tensor]:
    model.clear()
    return [model(*step_inputs(batch, i)).clone() for i in range(steps)]


def capture(
    model: decoder.Decoder, batch: int, **options
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor], Tensor]:
    static = step_inputs(batch)
    warmup(model, [static])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        out = model(*static)
    return graph, static, out


def replay(graph: torch.cuda.CUDAGraph, static: tuple[Tensor, Tensor], batch: int, step: int) -> None:
    for target, source in zip(static, step_inputs(batch, step), strict=True):
        target.copy_(source)
    graph.replay()


def test_a_whole_decoding_step_replays_with_new_inputs():
    model = quantized_decoder()
    wanted = eager_steps(model, 4, 6)
    with record_decisions() as decisions:
        graph, static, out = capture(model, 4)
    assert all(backends == {"triton"} for backends in decisions.backends().values())
    assert set(decisions.backends()) == {"mm_bf16_fp4", "nvfp4_kv_quantize_store", "nvfp4_kv_dequantize"}
    assert explain(decisions).count("triton") == len(decisions)
    model.clear()
    with set_backend("reference"):  # too late for what is captured
        for i, expected in enumerate(wanted):
            replay(graph, static, 4, i)
            assert_same_bytes(out, expected)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(1000):
        graph.replay()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_graphs_of_two_sizes_share_a_pool():
    model = quantized_decoder()
    wanted = {batch: eager_steps(model, batch, 3) for batch in (8, 3)}
    large = capture(model, 8)
    small = capture(model, 3, pool=large[0].pool())
    assert small[0].pool() == large[0].pool()
    for batch, (graph, static, out) in ((8, large), (3, small), (8, large), (3, small)):
        model.clear()
        for i, expected in enumerate(wanted[batch]):
            replay(graph, static, batch, i)
            assert_same_bytes(out, expected)


def test_capture_in_a_stream_of_ones_own():
    model = quantized_decoder()
    wanted = eager_steps(model, 4, 3)
    static = step_inputs(4)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        warmup(model, [static])
        graph.capture_begin()
        out = model(*static)
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    model.clear()
    for i, expected in enumerate(wanted):
        replay(graph, static, 4, i)
        assert_same_bytes(out, expected)


def test_capture_and_replay_in_another_thread():
    """Grad mode and ``set_backend`` are a thread's own."""
    model = quantized_decoder()
    wanted = eager_steps(model, 4, 3)
    outs, errors = [], []

    def work():
        try:
            with torch.no_grad(), set_backend("triton"):
                graph, static, out = capture(model, 4, capture_error_mode="thread_local")
                model.clear()
                for i in range(3):
                    replay(graph, static, 4, i)
                    outs.append(out.clone())
                torch.cuda.synchronize()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors, errors
    for given, expected in zip(outs, wanted, strict=True):
        assert_same_bytes(given, expected)


def test_piecewise_in_another_thread():
    attend = Attend()
    step = piecewise(attend, [4], split=[decoder.ATTENTION])
    x = values(0, 4, 64).cuda()
    warmup(step, [(x,)])
    outs, errors = [], []

    def work():
        try:
            with torch.no_grad(), set_backend("triton"):
                outs.extend(step(x).clone() for _ in range(4))
                torch.cuda.synchronize()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors, errors
    for out in outs:
        assert_same_bytes(out, attend(x))


def test_the_guard_speaks_and_warming_up_is_what_helps():
    from torch_fp4ops.ops._triton_quantize import quantize_kernel

    x = values(0, 17, 64).cuda()
    wanted = OPS["mxfp8_quantize"](x)
    quantize_kernel.device_caches.clear()  # as in a process that never ran it
    graph = torch.cuda.CUDAGraph()
    message = (
        r"mxfp8_quantize, backend 'triton': Triton kernel quantize_kernel would be compiled.*input bfloat16 \[17, 64\]"
    )
    with pytest.raises(FirstUseInCapture, match=message), torch.cuda.graph(graph):
        torch.ops.fp4.mxfp8_quantize(x)
    torch.cuda.synchronize()
    warmup(torch.ops.fp4.mxfp8_quantize, [(17, 64)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.fp4.mxfp8_quantize(x)
    graph.replay()
    for given, expected in zip(out, wanted, strict=True):
        assert_same_bytes(given, expected)
