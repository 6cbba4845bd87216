"""What an op's contract is written with: the bound call, its checks, and the outputs it promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["SCALES", "Call", "Out", "broken_promise", "can_be_scales"]

SCALES = "finite values above zero, with finite reciprocals"
"""What :func:`can_be_scales` allows, in messages."""


def can_be_scales(t: Tensor) -> bool:
    """Whether all values can be global scales: 2^-128 has no finite reciprocal in fp32, and makes NaN of zeros.

    Reads data: only for a check of values, on the CPU.
    """
    return bool((t.isfinite() & (t > 0) & t.reciprocal().isfinite()).all())


class Out(NamedTuple):
    """An output: fresh, contiguous and on the device of the op's first tensor."""

    shape: Sequence[int]
    dtype: torch.dtype


def broken_promise(out: Any, promised: Out | tuple[Out, ...] | None, device: torch.device) -> str | None:
    """What an op gave, if that differs from what its contract promised for the call in number, shapes, dtypes, device
    or strides; None if it doesn't."""
    given = [t for t in tree_leaves(out) if t is not None]
    wanted = [promised] if isinstance(promised, Out) else list(promised or ())
    right = len(given) == len(wanted) and all(
        isinstance(t, Tensor)
        and (tuple(t.shape), t.dtype, t.device) == (tuple(o.shape), o.dtype, device)
        and t.is_contiguous()
        for t, o in zip(given, wanted, strict=True)
    )
    if right:
        return None
    described = ", ".join(_described(t) for t in given) or "nothing"
    wanted_too = ", ".join(f"{o.dtype} {tuple(o.shape)}" for o in wanted) or "nothing"
    return f"gave {described}; its contract promises {wanted_too}, contiguous, on {device}"


def _described(t: Any) -> str:
    return f"{t.dtype} {tuple(t.shape)} of strides {t.stride()} on {t.device}" if isinstance(t, Tensor) else repr(t)


class Call:
    """One call of an op: its arguments by name, defaults filled in, and the checks a contract makes of them.

    A failed check raises ValueError naming the op, the argument, what was given and what is allowed. The same
    checks run on real tensors and on fake ones with symbolic shapes; where a symbolic condition can't be
    decided while tracing, it becomes a run-time assertion of the graph.
    """

    op_name: str
    device: torch.device

    def __init__(self, op_name: str, first_tensor: Tensor, arguments: dict[str, Any]):
        arguments["op_name"] = op_name
        arguments["device"] = first_tensor.device
        self.__dict__ = arguments

    if TYPE_CHECKING:  # at run time it would slow every attribute down

        def __getattr__(self, name: str) -> Any: ...

    def require(self, condition: Any, argument: str, given: Any, allowed: str) -> None:
        """Raise unless ``condition``; a plain True costs next to nothing."""
        if condition is True:
            return
        if isinstance(condition, torch.SymBool):
            torch._check_value(condition, lambda: self._message(argument, given, allowed))
        elif not condition:
            raise ValueError(self._message(argument, given, allowed))

    def _message(self, argument: str, given: Any, allowed: str) -> str:
        if isinstance(given, torch.Size):
            given = f"of shape {tuple(given)}"
        elif isinstance(given, (torch.dtype, torch.device)):
            given = f"{given}"
        elif not isinstance(given, str) or given == getattr(self, argument, None):
            given = repr(given)
        return f"torch.ops.fp4.{self.op_name}: {argument} is {given}; allowed: {allowed}"

    def require_dtype(self, argument: str, dtypes: Sequence[torch.dtype]) -> None:
        t = getattr(self, argument)
        if t.dtype not in dtypes:
            self.require(False, argument, t.dtype, " or ".join(map(str, dtypes)))

    def require_rank(self, argument: str, rank: int) -> None:
        t = getattr(self, argument)
        if t.dim() != rank:
            self.require(False, argument, t.shape, "1 dimension" if rank == 1 else f"{rank} dimensions")

    def require_shape(self, argument: str, shape: Sequence[int], why: str = "") -> None:
        t = getattr(self, argument)
        if type(t) is Tensor and t.shape == shape:  # a real tensor: comparing sizes can't add a guard
            return
        if t.dim() != len(shape):
            self.require(False, argument, t.shape, f"shape {tuple(shape)}{why}")
        for given, wanted in zip(t.shape, shape, strict=True):
            if given is not wanted and (given == wanted) is not True:
                self.require(given == wanted, argument, t.shape, f"shape {tuple(shape)}{why}")

    def require_contiguous(self, argument: str, t: Tensor | None = None, what: str = "contiguous") -> None:
        """``t`` is the argument itself unless a view of it is what must be contiguous (a transposed weight)."""
        argument_tensor = getattr(self, argument)
        t = argument_tensor if t is None else t
        if type(t) is Tensor and t.is_contiguous():
            return
        if all(type(n) is int for n in t.shape):
            ok: Any = t.is_contiguous()
            self.require(ok, argument, f"of strides {tuple(argument_tensor.stride())}", what)
            return
        expected: Any = 1  # symbolic sizes: is_contiguous() could need a guard on them
        for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
            if not (type(size) is int and size == 1):
                given = f"of strides {tuple(argument_tensor.stride())}"
                self.require(stride == expected, argument, given, what)
            expected = expected * size

    def require_scalar(self, argument: str) -> None:
        """A float32 tensor of one element (None is the caller's business)."""
        self.require_dtype(argument, (torch.float32,))
        t = getattr(self, argument)
        self.require(t.numel() == 1, argument, t.shape, "one element")

    def require_positive(self, argument: str) -> None:
        """See :func:`can_be_scales`."""
        t = getattr(self, argument)
        self.require(can_be_scales(t), argument, f"{t.tolist()}", SCALES)
