"""Launches the Hopper products of ``_hopper_gemm``: how they are cut up, descriptors, workspace, offline cases.

How a product is cut up follows from its sizes alone: of the ways in ``WAYS``, the one whose predicted time is least.
The prediction adds up steps of 64 along K; what a step takes was measured on an NVIDIA H200 (``benchmarks/NOTES.md``).

Gluon is imported where a kernel is needed, not with this module, so that a Triton whose Gluon does not fit keeps the
backends in plain Triton, which ask ``unavailable`` first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..formats import BlockFormat
from ._triton_launch import INTERPRETED, AotCase, global_scale_form, launch, rows_of_units

__all__ = ["Way", "choose", "product", "unavailable"]

_CAPABILITY = (9, 0)


class Way(NamedTuple):
    """A way to cut a product up; see ``_hopper_gemm.Plan`` for the first fields."""

    BM: int
    R: int = 1
    KW: int = 1
    KS: int = 1
    STAGES: int = 4
    STREAM: bool = False
    RESIDENT: int = 1
    """Programs that a multiprocessor holds."""
    start: float = 4.9
    """What a launch takes beside its steps, in microseconds."""
    step: float = 0.3
    """Microseconds a step of a program."""
    shared_step: float = 0.0
    """The same with RESIDENT programs on a multiprocessor."""
    BAND: int = 8

    @property
    def rows(self) -> int:
        """Weight rows a tile."""
        return 128 * self.R // self.KW


WAYS = (
    Way(8, KS=4, STAGES=6, STREAM=True, start=3.3, step=0.18),
    Way(8, KS=4, STAGES=4, STREAM=True, RESIDENT=2, start=4.3, step=0.19, shared_step=0.32),
    Way(8, KW=2, KS=2, STAGES=8, RESIDENT=2, start=3.6, step=0.105, shared_step=0.17),
    Way(16, KS=4, STAGES=6, STREAM=True, start=3.3, step=0.20),
    Way(16, KS=4, STAGES=3, STREAM=True, RESIDENT=2, start=4.3, step=0.25, shared_step=0.385),
    Way(16, KW=2, KS=2, STAGES=8, RESIDENT=2, start=3.6, step=0.12, shared_step=0.20),
    Way(32, KS=2, STAGES=7, STREAM=True, step=0.25),
    Way(32, KS=2, STAGES=5, STREAM=True, RESIDENT=2, step=0.26, shared_step=0.42),
    Way(32, KS=2, STAGES=5, RESIDENT=2, start=4.5, step=0.23, shared_step=0.39),
    Way(64, STAGES=12, STREAM=True, step=0.32),
    Way(64, STAGES=8, STREAM=True, RESIDENT=2, step=0.32, shared_step=0.53),
    Way(64, STAGES=6, RESIDENT=2, start=4.5, step=0.265, shared_step=0.47),
    Way(128, STAGES=9, STREAM=True, start=5.0, step=0.40),
    Way(128, STAGES=7, start=5.0, step=0.36),
    Way(128, R=2, STAGES=5, STREAM=True, start=5.0, step=0.73),
    Way(128, R=2, STAGES=5, start=5.0, step=0.66),
    Way(256, STAGES=5, STREAM=True, start=6.0, step=0.68),
    Way(256, STAGES=4, start=6.0, step=0.64),
)
_SUM_START, _SUM_BYTES_PER_US = 1.2, 6e6
_REGISTERS = {1: (None, 240), 2: (80, 104)}
"""By resident programs: the registers a thread that a program starts with, and those of its warp groups later."""


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why these kernels can't run on a device; None if they can."""
    if INTERPRETED:
        return "Gluon kernels do not run in Triton's interpreter"
    if device.type != "cuda" or torch.version.hip is not None:
        return "these Gluon kernels are for NVIDIA GPUs of compute capability 9.0"
    capability = torch.cuda.get_device_capability(device)
    if capability != _CAPABILITY:
        return f"these Gluon kernels are for compute capability 9.0, not {capability[0]}.{capability[1]}"
    try:
        from . import _hopper_gemm  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"this Triton's Gluon lacks what the kernels need: {error}"
    return None


class Cut(NamedTuple):
    """A way with the numbers that follow from the sizes."""

    way: Way
    programs: int
    tiles_m: int
    tiles_n: int
    trips: int
    parts: int
    """The most programs that share a tile; 1 if every tile has one of its own."""
    us: float


def _cut(way: Way, m: int, n: int, k: int, processors: int) -> Cut | None:
    trips, rest = divmod(k, 256 * way.KW)
    tiles_n, rest_n = divmod(n, way.rows)
    if rest or rest_n:
        return None
    tiles_m = triton.cdiv(m, way.BM)
    tiles = tiles_m * tiles_n
    slots = processors * way.RESIDENT
    total = tiles * trips
    programs, parts = min(tiles, slots), 1
    if way.STREAM:
        # An equal number of whole parts for each tile where there are few, so that no program has two.
        programs = min(slots // tiles, trips) * tiles if tiles <= slots else min(slots, total)
        parts = _most_sharers(tiles, trips, programs)
    most_trips = triton.cdiv(total, programs) if way.STREAM else triton.cdiv(tiles, programs) * trips
    us = way.start + most_trips * 4 * way.KW * (way.shared_step if programs > processors else way.step)
    if parts > 1:
        shared = programs if total % programs == 0 and trips % (total // programs) == 0 else 2 * programs
        us += _SUM_START + shared * 8 * way.rows * min(way.BM, m) / _SUM_BYTES_PER_US
    return Cut(way, programs, tiles_m, tiles_n, trips, parts, us)


_COUNTED_TILES = 2048


@functools.cache
def _most_sharers(tiles: int, trips: int, programs: int) -> int:
    """The most programs that one tile's trips fall to, or a bound on it where counting would take long."""
    each, more = divmod(tiles * trips, programs)
    if tiles > _COUNTED_TILES:
        return triton.cdiv(trips - 1, each) + 1

    def at(position: int) -> int:
        longer = more * (each + 1)
        return position // (each + 1) if position < longer else more + (position - longer) // max(each, 1)

    return max(at((t + 1) * trips - 1) - at(t * trips) + 1 for t in range(tiles))


@functools.lru_cache(4096)
def choose(m: int, n: int, k: int, processors: int, out_dtype: torch.dtype = torch.bfloat16) -> Cut:
    """The cut of least predicted time for m rows and a weight of n x k, padded."""
    least = next((bm for bm in (8, 16, 32, 64) if m <= bm), 64)
    most = 4 * least if m > 32 else least
    ways = [way for way in WAYS if least <= way.BM <= most]
    if out_dtype == torch.float32:  # which threads store; more sums leave them no registers
        ways = [way for way in ways if way.R * way.BM <= 128]
    cuts = [_cut(way, m, n, k, processors) for way in ways]
    return min((cut for cut in cuts if cut is not None), key=lambda cut: cut.us)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def product(x: Tensor, weight: Tensor, scale: Tensor, fmt: BlockFormat, out: Tensor, alpha: Tensor | None) -> None:
    """``out = (x @ w.T) * alpha``, accumulated in fp32 and rounded once.

    Args:
        x: bfloat16 ``[m, k]``, or float16 for NVFP4.
        weight, scale: bytes of the layout "hopper", ``[n, K / elements a byte]`` and ``[n, K / block_size]``, with n a
            multiple of 128 and K, k rounded up to 256.
        out: bfloat16, float16 or float32 ``[m, n]``, contiguous.
        alpha: float32, one element or one a row, or None.
    """
    n = out.shape[1]
    k = weight.shape[1] * fmt.elements_per_byte
    if out.numel():
        cut = choose(x.shape[0], n, k, _processors(out.device), out.dtype)
        multiply(x, weight, scale, fmt, out, alpha, cut)


def multiply(
    x: Tensor, weight: Tensor, scale: Tensor, fmt: BlockFormat, out: Tensor, alpha: Tensor | None, cut: Cut
) -> None:
    """``product``, cut up in a given way."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ._hopper_gemm import matmul_kernel
    from ._hopper_schedule import sum_parts_kernel

    way = cut.way
    m, n = out.shape
    x, _ = rows_of_units(x)
    alpha, alpha_form = global_scale_form(alpha)
    constants = _constants(way, fmt.name, x.dtype, out.dtype, alpha_form) | {"STREAM": cut.parts > 1}
    layouts = _layouts()
    blocks = _blocks(way, fmt.name)
    x_desc = TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [way.BM, 64], layouts[0])
    weight_descs = []
    for data, block in zip((weight, scale), blocks, strict=True):
        words = data.view(torch.int32).view(-1, block[1])
        weight_descs.append(TensorDescriptor(words, list(words.shape), [block[1], 1], block, layouts[1]))
    out_desc = None
    if constants["TMA_STORE"]:
        out_desc = TensorDescriptor(out, [m, n], [n, 1], [way.BM, 64], layouts[0])
    sums = None
    if cut.parts > 1:
        sums = torch.empty(2 * cut.programs * way.rows * way.BM, dtype=torch.float32, device=out.device)
    sizes = (m, n, cut.tiles_m, cut.tiles_n, cut.trips)
    args = (x_desc, *weight_descs, out_desc, out, sums, alpha, *sizes)
    most = _REGISTERS[way.RESIDENT][0]
    launch(matmul_kernel, (cut.programs,), 128, out.device, *args, max_registers=most, **constants)
    if sums is not None:
        rows = min(way.BM, 16)
        grid = (cut.tiles_m * cut.tiles_n * (way.rows // 64), triton.cdiv(min(way.BM, m), rows))
        shared = {key: constants[key] for key in ("BM", "BAND", "ALPHA", "FACTOR")}
        shared |= {"SUBS": way.rows // 64, "ROWS": rows, "PARTS": cut.parts}
        launch(sum_parts_kernel, grid, 128, out.device, sums, out, alpha, *sizes, cut.programs, **shared)


@functools.cache
def _layouts() -> tuple[Any, Any]:
    """Shared memory of rows of 16-bit numbers, and of words of weights."""
    import triton.experimental.gluon.language as gl

    return gl.NVMMASharedLayout(128, 16, rank=2), gl.NVMMASharedLayout(0, 32, rank=2)


def _blocks(way: Way, fmt: str) -> tuple[list[int], list[int]]:
    """What a TMA load takes of codes and of scales, in words."""
    from ._hopper_decode import scale_words

    halves = min(way.rows // 64, 2)
    return [halves * (16 if fmt == "mxfp8" else 8), 64], [halves, 32 * scale_words(fmt)]


def _constants(way: Way, fmt: str, dtype: torch.dtype, out_dtype: torch.dtype, alpha_form: int) -> dict[str, Any]:
    from ._hopper_decode import FACTORS

    KS, stages = _stages(way, fmt)
    return {
        "FMT": fmt,
        "HALF": dtype == torch.float16,
        "BM": way.BM,
        "R": way.R,
        "KW": way.KW,
        "KS": KS,
        "STAGES": stages,
        "STREAM": way.STREAM,
        # The others are stored by threads: narrow tiles and shared ones gain little, and float32 has no room.
        "TMA_STORE": _has_buffer(way) and out_dtype != torch.float32,
        "BAND": way.BAND,
        "ALPHA": alpha_form,
        "FACTOR": FACTORS[fmt],
        "REGISTERS": _REGISTERS[way.RESIDENT][1],
    }


def _has_buffer(way: Way) -> bool:
    return way.BM >= 64 and (way.R == 2 or not way.STREAM)


def _stages(way: Way, fmt: str) -> tuple[int, int]:
    """KS and the number of stages: as the way says, or what has room with MXFP8's weights, twice as large."""
    if fmt != "mxfp8":
        return way.KS, way.STAGES
    steps = min(way.KS, 2)
    room = 227 * 1024 // way.RESIDENT - 3072
    if _has_buffer(way):
        room -= way.rows * way.BM * 2
    if way.KW > 1:
        room -= way.rows * way.BM * 4 * (way.KW - 1)
    stage = steps * (way.BM * 128 + way.rows * 66)
    return steps, min(way.STAGES * way.KS // steps, room // stage) // way.KW * way.KW


# What is compiled offline

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def offline_cases() -> Iterator[AotCase]:
    """Every way for NVFP4, those with the largest and the smallest tiles otherwise, and sums of parts; for sm_90."""
    from ._hopper_schedule import sum_parts_kernel

    for way in WAYS:
        yield _offline_case(way, "nvfp4")
    ends = (WAYS[0], WAYS[2], WAYS[-4], WAYS[-3], WAYS[-1])
    for way in ends:
        yield _offline_case(way, "mxfp4")
        yield _offline_case(way, "mxfp8")
    for way in (WAYS[0], WAYS[-3], WAYS[-1]):
        yield _offline_case(way, "nvfp4", torch.float16, torch.float16)
    yield _offline_case(WAYS[-5], "nvfp4", out_dtype=torch.float32, alpha_form=2)
    ints = dict.fromkeys(("M", "N", "tiles_m", "tiles_n", "TRIPS", "programs"), "i32")
    signature = {"sums": "*fp32", "out": "*bf16", "alpha": "*fp32", **ints}
    for bm, parts in ((8, 2), (256, 9)):
        constants = {"BM": bm, "SUBS": 2, "BAND": 8, "ALPHA": 1, "FACTOR": 128.0, "ROWS": min(bm, 16), "PARTS": parts}
        yield AotCase(f"hopper-sum-{bm}x{parts}", sum_parts_kernel, signature, constants, 128, ("N",))


def _offline_case(
    way: Way,
    fmt: str,
    dtype: torch.dtype = torch.bfloat16,
    out_dtype: torch.dtype = torch.bfloat16,
    alpha_form: int = 1,
) -> AotCase:
    from ._hopper_gemm import matmul_kernel

    constants = _constants(way, fmt, dtype, out_dtype, alpha_form)
    layouts, blocks = _layouts(), _blocks(way, fmt)
    signature = {
        "x_desc": f"tensordesc<{_TYPES[dtype]}[{way.BM}, 64],{layouts[0]!r}>",
        "codes_desc": f"tensordesc<i32{blocks[0]},{layouts[1]!r}>",
        "scales_desc": f"tensordesc<i32{blocks[1]},{layouts[1]!r}>",
        "out": f"*{_TYPES[out_dtype]}",
        "alpha": "*fp32",
        **dict.fromkeys(("M", "N", "tiles_m", "tiles_n", "TRIPS"), "i32"),
    }
    if constants["TMA_STORE"]:
        signature["out_desc"] = f"tensordesc<{_TYPES[out_dtype]}[{way.BM}, 64],{layouts[0]!r}>"
    if way.STREAM:
        signature["sums"] = "*fp32"
    for name in ("out_desc", "sums"):
        if name not in signature:
            constants[name] = None
    kind = f"{fmt}-{_TYPES[dtype]}-{_TYPES[out_dtype]}"
    tile = f"{way.BM}x{way.rows}{f'-kw{way.KW}' * (way.KW > 1)}{'-stream' * way.STREAM}-{way.RESIDENT}"
    most = _REGISTERS[way.RESIDENT][0]
    return AotCase(f"hopper-{kind}-{tile}", matmul_kernel, signature, constants, 128, ("N",), most)
