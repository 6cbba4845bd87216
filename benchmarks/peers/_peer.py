"""What a peer is."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_fp4ops.testing import Sample

from ..cases import Case
from ..inputs import Weight
from ..verify import Expected

Run = Callable[[], Any]


class Unsuitable(Exception):
    """Why a peer can't take a case."""


@dataclass(frozen=True)
class Prepared:
    runs: Sequence[Run]
    compare: Callable[[Any], Any] = lambda out: out
    """Brings the peer's output into the op's layout."""
    poison: bool = True
    """False where memory must not be poisoned in the check (it would compile again)."""
    expected: Expected | None = None
    """What is right, where the peer was given other inputs than the case's."""


@dataclass(frozen=True)
class Peer:
    name: str
    ops: tuple[str, ...]
    prepare: Callable[[Case, Sequence[Sample], Expected], Prepared]
    """Raises Unsuitable, or whatever the peer raises. Its docstring says what the peer computes."""
    needs_gpu: bool = True

    def takes(self, op_name: str, device: torch.device) -> bool:
        return op_name in self.ops and (device.type == "cuda" or not self.needs_gpu)

    @property
    def what(self) -> str:
        return inspect.getdoc(self.prepare) or ""


Multiply = Callable[[Tensor], Tensor]
"""bf16 activations ``[m, k]`` times a weight: bf16 ``[m, n]``."""


@dataclass(frozen=True)
class WeightPeer:
    """A product of bf16 activations with weights in 4 bits, which are loaded once for any number of products."""

    name: str
    load: Callable[[Weight, Tensor | None], Multiply]
    """Of a plain weight and its alpha. Raises Unsuitable, or whatever the peer raises. Its docstring says what the peer
    computes."""

    @property
    def what(self) -> str:
        return inspect.getdoc(self.load) or ""

    @property
    def peer(self) -> Peer:
        """The same for cases of ``mm_bf16_fp4``, each of which loads its own weights."""

        def prepare(case: Case, samples: Sequence[Sample], expected: Expected) -> Prepared:
            products = [self.load(Weight.of(case.op, s), s.args[3]) for s in samples]
            return Prepared([lambda s=s, f=f: f(s.args[0]) for s, f in zip(samples, products, strict=True)])

        prepare.__doc__ = self.load.__doc__
        return Peer(self.name, ("mm_bf16_fp4",), prepare)


def imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unsuitable(f"not installed: {error}") from error
    except Exception as error:  # such packages fail in many ways where their GPU or compiler is missing
        raise Unsuitable(f"{name} can't be imported: {error}") from error
