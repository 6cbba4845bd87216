"""Take a kernel from elsewhere, a user's or a library's, under the same roof: as an op, or as a backend of one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from .contracts import Call, Out, broken_promise
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
            dtypes. From it come the fake, the validation, and, as for a backend from its op's contract, a check of
            what ``fn`` gives, at every call.
        unsupported: for a backend: why it can't take a call, by metadata alone; None if it can.
        exact: for a backend: whether quantised bytes must equal the reference's, when ``check`` asks.
        tolerance: for a backend: relative error that its probe allows. A backend is probed before its first use.

    Returns:
        The op. ``backend="auto"`` takes a new backend only if a preference row says so; name it.

    Raises:
        TypeError: a signature that is none of an operator's, or not the op's, or a new op's whose first argument is no
            Tensor or one of whose arguments is named as what a ``Call`` has.
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
    register(_held_to_contract(fn, op_name))
    return target


def _new_op(name: str, fn: Callable[..., Any], contract: Callable[[Call], Any]) -> Op:
    parameters = inspect.signature(fn, eval_str=True).parameters
    first = next(iter(parameters.values()), None)
    if first is None or first.annotation is not Tensor:  # its device is the call's
        raise TypeError(f"register_extern: the first argument of {name!r} is {first}; allowed: a Tensor")
    for parameter in parameters:
        if parameter in ("op_name", "device") or hasattr(Call, parameter):
            taken = f"an argument {parameter!r}, which a contract's Call has, too"
            raise TypeError(f"register_extern: {name!r} has {taken}")

    return op(contract=contract)(_held_to_contract(fn, name))


def _shares_memory(out: Any, given: Any) -> bool:
    outputs, arguments = (
        [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.numel()] for tree in (out, given)
    )
    of_arguments = {t.untyped_storage().data_ptr() for t in arguments}
    return len({t.data_ptr() for t in outputs}) < len(outputs) or any(
        t.untyped_storage().data_ptr() in of_arguments for t in outputs
    )


def _held_to_contract(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``fn`` with the argument ``backend`` that every op has, and a check of what it gives."""
    signature = inspect.signature(fn, eval_str=True)
    has_backend = "backend" in signature.parameters

    def run(*args: Any, **kwargs: Any) -> Any:
        call = OPS[name]._bind(args, kwargs)  # which the op has validated
        if not has_backend:
            kwargs.pop("backend", None)
        out = fn(*args, **kwargs)
        wrong = broken_promise(out, OPS[name].contract(call), call.device)
        if wrong is None and _shares_memory(out, (args, kwargs)):
            wrong = "gave memory of its arguments, or the same twice; its contract promises fresh outputs"
        if wrong is not None:
            raise RuntimeError(f"torch.ops.fp4.{name} {wrong}")
        return out

    if not has_backend:
        backend = inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY, default="auto", annotation=str)
        signature = signature.replace(parameters=[*signature.parameters.values(), backend])
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {n: p.annotation for n, p in signature.parameters.items()}
    run.__annotations__["return"] = signature.return_annotation
    run.__name__, run.__doc__, run.__module__ = name, fn.__doc__, fn.__module__
    return run
