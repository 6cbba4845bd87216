"""Gluon's names, for functions of kernels that run as Python's."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from .memory import TORCH_TYPES, Descriptor, Pointer, Product, Shared, Value, data_of, multiplied
from .ptx import evaluate, statements
from .tasks import Barrier, Scheduler, Task

__all__ = ["Gluon", "Program"]


class _Layout:
    """Stands for any: who has which element makes no difference here."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    @staticmethod
    def with_identity_for(*args: Any) -> _Layout:
        return _Layout()


class _BarrierLayout(_Layout):
    pass


class _Barriers:
    def __init__(self, count: int):
        self._all = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        assert 0 <= int(i) < len(self._all)
        return self._all[int(i)]


class Program:
    """One of a grid. ``parts`` is what the programs of its cluster have sent each other."""

    def __init__(self, index: int, grid: Sequence[int], rank: int, cluster: Sequence[Program], parts: dict[Any, Any]):
        self.place, self.grid = (index % grid[0], index // grid[0]), (*grid, 1)
        self.rank, self.cluster, self.parts = rank, cluster, parts
        self.groups = 0
        self.came = 0
        """Warp groups that there are, and those that came to the cluster's barrier."""


class Gluon:
    """What kernels import, for programs of so many warps that ``scheduler`` has."""

    scheduler: Scheduler

    def __init__(self, warps: int):
        self.gl = SimpleNamespace(
            constexpr=None,
            static_range=range,
            arange=lambda start, end, layout=None: Value(torch.arange(start, end, dtype=torch.int32)),
            full=lambda shape, value, kind, layout=None: Value(torch.full(shape, value, dtype=TORCH_TYPES[kind])),
            zeros=lambda shape, kind, layout=None: Value(torch.zeros(shape, dtype=TORCH_TYPES[kind])),
            where=lambda which, a, b: Value(torch.where(_tensor(which), _number(a), _number(b))),
            maximum=lambda a, b: Value(torch.maximum(*torch.broadcast_tensors(_number(a), _number(b)))),
            cdiv=lambda a, b: (a + (b - 1)) // b,
            broadcast=_broadcast,
            expand_dims=lambda value, dim: Value(value.data.unsqueeze(dim)),
            join=lambda a, b: Value(torch.stack(torch.broadcast_tensors(a.data, b.data), -1)),
            split=lambda value: tuple(Value(part) for part in value.data.unbind(-1)),
            sum=lambda value, axis: Value(value.data.sum(axis)),
            convert_layout=lambda value, layout, assert_trivial=False: value,
            load=self._load,
            store=self._store,
            program_id=lambda axis: Value(torch.tensor(self._task.program.place[axis], dtype=torch.int32)),
            num_programs=lambda axis: self._task.program.grid[axis],
            num_warps=lambda: warps,
            allocate_shared_memory=_allocate,
            inline_asm_elementwise=self._inline_asm,
            warp_specialize=self._warp_specialize,
            **{
                name: getattr(tl, name)
                for name in ("int16", "int32", "int64", "uint32", "float16", "bfloat16", "float32")
            },
            **{
                name: _Layout
                for name in (
                    "BlockedLayout", "DistributedLinearLayout", "DotOperandLayout", "NVMMADistributedLayout",
                    "NVMMASharedLayout", "PaddedSharedLayout", "SliceLayout", "SwizzledSharedLayout",
                )
            },
        )  # fmt: skip
        self.mbarrier = SimpleNamespace(
            MBarrierLayout=_BarrierLayout,
            init=lambda barrier, count: barrier.init(count),
            arrive=self._arrive,
            expect=lambda barrier, size, pred=True: barrier.arrive(int(size)) if pred else None,
            wait=self._wait,
        )
        self.tma = SimpleNamespace(store_wait=self._store_wait)
        self.async_copy = SimpleNamespace(commit_group=lambda: self._task.copies.append([]))

    @property
    def _task(self) -> Task:
        assert self.scheduler.current is not None
        return self.scheduler.current

    def _touch_memory(self) -> None:
        assert self._task.may_touch_memory, "memory is touched before the kernel in front is waited for"

    # Memory

    def _load(self, pointer: Pointer, mask: Any = None, other: Any = None) -> Value:
        self._touch_memory()
        return pointer.load(mask, other)

    def _store(self, pointer: Pointer, value: Value, mask: Any = None) -> None:
        self._touch_memory()
        pointer.store(value, mask)

    def copy_async(self, to: Shared, pointer: Pointer, mask: Any = None) -> None:
        """Done as late as can be, when it is waited for."""
        self._touch_memory()
        self._task.copies[-1].append(lambda: to.store(pointer.load(True if mask is None else mask, 0)))

    def async_load(
        self, descriptor: Descriptor, at: Sequence[Any], barrier: Barrier, to: Shared, pred: Any = True
    ) -> None:
        self._touch_memory()
        if not pred:
            return
        place = [int(i) for i in at]

        def arrive() -> None:
            descriptor.load(place, to)
            barrier.complete(to.bytes)

        self.scheduler.copies.append(arrive)

    def async_store(self, descriptor: Descriptor, at: Sequence[Any], of: Shared) -> None:
        self._touch_memory()
        place = [int(i) for i in at]
        self._task.stores.append(lambda: descriptor.store(place, of))

    def _store_wait(self, later: int) -> None:
        stores = self._task.stores
        while len(stores) > later:
            stores.pop(0)()

    # Between tasks

    def _wait(self, barrier: Barrier, phase: Any) -> None:
        parity = int(phase)
        self._task.wait(f"parity {parity} of a barrier", lambda: barrier.passed(parity))

    def _arrive(self, barrier: Barrier, pred: Any = True) -> None:
        if pred:
            barrier.arrive()
            self._task.wait("its turn")

    def _warp_specialize(self, tasks: Sequence[Any], warps: Sequence[int], registers: Sequence[int]) -> None:
        assert len(tasks) == len(warps) + 1 == len(registers) + 1
        own, program = self._task, self._task.program
        program.groups = len(tasks)
        others = [
            self.scheduler.start(f"{own.name}, group {i}", _call(*task), program) for i, task in enumerate(tasks[1:], 1)
        ]
        _call(*tasks[0])()
        own.wait("the other groups", lambda: all(task.done for task in others))

    # Tensor cores

    def mma_v2(self, left: Value, right: Value, sums: Value) -> Value:
        return Value(multiplied(left, right, sums))

    def warpgroup_mma(self, left: Value, right: Shared, sums: Value, is_async: bool) -> Product:
        """Done at once, or as late as can be."""
        product = Product(left, right, sums)
        self._task.products.append(product)
        if self.scheduler.random.random() < 0.5:
            self._finish(0)
        return product

    def warpgroup_mma_wait(self, later: int, deps: Sequence[Any]) -> Any:
        self._finish(later)
        return deps[0] if len(deps) == 1 else tuple(deps)

    def _finish(self, later: int) -> None:
        products = self._task.products
        while len(products) > later:
            products.pop(0).finish()

    # PTX

    def _inline_asm(self, asm: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
        if not is_pure:
            return self._run_asm(asm)
        assert pack == 1
        kinds = dtype if isinstance(dtype, tuple) else (dtype,)
        widths = re.sub(r"[=&]", "", constraints).split(",")
        given = torch.broadcast_tensors(*(arg.data for arg in args))
        bits = [_bits(data, width) for data, width in zip(given, widths[len(kinds) :], strict=True)]
        results = evaluate(asm, bits, len(kinds))
        out = []
        for kind, width, result in zip(kinds, widths, results, strict=False):
            whole = np.array(np.broadcast_to(result, given[0].shape))
            signed = torch.from_numpy(whole.view(np.int16 if width == "h" else np.int32))
            out.append(Value(signed.view(TORCH_TYPES[kind])))
        return tuple(out) if isinstance(dtype, tuple) else out[0]

    def _run_asm(self, asm: str) -> None:
        for name, operands in statements(asm):
            self._EFFECTS[name](self, *operands)

    def _wait_for_copies(self, later: str) -> None:
        copies = self._task.copies
        while len(copies) > int(later) + 1:  # the last group is not closed yet
            for copy in copies.pop(0):
                copy()

    def _wait_for_previous(self) -> None:
        self._task.may_touch_memory = True

    _EFFECTS: dict[str, Callable[..., None]] = {  # noqa: RUF012
        "griddepcontrol.wait": _wait_for_previous,
        "griddepcontrol.launch_dependents": lambda self: None,
        "cp.async.wait_group": _wait_for_copies,
        "bar.warp.sync": lambda self, mask: None,
    }

    # Clusters: what ``_hopper_cluster`` does by addresses

    def arrive_at_cluster(self, plan: Any = None) -> None:
        self._task.program.came += 1
        self._task.wait("its turn")

    def wait_for_cluster(self) -> None:
        programs = self._task.program.cluster
        self._task.wait("its cluster", lambda: all(p.came == p.groups > 0 for p in programs))
        self._task.sees_cluster = True

    def arrive_and_wait_for_cluster(self) -> None:
        self.arrive_at_cluster()
        self.wait_for_cluster()

    def add_parts(self, sums: Value, index: int, plan: Any) -> Value:
        assert self._task.sees_cluster, "parts are sent before it is known that programs of the cluster are there"
        program = self._task.program
        shares = sums.data.chunk(plan.CLUSTER, 1)
        for other, share in enumerate(shares):
            if other != program.rank:
                program.parts[other, index, program.rank] = share
        wanted = [(program.rank, index, other) for other in range(plan.CLUSTER) if other != program.rank]
        self._task.wait("parts", lambda: all(key in program.parts for key in wanted))
        result = shares[program.rank].clone()
        for key in wanted:
            result += program.parts.pop(key)
        return Value(result)


def _call(function: Callable[..., None], args: Sequence[Any]) -> Callable[[], None]:
    return lambda: function(*args)


def _tensor(value: Any) -> Tensor:
    return torch.as_tensor(data_of(value))


def _number(value: Any) -> Tensor:
    value = data_of(value)
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int32)


def _bits(data: Tensor, width: str) -> np.ndarray:
    assert data.dtype == (torch.int16 if width == "h" else torch.int32), (data.dtype, width)
    return data.contiguous().numpy().view(np.uint16 if width == "h" else np.uint32)


def _allocate(kind: Any, shape: list[int], layout: Any) -> Any:
    if not isinstance(layout, _BarrierLayout):
        return Shared.allocate(kind, shape)
    return _Barriers(shape[0]) if len(shape) == 2 else Barrier()


def _broadcast(a: Any, b: Any) -> tuple[Any, Any]:
    parts = [torch.as_tensor(x.offset) if isinstance(x, Pointer) else x.data for x in (a, b)]
    whole = torch.broadcast_tensors(*parts)
    return tuple(  # type: ignore[return-value]
        Pointer(x.base, data) if isinstance(x, Pointer) else Value(data) for x, data in zip((a, b), whole, strict=True)
    )
