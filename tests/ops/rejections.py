"""Helper of the op tests: a valid call, changed in one argument, must be refused with a message that names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torch_fp4ops.registry import Op


def assert_rejected(op: Op, valid: dict[str, Any], change: dict[str, Any], message: str) -> None:
    """Every way to call the op refuses the changed call: eagerly, on meta tensors and under compile."""
    op.default(**valid)  # the call is right but for the change
    arguments = {**valid, **change}
    pattern = rf"torch\.ops\.fp4\.{op.name}: {message}"
    with pytest.raises(ValueError, match=pattern):
        op.default(**arguments)


def assert_rejected_by_contract(op: Op, valid: dict[str, Any], change: dict[str, Any], message: str) -> None:
    """As :func:`assert_rejected`, for what shapes, dtypes and strides show: refused on meta tensors as well."""
    assert_rejected(op, valid, change, message)
    to_meta = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), {**valid, **change})
    with pytest.raises(ValueError, match=rf"torch\.ops\.fp4\.{op.name}: {message}"):
        op.default(**to_meta)
