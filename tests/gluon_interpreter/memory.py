"""Values, pointers, shared memory and TMA descriptors, by what they hold; layouts make no difference here."""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

__all__ = ["TORCH_TYPES", "Descriptor", "Pointer", "Product", "Shared", "Value", "data_of", "multiplied", "type_of"]

TORCH_TYPES = {
    tl.int1: torch.bool,
    tl.int16: torch.int16,
    tl.int32: torch.int32,
    tl.uint32: torch.int64,  # wide enough for all of them
    tl.int64: torch.int64,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
}
_TYPES = {kind: name for name, kind in TORCH_TYPES.items() if name != tl.uint32}


def type_of(data: Tensor) -> Any:
    return _TYPES[data.dtype]


def data_of(value: Any) -> Any:
    return value.data if isinstance(value, Value) else value


def _binary(function: Any) -> Any:
    return lambda self, other: Value(function(self.data, data_of(other)))


def _reflected(function: Any) -> Any:
    return lambda self, other: Value(function(data_of(other), self.data))


class Value:
    """A tensor in registers, or a number."""

    def __init__(self, data: Tensor):
        self.data = data

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> Any:
        return type_of(self.data)

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=None, element_ty=self.dtype)

    def to(self, kind: Any) -> Value:
        data = self.data.to(TORCH_TYPES[kind])
        return Value(data & 0xFFFFFFFF if kind == tl.uint32 else data)

    def reshape(self, shape: list[int]) -> Value:
        return Value(self.data.reshape(shape))

    def permute(self, order: tuple[int, ...]) -> Value:
        return Value(self.data.permute(order))

    def __getitem__(self, index: Any) -> Value:
        return Value(self.data[index])

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)

    __hash__ = None  # type: ignore[assignment]


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"):
    _function = getattr(operator, f"{_name}_" if _name in ("and", "or") else _name)
    setattr(Value, f"__{_name}__", _binary(_function))
    setattr(Value, f"__r{_name}__", _reflected(_function))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _binary(getattr(operator, _name)))


def multiplied(left: Any, right: Any, sums: Value) -> Tensor:
    """``sums + left @ right``, whose last bits do not depend on strides."""
    return sums.data + left.data.float().contiguous() @ right.data.float().contiguous()


class Product(Value):
    """Sums of products that the tensor cores are still at; they read shared memory when they please."""

    def __init__(self, left: Value, right: Shared, before: Value):
        self._given: Any = left, right, before

    def finish(self) -> None:
        if self._given is not None:
            left, right, before = self._given
            self._data = multiplied(left, right, before)
            self._given = None

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        assert self._given is None, "sums are read before they were waited for"
        return self._data


class Pointer:
    """To elements of a tensor, which need not fill its memory."""

    def __init__(self, base: Tensor, offset: Any = 0):
        self.base, self.offset = base, offset

    @staticmethod
    def to(tensor: Tensor) -> Pointer:
        size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return Pointer(tensor.as_strided((size,), (1,)))

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=type_of(self.base))

    def __add__(self, other: Any) -> Pointer:
        other = data_of(other)
        return Pointer(self.base, self.offset + (other.long() if isinstance(other, Tensor) else other))

    def _places(self, mask: Any) -> tuple[Tensor, Tensor]:
        offset, there = torch.broadcast_tensors(
            torch.as_tensor(self.offset), torch.as_tensor(True if mask is None else data_of(mask))
        )
        wrong = there & ((offset < 0) | (offset >= self.base.numel()))
        assert not wrong.any(), f"places {offset[wrong][:4].tolist()} of {self.base.numel()} elements"
        return offset, there

    def load(self, mask: Any, other: Any) -> Value:
        offset, there = self._places(mask)
        loaded = self.base[torch.where(there, offset, 0)]
        return Value(loaded if mask is None else torch.where(there, loaded, other).to(self.base.dtype))

    def store(self, value: Value, mask: Any) -> None:
        assert value.data.dtype == self.base.dtype
        offset, there = self._places(mask)
        offset, there, data = torch.broadcast_tensors(offset, there, value.data)
        self.base[offset[there]] = data[there]


class Shared:
    """Shared memory, which begins as what nobody should use."""

    def __init__(self, data: Tensor):
        self.data = data

    @staticmethod
    def allocate(kind: Any, shape: list[int]) -> Shared:
        data = torch.empty(shape, dtype=TORCH_TYPES[kind])
        return Shared(data.fill_(torch.nan if data.is_floating_point() else 0x5A5A))

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> Any:
        return type_of(self.data)

    @property
    def bytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < self.data.shape[0], f"{int(i)} of {self.data.shape[0]}"
        return Shared(self.data[int(i)])

    def slice(self, start: Any, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, int(start), length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, layout: Any = None) -> Value:
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        assert value.data.dtype == self.data.dtype and value.data.shape == self.data.shape
        self.data.copy_(value.data)

    def reinterpret(self, kind: Any, shape: list[int], layout: Any = None) -> Shared:
        """The same bytes as other elements; Triton 3.8 takes no part of them."""
        flat = self.data.view(-1).view(torch.uint8)
        size = torch.Size(shape).numel() * TORCH_TYPES[kind].itemsize
        assert size == flat.numel(), f"{size} bytes of {flat.numel()}"
        return Shared(flat.view(TORCH_TYPES[kind]).view(shape))


class Descriptor:
    """Of a tensor that TMA reads and writes by blocks: zeros beyond it, and nothing is written there."""

    def __init__(self, given: Any):
        self.tensor = given.base.as_strided(given.shape, given.strides)
        self.block_shape, self.layout = list(given.block_shape), None
        self.dtype = type_of(self.tensor)

    def _inside(self, at: list[Any], data: Tensor) -> tuple[Tensor, Tensor]:
        assert list(data.shape) == self.block_shape and data.dtype == self.tensor.dtype
        here, there = self.tensor, data
        for dim, (first, size) in enumerate(zip(map(int, at), self.block_shape, strict=True)):
            low, high = max(first, 0), min(first + size, self.tensor.shape[dim])
            here = here.narrow(dim, min(low, self.tensor.shape[dim]), max(high - low, 0))
            there = there.narrow(dim, min(low - first, size), max(high - low, 0))
        return here, there

    def load(self, at: list[Any], to: Shared) -> None:
        here, there = self._inside(at, to.data)
        to.data.zero_()
        there.copy_(here)

    def store(self, at: list[Any], of: Shared) -> None:
        here, there = self._inside(at, of.data)
        here.copy_(there)
