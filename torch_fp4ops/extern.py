"""Take a kernel from elsewhere, a user's or a library's, under the same roof: as an op, or as a backend of one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .contracts import Call, Out
from .probe import Probed
from .registry import OPS, Op, op

__all__ = ["register_extern"]


def register_extern(
    name: str,
    fn: Callable[..., Any],
    contract: Callable[[Call], Out | tuple[Out, ...] | None] | None = None,
    *,
    unsupported: Callable[[Call], str | None] | None = None,
    exact: bool = True,
    tolerance: float = 0.02,
) -> Op:
    """Register ``fn`` as ``torch.ops.fp4.<name>``, or, with a name ``"<op>.<backend>"``, as a backend of that op.

    Args:
        name: the new op's, or ``"mm_fp4.mine"``.
        fn: a function with annotated arguments and results, as ``torch.library.infer_schema`` reads them. For a
            backend: the op's own arguments, ``backend`` left out or not. It may launch kernels, call other libraries
            and break graphs as it likes: a graph sees one node.
        contract: for a new op: checks the :class:`~torch_fp4ops.contracts.Call` and returns the outputs' shapes and
            dtypes. From it come the fake, the validation, and a check of what ``fn`` gives, at every call.
        unsupported: for a backend: why it can't take a call, by metadata alone; None if it can.
        exact: for a backend: whether quantised bytes must equal the reference's, when ``check`` asks.
        tolerance: for a backend: relative error that its probe allows. A backend is probed before its first use.

    Returns:
        The op. ``backend="auto"`` takes a new backend only if a preference row says so; name it.

    Raises:
        TypeError: a signature that is none of an operator's, or not the op's.
        ValueError: the op does not exist, the name is taken, or an argument of the other kind is given.
    """
    op_name, _, backend = name.partition(".")
    if not backend:
        if contract is None or unsupported is not None:
            raise ValueError(f"register_extern: a new op ({name!r}) needs a contract, and has no unsupported=")
        if op_name in OPS:
            raise ValueError(
                f"register_extern: there is an op {op_name!r} already; a backend is named '{op_name}.<name>'"
            )
        return _new_op(op_name, fn, contract)
    if contract is not None:
        raise ValueError(f"register_extern: the contract of {op_name!r} holds for {name!r}; leave contract out")
    if op_name not in OPS:
        raise ValueError(f"register_extern: there is no op {op_name!r}; the ops are {', '.join(sorted(OPS))}")
    target = OPS[op_name]
    target.backend_names()  # its own first, so that none of them finds its name taken
    register = target.backend(
        backend, unsupported=unsupported or (lambda call: None), trust=Probed(tolerance=tolerance), exact=exact
    )
    register(_with_backend_argument(fn, op_name, lambda out, args, kwargs: out))
    return target


def _new_op(name: str, fn: Callable[..., Any], contract: Callable[[Call], Any]) -> Op:
    def held_to_contract(out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = OPS[name].check(*args, **kwargs)
        promised = contract(call)
        outputs = () if promised is None else (promised,) if isinstance(promised, Out) else promised
        given = () if out is None else (out,) if isinstance(out, Tensor) else tuple(out)
        inputs = {t.data_ptr() for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.numel()}
        right = len(given) == len(outputs) and all(
            (tuple(t.shape), t.dtype, t.device) == (tuple(o.shape), o.dtype, call.device)
            and t.is_contiguous()
            and t.data_ptr() not in inputs
            for t, o in zip(given, outputs, strict=True)
        )
        if not right:
            described = [(tuple(t.shape), t.dtype, f"strides {t.stride()}") for t in given]
            raise RuntimeError(
                f"torch.ops.fp4.{name} gave {described}; its contract promises fresh contiguous {list(outputs)}"
            )
        return out

    return op(contract=contract)(_with_backend_argument(fn, name, held_to_contract))


def _with_backend_argument(fn: Callable[..., Any], name: str, then: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` with the argument ``backend`` that every op has, and a check of what it gives."""
    signature = inspect.signature(fn, eval_str=True)
    has_backend = "backend" in signature.parameters

    def run(*args: Any, **kwargs: Any) -> Any:
        if not has_backend:
            kwargs.pop("backend", None)
        return then(fn(*args, **kwargs), args, kwargs)

    if not has_backend:
        backend = inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY, default="auto", annotation=str)
        signature = signature.replace(parameters=[*signature.parameters.values(), backend])
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {n: p.annotation for n, p in signature.parameters.items()}
    run.__annotations__["return"] = signature.return_annotation
    run.__name__, run.__doc__, run.__module__ = name, fn.__doc__, fn.__module__
    return run
