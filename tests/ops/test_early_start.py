"""On a GPU that starts a kernel before the one in front has ended: nothing is read or written too early."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

import triton
import triton.language as tl

from torch_fp4ops.formats import MXFP8, NVFP4
from torch_fp4ops.ops import _hopper_launch
from torch_fp4ops.ops._hopper_ways import AT_ONCE, STRIPS, WAYS, AtOnce, Way, cut
from torch_fp4ops.ops._triton_gemm_launch import Operand
from torch_fp4ops.testing import assert_same_bytes
from torch_fp4ops.testing.samples import values

from .test_every_op import tensors
from .test_hopper_strips import quantized_rows
from .test_hopper_ways import needs_hopper
from .test_on_gpu import CASES, able, call, gpu_samples

pytestmark = pytest.mark.gpu

LATE_NS = 100_000
BLOCK = 1 << 12


@pytest.fixture(autouse=True)
def starts_early():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("before compute capability 9.0 kernels start one after the other")


@triton.jit
def copy_late_kernel(source_ptr, target_ptr, count, LATE: tl.constexpr, BLOCK: tl.constexpr):
    """Lets the next kernel start at once, and copies later; it waits for no other itself."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )
    now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    end = now + LATE
    while now < end:
        now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + i, tl.load(source_ptr + i, mask=i < count), mask=i < count)


def copy_late(source: Tensor, target: Tensor, late_ns: int = LATE_NS, early: bool = False) -> None:
    """All bytes of the memory of a tensor to that of another one like it; ``early``: without waiting itself."""
    whole = [torch.empty(0, dtype=torch.uint8, device="cuda").set_(t.untyped_storage()) for t in (source, target)]
    count = whole[0].numel()
    if count:
        copy_late_kernel[(triton.cdiv(count, BLOCK),)](*whole, count, late_ns, BLOCK, launch_pdl=early)


def eager_and_captured(work: Callable[[], list[Tensor]], blank: Callable[[], None]) -> Iterator[list[Tensor]]:
    """What ``work`` gives at once and in a graph, each time after ``blank``."""
    for _ in range(3):  # worked out, traced, replayed
        blank()
        torch.cuda.synchronize()
        out = work()
    yield out
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    blank()
    torch.cuda.synchronize()
    graph.replay()
    yield out


def test_a_kernel_that_does_not_wait_starts_early():
    """Else the tests below would prove nothing."""
    x = values(0, 64, 64).cuda()
    late, read = torch.empty_like(x), torch.empty_like(x)

    def work() -> list[Tensor]:
        copy_late(x, late, 1_000_000)
        copy_late(late, read, 0, early=True)
        return [read]

    for (out,) in eager_and_captured(work, lambda: late.zero_()):
        assert not out.any()
        assert torch.equal(late, x)


@pytest.mark.parametrize(("name", "i"), CASES)
def test_ops_wait_for_each_input(name, i):
    sample = gpu_samples(name)[i]
    for backend in {"triton", "gluon"} & set(able(name, sample)):
        wanted = call(name, sample.clone(), backend)
        given = sample.clone()
        pairs = list(zip(tensors((sample.args, sample.kwargs)), tensors((given.args, given.kwargs)), strict=True))
        assert_waits(pairs, lambda given=given, backend=backend: call(name, given, backend), wanted)


def assert_waits(pairs: list[tuple[Tensor, Tensor]], run: Callable[[], list[Tensor]], wanted: list[Tensor]) -> None:
    """Each input in turn is written by the kernel before, late, from the first of its pair to the second."""
    for last, late in enumerate(pairs):

        def work(last=last, late=late) -> list[Tensor]:
            for source, target in (*pairs[:last], *pairs[last + 1 :]):
                target.copy_(source)
            copy_late(*late)
            return run()

        for got in eager_and_captured(work, lambda: [target.zero_() for _, target in pairs]):
            for a, b in zip(got, wanted, strict=True):
                assert_same_bytes(a, b, f"tensor {last} written late")


PRODUCTS = [(NVFP4, way) for way in (*WAYS, *STRIPS["nvfp4"][::4], *AT_ONCE[::3])]
PRODUCTS += [(MXFP8, way) for way in (*WAYS[-7::3], *STRIPS["mxfp8"][2::4], *AT_ONCE[1::3])]


@pytest.mark.parametrize(("fmt", "way"), PRODUCTS, ids=str)
@pytest.mark.parametrize("quantized", [False, True])
def test_products_wait_however_they_are_cut_up(fmt, way, quantized):
    needs_hopper()
    m, n, k = 2 * way.BM if isinstance(way, Way) else way.BM, 896, 1024 if isinstance(way, AtOnce) else 4096
    chosen = cut(way, m, n, k, torch.cuda.get_device_properties(0).multi_processor_count, fmt.name)
    if chosen is None:
        pytest.skip("not a way for these sizes")
    weights = quantized_rows(n, k, fmt, "128x4", 1, "cuda")
    alpha = torch.rand(1, device="cuda") + 0.5
    rows = [torch.randn(m, k, device="cuda").bfloat16()]
    if quantized:
        a = quantized_rows(m, k, fmt, "128x4", 2, "cuda")
        rows = [a.elements, a.scales]
    pairs = [(t, torch.empty_like(t)) for t in (weights.elements, weights.scales, alpha, *rows)]

    def product(weight: Tensor, scale: Tensor, alpha: Tensor, *rows: Tensor) -> list[Tensor]:
        a = Operand.of(fmt, rows[0], rows[1], "128x4") if quantized else Operand(rows[0])
        out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        _hopper_launch.multiply(a, weight, scale, fmt, out, alpha, chosen)
        return [out]

    wanted = product(*(source for source, _ in pairs))
    assert_waits(pairs, lambda: product(*(target for _, target in pairs)), wanted)


def quantized(x: Tensor) -> list[Tensor]:
    return tensors(torch.ops.fp4.fp4_quantize(x, torch.ones(1, device="cuda")))


def test_ops_wait_for_other_streams():
    x = values(0, 64, 64).cuda()
    late, unrelated, side = torch.empty_like(x), torch.empty_like(x), torch.cuda.Stream()
    wanted = quantized(x)

    def work() -> list[Tensor]:
        here = torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            copy_late(x, late, 2 * LATE_NS)
        copy_late(x, unrelated)
        here.wait_stream(side)
        return quantized(late)

    for got in eager_and_captured(work, lambda: late.zero_()):
        for a, b in zip(got, wanted, strict=True):
            assert_same_bytes(a, b)


def test_ops_do_not_write_where_something_is_still_read():
    x = values(0, 64, 64).cuda()
    payload, _ = quantized(x)
    wanted = torch.full_like(payload, 7)
    seen = torch.empty_like(wanted)
    for _ in range(3):
        held = torch.full_like(payload, 7)
        address = held.data_ptr()
        copy_late(held, seen)
        del held
        assert address in {t.data_ptr() for t in quantized(x)}  # the same memory
        assert_same_bytes(seen, wanted)
