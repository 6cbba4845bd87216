"""The benchmark harness: its arithmetic, what the cases say of themselves, its files and its exit status."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from benchmarks import cases, decode_step, gpu_report, host_overhead, peers, plots, probing, report, run, timing, verify
from benchmarks.report import Row
from torch_fp4ops import OPS
from torch_fp4ops.testing import Sample

CEILINGS = timing.Ceilings(copy_gbps=4000.0, matmul_tflops=800.0, node_us=1.2)
TEMPLATE = Row("fp4_quantize", "nvfp4-128x4 128x4096", "triton", m=128, k=4096, gpu="a GPU")


def timed(us: float, **changes) -> Row:
    return replace(TEMPLATE, us=us, gbps=100.0, tflops=0.0, fraction=0.5, **changes)


# Arithmetic of times


def test_rates_and_fractions():
    assert timing.gbps(4_000_000, 1.0) == 4000
    assert timing.tflops(8e9, 10.0) == 800
    # 40 MB at 4000 GB/s are 10 us, 16 GFLOP at 800 TFLOP/s are 20 us: arithmetic binds.
    assert CEILINGS.floor_us(40e6, 16e9) == pytest.approx(20)
    assert CEILINGS.fraction(40.0, 40e6, 16e9) == pytest.approx(0.5)
    assert CEILINGS.fraction(40.0, 40e6, 0) == pytest.approx(0.25)


def test_sets_exceed_340_mb_and_twice_the_l2():
    assert timing.sets_for(350 << 20) == 1
    assert timing.sets_for(100 << 20) == 4
    assert timing.sets_for(100 << 20, l2_bytes=200 << 20) == 5
    assert timing.sets_for(100) == timing.MOST_SETS


@pytest.mark.parametrize("estimate", [0.1, 2.0, 50.0, 2999.0, 3001.0, 1e5])
@pytest.mark.parametrize("sets", [1, 3, 128])
@pytest.mark.parametrize("effort", [timing.FULL, timing.QUICK], ids=["full", "quick"])
def test_a_replay_visits_the_sets_evenly_and_ends(estimate, sets, effort):
    count = timing.calls_per_replay(estimate, sets, effort)
    assert 1 <= count <= timing.MOST_CALLS
    if estimate <= effort.replay_us:
        assert count % sets == 0
    else:
        assert count * estimate <= max(estimate, 4 * effort.replay_us)
    assert 3 <= timing.replays_for(count * estimate, effort) <= effort.most_replays


def test_time_on_cpu_rotates_and_takes_the_median():
    seen = []
    us = timing.time_on_cpu([lambda i=i: seen.append(i) for i in range(3)], budget_s=0.01, most=30)
    assert us > 0
    assert seen[:5] == [0, 0, 1, 2, 0]  # one to warm up


def test_a_slow_call_is_timed_three_times():
    calls = []
    timing.time_on_cpu([lambda: calls.append(0)], budget_s=0.0)
    assert len(calls) == 4


# Cases


def test_byte_counts_by_hand():
    # 8 x 32 bf16 in, 8 x 16 bytes of codes, one tile of scales, the global scale.
    assert cases.fp4_quantize(8, 32).bytes == 512 + 128 + 128 * 4 + 4
    assert cases.fp4_quantize(8, 32, "nvfp4", "linear").bytes == 512 + 128 + 8 * 2 + 4
    assert cases.fp4_quantize(9, 64, "nvfp4", "8x4").bytes == 1152 + 288 + 16 * 4 + 4
    assert cases.fp4_quantize(8, 64, "mxfp4").bytes == 1024 + 256 + 128 * 4
    assert cases.mxfp8_quantize(8, 64, "linear").bytes == 1024 + 512 + 8 * 2
    assert cases.silu_and_mul_fp4_quantize(8, 32).bytes == 1024 + 128 + 128 * 4 + 4
    assert cases.rms_norm_fp4_quantize(8, 32).bytes == 512 + 64 + 128 + 128 * 4 + 4
    # a 1 x 64 bf16, b 128 x 32 bytes with 128 x 4 scales, 1 x 128 bf16 out, alpha.
    assert cases.mm_bf16_fp4(1, 128, 64).bytes == 128 + 4096 + 512 + 256 + 4
    assert cases.mm_bf16_fp4(1, 128, 64).flops == 2 * 128 * 64
    # Both K and V: 2 x 16 x 64 bf16 in, 2 x 16 x (32 + 4) bytes out, 16 int64 slots, two scales.
    assert cases.nvfp4_kv_quantize_store(16, 1, 64).bytes == 4096 + 1152 + 128 + 8


def _small_cases():
    found = [cases.fp4_quantize(9, 64, fmt, layout) for fmt in ("nvfp4", "mxfp4") for layout in ("linear", "128x4")]
    found += [cases.fp4_quantize(9, 64, "nvfp4", "8x4"), cases.fp4_dequantize(9, 64), cases.mxfp8_dequantize(9, 64)]
    found += [cases.mxfp8_quantize(9, 64), cases.nvfp4_kv_quantize(9, 64), cases.nvfp4_kv_dequantize(9, 64)]
    found += [make(9, 64) for make in (cases.silu_and_mul_fp4_quantize, cases.rms_norm_fp4_quantize)]
    return found + [make(9, 24, 64) for make in (cases.mm_bf16_fp4, cases.mm_fp4, cases.mm_mxfp8)]


@pytest.mark.parametrize("case", _small_cases(), ids=lambda c: f"{c.op}-{c.family}")
def test_bytes_are_those_of_the_tensors(case):
    sample = case.sample("cpu")
    out = OPS[case.op](*sample.args, **sample.kwargs, backend="reference")
    tensors = [t for t in tree_leaves((sample.args, out)) if isinstance(t, torch.Tensor)]
    assert case.bytes == sum(t.nbytes for t in tensors)


def test_experts_count_where_they_are_hit(monkeypatch):
    monkeypatch.setitem(cases.shapes.MOE_MODELS, "tiny", (128, 128, 8, 2))
    case = cases.cutlass_fused_moe(1, "tiny")
    matrices = (256 * 64 + 256 * 4) + (128 * 64 + 128 * 4)
    assert case.bytes == 2 * 2 * 128 + 2 * 8 + 2 * matrices  # one token hits two experts
    assert case.flops == 2 * 2 * (256 * 128 + 128 * 128)


@pytest.mark.parametrize(("fmt", "layout"), [("mxfp4", "linear"), ("mxfp4", "sm90_interleaved"), ("nvfp4", "linear")])
def test_experts_run_and_a_wrong_token_is_noticed(monkeypatch, fmt, layout):
    monkeypatch.setitem(cases.shapes.MOE_MODELS, "tiny", (128, 128, 4, 2))
    case = cases.cutlass_fused_moe(9, "tiny", fmt, layout)
    expected = verify.Expected(case, case.sample("cpu"))
    copy = expected.sample.clone()
    out = OPS[case.op](*copy.args, **copy.kwargs, backend="reference")
    expected.check(out, copy)
    out[4] *= 1.1
    with pytest.raises(AssertionError):
        expected.check(out, copy)


@pytest.mark.parametrize("listed", [cases.all_cases, cases.quick_cases, cases.cpu_cases])
def test_names_are_unique(listed):
    names = [(case.op, case.name) for case in listed()]
    assert len(set(names)) == len(names)


def test_every_op_has_cases():
    named = {name for name in OPS if not name.startswith("_")}
    assert {case.op for case in cases.all_cases()} == {case.op for case in cases.quick_cases()} == named
    sweep = {(c.m, c.k) for c in cases.all_cases() if (c.op, c.family) == ("fp4_quantize", "nvfp4-128x4")}
    assert {(m, k) for m in cases.shapes.QUANTIZE_ROWS for k in cases.shapes.QUANTIZE_COLUMNS} <= sweep


@pytest.mark.parametrize("name", ["mxfp8_quantize", "nvfp4_kv_quantize_store"])
def test_an_op_without_cases_is_measured_by_its_example(name):
    case = cases.example(OPS[name])
    if name == "mxfp8_quantize":
        assert case.bytes == 128 * 4096 * 2 + 128 * 4096 + 128 * 128
    (row,) = run.measure_case(case, TEMPLATE, {"reference"}, torch.device("cpu"), CEILINGS)
    assert row.status == "ok"


def test_sets_are_equal_and_apart():
    first, second = cases.fp4_quantize(8, 32).sets("cpu", 2)
    assert torch.equal(first.args[0], second.args[0])
    assert first.args[0].data_ptr() != second.args[0].data_ptr()
    assert torch.equal(first.args[0], cases.fp4_quantize(8, 32).sample("cpu").args[0])


# Checks of outputs


@pytest.mark.parametrize("case", _small_cases(), ids=lambda c: f"{c.op}-{c.family}")
def test_a_wrong_output_is_noticed(case):
    expected = verify.Expected(case, case.sample("cpu"))
    copy = expected.sample.clone()
    out = OPS[case.op](*copy.args, **copy.kwargs, backend="reference")
    expected.check(out, copy)
    first = out if isinstance(out, torch.Tensor) else out[0]
    first.view(torch.uint8).view(-1)[1] ^= 0x41
    with pytest.raises(AssertionError):
        expected.check(out, copy)


def test_memory_is_poisoned_for_checks_only():
    with verify.poisoned_memory():
        assert bool((torch.empty(100, dtype=torch.uint8) == 255).all())
        assert bool(torch.empty(100).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_peer_may_round_differently_but_not_be_wrong():
    case = cases.fp4_quantize(64, 64, "nvfp4", "linear")
    expected = verify.Expected(case, case.sample("cpu"))
    codes, scales = (t.clone() for t in expected.outputs[:2])
    assert expected.check_peer((codes, scales)) == ""
    codes.view(-1)[0] ^= 1
    assert "differ" in expected.check_peer((codes, scales))
    with pytest.raises(AssertionError, match="relative error"):
        expected.check_peer((torch.full_like(codes, 255), scales))


@pytest.mark.parametrize("make", [cases.silu_and_mul_fp4_quantize, cases.rms_norm_fp4_quantize])
def test_the_unfused_pairs_pass_as_peers(make):
    rows = run.measure_case(
        make(64, 256, compiled=True), TEMPLATE, {"unfused", "unfused-compiled"}, torch.device("cpu"), CEILINGS
    )
    assert [(row.backend, row.status[:2]) for row in rows] == [("unfused", "ok"), ("unfused-compiled", "ok")]


def test_a_failing_backend_is_a_row():
    case = cases.fp4_quantize(8, 32)

    def fails():
        raise RuntimeError("no such\nluck")

    row = run._timed_row(TEMPLATE, fails, case, torch.device("cpu"), CEILINGS)
    assert (row.status, row.timed) == ("error: RuntimeError: no such luck", False)

    def wrong():
        raise run.WrongOutput("3 of 4 bytes differ")

    assert run._timed_row(TEMPLATE, wrong, case, torch.device("cpu"), CEILINGS).status.startswith(
        "wrong output: 3 of 4"
    )


def test_a_peer_that_writes_nothing_gets_no_time(monkeypatch):
    case = cases.fp4_quantize(64, 64)

    def prepare(case, samples, expected):
        return peers.Prepared([lambda: tuple(torch.empty_like(t) for t in expected.outputs[:2])])

    monkeypatch.setattr(peers, "PEERS", (peers.Peer("empty", ("fp4_quantize",), prepare, needs_gpu=False),))
    (row,) = run.measure_case(case, TEMPLATE, {"empty"}, torch.device("cpu"), CEILINGS)
    assert row.status.startswith("wrong output")
    assert math.isnan(row.us)


# Files and comparison


def test_csv_round_trip(tmp_path):
    path = tmp_path / "sub" / "rows.csv"
    rows = [timed(12.5), replace(TEMPLATE, backend="flashinfer", status='refused: needs SM100, "really"')]
    rows = [*report.ceiling_rows(CEILINGS, TEMPLATE), *rows]
    writer = report.Writer(str(path))
    for row in rows:
        writer.add(row)
    writer.close()
    with open(path) as file:
        assert next(csv.reader(file)) == list(report.COLUMNS)
    back = report.read_csv(path)
    assert [repr(row) for row in back] == [repr(row) for row in rows]  # NaN is not equal to itself
    assert report.ceilings_of(back) == CEILINGS
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        report.read_csv(tmp_path / "other.csv")


@pytest.mark.parametrize(
    ("us", "status"), [(10.0, 0), (5.0, 0), (10.9, 0), (11.1, 1), (30.0, 1)], ids=lambda value: f"{value}"
)
def test_slower_by_more_than_a_tenth_fails(us, status, capsys):
    other = timed(7.0, case="nvfp4-128x4 1x4096")
    assert report.compare([timed(10.0), other], [timed(us), other]) == status
    printed = capsys.readouterr().out
    assert f"geometric mean {math.sqrt(10.0 / us):.3f} over 2 rows" in printed
    assert ("SLOWER" in printed) is bool(status)


def test_what_fails_now_counts_as_slower_and_what_is_missing_does_not(capsys):
    failing = replace(TEMPLATE, status="wrong output: all of it")
    assert report.compare([timed(10.0)], [failing]) == 1
    assert report.compare([timed(10.0)], []) == 0
    assert report.compare([failing], [timed(10.0)]) == 0
    assert "no row in common" in capsys.readouterr().out


def test_compare_from_the_command_line(tmp_path, capsys):
    for name, us in (("old", 10.0), ("new", 20.0)):
        writer = report.Writer(str(tmp_path / f"{name}.csv"))
        writer.add(timed(us))
        writer.close()
    old, new = str(tmp_path / "old.csv"), str(tmp_path / "new.csv")
    assert run.main(["--from", new, "--compare", old]) == 1
    assert run.main(["--from", old, "--compare", new]) == 0
    assert "fp4_quantize" in capsys.readouterr().out


def test_cpu_run(tmp_path, capsys):
    path = tmp_path / "cpu.csv"
    arguments = ["--device", "cpu", "--quick", "--backends", "reference"]
    assert run.main([*arguments, "--csv", str(path)]) == 0
    rows = [row for row in report.read_csv(path) if row.op != report.CEILING]
    assert {row.op for row in rows} == {"fp4_quantize", "mm_bf16_fp4"}
    assert all(row.timed and 0 < row.us < 1e6 and row.fraction > 0 for row in rows)
    assert rows[0].command.startswith("benchmarks/run.py --device cpu")
    assert "on the CPU" in capsys.readouterr().out


def test_wrong_arguments(capsys):
    with pytest.raises(SystemExit):
        run.main(["--ops", "nonsense"])
    assert "there is no op nonsense" in capsys.readouterr().err
    assert run.main(["--device", "cpu", "--cases", "nonsense"]) == 2


def test_plots_have_something_on_them(tmp_path):
    pytest.importorskip("matplotlib")
    rows = report.ceiling_rows(CEILINGS, TEMPLATE)
    chosen = [
        c for c in cases.all_cases() if (c.op, c.family) in (("fp4_quantize", "nvfp4-128x4"), ("mm_fp4", "nvfp4"))
    ]
    for case in chosen:
        for backend, factor in (("reference", 9.0), ("triton", 2.0), ("cublas-bf16", 4.0)):
            us = 2 + factor * CEILINGS.floor_us(case.bytes, case.flops)
            rates = {"gbps": timing.gbps(case.bytes, us), "tflops": timing.tflops(case.flops, us)}
            sizes = {"m": case.m, "n": case.n, "k": case.k}
            row = timed(us, op=case.op, case=case.name, backend=backend, **sizes)
            rows.append(replace(row, **rates))
    written = plots.plot_all(rows, tmp_path / "plots")
    assert {path.name for path in written} == {
        f"{stem}-{kind}.png"
        for stem in ("fp4_quantize-nvfp4-128x4", "mm_fp4-nvfp4")
        for kind in ("time", "vs-reference", "vs-cublas-bf16")
    }
    import matplotlib.image

    for path in written:
        pixels = matplotlib.image.imread(path)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.05


def test_speed_ups_are_of_the_best_own_backend():
    rows = [
        timed(us, m=m, k=k, backend=backend)
        for m in (1, 8)
        for k in (128, 256)
        for backend, us in (("reference", 30.0), ("triton", 3.0), ("flashinfer", 2.0), ("torch.compile", 6.0))
    ]
    assert set(plots.speed_ups(rows, "reference").values()) == {15.0}
    assert set(plots.speed_ups(rows, "torch.compile").values()) == {3.0}
    assert plots.speed_ups(rows[:4], "reference") is None  # one shape is no grid


# Host overhead


def test_the_probe_of_host_overhead_leaves_no_op_behind():
    before = set(OPS)
    with host_overhead.probe_op() as probe:
        assert probe.name.startswith("_")
        assert float(getattr(torch.ops.fp4, probe.name)(torch.ones(1, 2)).sum()) == -2
    assert set(OPS) == before
    assert host_overhead.us_per_call(lambda: Sample("", ()), calls=100, runs=3) > 0


def test_unwritten_reads_are_told_apart(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "========= Uninitialized __global__ memory read of size 16 bytes\n"
        "=========     at swiglu_kernel+0x330 in _triton_kernels.py:170\n"
        "=========     by thread (0,0,0) in block (8,0,0)\n"
        "========= Uninitialized __global__ memory read of size 4 bytes\n"
        "=========     at void at::native::elementwise_kernel<(int)128>(int, T3)+0x19b0\n"
    )
    assert gpu_report.count_unwritten_reads(str(log)) == {"unwritten_reads": 1, "unwritten_reads_of_torch": 1}


# The decoding step

TINY = {"hidden": 64, "layers": 1, "heads": 4, "kv-heads": 2, "intermediate": 128, "vocabulary": 32, "length": 16}
TINY_STEP = [f"--{name}={size}" for name, size in TINY.items()]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_decode_step_runs_and_writes_its_rows(tmp_path, capsys, fresh_dynamo, device):
    out = tmp_path / "out.csv"
    backend, weights = ("triton", decode_step.WEIGHTS) if device == "cuda" else ("reference", ["nvfp4-w4a16"])
    options = ["--batches", "1", "2", "--weights", *weights, "--device", device, "--backend", backend, "--no-ops"]
    status = decode_step.main(["--out", str(out), *options, *TINY_STEP])
    rows = list(csv.DictReader(out.open()))
    assert status == 0, [r["status"] for r in rows]
    modes = decode_step.MODES if device == "cuda" else decode_step.MODES[:2]
    wanted = [(w, m, b) for w in weights for b in "12" for m in modes]
    assert [(r["weights"], r["mode"], r["batch"]) for r in rows] == wanted
    for r in rows:
        assert float(r["us"]) > 0
        assert float(r["tokens_per_s"]) == pytest.approx(int(r["batch"]) / float(r["us"]) * 1e6, rel=1e-3)
        assert (float(r["kernel_us"]) > 0) == (device == "cuda")
    assert "tokens/s" in capsys.readouterr().out


def test_a_mode_that_fails_is_a_row(tmp_path, capsys, fresh_dynamo, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no capture\nand more")

    monkeypatch.setattr(decode_step, "_step", fail)
    assert decode_step.main(["--batches", "1", "--device", "cpu", "--backend", "reference", *TINY_STEP]) == 1
    assert "RuntimeError: no capture\n" in capsys.readouterr().out


# Probes


def test_checks_go_on_after_a_failure(capsys):
    def fails(error: Exception):
        raise error

    checks = probing.Checks()
    assert checks.attempt("fine", lambda: None)
    assert not checks.attempt("bytes", lambda: fails(AssertionError("3 of 4 bytes differ")))
    assert not checks.attempt("launch", lambda: fails(RuntimeError("no kernel image")))
    assert str(checks) == "3 comparisons, 2 failures"
    out = capsys.readouterr().out
    assert "WRONG bytes 3 of 4 bytes differ" in out and "ERROR launch no kernel image" in out and "fine" not in out


def test_csv_of_a_probe(tmp_path):
    path = tmp_path / "new" / "probe.csv"
    probing.write_csv(path, [])
    assert not path.exists()
    probing.write_csv(path, [{"m": 1, "us": 2.5}, {"m": 2, "us": 3.5}])
    assert path.read_text().splitlines() == ["m,us", "1,2.5", "2,3.5"]


def test_a_run_that_is_ended_while_it_writes_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "probe.csv"
    probing.write_csv(path, [{"m": 1}])
    whole = path.read_bytes()

    def ended(self, text):
        self.write_bytes(text.encode()[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", ended)
    with pytest.raises(KeyboardInterrupt):
        probing.write_csv(path, [{"m": 1}, {"m": 2}])
    assert path.read_bytes() == whole
