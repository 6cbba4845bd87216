"""The benchmark of what ops cost on the host: the part that needs a GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import host_overhead
from torch_fp4ops import OPS


@pytest.mark.gpu
def test_every_op_is_measured():
    with torch.no_grad():
        rows = list(host_overhead.backend_overheads(calls=20, runs=1))
    assert {row.op for row in rows} == set(OPS)
    assert all(row.direct_us > 0 and row.op_us > 0 for row in rows)
    assert all(row.launches and row.launch_us > 0 for row in rows if row.backend in ("triton", "gluon"))
