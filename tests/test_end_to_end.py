"""The benchmarks' decoder, its attention, and the script that times it from end to end."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from benchmarks import attention, decoder, end_to_end

SHAPE = decoder.Shape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocabulary=32, batch=3, length=16)
SIZES = [f"--{n}={v}" for n, v in vars(SHAPE).items() if n in ("hidden", "layers", "heads", "intermediate", "length")]
SIZES += ["--kv-heads=2", "--vocabulary=32"]


def test_attention_sees_its_cache_up_to_the_position():
    g = torch.Generator().manual_seed(0)
    q, keys, values = (torch.randn(s, generator=g) for s in ((3, 4, 16), (5, 7, 2, 16), (5, 7, 2, 16)))
    positions = torch.tensor([0, 3, 6])
    given = attention.decode_attention(q, keys, values, positions)
    for i, last in enumerate(positions.tolist()):
        for head in range(4):
            k, v = (cache[i, : last + 1, head // 2] for cache in (keys, values))
            wanted = (k @ q[i, head] / 4).softmax(0) @ v
            torch.testing.assert_close(given[i, head], wanted)
    torch.library.opcheck(
        torch.ops.torch_fp4ops_benchmarks.decode_attention.default,
        (q, keys, values, positions, torch.empty_like(q)),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (4, 2, 64), (4, 4, 16)])
def test_the_kernel_of_attention_is_as_right_as_torchs(heads, kv_heads, dim):
    g = torch.Generator("cuda").manual_seed(0)
    shapes = ((3, heads, dim), (5, 200, kv_heads, dim), (5, 200, kv_heads, dim))
    q, keys, values = (torch.randn(s, generator=g, device="cuda", dtype=torch.bfloat16) for s in shapes)
    positions = torch.tensor([0, 63, 150], device="cuda")
    given = attention.decode_attention(q, keys, values, positions)
    wanted = attention.attend_by_sdpa(*(t.float() for t in (q, keys, values)), positions)
    torch.testing.assert_close(given.float(), wanted, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("kv_cache", ["bf16", "nvfp4"])
def test_a_prompt_gives_what_its_tokens_one_by_one_give(kv_cache):
    torch.manual_seed(0)
    model = decoder.Decoder(SHAPE, kv_cache).eval()
    tokens, positions = end_to_end.prompts(2, 5, SHAPE, "cpu")
    whole = model(tokens, positions)
    caches = [layer.keys.clone() for layer in model.layers]
    model.clear()
    for i in range(5):
        last = model(tokens[:, i], positions[:, i])
    assert whole.shape == last.shape == (2, SHAPE.vocabulary)
    # A prompt attends to what is not quantised yet.
    torch.testing.assert_close(whole, last, atol=0.05 if kv_cache == "bf16" else 0.4, rtol=0.05)
    written = model.layers[0].keys
    assert torch.equal(caches[0], written)
    assert bool(written[:2, :5].any())
    assert not bool(written[:2, 5:].any())


def test_steps_are_timed_and_compared_with_bf16(tmp_path, capsys, fresh_dynamo):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out" / "rows.csv"
    files = ["--csv", str(out), "--plot", str(tmp_path)]
    options = ["--device", "cpu", "--backend", "reference", "--batches", "3", "--prompt", "4"]
    assert end_to_end.main([*files, *options, *SIZES, "--layers", "1"]) == 0
    rows = list(csv.DictReader(out.open()))
    places = [(r["weights"], r["phase"], r["batch"], r["tokens"]) for r in rows]
    steps = (("decode", "3", "3"), ("prefill", "3", "12"))
    assert places == [(w, *step) for w in end_to_end.WEIGHTS for step in steps]
    for r, bf16 in zip(rows, rows[:2] * 2, strict=True):
        us = float(r["us"])
        assert float(r["tokens_per_s"]) == pytest.approx(int(r["tokens"]) / us * 1e6, rel=1e-4)
        assert float(r["speed_up"]) == pytest.approx(float(bf16["us"]) / us, rel=1e-4)
    assert (tmp_path / "end-to-end.png").stat().st_size > 10000
    assert "tokens/s" in capsys.readouterr().out


def test_a_wrong_step_has_no_time(tmp_path, capsys, fresh_dynamo, monkeypatch):
    class Wrong(decoder.Decoder):
        def forward(self, tokens, positions):
            out = super().forward(tokens, positions)
            return out * 2 if torch._dynamo.eval_frame._stance.stance == "default" else out

    monkeypatch.setattr(decoder, "Decoder", Wrong)
    out = tmp_path / "rows.csv"
    options = ["--device", "cpu", "--weights", "bf16", "--phases", "decode", "--batches", "2"]
    assert end_to_end.main(["--csv", str(out), *options, *SIZES, "--layers", "1"]) == 1
    (row,) = csv.DictReader(out.open())
    assert row["status"] == "AssertionError: the relative error of the logits is 1"
    assert math.isnan(float(row["us"] or "nan"))


def test_a_prompt_longer_than_the_cache_is_refused():
    with pytest.raises(SystemExit, match="--prompt is 17; allowed: up to --length, 16"):
        end_to_end.main(["--device", "cpu", "--prompt", "17", *SIZES])
