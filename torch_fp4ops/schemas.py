"""An op's schema as AOTInductor can take it, and what None then stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["in_place_of_none", "with_none_for_defaults"]


def with_none_for_defaults(schema: str) -> str:
    """The schema with None as the default where AOTInductor loses another one.

    It hands a dtype that is left out on as a number, and a keyword-only int that is left out to the call but not to
    the callee; both are refused when the package is loaded or run.
    """
    positional, star, keyword_only = schema.partition(" *,")
    keyword_only = re.sub(r"SymInt (\w+)=-?\d+", r"SymInt? \1=None", keyword_only)
    return re.sub(r"ScalarType (\w+)=\w+", r"ScalarType? \1=None", positional + star + keyword_only)


def in_place_of_none(arguments: Sequence[Any], defaults: Mapping[str, Any]) -> tuple[tuple[int, str, Any], ...]:
    """Place, name and value of the schema's arguments that are not None where None is given.

    They are those whose default :func:`with_none_for_defaults` took, and lists of tensors: AOTInductor hands an empty
    one on as None.
    """
    values: list[tuple[int, str, Any]] = []
    for i, a in enumerate(arguments):
        if str(a.type) == "List[Tensor]":
            values.append((i, a.name, []))
        elif a.has_default_value() and a.default_value is None and defaults[a.name] is not None:
            values.append((i, a.name, defaults[a.name]))
    return tuple(values)
