"""What ``SharedLowering`` lets targets share, with TTGIR and a lowering that are made up."""

from __future__ import annotations

import pytest

from .lowering import SharedLowering

TTGIR = """#blocked = #ttg.blocked<{{sizePerThread = [{size}], order = [0]}}>
#loc = loc("there":1:0)
module attributes {{ttg.target = "cuda:80"}} {{
  %0 = arith.{op} %a, %b : tensor<{length}xf32, #blocked> loc(#loc)
}}
"""


@pytest.fixture
def lowered_for():
    """Lowers for a target; says whether the backend did it, and checks that the result is right."""
    shared = SharedLowering()

    def lower(target, op="addf", size=1, length=128):
        calls = []
        differs = op == "divf" and target == "sm_90"

        def by_backend(module, metadata):
            calls.append(target)
            metadata["shared"] = length
            return f"{op} {size} {length} {differs}"

        metadata = {}
        stages = {"llir": by_backend}
        assert shared.hook(target)(object(), stages, None) == shared.hook(target)()
        text = TTGIR.format(op=op, size=size, length=length).replace("cuda:80", target)
        assert stages["llir"](text, metadata) == f"{op} {size} {length} {differs}"
        assert metadata == {"shared": length}
        return bool(calls)

    return lower


def test_what_came_out_alike_is_lowered_once(lowered_for):
    assert lowered_for("sm_80") and lowered_for("sm_86")
    assert lowered_for("sm_80", length=256) and not lowered_for("sm_86", length=256)


def test_every_two_targets_are_compared(lowered_for):
    assert lowered_for("sm_80") and lowered_for("sm_86")
    assert lowered_for("sm_80", length=256) and lowered_for("sm_89", length=256)


def test_other_operations_and_layouts_are_lowered_for_each(lowered_for):
    assert lowered_for("sm_80") and lowered_for("sm_86")
    for other in ({"op": "mulf"}, {"size": 2}):
        assert lowered_for("sm_80", **other) and lowered_for("sm_86", **other)


def test_what_came_out_different_is_lowered_for_each(lowered_for):
    for length in (128, 256):
        assert lowered_for("sm_80", "divf", length=length) and lowered_for("sm_90", "divf", length=length)
