"""Every way to cut a Hopper product up: what it needs of shared memory, and, on a GPU, what it computes."""

from __future__ import annotations

import contextlib
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from torch_fp4ops import capture
from torch_fp4ops.block_quantization import dequantize_blocks
from torch_fp4ops.cuda_graphs import FirstUseInCapture
from torch_fp4ops.formats import FORMATS, MXFP8, NVFP4, BlockFormat
from torch_fp4ops.hopper_layout import pack_hopper_weight
from torch_fp4ops.testing import assert_matmul_close

pytest.importorskip("triton.experimental.gluon", reason="needs Gluon")

from torch_fp4ops.ops import _hopper_kernels, _hopper_launch
from torch_fp4ops.ops._hopper_plan import SHARED_BYTES
from torch_fp4ops.ops._hopper_ways import WAYS, Cut, Way, choose, cut, float32_ways
from torch_fp4ops.ops._triton_gemm_launch import Operand

from ..gluon_interpreter import interpreted

PROCESSORS = 132


def name_of(way: Way) -> str:
    flags = "-stream" * way.STREAM + f"-cluster{way.CLUSTER}" * (way.CLUSTER > 1) + "-once" * way.ONCE
    return f"{way.BM}x{way.rows}x{way.KS}-{way.KW}-{way.STAGES}-{way.AHEAD}{flags}-{way.RESIDENT}"


def needs_hopper() -> None:
    if _hopper_launch.unavailable(torch.device("cuda", 0)):
        pytest.skip("needs compute capability 9.0")


ways = pytest.mark.parametrize("way", WAYS, ids=name_of)
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)


@ways
@formats
def test_stages_are_enough_and_have_room(way, fmt):
    stages = []
    for one_tile in (False, True):
        plan = _hopper_kernels.tile_plan(way, fmt.name, torch.bfloat16, torch.bfloat16, 1, one_tile=one_tile)
        assert plan.STAGES % plan.KW == 0  # groups that take turns have stages of their own
        assert (plan.KW if plan.MMA else plan.LEAST_STAGES) <= plan.STAGES
        assert plan.AHEAD + plan.R <= 3 and not (plan.ONCE and (plan.STREAM or plan.R > 1))
        assert plan.KW == 1 or not plan.ONCE or plan.CLUSTER > 1
        used = plan.STAGES * plan.STAGE_BYTES + plan.RESULT_BYTES + _hopper_kernels.BARRIER_BYTES
        assert used <= SHARED_BYTES // way.RESIDENT
        stages.append(plan.STAGES)
    assert stages[0] <= stages[1]


@pytest.mark.parametrize("tile", [32, 64, 96, 128, 192, 256])
def test_few_rows_beyond_the_last_are_loaded(tile):
    for m in range(1, 2 * tile + 1):
        rows = _hopper_kernels.rows_at_once(tile, m)
        assert (tile & -tile) % rows == 0  # of both accumulators
        assert -m % rows < (tile // 4 if tile > 64 else 32)
        assert rows == tile & -tile or m % tile


def test_small_weights_are_shared_by_warp_groups():
    """Tiles of 64 rows give more multiprocessors one than tiles of 128."""
    for m, n, k in ((32, 7168, 2048), (64, 7168, 2048), (128, 4096, 4096), (256, 2048, 4096)):
        way = choose(m, n, k, PROCESSORS).way
        assert isinstance(way, Way) and way.KW == 2 and not way.STREAM


def test_rows_between_powers_of_two_have_tiles_of_their_own():
    for m, n, k, rows in (
        (192, 28672, 8192, 192),
        (384, 7168, 2048, 192),
        (768, 4096, 4096, 192),
        (96, 7168, 2048, 96),
    ):
        chosen = [choose(m, n, k, PROCESSORS, fmt=fmt).way.BM for fmt in FORMATS]
        assert chosen == [rows] * len(FORMATS)


@ways
def test_boxes_of_a_cluster_are_apart_and_have_room(way):
    plan = _hopper_kernels.tile_plan(way, "nvfp4", torch.bfloat16, torch.bfloat16, 1)
    assert (plan.CLUSTER_BYTES > 0) == (way.CLUSTER > 1)
    if way.CLUSTER > 1:
        taken = set()
        for box in plan.BOXES:
            assert box.size == 128 * 4 * box.numbers * (way.CLUSTER - 1) and box.numbers % 4 == box.at % 16 == 0
            taken |= {*range(box.at, box.at + box.size), *range(box.full, box.full + 8)}
        assert len(taken) == sum(box.size + 8 for box in plan.BOXES) and max(taken) < plan.CLUSTER_BYTES
        assert plan.CLUSTER_BYTES % 16 == 0
        assert sum(box.numbers for box in plan.BOXES) * 128 * way.CLUSTER == way.rows * way.BM


@pytest.mark.parametrize("processors", [78, PROCESSORS])
def test_all_clusters_run_at_a_time(processors):
    seen = set()
    for n in range(128, 8320, 128):
        for m in (17, 40, 64, 90, 200, 500):
            chosen = choose(m, n, 4096, processors)
            if isinstance(chosen.way, Way) and chosen.way.CLUSTER > 1:
                seen.add(chosen.way.CLUSTER)
                tiles = chosen.tiles_m * chosen.tiles_n
                assert chosen.programs == tiles * chosen.way.CLUSTER and chosen.parts == 1
                # Of 8 groups, each an even number of multiprocessors, every one may have two that no four take.
                left = [2 * groups for groups in range(9) if (processors - 2 * groups) % 4 == 0]
                assert tiles <= (processors // 2 if chosen.way.CLUSTER == 2 else (processors - max(left)) // 4)
            without = choose(m, n, 4096, processors, clusters=False).way
            assert not isinstance(without, Way) or without.CLUSTER == 1
    assert seen == {2, 4}


@pytest.mark.parametrize("processors", [78, PROCESSORS])
def test_what_comes_early_to_add_parts_up_has_a_multiprocessor_each(processors):
    early = set()
    for way in WAYS:
        for m in (1, way.BM - 3, way.BM, 5 * way.BM // 2):
            for n, k in ((4096, 4096), (8192, 28672), (256, 7168), (28672, 8192)):
                chosen = cut(way, m, n, k, processors)
                if chosen is None or chosen.parts == 1:
                    assert chosen is None or not chosen.sum_early
                    continue
                rows, tiles = min(way.BM, m), chosen.tiles_m * chosen.tiles_n * way.rows // 64
                assert way.BM % chosen.sum_rows == (32 if (way.BM, chosen.sum_rows) == (96, 64) else 0)
                assert _hopper_kernels.sum_threads(chosen.sum_rows) <= 512
                assert chosen.sum_early == (tiles * -(-rows // 64) <= processors)
                assert not chosen.sum_early or tiles * -(-rows // chosen.sum_rows) <= processors
                early.add(chosen.sum_early)
    assert early == {True, False}


@ways
@pytest.mark.parametrize("fmt", [NVFP4, MXFP8], ids=lambda fmt: fmt.name)
def test_a_way_is_right_in_the_interpreter(way, fmt):
    """With an almost empty last tile of x, programs of several tiles, and parts where the way has them."""
    m, n = way.BM + way.BM // 4 + 1, max(256, 2 * way.rows)
    k = 256 * way.KW * max(3, way.CLUSTER + 1)
    cuts = [cut(way, m, n, k, processors, fmt.name) for processors in (3, 2, 4, PROCESSORS)]
    chosen = next(each for each in cuts if each is not None and (each.parts > 1) == way.STREAM)
    check_way(chosen, m, n, k, fmt, device="cpu")


@pytest.mark.gpu
@ways
@formats
def test_a_way_is_right_and_always_the_same(way, fmt):
    needs_hopper()
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    trip = 256 * way.KW
    rows_of_all = 5 * processors * way.RESIDENT * way.rows // 2 // 256 * 256
    cuts = []
    # Few tiles; more than there are places for at a time; the last one almost empty and fewer steps than stages; as many
    # as let 64 rows be summed at a time.
    few, many, short, half = (
        (2 * way.BM - 3, 768, 4 * trip),
        (way.BM - 1, rows_of_all, 2 * trip),
        (way.BM + way.BM // 4, 768, trip),
        (2 * way.BM, 2048, 4 * trip),
    )
    for m, n, k in (few, many, short, half):
        chosen = cut(way, m, n, k, processors)
        if chosen is not None:
            cuts.append(chosen)
            check_way(chosen, m, n, k, fmt)
    assert cuts


@pytest.mark.gpu
@ways
def test_a_way_is_right_for_other_types(way):
    needs_hopper()
    m, n, k = way.BM + 5, 512, 256 * way.KW * max(2, way.CLUSTER)
    chosen = cut(way, m, n, k, torch.cuda.get_device_properties(0).multi_processor_count)
    assert chosen is not None
    check_way(chosen, m, n, k, NVFP4, torch.float16, torch.float16)
    if way in float32_ways([way]):
        check_way(chosen, m, n, k, NVFP4, out_dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), [(40, 4096, 4096), (30, 1536, 7168), (250, 2048, 7168)])
def test_ops_with_clusters_at_once_and_in_graphs(m, n, k):
    """At once: worked out, traced, and replayed, which launch in three ways."""
    needs_hopper()
    way = choose(m, n, k, torch.cuda.get_device_properties(0).multi_processor_count).way
    assert isinstance(way, Way) and way.CLUSTER > 1
    codes = torch.randint(0, 256, (n, k // 2), device="cuda").to(torch.uint8)
    scales = torch.randint(0x20, 0x40, (n, k // 16), device="cuda").to(torch.uint8)
    weight, scale = pack_hopper_weight(codes, scales, NVFP4)
    x = torch.randn(m, k, device="cuda").bfloat16()

    def product() -> Tensor:
        return torch.ops.fp4.mm_bf16_fp4(x, weight, scale, block_size=16, b_layout="hopper", backend="gluon")

    first = product()
    assert_matmul_close(first, x, dequantize_blocks(codes, scales, NVFP4))
    assert all(torch.equal(product(), first) for _ in range(5))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = product()
    out.zero_()
    graph.replay()
    assert torch.equal(out, first)


@pytest.mark.gpu
def test_first_use_of_clusters_is_refused_in_a_capture(monkeypatch):
    needs_hopper()
    from torch_fp4ops.ops._hopper_gemm import matmul_kernel

    chosen = choose(64, 4096, 4096, PROCESSORS)
    assert isinstance(chosen.way, Way) and chosen.way.CLUSTER > 1
    monkeypatch.setattr(matmul_kernel, "device_caches", defaultdict(matmul_kernel.create_binder))
    monkeypatch.setattr(capture, "capturing", lambda: True)
    with pytest.raises(FirstUseInCapture, match="Triton kernel matmul_kernel would be compiled"):
        check_way(chosen, 64, 4096, 4096, NVFP4)


def check_way(
    chosen: Cut,
    m: int,
    n: int,
    k: int,
    fmt: BlockFormat,
    dtype: torch.dtype = torch.bfloat16,
    out_dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> None:
    """Within the bound, and the same each time: on a GPU, or interpreted, with other orders of events."""
    codes = torch.randint(0, 256, (n, k // fmt.elements_per_byte), device=device).to(torch.uint8)
    if fmt is MXFP8:
        codes[(codes & 0x7F) == 0x7F] = 0
    low, high = (0x20, 0x60) if fmt is NVFP4 else (116, 128)
    scales = torch.randint(low, high, (n, k // fmt.block_size), device=device).to(torch.uint8)
    weight, scale = pack_hopper_weight(codes, scales, fmt)
    x = torch.randn(m, k, device=device).to(dtype)
    alpha = torch.rand(m, device=device) + 0.5

    def product(run: int) -> Tensor:
        out = torch.full((m, n), torch.nan, device=device, dtype=out_dtype)
        with interpreted(run) if device == "cpu" else contextlib.nullcontext():
            _hopper_launch.multiply(Operand(x), weight, scale, fmt, out, alpha, chosen)
        return out

    first = product(0)
    values = codes.view(torch.float8_e4m3fn) if fmt is MXFP8 else codes
    assert_matmul_close(first, x, dequantize_blocks(values, scales, fmt), alpha)
    assert all(torch.equal(product(run), first) for run in range(1, 2 if device == "cpu" else 51))
