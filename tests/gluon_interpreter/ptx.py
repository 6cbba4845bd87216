"""The PTX of kernels that computes, on arrays: every register is an array of bits."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["evaluate", "statements"]

_U32, _U16 = np.uint32, np.uint16


@functools.cache
def statements(asm: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Instructions and their operands, of which ``{a, b}`` is one; declarations left out."""
    found = []
    for line in re.sub(r"//[^\n]*", "", asm).strip().removeprefix("{").removesuffix("}").split(";"):
        name, _, rest = line.strip().partition(" ")
        if name and name != ".reg":
            operands = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
            found.append((name, tuple(operand.replace(" ", "") for operand in operands)))
    return tuple(found)


def evaluate(asm: str, inputs: Sequence[np.ndarray], outputs: int) -> list[np.ndarray]:
    """What PTX without side effects computes of ``inputs``, bits of 16 or 32: $0 and so on."""
    registers: dict[str, Any] = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(operand: str) -> Any:
        if operand.startswith("{"):
            low, high = (registers[name] for name in operand[1:-1].split(","))
            return low.astype(_U32) | high.astype(_U32) << _U32(16)
        if operand.startswith("0f"):
            return _U32(int(operand[2:], 16))
        if operand[0].isdigit():
            return _U32(int(operand, 0))
        return registers[operand]

    for name, (to, *operands) in statements(asm):
        with np.errstate(all="ignore"):
            result = _INSTRUCTIONS[name](*map(value, operands))
        if to.startswith("{"):
            low, high = to[1:-1].split(",")
            registers[low], registers[high] = result.astype(_U16), (result >> _U32(16)).astype(_U16)
        else:
            registers[to] = result
    return [registers[f"${i}"] for i in range(outputs)]


def _float(bits: Any) -> np.ndarray:
    return np.asarray(bits, _U32).view(np.float32)


def _bits(value: np.ndarray) -> np.ndarray:
    return np.asarray(value, np.float32).view(_U32)


def _halves(word: Any) -> tuple[np.ndarray, np.ndarray]:
    word = np.asarray(word, _U32)
    return (word & _U32(0xFFFF)).astype(_U16), (word >> _U32(16)).astype(_U16)


def _pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(_U32) | high.astype(_U32) << _U32(16)


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(_U32) << _U32(16)).view(np.float32)


def _to_bf16(value: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(value, np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(_U16)


def _times_bf16(x: Any, y: Any) -> np.ndarray:
    return _pair(*(_to_bf16(_from_bf16(a) * _from_bf16(b)) for a, b in zip(_halves(x), _halves(y), strict=True)))


def _times_f16(x: Any, y: Any) -> np.ndarray:
    halves = zip(_halves(x), _halves(y), strict=True)
    return _pair(*((a.view(np.float16) * b.view(np.float16)).view(_U16) for a, b in halves))


def _from_e4m3(codes: Any) -> np.ndarray:
    codes = np.asarray(codes, _U16)
    halves = []
    for part in (codes & _U16(0xFF), codes >> _U16(8)):
        values = torch.from_numpy(np.ascontiguousarray(part.astype(np.uint8))).view(torch.float8_e4m3fn)
        halves.append(values.half().view(torch.int16).numpy().view(_U16))
    return _pair(*halves)


def _lop3(a: Any, b: Any, c: Any, table: Any) -> Any:
    out = _U32(0)
    for i in range(8):
        if int(table) >> i & 1:
            out = out | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _prmt(a: Any, b: Any, selector: Any) -> Any:
    out = _U32(0)
    for i in range(4):
        which = int(selector) >> 4 * i & 0xF
        assert which < 8, "signs are not followed"
        source = a if which < 4 else b
        out = out | (source >> _U32(8 * (which & 3)) & _U32(0xFF)) << _U32(8 * i)
    return out


_INSTRUCTIONS: dict[str, Any] = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, n: a << n,
    "shr.u32": lambda a, n: a >> n,
    "shf.r.wrap.b32": lambda low, high, n: low >> n | high << (_U32(32) - n),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "max.u32": np.maximum,
    "setp.eq.u32": lambda a, b: a == b,
    "selp.b32": lambda a, b, is_so: np.where(is_so, a, b),
    "mul.rn.f32": lambda a, b: _bits(_float(a) * _float(b)),
    "mul.rn.bf16x2": _times_bf16,
    "mul.rn.f16x2": _times_f16,
    "cvt.u16.u32": lambda a: a.astype(_U16),
    "cvt.rn.f16x2.e4m3x2": _from_e4m3,
    "cvt.f32.f16": lambda a: _bits(np.asarray(a, _U16).view(np.float16)),
    "cvt.rn.bf16x2.f32": lambda high, low: _pair(_to_bf16(_float(low)), _to_bf16(_float(high))),
}
