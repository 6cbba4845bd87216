"""The command line: env, explain, check. (demo and bench have tests of their own.)"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from torch_fp4ops import OPS, cli, registry
from torch_fp4ops.registry import Backend


def test_module_runs_as_a_program():
    run = subprocess.run(
        [sys.executable, "-m", "torch_fp4ops", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == cli.__version__


def test_a_reader_that_has_read_enough_is_no_error():
    command = [sys.executable, "-m", "torch_fp4ops", "env"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        run.stdout.close()
        said = run.stderr.read()
    assert run.returncode == 1 and "Traceback" not in said and "BrokenPipe" not in said


def test_env_lists_versions_and_every_op(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    for name in OPS:
        assert name in out
    assert "TORCH_FP4OPS_BACKEND not set" in out


@pytest.mark.parametrize("name", OPS)
def test_explain_with_and_without_sizes(name, capsys):
    small = [] if name != "cutlass_fused_moe" else ["2", "32", "32", "2", "1"]
    assert cli.main(["explain", name, *small, "--device", "cpu"]) == 0
    assert f"{name} on cpu: " in capsys.readouterr().out


def test_explain_without_an_op_goes_through_all(capsys, monkeypatch):
    monkeypatch.setattr(cli, "OPS", {name: OPS[name] for name in ("fp4_dequantize", "nvfp4_kv_quantize")})
    assert cli.main(["explain", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for name in ("fp4_dequantize", "nvfp4_kv_quantize"):
        assert f"{name} on cpu: reference" in out
    assert "flashinfer: FlashInfer's kernels run on NVIDIA GPUs" in out


def test_explain_names_what_is_wrong(capsys):
    assert cli.main(["explain", "mm_fp4", "4", "8", "40", "--device", "cpu"]) == 1
    assert "K = 40; allowed: K a multiple of 16" in capsys.readouterr().err
    assert cli.main(["explain", "mm_fp4", "4", "8", "32", "--backend", "nope", "--device", "cpu"]) == 1
    assert "backend is 'nope'" in capsys.readouterr().err
    for wrong, message in ((["mm_fp5"], "invalid choice"), (["mm_fp4", "1", "2", "3", "4"], "the sizes m, n, k")):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["explain", *wrong])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err


def test_check_counts_and_writes_results(capsys, tmp_path):
    path = tmp_path / "results.json"
    assert cli.main(["check", "mm_fp4", "--device", "cpu", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    results = json.loads(path.read_text())
    right = [r for r in results if r["status"] == "right"]
    assert right and f"{len(right)} right, 0 wrong" in out
    assert {r["backend"] for r in right} >= {"reference"}


def test_check_fails_when_a_backend_is_wrong(capsys, monkeypatch):
    op = OPS["fp4_quantize"]

    def wrong(*args, **kwargs):
        codes, scales = op.__wrapped__(*args, **kwargs)
        return codes ^ 1, scales

    def broken(*args, **kwargs):
        raise RuntimeError("launch failed")

    op.backend_names()  # loads the op's own first, or they would go with the copy
    monkeypatch.setattr(op, "_backends", dict(op._backends))
    op._backends["wrong"] = Backend("wrong", wrong, lambda call: None)
    op._backends["broken"] = Backend("broken", broken, lambda call: "rank" if call.input.dim() > 2 else None)
    assert cli.main(["check", "fp4_quantize", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "WRONG fp4_quantize on cpu, wrong, sample nvfp4-128x4-17x96: AssertionError" in out
    assert "RuntimeError: launch failed" in out
    assert "1  rank" in out  # one sample refused, with its reason


def test_check_rejects_an_unknown_op(capsys):
    with pytest.raises(SystemExit):
        cli.main(["check", "mm_fp5"])
    assert "there is no op mm_fp5; the ops are cutlass_fused_moe" in capsys.readouterr().err


def test_check_rejects_a_backend_that_no_op_has(capsys):
    assert cli.main(["check", "mm_fp4", "--device", "cpu", "--backend", "tritn"]) == 2
    assert "--backend is 'tritn'; allowed: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--json", "/no/such/folder/x.json"], "no folder for the file '/no/such/folder/x.json'"),
        (["explain", "mm_fp4", "--", "-1", "16", "16"], "-1; allowed: 0 or more"),
        (["demo", "--device", "tpu"], "no device 'tpu'; allowed: cpu"),
    ],
)
def test_arguments_that_never_start(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_bench_says_where_it_lives(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "torch_fp4ops" / "cli.py"))
    assert cli.main(["bench"]) == 2
    assert "in a checkout of the repository" in capsys.readouterr().err


def test_reference_on_a_gpu_warns_once(monkeypatch):
    monkeypatch.setattr(registry, "_warned", set())
    with pytest.warns(UserWarning, match="mm_fp4 runs its pure-PyTorch reference, which is slow. triton: no"):
        registry._warn_reference("mm_fp4", "triton: no")
