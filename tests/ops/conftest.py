"""What the tests of Triton kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..interpreter import Interpreter


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()
