"""The table of GEMMs: its rows with a timer that is told what to say, its checks, its files and its plots."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch

from benchmarks import gemm_table, inputs, peers, plots, table, timing, verify
from benchmarks.inputs import Weight
from benchmarks.peers import marlin
from benchmarks.table import Row
from torch_fp4ops import OPS, scale_layouts

CPU = torch.device("cpu")
FLOOR = timing.Ceilings(copy_gbps=4200.0, matmul_tflops=790.0, node_us=0.0)
SHAPE = (64, 128, "a layer")
ROW = Row(
    "mm_bf16_fp4", "nvfp4", 16, 4096, 4096, "a layer", "gluon", us=10.0, floor_us=5.0, cublas_us=20.0, gpu="a GPU"
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def few_weights(monkeypatch):
    monkeypatch.setattr(gemm_table, "_WEIGHT_BYTES", 1)


class Clock:
    """A timer: the n-th measurement takes n microseconds; counts what was captured and calls each product once."""

    def __init__(self):
        self.measured = 0
        self.captured = []

    def __call__(self, calls):
        self.captured.append([call() for call in calls])

        def measure():
            self.measured += 1
            return float(self.measured)

        return measure


def product(weight, alpha):
    """Another implementation."""
    values = verify.weight_values(weight) * (1.0 if alpha is None else alpha)
    return lambda a: (a.float() @ values.T).bfloat16()


def rows_of(op_name, fmt, wanted, ms=(3,), clock=None):
    return list(gemm_table.measure(op_name, fmt, SHAPE, ms, wanted, CPU, clock or Clock(), FLOOR))


def test_each_row_lies_between_two_measurements_of_cublas(few_weights, monkeypatch):
    rivals = (peers.WeightPeer("marlin", product),)
    monkeypatch.setattr(peers, "WEIGHT_ONLY", rivals)
    clock = Clock()
    rows = rows_of("mm_bf16_fp4", "nvfp4", ["reference", "marlin"], (3, 5), clock)
    assert [(r.backend, r.m) for r in rows] == [(b, m) for m in (3, 5) for b in ("reference", "marlin", "cublas-bf16")]
    # Measurements of an M: cuBLAS 1, reference 2, cuBLAS 3, marlin 4, cuBLAS 5; cuBLAS is captured once.
    assert [(r.us, r.cublas_us) for r in rows[:3]] == [(2, 2), (4, 4), (3, 3)]
    assert [(r.us, r.cublas_us) for r in rows[3:]] == [(7, 7), (9, 9), (8, 8)]
    assert [len(calls) for calls in clock.captured] == [2] * 6  # two copies of each weight, as one would stay in the L2
    assert not torch.equal(*clock.captured[1])
    assert all(r.status == "ok" and r.floor_us == rows[0].floor_us for r in rows[:3])
    # 2 * 3 * 128 of a, 64 * 64 codes and 128 * 8 scales, 2 * 3 * 64 of the output and alpha, at 4200 GB/s.
    assert rows[0].floor_us == pytest.approx((768 + 4096 + 1024 + 384 + 4) / 4.2e6)


@pytest.mark.parametrize(
    ("op_name", "fmt"), [(name, fmt) for name, fmts in gemm_table.FORMATS.items() for fmt in fmts], ids="-".join
)
def test_every_op_and_format_passes_its_check(few_weights, op_name, fmt):
    own, cublas = rows_of(op_name, fmt, ["reference"])
    assert (own.status, own.backend, own.us) == ("ok", "reference", 2)
    assert cublas.backend == table.BASELINE


def test_what_is_wrong_or_fails_or_is_missing_has_no_time(few_weights, monkeypatch):
    tries = []

    def fails(weight, alpha):
        def multiply(a):
            tries.append(a.shape)
            raise RuntimeError("PassManager::run\nfailed")

        return multiply

    def unwritten(weight, alpha):
        return lambda a: product(weight, alpha)(a).index_fill_(0, torch.tensor([2]), math.nan)

    def missing(weight, alpha):
        raise peers.Unsuitable("not installed: no such thing")

    loads = {
        "slightly wrong": lambda w, alpha: lambda a: product(w, alpha)(a) * 1.03,
        "unwritten": unwritten,
        "fails": fails,
        "missing": missing,
    }
    monkeypatch.setattr(peers, "WEIGHT_ONLY", tuple(peers.WeightPeer(name, f) for name, f in loads.items()))
    monkeypatch.setattr(peers, "NAMES", tuple(loads))
    rows = rows_of("mm_bf16_fp4", "nvfp4", list(loads), (5, 6))
    status = {r.backend: r.status for r in rows[:5]}
    assert all(math.isnan(r.us) for r in rows if r.backend != table.BASELINE)
    assert status["slightly wrong"].startswith("wrong output: AssertionError: relative error 0.03")
    assert "unwritten is" in status["unwritten"]
    assert status["fails"] == "error: RuntimeError: PassManager::run failed"
    assert status["missing"] == "not installed: no such thing"
    assert len(tries) == 1  # not once more for each M


def test_a_backend_that_is_slightly_wrong_is_noticed(few_weights, monkeypatch):
    op = OPS["mm_bf16_fp4"]
    run = op.default

    class Wrong:
        backend_names = op.backend_names

        @staticmethod
        def default(*args, **kwargs):
            return run(*args, **kwargs) * 1.02

    monkeypatch.setitem(OPS, "mm_bf16_fp4", Wrong)
    own, _ = rows_of("mm_bf16_fp4", "nvfp4", ["reference"])
    assert own.status.startswith("wrong output")
    assert math.isnan(own.us)


def test_backends_that_are_not_there_say_so(few_weights):
    status = {r.backend: r.status for r in rows_of("mm_fp4", "nvfp4", ["triton", "no such"])}
    assert status["no such"] == "mm_fp4 has no such backend"
    assert status["triton"].startswith("refused: ")
    assert rows_of("mm_fp4", "nvfp4", ["marlin"])[0].backend == table.BASELINE  # it multiplies bf16 only


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gemm_table.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gemm_table.main(["--ops", "mm_fp8"])
    assert "allowed: mm_bf16_fp4" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "value"), [([], "1"), (["--plain"], "within")])
def test_plain_nodes_have_no_early_starts(monkeypatch, more, value):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gemm_table, "measure", lambda *_: iter(()))
    monkeypatch.setattr(gemm_table.timing, "free_memory", lambda _: None)
    monkeypatch.setenv("TORCH_FP4OPS_EARLY_START", "1")
    assert gemm_table._measure_all(gemm_table._parser().parse_args(more), "") == []
    assert os.environ["TORCH_FP4OPS_EARLY_START"] == value


@pytest.mark.gpu
@pytest.mark.parametrize("more", [[], ["--neighbour"]])
def test_a_small_table_on_a_gpu(more, tmp_path):
    path = tmp_path / "table.csv"
    few = ["--weights", "7168x2048", "--m", "1,256", "--backends", "triton", "--peers", "marlin"]
    assert gemm_table.main([*few, *more, "--csv", str(path)]) == 0
    rows = table.read_csv(path)
    assert {row.op for row in rows} == set(gemm_table.FORMATS)
    for row in rows:
        if row.backend == "marlin":
            assert row.timed or row.status.startswith("not installed")
        else:
            assert row.status == "ok"
            assert row.us > 0.8 * row.floor_us
            assert row.cublas_us > 0


# Inputs and peers


@pytest.mark.parametrize(("op_name", "fmt"), [("mm_bf16_fp4", "mxfp4"), ("mm_fp4", "nvfp4"), ("mm_mxfp8", "mxfp8")])
def test_a_weight_is_found_again_in_a_call_and_prepared(monkeypatch, op_name, fmt):
    weight = Weight.random(generator(), fmt, 64, 128)
    a = inputs.activations(generator(), op_name, fmt, 3, 128)
    sample = inputs.gemm(op_name, a, weight, inputs.alpha_of(fmt, CPU))
    again = Weight.of(op_name, sample)
    assert again[3:] == weight[3:]
    assert again.fmt == fmt
    assert torch.equal(verify.weight_values(again), verify.weight_values(weight))
    assert inputs.for_backend(op_name, "triton", sample) is sample
    monkeypatch.setitem(inputs.PREPARED_FOR, "some backend", "plain")
    prepared = inputs.for_backend(op_name, "some backend", sample)
    outs = [OPS[op_name](*s.args, **s.kwargs, backend="reference") for s in (sample, prepared)]
    assert torch.equal(*outs)


def test_marlins_scales_are_permuted_and_recoded():
    weight = Weight.random(generator(), "nvfp4", 128, 256)
    linear = scale_layouts.unswizzle(weight.scales, 128, 16, "128x4").view(torch.float8_e4m3fn).float()
    given = marlin.permuted_scales(weight)
    assert (given.shape, given.dtype) == ((16, 128), torch.float8_e4m3fn)
    halves = (given.view(torch.uint8).to(torch.int32) << 7).to(torch.int16).view(torch.float16).float() / 2**7
    for column in range(128):
        first, within = column // 64 * 64, column % 64
        in_four = (0, 2, 1, 3)[within % 4]
        place = within // 4 * 4 + in_four
        assert torch.equal(halves[:, column], linear[first + place // 8 + place % 8 * 8])


def test_marlin_is_absent_without_its_folder(monkeypatch, tmp_path):
    weight = Weight.random(generator(), "nvfp4", 64, 128)
    monkeypatch.delenv(marlin.FOLDER, raising=False)
    marlin._library.cache_clear()
    with pytest.raises(peers.Unsuitable, match=f"not installed: {marlin.FOLDER} is not set"):
        marlin.load(weight, None)
    monkeypatch.setenv(marlin.FOLDER, str(tmp_path))
    with pytest.raises(peers.Unsuitable, match="not installed: .*marlin_gemm.so"):
        marlin.load(weight, None)
    with pytest.raises(peers.Unsuitable, match="NVFP4 only"):
        marlin.load(Weight.random(generator(), "mxfp4", 64, 128), None)
    with pytest.raises(peers.Unsuitable, match="multiples"):
        marlin.load(Weight.random(generator(), "nvfp4", 64, 64), None)


def test_every_peer_says_what_it_computes():
    assert all(len(peer.what) > 20 for peer in (*peers.PEERS, *peers.WEIGHT_ONLY))
    assert {peer.name for peer in peers.WEIGHT_ONLY} <= set(peers.NAMES)


# Files, means and plots


def some_rows() -> list[Row]:
    rows = []
    for n, k in ((4096, 4096), (28672, 8192)):
        for m in (1, 64, 128):
            base = replace(ROW, m=m, n=n, k=k)
            rows += [base, replace(base, backend="marlin", us=15.0), replace(base, backend="cublas-bf16", us=20.0)]
    return rows


def test_ratios_and_means_by_hand(capsys):
    rows = some_rows()
    rows[0] = replace(rows[0], us=40.0)
    found = table.ratios(rows)
    assert found["over_floor"][rows[0]] == 8
    assert found["vs_cublas"][rows[0]] == 0.5
    assert found["vs_marlin"][rows[3]] == 1.5
    table.print_means(rows)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    # Few rows: floors 8, 2, 2, 2, twice as fast as cuBLAS but for the first; then 2 products above.
    few = f"{(8 * 8) ** 0.25:.2f} {(0.5 * 8) ** 0.25:.2f} (3/4) {(0.375 * 1.5**3) ** 0.25:.2f} (3/4)".split()
    assert printed[-2] == ["mm_bf16_fp4", "nvfp4", "gluon", "1", "to", "64", *few]
    assert printed[-1] == ["mm_bf16_fp4", "nvfp4", "gluon", "65", "to", "128", "2.00", "2.00", "(2/2)", "1.50", "(2/2)"]
    table.print_tables([*rows, replace(ROW, backend="gemlite", us=math.nan, status="not installed: gemlite")])
    printed = capsys.readouterr().out
    assert "mm_bf16_fp4, nvfp4, gemlite (1 products): not installed: gemlite" in printed
    assert "28672 x 8192" in printed


def test_the_file_has_the_ratios_and_is_read_back(tmp_path, capsys):
    path = tmp_path / "sub" / "table.csv"
    rows = [*some_rows(), replace(ROW, backend="gemlite", us=math.nan, status='error: "no", it said')]
    table.write_csv(path, rows)
    header, first = path.read_text().splitlines()[:2]
    assert header.endswith("command,over_floor,vs_cublas,vs_marlin")
    assert first.endswith(",2,2,1.5")
    back = table.read_csv(path)
    assert [repr(row) for row in back] == [repr(row) for row in rows]  # NaN is not equal to itself
    assert gemm_table.main(["--from", str(path)]) == 0
    assert "geometric means" in capsys.readouterr().out
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        table.read_csv(path)


def test_maps_of_speed_ups(tmp_path):
    pytest.importorskip("matplotlib")
    written = plots.plot_gemm_table(some_rows(), tmp_path)
    assert {p.name for p in written} == {f"mm_bf16_fp4-nvfp4-table-vs-{b}.png" for b in ("cublas-bf16", "marlin")}
    import matplotlib.image

    for path in written:
        assert matplotlib.image.imread(path)[..., :3].std() > 0.05
