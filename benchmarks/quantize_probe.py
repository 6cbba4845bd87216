"""Find the fastest tilings of the quantisation kernels on this GPU, and check their bytes there.

    python benchmarks/quantize_probe.py                 # checks, then the sweep, within --seconds
    python benchmarks/quantize_probe.py --check         # only the checks of what ships
    TRITON_PTXAS_PATH=... python benchmarks/quantize_probe.py --check     # the same with another assembler

Every tiling is compared with the reference byte for byte before it is timed. Times are of CUDA-graph replays over
rotating buffers that exceed the L2 cache: the median over replays of the time of one call. The fraction is that of
the bandwidth of an elementwise copy measured in the same run. ``$OUT`` (or ``--out``) gets quantize_probe.csv.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.probing import START, Checks, say, write_csv
from compile_tests.offline import aot_cases, compile_apart
from torch_fp4ops import OPS, scale_layouts
from torch_fp4ops.block_quantization import dequantize_blocks
from torch_fp4ops.formats import MXFP4, MXFP8, NVFP4, BlockFormat
from torch_fp4ops.ops import _triton_dequantize, _triton_quantize
from torch_fp4ops.ops._triton_launch import Tiling
from torch_fp4ops.testing import assert_right, assert_same_bytes, samples
from torch_fp4ops.testing.strategies import SPECIAL_VALUES

COLD_BYTES = 256 << 20
SHAPES = [(8192, 7168), (1, 4096), (32768, 16384), (128, 7168), (1024, 4096), (16, 16384), (32768, 1024), (4096, 2944)]
LAYOUT_FLAGS = {
    scale_layouts.SWIZZLED_128X4: (True, False),
    scale_layouts.SWIZZLED_8X4: (True, True),
    scale_layouts.LINEAR: (False, False),
}


# Timing


def microseconds(calls: list[Callable[[], Any]], replays: int = 11) -> float:
    """Median time of one call, all calls captured round-robin into one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        calls[-1]()
        end.record()
        torch.cuda.synchronize()
        estimate_ms = max(start.elapsed_time(end), 2e-3)
        count = max(len(calls), min(200, math.ceil(2.0 / estimate_ms)))
        if estimate_ms > 1.0:
            count = max(2, min(len(calls), 3))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                calls[i % len(calls)]()
        times = []
        for i in range(replays + 2):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 2:
                times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2] * 1e3 / count


def copy_rate() -> float:
    """GB/s, read and written, of an elementwise kernel over 2 GiB."""
    x = torch.zeros(1 << 30, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    return 4 * x.numel() / microseconds([lambda: torch.neg(x, out=y)], 7) / 1e3


# What is swept


@dataclass(frozen=True)
class Quantize:
    fmt: BlockFormat
    layout: str
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"quantize-{self.fmt.name}-{self.layout}-{str(self.dtype)[6:]}"

    def tilings(self) -> Iterator[Tiling]:
        for R in _row_counts(self.layout):
            for threads in (64, 128, 256):
                for iters in (1, 2, 4, 8):
                    for split in (1, 2) if self.dtype == torch.bfloat16 else (1,):
                        for ahead in range(1, min(iters, 3) + 1):
                            yield Tiling(R, threads // R // split, iters, split, ahead)

    def shipped(self, m: int, k: int) -> Tiling:
        return _triton_quantize.tiling(self.fmt, self.layout, m, k // self.fmt.block_size)

    def buffers(self, m: int, k: int, x: Tensor) -> tuple[Tensor, ...]:
        payload = x.new_empty(m, k // self.fmt.elements_per_byte, dtype=torch.uint8)
        scales = x.new_empty(scale_layouts.scale_shape(m, k // self.fmt.block_size, self.layout), dtype=torch.uint8)
        return x, payload, scales

    def run(self, buffers: tuple[Tensor, ...], gs: Tensor, tile: Tiling | None) -> None:
        x, payload, scales = buffers
        gs_or_none = gs if self.fmt.has_global_scale else None
        _triton_quantize.quantize_rows(x, self.fmt, self.layout, gs_or_none, False, payload, scales, tile=tile)

    def reference(self, x: Tensor, gs: Tensor) -> tuple[Tensor, Tensor]:
        flags = LAYOUT_FLAGS[self.layout]
        if self.fmt is MXFP8:
            number = list(LAYOUT_FLAGS).index(self.layout)  # FlashInfer's
            out = OPS["mxfp8_quantize"].default(x, sf_swizzle_layout=number, backend="reference")
            shape = scale_layouts.scale_shape(x.shape[0], x.shape[1] // 32, self.layout)
            return out[0].view(torch.uint8), out[1].view(shape)
        gs_or_none = gs if self.fmt.has_global_scale else None
        return OPS["fp4_quantize"].default(
            x, gs_or_none, self.fmt.block_size, self.fmt is MXFP4, *flags, backend="reference"
        )

    def check(self, tile: Tiling, data: tuple[Tensor, Tensor]) -> None:
        x, gs = data[0].to(self.dtype), data[1]
        buffers = self.buffers(*x.shape, x)
        for t in buffers[1:]:
            t.fill_(0xAA)
        self.run(buffers, gs, tile)
        for what, given, wanted in zip(("payload", "scales"), buffers[1:], self.reference(x, gs), strict=True):
            assert_same_bytes(given, wanted, f"{self} {tile} {what}")


@dataclass(frozen=True)
class Dequantize:
    fmt: BlockFormat
    layout: str
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"dequantize-{self.fmt.name}-{self.layout}-{str(self.dtype)[6:]}"

    @property
    def split(self) -> int:
        return self.fmt.block_size // (16 // self.dtype.itemsize)

    def tilings(self) -> Iterator[Tiling]:
        for R in _row_counts(self.layout):
            for threads in (128, 256, 512):
                for iters in (1, 2, 4, 8):
                    yield Tiling(R, threads // R // self.split, iters, self.split)

    def shipped(self, m: int, k: int) -> Tiling:
        return _triton_dequantize.tiling(self.layout, m, k // self.fmt.block_size, self.split)

    def buffers(self, m: int, k: int, x: Tensor) -> tuple[Tensor, ...]:
        quantize = Quantize(self.fmt, self.layout, x.dtype)
        buffers = quantize.buffers(m, k, x)
        quantize.run(buffers, x.new_full((1,), 500.0, dtype=torch.float32), None)
        return buffers[1], buffers[2], x.new_empty(m, k, dtype=self.dtype)

    def run(self, buffers: tuple[Tensor, ...], gs: Tensor, tile: Tiling | None) -> None:
        payload, scales, out = buffers
        gs_or_none = gs if self.fmt.has_global_scale else None
        _triton_dequantize.dequantize_rows(payload, scales, self.fmt, self.layout, gs_or_none, False, out, tile)

    def check(self, tile: Tiling, data: tuple[Tensor, Tensor]) -> None:
        x, gs = data
        payload, scales, out = buffers = self.buffers(*x.shape, x)
        out.fill_(7)
        self.run(buffers, gs, tile)
        linear = scale_layouts.unswizzle(scales, x.shape[0], x.shape[1] // self.fmt.block_size, self.layout)
        if self.fmt is MXFP8:
            payload = payload.view(torch.float8_e4m3fn)
        decode = (1.0 / gs).reshape(-1, 1) if self.fmt.has_global_scale else None
        wanted = dequantize_blocks(payload, linear, self.fmt, decode).to(self.dtype)
        assert_same_bytes(out, wanted, f"{self} {tile}")


def _row_counts(layout: str) -> tuple[int, ...]:
    return {scale_layouts.SWIZZLED_128X4: (1, 4), scale_layouts.SWIZZLED_8X4: (4,), scale_layouts.LINEAR: (1,)}[layout]


SWEPT: list[Quantize | Dequantize] = [
    Quantize(NVFP4, scale_layouts.SWIZZLED_128X4),
    Quantize(MXFP4, scale_layouts.SWIZZLED_128X4),
    Quantize(MXFP8, scale_layouts.SWIZZLED_128X4),
    Dequantize(NVFP4, scale_layouts.SWIZZLED_128X4),
    Quantize(NVFP4, scale_layouts.LINEAR),
    Dequantize(NVFP4, scale_layouts.LINEAR),
    Dequantize(MXFP8, scale_layouts.SWIZZLED_128X4),
    Quantize(NVFP4, scale_layouts.SWIZZLED_8X4),
    Quantize(NVFP4, scale_layouts.SWIZZLED_128X4, torch.float32),
    Dequantize(NVFP4, scale_layouts.SWIZZLED_128X4, torch.float32),
]


def sweep_kv_store(rate: float) -> None:
    """Times of the cache store by tile: n tokens of 8 heads of 128, pages of 16."""
    module = importlib.import_module("torch_fp4ops.ops.nvfp4_kv_quantize_store.triton")
    shipped = module.tiling
    scale = torch.full((1,), 0.002, device="cuda")
    for n in (1, 64, 1024, 16384):
        moved = 2 * n * 8 * 128 * 2.5625
        sets = []
        for _ in range(max(1, min(32, int(COLD_BYTES / moved)))):
            key, value = (torch.randn(n, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv")
            caches = [torch.empty(n // 16 + 1, 16, 8, d, device="cuda", dtype=torch.uint8) for d in (64, 64, 8, 8)]
            sets.append((key, value, torch.randperm(n, device="cuda"), *caches, scale, scale))
        times = {}
        for threads, C, iters in itertools.product((32, 64, 128, 256), (32, 64), (1, 2, 4)):
            if threads >= C:
                tile = (threads // C, C, iters)
                module.tiling = lambda n, cols, tile=tile: tile
                calls = [partial(module.nvfp4_kv_quantize_store_triton, *arguments) for arguments in sets]
                times[tile] = microseconds(calls)
        module.tiling = shipped
        best = sorted(times.items(), key=lambda item: item[1])
        line = " | ".join(f"{tile} {us:.2f}" for tile, us in best[:3])
        mine = f"{shipped(n, 64)} {times.get(shipped(n, 64), math.nan):.2f}"
        say(f"kv_store {n}x8x128: {line} | shipped {mine} | best {moved / best[0][1] / 1e3 / rate:.2f} of copy")


# Checking


def hard_data(m: int, k: int, seed: int) -> Tensor:
    """fp32 on the GPU: blocks of all magnitudes, ties, and special values here and there."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    x *= torch.randint(-30, 20, (m, k // 32, 1), generator=generator).float().exp2().expand(-1, -1, 32).reshape(m, k)
    ties = torch.randint(-24, 25, (m, k), generator=generator) / 4
    x = torch.where(torch.rand(m, k, generator=generator) < 0.3, ties, x)
    special = torch.tensor(SPECIAL_VALUES)
    places = torch.randint(0, m * k, (max(1, m * k // 400),), generator=generator)
    x.view(-1)[places] = special[torch.randint(0, len(special), places.shape, generator=generator)]
    return x.cuda()


def check_shipped() -> int:
    """Every op's samples, and larger hard data in every format, layout, dtype and form of global scale."""
    checks = Checks()
    for op in OPS.values():
        if "triton" in op.backend_names():
            for sample in samples(op, "cuda"):
                checks.attempt(f"{op.name} {sample.name}", partial(assert_right, op, sample, "triton"))
    say(f"samples: {checks}")
    for m, k in ((1, 64), (129, 1056), (1000, 2944), (4097, 7168)):
        x = hard_data(m, k, m)
        rows = torch.rand(m, device="cuda") * 1000 + 0.1
        for fmt in (NVFP4, MXFP4, MXFP8):
            for layout in scale_layouts.LAYOUTS:
                for dtype in (torch.bfloat16, torch.float16, torch.float32):
                    forms = (rows[:1], rows) if fmt.has_global_scale else (rows[:1],)
                    for gs, kind in itertools.product(forms, (Quantize, Dequantize)):
                        case = kind(fmt, layout, dtype)
                        checks.attempt(f"{case} {m}x{k}", partial(case.check, case.shipped(m, k), (x, gs)))
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    shuffled = every[torch.randperm(2**16)].reshape(64, 1024).cuda()
    for data in (every.reshape(64, 1024).cuda(), shuffled):
        for fmt in (NVFP4, MXFP4, MXFP8):
            case = Quantize(fmt, scale_layouts.SWIZZLED_128X4)
            gs = torch.full((1,), 300.0, device="cuda")
            checks.attempt(f"all bf16 {case}", partial(case.check, case.shipped(64, 1024), (data, gs)))
    say(f"checks: {checks}")
    return checks.failures


# The sweep


def sweep(seconds: float, out: Path) -> None:
    rate = copy_rate()
    say(f"elementwise copy: {rate:.0f} GB/s")
    gs = torch.full((1,), 500.0, device="cuda")
    small = hard_data(300, 1056, 0)
    results: list[dict[str, Any]] = []
    good: dict[str, list[Tiling]] = {}
    checks = Checks()
    for case in SWEPT:
        good[str(case)] = []
        for tile in dict.fromkeys(case.tilings()):
            if checks.attempt(f"{case} {tile}", partial(case.check, tile, (small, gs))):
                good[str(case)].append(tile)
    say("tilings checked")
    try:
        sweep_kv_store(rate)
    except Exception as error:
        say("ERROR kv_store", str(error)[:300])
    for m, k in SHAPES:
        for case in SWEPT:
            if time.time() - START > seconds:
                say("out of time")
                return
            try:
                found = _time_tilings(case, good[str(case)], m, k, gs, rate)
            except Exception as error:
                say("ERROR", case, (m, k), str(error)[:300])
                continue
            results += found
            shipped = case.shipped(m, k)
            line = " | ".join(f"{tuple(r['tile'])} {r['us']:.2f}" for r in found[:3])
            mine = next((f"{r['us']:.2f}" for r in found if r["tile"] == shipped), "not swept")
            say(f"{case} {m}x{k}: {line} | shipped {tuple(shipped)} {mine} | best {found[0]['fraction']:.2f} of copy")
        write_csv(out / "quantize_probe.csv", [{**r, "tile": "x".join(map(str, r["tile"]))} for r in results])


def _time_tilings(
    case: Quantize | Dequantize, tiles: list[Tiling], m: int, k: int, gs: Tensor, rate: float
) -> list[dict[str, Any]]:
    dtype = case.dtype if isinstance(case, Quantize) else torch.bfloat16
    # Buffers are made one by one, so that an input of a dequantiser does not outlive its quantisation.
    first = case.buffers(m, k, torch.randn(m, k, device="cuda", dtype=dtype))
    moved = sum(t.nbytes for t in first)
    sets = [first]
    while len(sets) * moved < COLD_BYTES and len(sets) < 64:
        sets.append(case.buffers(m, k, torch.randn(m, k, device="cuda", dtype=dtype)))
    found = []
    for tile in tiles:
        calls = [lambda buffers=buffers, tile=tile: case.run(buffers, gs, tile) for buffers in sets]
        us = microseconds(calls, 7 if moved > 1 << 28 else 11)
        gbs = moved / us / 1e3
        found.append({"case": str(case), "m": m, "k": k, "tile": tile, "us": us, "GBs": gbs, "fraction": gbs / rate})
    return sorted(found, key=lambda r: r["us"])


def precompile(arch: str, jobs: int) -> None:
    """Fill Triton's cache in parallel, before CUDA is initialised, which forked processes could not use."""
    from concurrent.futures import ThreadPoolExecutor

    cases = list(aot_cases())
    for case in SWEPT:
        prefix = f"{case}-gs".replace("bfloat16", "bf16").replace("float32", "fp32")
        model = next((c for c in aot_cases() if c.name.startswith(prefix)), None)
        for tile in case.tilings() if model else ():
            tile_constants = {**tile._asdict(), "INVERSED": False}
            constants = {key: tile_constants.get(key, value) for key, value in model.constants.items()}
            cases.append(model._replace(constants=constants, threads=tile.threads))
    with ThreadPoolExecutor(jobs) as pool:
        errors = [r.error for r in pool.map(lambda c: compile_apart(c, arch, keep=True), cases) if r.error]
    say(f"precompiled {len(cases)} kernels for {arch}, {len(errors)} failures", *errors[:3])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="no sweep")
    parser.add_argument("--seconds", type=float, default=330, help="the sweep stops then")
    parser.add_argument("--arch", default="sm_90", help="what to precompile for")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    arguments = parser.parse_args()
    if not arguments.check:
        precompile(arguments.arch, arguments.jobs)
    say(
        torch.cuda.get_device_name(),
        "torch",
        torch.__version__,
        "ptxas",
        os.environ.get("TRITON_PTXAS_PATH", "bundled"),
    )
    failures = check_shipped()
    if not arguments.check:
        sweep(arguments.seconds, arguments.out)
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
