"""Put quantised layers into a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from ..formats import FORMATS
from ._block_scaled import LAYOUTS, BlockScaledLinear, allowed_values, why_not_quantizable
from .linear import ACTIVATIONS, FP4Linear, MXFP8Linear

__all__ = ["prepare_", "quantize_"]

Model = TypeVar("Model", bound=nn.Module)

_THE_MODEL_ITSELF = "the model itself is the layer; use FP4Linear.from_linear or MXFP8Linear.from_linear"


def quantize_(
    model: Model,
    weight_format: str,
    activations: str = "same",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    prepare: bool = True,
) -> Model:
    """Replace the ``nn.Linear`` layers of a model, in place, by layers with quantised weights. For inference.

    Every selected layer is checked before the first is replaced: a call that raises for a reason below has changed
    nothing. Layers are then replaced one at a time, so that only one weight exists in both forms; biases stay the
    same Parameters. A Linear that is used in several places is replaced by one new layer in all of them. A weight
    that is also used otherwise (an output layer tied to an embedding) stays alive for the other user.

    Only the exact type ``nn.Linear`` counts: a subclass may compute something else. Parents that read ``weight``
    themselves instead of calling the layer can't use the result; ``nn.TransformerEncoderLayer`` does so unless
    ``torch.backends.mha.set_fastpath_enabled(False)``.

    Args:
        model: weights bfloat16, float16 or float32, on any device, meta included.
        weight_format: ``"nvfp4"``, ``"mxfp4"`` or ``"mxfp8"``.
        activations: ``"same"`` quantises each layer's input to the same format; ``"bf16"`` keeps it in 16 bits
            (FP4 only). See :class:`FP4Linear`.
        filter_fn: gets a Linear and its qualified name, and says whether to replace it there. None: all.
        prepare: as for :meth:`FP4Linear.from_linear`.

    Returns:
        ``model``.

    Raises:
        ValueError: an unknown format or kind of activations; no layer selected; or layers that can't be quantised
            (all are listed): K not a multiple of the block size, a weight that is not finite or no plain tensor,
            hooks, a forward or tensors of its own, being compiled by itself, or the model itself being the layer.
    """
    if weight_format not in list(FORMATS):
        raise ValueError(f"quantize_: weight_format is {weight_format!r}; allowed: {allowed_values(list(FORMATS))}")
    if activations not in ACTIVATIONS:
        raise ValueError(f"quantize_: activations is {activations!r}; allowed: {allowed_values(ACTIVATIONS)}")
    if filter_fn is not None and not callable(filter_fn):
        allowed = "a function of a module and its name, or None"
        raise ValueError(f"quantize_: filter_fn is {filter_fn!r}; allowed: {allowed}")
    fmt = FORMATS[weight_format]
    if fmt.element != "e2m1" and activations != "same":
        given = f"{activations!r} with weight_format={weight_format!r}"
        raise ValueError(f"quantize_: activations is {given}; allowed: 'same' (only FP4 has 16-bit activations)")

    selected = _select(model, filter_fn)
    if not selected:
        raise ValueError("quantize_: no layer was selected; the model needs an nn.Linear that filter_fn accepts")
    problems = []
    for linear, places in selected:
        names = ", ".join(repr(name) for name in places)
        reason = why_not_quantizable(linear, fmt) if "" not in places else _THE_MODEL_ITSELF
        if any(name.rpartition(".")[2] == "_orig_mod" for name in places):  # torch.compile's name for what it wraps
            reason = "it is compiled by itself, and what is compiled would stay; quantise it first"
        if reason is not None:
            problems.append(f"  {names}: {reason}")
    if problems:
        raise ValueError(
            f"quantize_: {len(problems)} of the {len(selected)} selected layers can't become {weight_format}, so "
            "nothing was changed:\n" + "\n".join(problems) + "\n"
            "Leave them out with filter_fn, e.g. filter_fn=lambda module, name: name not in {...}"
        )

    selected.reverse()
    while selected:
        # Popped, and the old layer forgotten before the next one: nothing here keeps its weight alive.
        linear, places = selected.pop()
        new: BlockScaledLinear
        if fmt.element == "e2m1":
            new = FP4Linear.from_linear(linear, weight_format=weight_format, activations=activations, prepare=prepare)
        else:
            new = MXFP8Linear.from_linear(linear, prepare=prepare)
        for name in places:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new)
        del linear, new
    return model


def prepare_(model: Model, layout: str = "hopper") -> Model:
    """:meth:`FP4Linear.prepare` for every quantised layer of a model, in place; one at a time, so that only one weight
    exists twice.

    Args:
        model: layers of :func:`quantize_`, or the layer itself; other modules stay as they are.
        layout: ``"hopper"`` or ``"plain"``.

    Returns:
        ``model``.

    Raises:
        ValueError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"prepare_: layout is {layout!r}; allowed: {allowed_values(LAYOUTS)}")
    for module in model.modules():
        if isinstance(module, BlockScaledLinear):
            module.prepare(layout)
    return model


def _select(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None) -> list[tuple[nn.Linear, list[str]]]:
    """Each selected Linear with every qualified name under which it was selected."""
    names: dict[int, tuple[nn.Linear, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear and (filter_fn is None or filter_fn(module, name)):
            names.setdefault(id(module), (module, []))[1].append(name)
    return list(names.values())
