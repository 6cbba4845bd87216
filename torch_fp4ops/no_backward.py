"""What the ops have in place of a backward: an error that names the op."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["INFERENCE_ONLY", "NoBackward", "any_requires_grad", "refuse_tangents", "refuse_transforms"]

INFERENCE_ONLY = "These ops are for inference: use torch.no_grad() or torch.inference_mode(), or detach() the input."

_LIBRARY = torch.library.Library("fp4", "FRAGMENT")


def any_requires_grad(arguments: Iterable[Any]) -> bool:
    for argument in arguments:
        if isinstance(argument, Tensor):
            if argument.requires_grad:
                return True
        elif type(argument) is list and any_requires_grad(argument):
            return True
    return False


def refuse_tangents(op_name: str, arguments: Iterable[Any]) -> None:
    """Raise NotImplementedError if a tensor of the arguments is a dual one of forward-mode differentiation."""
    for argument in arguments:
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise NotImplementedError(
                f"torch.ops.fp4.{op_name} has no forward-mode derivative. These ops are for inference: "
                "detach() the input."
            )


def refuse_transforms(op_name: str, tensors: Iterable[Tensor]) -> None:
    """Raise NotImplementedError if one is what ``torch.func.grad`` or ``vjp`` differentiates by, which
    :class:`NoBackward` cannot be given."""
    if any(torch._C._functorch.is_gradtrackingtensor(t) for t in tensors):
        raise NotImplementedError(_without_backward(op_name))


def _without_backward(op_name: str) -> str:
    return f"torch.ops.fp4.{op_name} has no backward. {INFERENCE_ONLY}"


class NoBackward(torch.autograd.Function):
    """Gives the outputs a grad_fn that raises, so that backward never yields silent zeros."""

    @staticmethod
    def forward(ctx: Any, op_name: str, run: Callable[[], Any], *needing: Tensor) -> Any:
        ctx.op_name = op_name
        ctx.inputs = [(t.shape, t.dtype, t.device) for t in needing]
        return run()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad = next(g for g in grads if g is not None)
        # An op of its own, so that tracing a joint graph succeeds and only running the backward raises.
        unavailable = torch.ops.fp4.backward_unavailable.default
        return (None, None, *(unavailable(grad, *meta, ctx.op_name) for meta in ctx.inputs))


def _backward_unavailable(grad: Tensor, shape: Any, dtype: Any, device: Any, op_name: str) -> Tensor:
    raise NotImplementedError(_without_backward(op_name))


_LIBRARY.define(
    "backward_unavailable(Tensor grad, SymInt[] shape, ScalarType dtype, Device device, str op_name) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_LIBRARY.impl("backward_unavailable", _backward_unavailable, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fp4::backward_unavailable",
    lambda grad, shape, dtype, device, op_name: torch.empty(shape, dtype=dtype, device=device),
    lib=_LIBRARY,
)
