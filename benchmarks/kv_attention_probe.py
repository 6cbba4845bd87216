#!/usr/bin/env python
"""Tiles and splits of fp4_kv_attention_decode, side by side on a GPU: ``python benchmarks/kv_attention_probe.py``.

What is best here goes into ``tile_for`` and ``splits_for`` of the op's Triton backend. Every configuration is checked
against the shipped one before it is timed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

if str(Path(__file__).parent.parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks import cases, timing
from torch_fp4ops.ops.fp4_kv_attention_decode.triton import Tile, attend, splits_for, tile_for

SHAPES = ((64, 32768, 32, 8, 128), (64, 8192, 32, 8, 128), (1, 32768, 32, 8, 128), (256, 2048, 32, 8, 128))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes, from the first")
    parser.add_argument("--tiles", action="store_true", help="tiles only, with the shipped number of splits")
    options = parser.parse_args()
    device = torch.device("cuda")
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    rate = timing.measure_ceilings(device).copy_gbps
    print(f"{torch.cuda.get_device_name()}, copy {rate:.0f} GB/s")
    for batch, tokens, q_heads, heads, dim in SHAPES[: options.shapes]:
        case = cases.fp4_kv_attention_decode(batch, tokens, q_heads, heads, dim)
        sets = case.sets(device, timing.sets_for(case.bytes, timing.l2_bytes(device)))
        shipped_tile = tile_for("nvfp4", dim, q_heads // heads, False)
        shipped_splits = splits_for(batch * heads, tokens, processors)
        wanted = _call(sets[0].args, None, None)().float()
        tiles = [
            Tile(bn, rows, stages, threads)
            for bn, rows, stages, threads in itertools.product((32, 64), (8, 16), (1, 2, 3, 5, 7), (32, 64, 128))
        ]
        splits = {shipped_splits}
        if not options.tiles:
            splits |= {n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n * 64 <= tokens}
        pairs = dict.fromkeys([(t, shipped_splits) for t in tiles] + [(shipped_tile, n) for n in sorted(splits)])
        results = []
        for tile, n in pairs:
            try:
                out = _call(sets[0].args, tile, n)().float()
                error = float((out - wanted).norm() / wanted.norm())
                assert error < 0.01, f"relative error {error:.2g}"
                us = timing.time_calls([_call(s.args, tile, n) for s in sets], device).us
            except Exception as failure:  # too much shared memory, most likely
                print(f"  {tile} splits={n}: {str(failure).splitlines()[0][:100]}")
                continue
            results.append((us, tile, n))
        print(f"{case.name}: shipped {shipped_tile} splits={shipped_splits}")
        for us, tile, n in sorted(results, key=lambda r: r[0])[:12]:
            mark = " <- shipped" if (tile, n) == (shipped_tile, shipped_splits) else ""
            print(f"  {us:9.1f} us {case.bytes / us / 1e3 / rate:5.2f} of copy  {tile} splits={n}{mark}", flush=True)
        del sets
        timing.free_memory(device)


def _call(args, tile, splits):  # type: ignore[no-untyped-def]
    q, k, v, k_sf, v_sf, tables, lengths, k_scale, v_scale = args
    scale = q.shape[2] ** -0.5
    fixed = ("NHD", scale, -1, None, "nvfp4", splits, tile)
    return lambda: attend(q, (k, v), (k_sf, v_sf), tables, lengths, (k_scale, v_scale), *fixed)


if __name__ == "__main__":
    main()
