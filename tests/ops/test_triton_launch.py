"""Which launches are programmatic dependent ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from torch_fp4ops.ops import _triton_launch
from torch_fp4ops.ops._triton_launch import EARLY_START_VARIABLE

GPU = torch.device("cuda", 0)


class Recorded:
    """A kernel that only says with what it was launched."""

    arg_names = ("x",)

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.options.update(options)


@pytest.mark.parametrize(("early", "given"), [(True, {"launch_pdl": True}), (False, {})])
def test_a_launch_says_so_only_where_kernels_start_early(monkeypatch, early, given):
    """ROCm's launcher knows no such option."""
    monkeypatch.setattr(_triton_launch, "_starts_early", lambda device, second: early)
    kernel = Recorded()
    _triton_launch.launch(kernel, (1,), 128, torch.device("cpu"), 1)
    assert kernel.options == {"num_warps": 4, "enable_fp_fusion": False, **given}


@pytest.mark.parametrize(
    ("capability", "hip", "said", "early"),
    [
        ((9, 0), None, None, (True, True)),
        ((12, 0), None, "1", (True, True)),
        ((8, 9), None, None, (False, False)),
        ((9, 4), "7.0", None, (False, False)),
        ((9, 0), None, "0", (False, False)),
        ((9, 0), None, "within", (False, True)),
        ((8, 0), None, "within", (False, False)),
    ],
)
def test_kernels_start_early_from_9_0_on_unless_told_otherwise(monkeypatch, capability, hip, said, early):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.delenv(EARLY_START_VARIABLE, raising=False)
    if said is not None:
        monkeypatch.setenv(EARLY_START_VARIABLE, said)
    for second in (False, True):
        assert _triton_launch._starts_early.__wrapped__(GPU, second) == early[second]
        assert not _triton_launch._starts_early.__wrapped__(torch.device("cpu"), second)


def test_another_way_to_start_is_refused(monkeypatch):
    monkeypatch.setenv(EARLY_START_VARIABLE, "no")
    with pytest.raises(ValueError, match="TORCH_FP4OPS_EARLY_START is 'no'; allowed: '1', 'within', '0'"):
        _triton_launch._starts_early.__wrapped__(GPU, False)


def test_rows_are_copied_together_where_they_are_far_apart():
    """Kernels index a tile's rows in 32 bits."""
    for step, copied in ((1 << 25, False), (1 << 26, False), ((1 << 26) + 8, True)):
        whole = torch.empty(step + 16, dtype=torch.bfloat16)  # of which few pages are ever touched
        x = whole.as_strided((2, 16), (step, 1))
        x.copy_(torch.arange(32.0).view(2, 16))
        rows, units = _triton_launch.rows_of_units(x)
        assert torch.equal(rows, x) and (rows.data_ptr() != x.data_ptr()) == copied
        assert units == (2 if copied else step // 8)
    one = torch.empty(1, 16, dtype=torch.bfloat16).as_strided((1, 16), (1 << 40, 1))
    wide = torch.empty(3, (1 << 26) + 8, dtype=torch.bfloat16, device="meta")
    assert _triton_launch.rows_of_units(one)[1] == 2
    assert _triton_launch.rows_of_units(wide) == (wide, (1 << 23) + 1)
