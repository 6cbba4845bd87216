"""FP4Cache in transformers' models: against keys and values quantised by hand, and everything generate does to a cache."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from torch_fp4ops.block_quantization import dequantize_blocks, quantize_mx, quantize_nvfp4  # noqa: E402
from torch_fp4ops.formats import BLOCKFP4, MXFP4, NVFP4  # noqa: E402
from torch_fp4ops.kv_cache import KVScales  # noqa: E402
from torch_fp4ops.kv_cache.transformers import FP4Cache, calibrate_kv_scales  # noqa: E402

LAYERS, VOCABULARY = 2, 97
IDS = torch.tensor([[5, 9, 22, 61, 3], [8, 1, 40, 2, 90]])
K_AMAX, V_AMAX = torch.tensor([9.0, 7.0]), torch.tensor([5.0, 4.0])
SCALES = KVScales.from_amax(K_AMAX, V_AMAX)
KINDS = [
    pytest.param({"method": name, "max_cache_len": length}, id=f"{name}-{'static' if length else 'growing'}")
    for name in ("nvfp4", "mxfp4", "fp4_mx_block16")
    for length in (None, 24)
]


@functools.cache
def model(**change):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "hidden_size": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 96,
            "vocab_size": VOCABULARY,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "eos_token_id": None,
            **change,
        }
    )
    return transformers.LlamaForCausalLM(config).eval()


def cache_of(kind: dict, **more) -> FP4Cache:
    scales = SCALES if kind.get("method", "nvfp4") == "nvfp4" else None
    return FP4Cache(model().config, **{"scales": scales, **kind, **more})


def by_hand(method: str) -> transformers.Cache:
    """A cache in full precision whose keys and values went through four bits."""

    def through_four_bits(x, amax):
        if method == "nvfp4":
            return dequantize_blocks(*quantize_nvfp4(x, 2688 / amax, amax / 2688), NVFP4, amax / 2688).to(x.dtype)
        fmt = MXFP4 if method == "mxfp4" else BLOCKFP4
        return dequantize_blocks(*quantize_mx(x, fmt), fmt).to(x.dtype)

    class Layer(transformers.cache_utils.DynamicLayer):
        def __init__(self, i):
            super().__init__()
            self.i = i

        def update(self, keys, values, *args, **kwargs):
            return super().update(
                through_four_bits(keys, K_AMAX[self.i]), through_four_bits(values, V_AMAX[self.i]), *args, **kwargs
            )

    return transformers.Cache(layers=[Layer(i) for i in range(LAYERS)])


def generate(cache, ids=IDS, **options):
    mask = torch.ones_like(ids)
    return model().generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=10, do_sample=False, **options
    )


@torch.no_grad()
def logits(cache, ids=IDS):
    return model()(ids, past_key_values=cache).logits


@pytest.mark.parametrize("kind", KINDS)
def test_generate_equals_quantising_by_hand(kind):
    options = {"output_logits": True, "return_dict_in_generate": True}
    cache = cache_of(kind)
    out, wanted = generate(cache, **options), generate(by_hand(kind["method"]), **options)
    assert torch.equal(out.sequences, wanted.sequences)
    for a, b in zip(out.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert int(cache.get_seq_length()) == IDS.shape[1] + 9  # the last token is not put in
    assert not torch.equal(out.logits[-1], generate(None, **options).logits[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_reorders(kind):
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(cache_of(kind), **options), generate(by_hand(kind["method"]), **options))


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize(
    "options", [{"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 3}], ids=["chunks", "prompt lookup"]
)
def test_ways_to_generate_that_change_nothing(kind, options):
    """A prompt in chunks; guesses that are taken back (one sequence, and a cache that grows)."""
    guessing = "prompt_lookup_num_tokens" in options
    if guessing and kind["max_cache_len"]:
        pytest.skip("transformers guesses with growing caches only")
    ids = IDS.repeat(1, 2)[:1] if guessing else IDS
    assert torch.equal(generate(cache_of(kind), ids, **options), generate(cache_of(kind), ids))


@settings(max_examples=25)
@given(
    st.sampled_from([None, 80]),
    st.lists(st.tuples(st.sampled_from(["add", "add", "crop", "reorder"]), st.integers(0, 5)), max_size=12),
)
def test_any_course_of_changes(room, changes):
    """A layer holds, after any of them, what a layer in full precision holds that was given quantised values."""
    layer, oracle = cache_of({"max_cache_len": room}).layers[0], by_hand("nvfp4").layers[0]
    generator = torch.Generator().manual_seed(0)
    for kind, n in [("add", 1), *changes, ("add", 1)]:
        length = oracle.get_seq_length()
        if kind == "add":
            new = torch.randn(2, 2, n + 1, 32, generator=generator)
            out, wanted = layer.update(new, -new), oracle.update(new, -new)
            for a, b in zip(out, wanted, strict=True):
                assert torch.equal(a[..., : b.shape[-2], :], b)
        elif kind == "crop" and n < length:
            layer.crop(-n)
            oracle.crop(-n)
        elif kind == "reorder":
            order = torch.tensor([[0, 1], [1, 0], [1, 1]][n % 3])
            layer.reorder_cache(order)
            oracle.reorder_cache(order)
        assert int(layer.get_seq_length()) == oracle.get_seq_length()


@pytest.mark.parametrize("kind", KINDS)
def test_crop_and_reset_leave_no_trace(kind):
    wanted = logits(cache_of(kind), IDS)
    cache = cache_of(kind)
    assert cache.is_croppable
    logits(cache, IDS[:, :3])
    logits(cache, IDS.flip(1))
    cache.crop(-IDS.shape[1])
    torch.testing.assert_close(logits(cache, IDS[:, 3:]), wanted[:, 3:], rtol=1e-4, atol=1e-4)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    torch.testing.assert_close(logits(cache, IDS), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", [0, 3, 100])
def test_a_growing_cache_repeats_and_selects(residual):
    cache = cache_of({}, residual_length=residual)
    logits(cache, IDS)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    fresh = cache_of({}, residual_length=residual)
    logits(fresh, IDS)
    next_ids = torch.tensor([[4], [7]])
    torch.testing.assert_close(logits(cache, next_ids), logits(fresh, next_ids), rtol=1e-4, atol=1e-4)


def test_the_residual_window_is_exact():
    """The latest tokens are as they came, older ones as the method reads them; the larger window, the smaller error."""
    cache = cache_of({}, residual_length=3)
    generator = torch.Generator().manual_seed(0)
    new = [torch.randn(1, 2, n, 32, generator=generator) for n in (4, 1, 2)]
    for x in new:
        keys, _ = cache.layers[0].update(x, x)
    everything = torch.cat(new, dim=-2)
    wanted, _ = by_hand("nvfp4").layers[0].update(everything, everything)
    assert torch.equal(keys[..., -3:, :], everything[..., -3:, :])
    assert torch.equal(keys[..., :-3, :], wanted[..., :-3, :])
    assert not cache.is_croppable
    cache.layers[0].crop(-4)
    assert cache.get_seq_length() == 3
    keys, _ = cache.layers[0].update(new[1], new[1])
    assert torch.equal(keys, torch.cat([wanted[..., :3, :], new[1]], dim=-2))

    exact = logits(transformers.DynamicCache(config=model().config))
    errors = [float((logits(cache_of({}, residual_length=r)) - exact).norm()) for r in (0, 3, 5)]
    assert errors[0] > errors[1] > errors[2] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_does_not_leak(kind):
    wanted = logits(cache_of(kind))
    positions = torch.tensor([0, 0, 0, 1, 2, 3, 4]).expand(2, -1)
    for pad in (0, 7):
        padded = torch.cat([torch.full((2, 2), pad), IDS], dim=1)
        mask = torch.ones_like(padded)
        mask[:, :2] = 0
        with torch.no_grad():
            out = model()(padded, attention_mask=mask, position_ids=positions, past_key_values=cache_of(kind)).logits
        torch.testing.assert_close(out[:, 2:], wanted, rtol=1e-4, atol=1e-4)


def test_bytes():
    """18 bytes for a head of 32, as 72 for one of 128."""
    growing, static = cache_of({}), cache_of({"max_cache_len": 24})
    for cache in (growing, static):
        logits(cache)
    assert growing.nbytes == LAYERS * 2 * 2 * 2 * IDS.shape[1] * 18
    assert static.nbytes == LAYERS * 2 * 2 * 2 * 24 * 18


def test_calibration(tmp_path):
    pytest.importorskip("safetensors")
    prompts = [IDS, {"input_ids": IDS.flip(1), "attention_mask": torch.ones_like(IDS)}]
    scales = calibrate_kv_scales(model(), prompts)
    assert scales.convention == "amax/2688"
    seen = []
    for ids in (IDS, IDS.flip(1)):
        cache = transformers.DynamicCache(config=model().config)
        logits(cache, ids)
        seen.append([(layer.keys.abs().max(), layer.values.abs().max()) for layer in cache.layers])
    amax = torch.tensor(seen).amax(0)
    torch.testing.assert_close(scales.k * 2688, amax[:, 0])
    torch.testing.assert_close(scales.v * 2688, amax[:, 1])
    scales.save(tmp_path / "kv.safetensors")
    cache = cache_of({}, scales=KVScales.load(tmp_path / "kv.safetensors"))
    logits(cache)
    k_scale, v_scale = cache.layers[1].method.global_scales(0)
    assert (k_scale.item(), v_scale.item()) == (scales.k[1].item(), scales.v[1].item())
    other = calibrate_kv_scales(model(), prompts, "amax/448")
    torch.testing.assert_close(other.k, scales.k * 6)
    with pytest.raises(ValueError, match=r"layers \[0, 1\] stored nothing"):
        calibrate_kv_scales(model(), [])


def test_calibrated_scales_are_better_than_ones():
    exact = logits(transformers.DynamicCache(config=model().config))
    small = KVScales(torch.full((2,), 1e-5), torch.full((2,), 1e-5), "amax/2688")
    errors = [
        float((logits(cache_of({}, scales=s)) - exact).norm()) for s in (calibrate_kv_scales(model(), [IDS]), small)
    ]
    assert errors[0] < errors[1] / 2  # saturated block scales


# What is refused


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"head_dim": 24}, {}, "nvfp4: head_dim is 24; allowed: a multiple of 16"),
        ({}, {"method": "fp8"}, "name is 'fp8'; allowed: 'nvfp4' or"),
        ({}, {"max_cache_len": 0}, "max_cache_len is 0; allowed: 1 or more"),
        ({}, {"max_cache_len": 8.0}, "max_cache_len is 8.0; allowed: an int or None"),
        ({}, {"residual_length": None}, "residual_length is None; allowed: an int"),
        ({}, {"scales": {}}, "scales is {}; allowed: KVScales or None"),
        ({}, {"residual_length": -1}, "residual_length is -1"),
        ({}, {"residual_length": 4, "max_cache_len": 8}, "residual_length is 4 with max_cache_len=8"),
        ({}, {"scales": SCALES.layer(0)}, "nvfp4: scales is of 1 layers; allowed: 2 layers"),
        ({}, {"method": "mxfp4", "scales": SCALES}, "mxfp4: .*no global scale"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            {},
            "the model has layers of sliding_attention; allowed: only full",
        ),
    ],
)
def test_what_cannot_be_cached_is_refused_at_once(change, options, message):
    config = transformers.LlamaConfig(**{**model().config.to_dict(), **change})
    with pytest.raises(ValueError, match=message):
        FP4Cache(config, **options)


def test_sliding_windows_are_refused():
    config = transformers.MistralConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, sliding_window=8)
    with pytest.raises(ValueError, match="the model has layers of sliding_window"):
        FP4Cache(config)


@pytest.mark.parametrize("kind", KINDS[1::2])
def test_a_static_cache_that_is_full_raises_and_is_untouched(kind):
    cache = cache_of({**kind, "max_cache_len": 6})
    with pytest.raises(ValueError, match="max_cache_len is 6 with 7 tokens for a cache of 0; allowed: 7 or more"):
        logits(cache, IDS.repeat(1, 2)[:, :7])
    logits(cache, IDS)
    before = [t.clone() for t in cache.layers[0]._bytes()]
    with pytest.raises(ValueError, match="max_cache_len is 6 with 2 tokens for a cache of 5; allowed: 7 or more"):
        logits(cache, IDS[:, :2])
    assert all(torch.equal(a, b) for a, b in zip(cache.layers[0]._bytes(), before, strict=True))


def test_changes_that_a_cache_cannot_make():
    static = cache_of({"max_cache_len": 8})
    logits(static)
    with pytest.raises(ValueError, match="key_states is of a batch of 1 and 2 heads; allowed: 2 and 2"):
        logits(static, IDS[:1])
    before = [t.clone() for t in static.layers[0]._bytes()]
    with pytest.raises(ValueError, match=r"beam_idx is of shape \(1,\); allowed: \(2,\), the batch"):
        static.reorder_cache(torch.tensor([1]))
    assert all(torch.equal(a, b) for a, b in zip(static.layers[0]._bytes(), before, strict=True))
    for change in (lambda: static.batch_repeat_interleave(2), lambda: static.batch_select_indices(torch.tensor([0]))):
        with pytest.raises(ValueError, match="has a fixed batch"):
            change()
    growing = cache_of({})
    logits(growing)
    keys = torch.randn(2, 2, 3, 32)
    for cache in (static, growing):
        before = cache.nbytes, int(cache.get_seq_length())
        with pytest.raises(
            ValueError, match=r"value_states is torch.float32 of shape \(2, 2, 2, 32\); allowed: .* as key_"
        ):
            cache.layers[0].update(keys, keys[:, :, :2])
        with pytest.raises(ValueError, match=r"value_states is torch.bfloat16 of shape"):
            cache.layers[0].update(keys, keys.bfloat16())
        assert (cache.nbytes, int(cache.get_seq_length())) == before
    with pytest.raises(ValueError, match="tokens_to_remove is -6; allowed: -5 to 0"):
        growing.crop(-6)
    with pytest.raises(ValueError, match="tokens_to_remove is 2"):
        growing.crop(2)
    with pytest.raises(ValueError, match="tokens_to_remove is 2"):
        static.crop(2)


@pytest.mark.parametrize("length", [None, 8], ids=["growing", "static"])
def test_a_first_call_that_fails_leaves_the_cache_as_it_was(length):
    cache = cache_of({"max_cache_len": length})
    with torch.enable_grad(), pytest.raises(NotImplementedError):
        model()(IDS, past_key_values=cache)
    with pytest.raises(ValueError, match="float64"):
        cache.layers[0].update(*torch.randn(2, 2, 2, 3, 32, dtype=torch.float64))
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    torch.testing.assert_close(logits(cache, IDS[:1]), logits(cache_of({}), IDS[:1]), rtol=1e-4, atol=1e-4)


def test_room_is_counted_where_lengths_are_not_read():
    """As on a GPU, whose lengths eager calls do not wait for."""
    cache = cache_of({"max_cache_len": 8})
    (layer, _), keys = cache.layers, torch.randn(2, 2, 3, 32)
    for change in (lambda: layer.crop(-2), layer.reset):
        for _ in range(2):
            layer.update(keys, keys)
        layer.cumulative_length = layer.cumulative_length.to("meta")
        with pytest.raises(ValueError, match="max_cache_len is 8 with 3 tokens for a cache of 6; allowed: 9 or more"):
            layer.update(keys, keys)
        layer.cumulative_length = torch.tensor([6])
        change()
        assert layer._least_length == int(layer.cumulative_length)
        layer.reset()


def test_models_that_have_nothing_to_cache():
    with pytest.raises(ValueError, match="config is a MambaConfig, without attention heads; allowed: one"):
        FP4Cache(transformers.MambaConfig(hidden_size=64, num_hidden_layers=2))
    with pytest.raises(ValueError, match="config is a LlamaForCausalLM; allowed: a model's config"):
        FP4Cache(model())


def test_calibration_does_not_depend_on_the_mode():
    dropping = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**model().config.to_dict(), "attention_dropout": 0.5})
    )
    dropping.load_state_dict(model().state_dict())
    dropping.train()
    dropping.lm_head.eval()
    modes = [module.training for module in dropping.modules()]
    scales, wanted = calibrate_kv_scales(dropping, [IDS]), calibrate_kv_scales(model(), [IDS])
    assert torch.equal(scales.k, wanted.k) and torch.equal(scales.v, wanted.v)
    assert [module.training for module in dropping.modules()] == modes
    for prompts in (IDS, {"input_ids": IDS}):
        with pytest.raises(ValueError, match=r"prompts is one prompt, a (Tensor|dict); allowed: a list of them"):
            calibrate_kv_scales(model(), prompts)


def test_a_model_with_an_encoder():
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 32, "d_ff": 64, "num_heads": 2, "vocab_size": VOCABULARY}
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, num_layers=2, eos_token_id=None, decoder_start_token_id=0)
    ).eval()
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    exact = FP4Cache(t5.config, residual_length=100)  # no token leaves full precision
    cache = transformers.EncoderDecoderCache(exact, transformers.DynamicCache())
    assert torch.equal(t5.generate(IDS, past_key_values=cache, **options), t5.generate(IDS, **options))
