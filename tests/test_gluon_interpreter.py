"""What the interpreter of Gluon kernels takes for wrong, and the PTX that it evaluates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton.experimental.gluon", reason="needs Gluon")

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from torch_fp4ops.ops._gluon import async_load, async_store, copy_async, run_asm
from torch_fp4ops.ops._hopper_kernels import shared_layout
from torch_fp4ops.ops._hopper_schedule import wait_for_previous

from .gluon_interpreter import Deadlock, launch
from .gluon_interpreter.ptx import evaluate


@gluon.jit
def _after(group, out, barrier):
    wait_for_previous()
    mbarrier.wait(barrier, 0)
    gl.store(out, 2.0 + gl.zeros([], gl.float32))


@gluon.jit
def _before(group, out, barrier):
    wait_for_previous()
    gl.store(out, 1.0 + gl.zeros([], gl.float32))
    mbarrier.arrive(barrier)


@gluon.jit
def two_groups(out, COUNT: gl.constexpr):
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=COUNT)
    gl.warp_specialize([(_after, (0, out, barrier)), (_before, (1, out, barrier))], [1], [24])


@gluon.jit
def copies(x, out, WAIT: gl.constexpr, BEGIN: gl.constexpr, FIRST: gl.constexpr):
    if BEGIN:
        wait_for_previous()
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    i = gl.arange(0, 32, L)
    to = gl.allocate_shared_memory(gl.float32, [32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    copy_async(to, x + FIRST + i)
    async_copy.commit_group()
    run_asm(WAIT)
    gl.store(out + i, to.load(L))


@gluon.jit
def products(x_desc, out_desc, BYTES: gl.constexpr, LATER: gl.constexpr, STORED: gl.constexpr):
    wait_for_previous()
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    x = gl.allocate_shared_memory(gl.bfloat16, [64, 64], x_desc.layout)
    result = gl.allocate_shared_memory(gl.bfloat16, [64, 64], x_desc.layout)
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    mbarrier.expect(barrier, BYTES)
    async_load(x_desc, [0, 0], barrier, x)
    mbarrier.wait(barrier, 0)
    acc = gl.zeros([64, 64], gl.float32, ACC)
    acc = warpgroup_mma(x.load(ACC), x, acc, is_async=True)
    acc = warpgroup_mma(x.load(ACC), x, acc, is_async=True)
    acc = warpgroup_mma_wait(LATER, deps=[acc])
    result.store(acc.to(gl.bfloat16))
    async_store(out_desc, [32, 0], result)
    if STORED:
        tma.store_wait(0)


def run(kernel, *args, seed=0, **constants):
    launch(kernel, (1,), 128, torch.device("cpu"), *args, seed=seed, **constants)


def test_groups_wait_for_each_other_in_any_order():
    for seed in range(10):
        out = torch.zeros(1)
        run(two_groups, out, COUNT=1, seed=seed)
        assert out == 2


def test_a_deadlock_says_who_waits():
    with pytest.raises(Deadlock, match=r"program \(0, 0\) waits for parity 0 of a barrier$"):
        run(two_groups, torch.zeros(1), COUNT=2)


def copied(wait="cp.async.wait_group 0; // $0", begin=True, first=0):
    x, out = torch.arange(40.0), torch.zeros(32)
    run(copies, x, out, WAIT=wait, BEGIN=begin, FIRST=first)
    return out


def test_copies_are_there_once_they_are_waited_for():
    assert torch.equal(copied(first=8), torch.arange(8.0, 40.0))
    with pytest.raises(AssertionError, match="leaves work behind"):
        copied(wait="cp.async.wait_group 1; // $0")


def test_memory_is_that_of_tensors_behind_the_kernel_in_front():
    with pytest.raises(AssertionError, match=r"places \[40\] of 40 elements"):
        copied(first=9)
    with pytest.raises(AssertionError, match="before the kernel in front"):
        copied(begin=False)


def multiplied(seed, size=64 * 64 * 2, later=0, stored=True):
    x, out = torch.randint(-3, 4, (64, 64)).bfloat16(), torch.zeros(80, 64, dtype=torch.bfloat16)
    descriptors = [TensorDescriptor(t, list(t.shape), [64, 1], [64, 64], shared_layout(128, 16, 2)) for t in (x, out)]
    run(products, *descriptors, BYTES=size, LATER=later, STORED=stored, seed=seed)
    return x.float(), out.float()


def test_products_are_there_once_they_are_waited_for():
    for seed in range(10):
        x, out = multiplied(seed)
        wanted = (2 * x @ x).bfloat16().float()
        assert torch.equal(out[32:], wanted[:48]) and not out[:32].any()
    with pytest.raises(AssertionError, match="before they were waited for"):
        for seed in range(10):
            multiplied(seed, later=1)
    with pytest.raises(AssertionError, match="leaves work behind"):
        multiplied(0, stored=False)


def test_bytes_are_those_that_a_barrier_was_told_of():
    with pytest.raises(AssertionError, match="more bytes come"):
        multiplied(0, size=64)
    with pytest.raises(Deadlock):
        multiplied(0, size=64 * 64 * 2 + 16)


words = st.integers(0, 2**32 - 1)


def computed(asm, *inputs):
    (result,) = evaluate(asm, [np.array([word], np.uint32) for word in inputs], 1)
    return int(result[0])


@given(words, words, words)
def test_ptx_of_integers(a, b, c):
    assert computed("shl.b32 $0, $1, 5; shr.u32 $0, $0, 3;", a) == (a << 5 & 0xFFFFFFFF) >> 3
    assert computed("shf.r.wrap.b32 $0, $1, $2, 6;", a, b) == (b << 32 | a) >> 6 & 0xFFFFFFFF
    assert computed("mad.lo.u32 $0, $1, $2, $3;", a, b, c) == (a * b + c) & 0xFFFFFFFF
    assert computed("lop3.b32 $0, $1, $2, $3, 0xE4;", a, b, c) == a & c | b & ~c
    assert computed("{ .reg .b32 t; and.b32 t, $1, $2; or.b32 $0, t, $3; }", a, b, c) == a & b | c
    given_bytes = [word >> 8 * i & 0xFF for word in (a, b) for i in range(4)]
    wanted = sum(given_bytes[i] << 8 * at for at, i in enumerate((4, 0, 7, 3)))
    assert computed("prmt.b32 $0, $1, $2, 0x3704;", a, b) == wanted
    assert computed("setp.eq.u32 q, $1, 7; selp.b32 $0, $2, $3, q;", 7, b, c) == b


@given(words, words)
def test_ptx_of_halves(a, b):
    swapped = computed("mov.b32 {l, h}, $1; mov.b32 $0, {h, l};", a)
    assert swapped == a >> 16 | (a & 0xFFFF) << 16
    for kind, dtype in (("bf16x2", torch.bfloat16), ("f16x2", torch.float16)):
        result = torch.tensor([computed(f"mul.rn.{kind} $0, $1, $2;", a, b)]).to(torch.int32).view(dtype)
        x, y = (torch.tensor([word]).to(torch.int32).view(dtype) for word in (a, b))
        torch.testing.assert_close(result, x * y, rtol=0, atol=0, equal_nan=True)
    codes = torch.tensor([a & 0xFFFF]).to(torch.int16)
    (pair,) = evaluate("cvt.rn.f16x2.e4m3x2 $0, $1;", [codes.numpy().view(np.uint16)], 1)
    values = torch.from_numpy(pair.view(np.int32)).view(torch.float16)
    torch.testing.assert_close(values, codes.view(torch.float8_e4m3fn).half(), rtol=0, atol=0, equal_nan=True)
