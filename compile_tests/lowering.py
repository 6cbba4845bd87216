"""Lowers TTGIR to LLVM's IR once for the targets that get the same of it.

Which do is observed, not assumed: a target gets another's result where all forms of operations of a kernel, layouts
included, have come out alike for the two before, as parts of kernels that were lowered for both. MLIR lowers operation
by operation. Everything after that, the code generator and the assembler, runs for each target.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

__all__ = ["SharedLowering"]

_TARGET = re.compile(r'ttg\.target = "[\w:]+"')
_LOCATIONS = re.compile(r"^#loc.*\n| loc\((?:[^()]|\([^()]*\))*\)", re.M)
_LAYOUT = re.compile(r"^(#\w+) = (.*)$", re.M)
_LAYOUT_NAME = re.compile(r"#(?!ttg\.)\w+")
_VALUE = re.compile(r"%[\w#:]+")
_NUMBER = re.compile(r"(?<![\w#])-?(?:0x[0-9A-F]+|\d[\d.]*(?:e[+-]\d+)?x?)")


class SharedLowering:
    """What kernels became, for the last one and its targets, and which targets got the same of what."""

    def __init__(self) -> None:
        self._ttgir = ""
        self._forms: set[str] = set()
        self._lowered: dict[str, tuple[str, dict[str, Any]]] = {}
        self._alike: dict[tuple[str, str], set[str]] = defaultdict(set)

    def hook(self, target: str) -> Callable[..., tuple[str, str]]:
        """What Triton calls with the stages of a compilation for the target; and without, for a key and its hash."""

        def hook(_: Any = None, stages: Any = None, *others: Any) -> tuple[str, str]:
            if stages is not None:
                lower = stages["llir"]
                stages["llir"] = lambda module, metadata: self._lower(lower, module, metadata, target)
            return "", ""

        return hook

    def _lower(self, lower: Any, module: Any, metadata: dict[str, Any], target: str) -> str:
        ttgir = _LOCATIONS.sub("", _TARGET.sub("", str(module)))
        if ttgir != self._ttgir:
            self._ttgir, self._lowered = ttgir, {}
            self._forms = _forms(ttgir)
        for other, (llir, added) in self._lowered.items():
            if self._forms <= self._alike[other, target]:
                metadata.update(added)
                return llir
        before = dict(metadata)
        llir = lower(module, metadata)
        added = {name: value for name, value in metadata.items() if name not in before or before[name] != value}
        for other, result in self._lowered.items():
            if result == (llir, added):
                self._alike[other, target] |= self._forms
        self._lowered[target] = llir, added
        return llir


def _forms(ttgir: str) -> set[str]:
    """The operations with their attributes and types, but without the values they name and without numbers."""
    layouts = dict(_LAYOUT.findall(ttgir))
    lines = {_NUMBER.sub("", _VALUE.sub("", line)) for line in ttgir.splitlines() if not line.startswith("#")}
    return {_LAYOUT_NAME.sub(lambda name: layouts.get(name[0], name[0]), line) for line in lines}
