"""Find the fastest configurations of the matrix products on this GPU, and check their results there.

    python benchmarks/gemm_probe.py                 # checks, then the sweep, within --seconds
    python benchmarks/gemm_probe.py --check         # only the checks of what ships
    python benchmarks/gemm_probe.py --no-check --rows 1024,4096

Every configuration is compared with float64, within the bound that fp32 sums obey, before it is timed. Times are of
CUDA-graph replays over rotating buffers that exceed the L2 cache (see ``timing.py``), beside torch.mm in bfloat16 in
the same run. ``$OUT`` (or ``--out``) gets gemm_probe.csv and gemm_probe_other.csv.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import timing
from benchmarks.probing import START, Checks, say, write_csv
from compile_tests.offline import compile_apart
from torch_fp4ops import OPS, scale_layouts
from torch_fp4ops.block_quantization import dequantize_blocks
from torch_fp4ops.formats import MXFP4, MXFP8, NVFP4, BlockFormat
from torch_fp4ops.ops import _triton_gemm_launch as launch
from torch_fp4ops.ops._triton_gemm_launch import Config, Operand
from torch_fp4ops.ops._triton_gemm_offline import Call, Product, aot_case
from torch_fp4ops.testing import assert_matmul_close, assert_right, samples

SHAPES = ((4096, 4096), (28672, 8192), (8192, 28672), (7168, 2048))
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
SWIZZLED = scale_layouts.SWIZZLED_128X4


# What is swept


def candidates(m: int) -> Iterator[tuple[Config, int]]:
    """Configurations for m rows, and into how many parts each splits K at most."""
    swaps = (False, True)
    if m <= 16:
        for (bn, bk, stages), swap in itertools.product(
            ((64, 128, 4), (128, 64, 4), (128, 128, 3), (64, 256, 3), (32, 128, 5), (64, 64, 5)), swaps
        ):
            yield Config(16, bn, bk, 128, stages, SWAP=swap), 16
    elif m <= 64:
        for (bm, bn, bk, threads, stages), swap in itertools.product(
            (
                (64, 64, 64, 128, 4),
                (64, 128, 64, 128, 4),
                (64, 128, 64, 256, 4),
                (64, 64, 128, 128, 3),
                (64, 128, 128, 256, 3),
                (32, 128, 64, 128, 4),
            ),
            swaps,
        ):
            yield Config(bm, bn, bk, threads, stages, SWAP=swap), 8
    else:
        for (bm, bn, bk, threads, stages), swap in itertools.product(
            (
                (128, 128, 64, 256, 3),
                (128, 128, 64, 256, 4),
                (128, 256, 64, 256, 3),
                (256, 128, 64, 256, 3),
                (128, 64, 64, 128, 4),
                (64, 128, 64, 128, 4),
                (128, 128, 64, 128, 3),
                (128, 128, 128, 256, 3),
            ),
            swaps,
        ):
            if m <= 256 or bm >= 128:
                yield Config(bm, bn, bk, threads, stages, SWAP=swap), 4 if m <= 256 else 1


def all_candidates() -> dict[Config, int]:
    found: dict[Config, int] = {}
    for m in ROWS:
        for config, most in candidates(m):
            found[config] = max(most, found.get(config, 1))
        found.setdefault(launch.configuration("sm90", m, "plain", "nvfp4", None), 16)
    return found


# Data


def weights(fmt: BlockFormat, n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random codes and swizzled scales near one, without NaN."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    make = partial(torch.randint, generator=generator, device="cuda", dtype=torch.uint8)
    elements = make(0, 256 if fmt is not MXFP8 else 0x7F, (n, k // fmt.elements_per_byte))
    shape = scale_layouts.scale_shape(n, k // fmt.block_size, SWIZZLED)
    return elements, make(0x28, 0x48, shape) if fmt is NVFP4 else make(120, 128, shape)


def values_of(fmt: BlockFormat, elements: Tensor, scales: Tensor, n: int, k: int) -> Tensor:
    elements = elements.view(torch.float8_e4m3fn) if fmt is MXFP8 else elements
    return dequantize_blocks(elements, scale_layouts.unswizzle(scales, n, k // fmt.block_size, SWIZZLED), fmt)


def check(config: Config, parts: int, fmt: BlockFormat = NVFP4, dtype: torch.dtype = torch.bfloat16) -> None:
    """Two products, one of ragged sizes."""
    for m, n, k in ((2 * config.BM, 384, 1024), (config.BM + 3, 200, 1024 + 32)):
        x = torch.randn(m, k, device="cuda").to(dtype)
        w = weights(fmt, n, k, n)
        alpha = torch.full((1,), 0.37, device="cuda")
        out = torch.full((m, n), torch.nan, device="cuda", dtype=torch.bfloat16)
        launch.matmul(Operand(x), Operand.of(fmt, *w, SWIZZLED), out, alpha, config=config, parts=parts)
        assert_matmul_close(out, x, values_of(fmt, *w, n, k), alpha)


def check_shipped() -> int:
    """Every op's samples, and each shape of the sweep with what ships, sampled rows of it against float64."""
    checks = Checks()
    for name in ("mm_bf16_fp4", "mm_fp4", "mm_mxfp8", "cutlass_fused_moe"):
        op = OPS[name]
        for sample in samples(op, "cuda"):
            if op.why_not("triton", op.check(*sample.args, **sample.kwargs)) is None:
                checks.attempt(f"{name} {sample.name}", partial(assert_right, op, sample, "triton"))
    say(f"samples: {checks}")
    for (n, k), fmt in itertools.product(((4096, 4096), (7168, 2048 + 32)), (NVFP4, MXFP4)):
        w = weights(fmt, n, k, 0)
        wanted = values_of(fmt, *w, n, k)
        for m, dtype in itertools.product((*ROWS, 17, 129), (torch.bfloat16, torch.float16)):
            x = torch.randn(m, k, device="cuda").to(dtype)
            checks.attempt(f"{fmt.name} {dtype} {m}x{n}x{k}", partial(_check_op, x, w, fmt, wanted))
    say(f"checks: {checks}")
    return checks.failures


def _check_op(x: Tensor, w: tuple[Tensor, Tensor], fmt: BlockFormat, wanted: Tensor) -> None:
    alpha = torch.full((1,), 0.37, device="cuda")
    args = (x, *w, alpha)
    out = OPS["mm_bf16_fp4"].default(*args, block_size=fmt.block_size, backend="triton")
    again = OPS["mm_bf16_fp4"].default(*args, block_size=fmt.block_size, backend="triton")
    assert torch.equal(out, again), "two calls differ"
    rows = torch.arange(0, len(x), max(1, len(x) // 64), device="cuda")
    assert_matmul_close(out[rows], x[rows], wanted, alpha)


# The sweep


def microseconds(calls: list[Callable[[], Any]]) -> float:
    return timing.time_calls(calls, torch.device("cuda")).us


def sweep(rows: list[int], seconds: float, out: Path) -> None:
    good, checks = set(), Checks()
    for config, most in all_candidates().items():
        all_parts = {1, min(2, most)}
        if all(checks.attempt(tuple(config), partial(check, config, parts)) for parts in all_parts):
            good.add(config)
    say(f"{len(good)} configurations are right")
    results: list[dict[str, Any]] = []
    for m, (n, k) in itertools.product(rows, SHAPES):
        if time.time() - START > seconds:
            say("out of time")
            break
        try:
            results += time_shape(m, n, k, good)
        except Exception as error:
            say("ERROR", (m, n, k), str(error)[:300])
        write_csv(out / "gemm_probe.csv", results)
    timing.free_memory(torch.device("cuda"))


def time_shape(m: int, n: int, k: int, good: set[Config]) -> list[dict[str, Any]]:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    sets = max(1, min(16, -(-timing.ROTATED_BYTES // (n * k * 9 // 16))))
    ws = [weights(NVFP4, n, k, i) for i in range(sets)]
    x = torch.randn(m, k, device="cuda").bfloat16()
    alpha = torch.ones(1, device="cuda")
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(1, sets // 3))]
    cublas = microseconds([partial(torch.mm, x, w.T) for w in dense])
    line = f"{m}x{n}x{k}: cuBLAS {cublas:.1f}"
    row = {"m": m, "n": n, "k": k, "cublas_us": cublas}
    found = []
    if m >= 1024:
        dequantize = OPS["fp4_dequantize"].default
        decoded = [partial(dequantize, *w, alpha, out_dtype=torch.bfloat16, backend="triton") for w in ws]
        us = cublas + microseconds(decoded)
        line += f", dequantise + cuBLAS {us:.1f}"
        found.append({**row, "config": "dequantise+cublas", "parts": 1, "us": us})
    operands = [Operand.of(NVFP4, *w, SWIZZLED) for w in ws]
    arch = launch.architecture(torch.device("cuda", 0))
    shipped = launch.configuration(arch, m, "plain", "nvfp4", None)
    shipped_parts = launch.splits(shipped, m, n, k, processors)
    swept = [(c, parts) for c, most in candidates(m) for parts in (1, 2, 4, 8, 16) if parts <= most and c in good]
    for config, parts in dict.fromkeys([(shipped, shipped_parts), *swept]):
        tiles = -(-m // config.BM) * -(-n // config.BN)
        if parts > 1 and (tiles * parts > 6 * processors or k // config.BK // parts < 2):
            continue

        def call(b: Operand, config: Config = config, parts: int = parts) -> Tensor:
            out = x.new_empty((m, n))
            launch.matmul(Operand(x), b, out, alpha, config=config, parts=parts)
            return out

        try:
            us = microseconds([partial(call, b) for b in operands])
        except Exception as error:
            say("ERROR", tuple(config), parts, str(error)[:200])
            continue
        found.append({**row, "config": "x".join(map(str, config)), "parts": parts, "us": us})
    ours = sorted((r for r in found if "+" not in r["config"]), key=lambda r: r["us"])
    mine = next((r for r in found if r["config"] == "x".join(map(str, shipped))), ours[0])
    best = " | ".join(f"{r['config']}/{r['parts']} {r['us']:.1f}" for r in ours[:4])
    floor = (n * k * 9 / 16 + 2 * m * (n + k)) / 4.2e6
    say(f"{line} | shipped {mine['us']:.1f} | bytes at 4.2 TB/s {floor:.1f} | {best}")
    return found


def other_ops(seconds: float, out: Path) -> None:
    """What ships of the other formats and ops, beside cuBLAS where there is a dense product to compare with."""
    results: list[dict[str, Any]] = []
    n, k = 4096, 4096
    alpha = torch.ones(1, device="cuda")
    for m in ROWS:
        x = torch.randn(m, k, device="cuda").bfloat16()
        cases: dict[str, Callable[[], Any]] = {
            "cublas": partial(torch.mm, x, torch.randn(n, k, device="cuda").bfloat16().T)
        }
        for fmt, dtype in itertools.product((NVFP4, MXFP4), (torch.bfloat16, torch.float16)):
            args = (x.to(dtype), *weights(fmt, n, k, 0), alpha)
            name = f"mm_bf16_fp4-{fmt.name}-{str(dtype)[6:]}"
            cases[name] = partial(OPS["mm_bf16_fp4"].default, *args, block_size=fmt.block_size, backend="triton")
        for fmt in (NVFP4, MXFP4):
            (a, sa), (b, sb) = weights(fmt, m, k, 1), weights(fmt, n, k, 0)
            kwargs = {"block_size": fmt.block_size, "use_nvfp4": fmt is NVFP4, "backend": "triton"}
            cases[f"mm_fp4-{fmt.name}"] = partial(OPS["mm_fp4"].default, a, b.T, sa, sb.T, alpha, **kwargs)
        (a, sa), (b, sb) = weights(MXFP8, m, k, 1), weights(MXFP8, n, k, 0)
        a, b = a.view(torch.float8_e4m3fn), b.view(torch.float8_e4m3fn)
        cases["mm_mxfp8"] = partial(OPS["mm_mxfp8"].default, a, b.T, sa.flatten(), sb.flatten(), backend="triton")
        results += _time_cases(cases, f"{m}x{n}x{k} (warm)", seconds)
        write_csv(out / "gemm_probe_other.csv", results)
    for name, hidden, inter, experts, top_k in (("gptoss", 2944, 2944, 128, 4), ("deepseek", 7168, 2048, 32, 8)):
        mx, nv = (
            [weights(f, experts * r, c, r) for r, c in ((2 * inter, hidden), (hidden, inter))] for f in (MXFP4, NVFP4)
        )
        for m in (1, 8, 64, 256, 1024, 4096):
            cases = {f"moe-{name}-{kind}": call for kind, call in moe_calls(m, hidden, inter, experts, top_k, mx, nv)}
            results += _time_cases(cases, f"{m} tokens", seconds)
            write_csv(out / "gemm_probe_other.csv", results)


def moe_calls(
    m: int, hidden: int, inter: int, experts: int, top_k: int, mx: list[Any], nv: list[Any]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    x = torch.randn(m, hidden, device="cuda").bfloat16()
    ids = torch.rand(m, experts, device="cuda").topk(top_k).indices.int()
    final = torch.full((m, top_k), 1 / top_k, device="cuda")
    ones = torch.ones(experts, device="cuda")
    op = OPS["cutlass_fused_moe"].default
    for kind, fmt, made in (("w4a16-mxfp4", MXFP4, mx), ("w4a16-nvfp4", NVFP4, nv), ("w4a4-nvfp4", NVFP4, nv)):
        w = [e.view(experts, -1, e.shape[1]) for e, _ in made]
        shapes = ((2 * inter, hidden // fmt.block_size), (hidden, inter // fmt.block_size))
        # The bytes serve as 128x4 scales of each expert where the rows fill whole tiles, as they do here.
        s = [
            t[: experts * r].reshape(experts, r, -1)[:, :, :c].contiguous()
            for (_, t), (r, c) in zip(made, shapes, strict=True)
        ]
        kwargs = {"weight_layout": "linear", "backend": "triton"}
        if kind == "w4a4-nvfp4":
            scales = [ones[:1], s[0], ones, ones[:1], s[1], ones]
        else:
            kwargs["use_w4_group_scaling"] = True
            scales = s if fmt is MXFP4 else [s[0], ones, s[1], ones]
        yield kind, partial(op, x, ids, final, *w, torch.bfloat16, scales, **kwargs)


def _time_cases(cases: dict[str, Callable[[], Any]], what: str, seconds: float) -> list[dict[str, Any]]:
    found = []
    for name, call in cases.items():
        if time.time() - START > seconds:
            break
        try:
            found.append({"case": name, "shape": what, "us": microseconds([call])})
        except Exception as error:
            say("ERROR", name, what, str(error)[:200])
    say(what, ", ".join(f"{r['case']} {r['us']:.1f}" for r in found))
    return found


def precompile(arch: str, jobs: int) -> None:
    """Fill Triton's cache in parallel, before CUDA is initialised, which forked processes could not use."""
    cases = []
    product = Product("plain", "nvfp4", torch.bfloat16, SWIZZLED)
    for config, most in all_candidates().items():
        for even, parts in itertools.product((True, False), {1, *(p for p in (2, 4, 8, 16) if p <= most)}):
            if even or parts <= 2:
                call = Call(k=4096 if even else 4128, splits=parts)
                cases.append(aot_case("sm90", config, product, call))
    with ThreadPoolExecutor(jobs) as pool:
        got = list(pool.map(lambda c: compile_apart(c, arch, keep=True), cases))
    spilling = sum(g.spilled_bytes > 0 for g in got)
    errors = [g.error for g in got if g.error]
    say(f"precompiled {len(cases)} kernels for {arch}, {len(errors)} failures, {spilling} spill", *errors[:3])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="no sweep")
    parser.add_argument("--no-check", action="store_true", help="only the sweep")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="numbers of rows to sweep")
    parser.add_argument("--seconds", type=float, default=290, help="the sweep stops then, and what is left 60 s later")
    parser.add_argument("--arch", default="sm_90", help="what to precompile for")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    arguments = parser.parse_args()
    if not arguments.check:
        precompile(arguments.arch, arguments.jobs)
    say(torch.cuda.get_device_name(), "torch", torch.__version__)
    failures = 0 if arguments.no_check else check_shipped()
    if not arguments.check:
        sweep([int(m) for m in arguments.rows.split(",")], arguments.seconds, arguments.out)
        other_ops(arguments.seconds + 60, arguments.out)
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
