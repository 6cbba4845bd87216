"""Time tilings of the fused quantisation kernels on this GPU: ``python benchmarks/fused_probe.py [--seconds N]``.

Every tiling's bytes are compared with those of the tiling that ships, which the tests hold to the reference, before it
is timed. Times and fractions are as in ``quantize_probe.py``. ``$OUT`` (or ``--out``) gets fused_probe.csv.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.probing import START, say
from benchmarks.quantize_probe import COLD_BYTES, copy_rate, microseconds
from torch_fp4ops import scale_layouts
from torch_fp4ops.formats import MXFP4, NVFP4, BlockFormat
from torch_fp4ops.ops import _triton_quantize
from torch_fp4ops.ops import _triton_rms_norm as rms
from torch_fp4ops.ops._triton_launch import Tiling

LAYOUT = scale_layouts.SWIZZLED_128X4
SHAPES = [(8192, 4096), (1, 4096), (8192, 16384), (32768, 8192), (128, 7168), (8192, 7168), (32, 16384), (32768, 1024)]

Run = Callable[[Tensor, Tensor, Tensor, "Tiling | rms.RowTiling | None"], None]


def silu(fmt: BlockFormat, gs: Tensor | None, weight: Tensor) -> Run:
    return lambda x, codes, sf, tile: _triton_quantize.quantize_rows(
        x, fmt, LAYOUT, gs, False, codes, sf, gated=True, tile=tile
    )


def norm(fmt: BlockFormat, gs: Tensor | None, weight: Tensor) -> Run:
    return lambda x, codes, sf, tile: rms.rms_norm_quantize_rows(
        x, weight, 1e-6, fmt, LAYOUT, gs, False, codes, sf, tile=tile
    )


def silu_tilings(blocks: int) -> Iterator[Tiling]:
    for threads, iters, split in itertools.product((64, 128, 256), (1, 2, 4), (1, 2)):
        for ahead in range(1, min(iters, 3) + 1):
            yield Tiling(4, threads // 4 // split, iters, split, ahead)


def norm_tilings(blocks: int) -> Iterator[rms.RowTiling]:
    for c in (32, 64, 128, 256, 512):
        steps = -(-blocks // c)
        if steps <= 8 and c < 2 * blocks:
            for rows in {1, max(1, 128 // c)}:
                for iters in (1, 4):
                    if steps * iters <= 8:
                        yield rms.RowTiling(rows, c, steps, iters)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    arguments = parser.parse_args()
    copy = copy_rate()
    say(f"{torch.cuda.get_device_name()}: copy {copy:.0f} GB/s")
    rows: list[tuple[object, ...]] = []
    for m, k in SHAPES:
        for name, fmt in (("silu", NVFP4), ("norm", NVFP4), ("silu", MXFP4), ("norm", MXFP4)):
            if time.time() - START < arguments.seconds:
                rows += probe(name, fmt, m, k, copy)
    with open(arguments.out / "fused_probe.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("kernel", "format", "m", "k", "tiling", "us", "fraction_of_copy", "status"), *rows]
        )
    return any(row[-1] not in ("ok", "ships") for row in rows)


def probe(name: str, fmt: BlockFormat, m: int, k: int, copy: float) -> list[tuple[object, ...]]:
    blocks = k // fmt.block_size
    width = 2 * k if name == "silu" else k
    gs = torch.full((1,), 168.0, device="cuda") if fmt.has_global_scale else None
    weight = torch.randn(k, device="cuda", dtype=torch.bfloat16)
    run = (silu if name == "silu" else norm)(fmt, gs, weight)
    moved = 2 * m * width + m * k // 2 + m * blocks
    xs = [torch.randn(m, width, device="cuda", dtype=torch.bfloat16)]
    xs += [xs[0].clone() for _ in range(min(64, COLD_BYTES // moved))]
    sf = scale_layouts.scale_shape(m, blocks, LAYOUT)

    def outputs(fill: int) -> tuple[Tensor, Tensor]:
        shapes = ((m, k // 2), sf)
        return tuple(torch.full(s, fill, dtype=torch.uint8, device="cuda") for s in shapes)  # type: ignore[return-value]

    sets = [(x, *outputs(0)) for x in xs]
    wanted = outputs(0xEE)
    run(xs[0], *wanted, None)
    rows: list[tuple[object, ...]] = []
    tilings = silu_tilings(blocks) if name == "silu" else norm_tilings(blocks)
    for tile in (None, *tilings):
        us, status = float("nan"), "ships" if tile is None else "ok"
        try:
            given = outputs(0x77)
            run(xs[0], *given, tile)
            if not all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True)):
                status = "wrong bytes"
            else:
                us = microseconds([lambda s=s, t=tile: run(*s, t) for s in sets])
        except Exception as error:  # a tiling that does not compile is a result
            status = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        rows.append(
            (name, fmt.name, m, k, tile and tuple(tile), round(us, 2), round(moved / us / 1e3 / copy, 3), status)
        )
    best = sorted((r for r in rows if r[5] == r[5]), key=lambda r: r[5])[:3]
    say(name, fmt.name, m, k, "ships", rows[0][5:7], "best", [(r[4], r[5], r[6]) for r in best])
    return rows


if __name__ == "__main__":
    sys.exit(main())
