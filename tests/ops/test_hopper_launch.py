"""What the Hopper products hand to their launches, without a GPU: all parameters, in their order, and how they start."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from torch_fp4ops.formats import MXFP8, NVFP4

pytest.importorskip("triton.experimental.gluon", reason="needs Gluon")

from torch_fp4ops.ops import _hopper_launch
from torch_fp4ops.ops._hopper_ways import AT_ONCE, STRIPS, WAYS, AtOnce, Strips, cut, decodes
from torch_fp4ops.ops._triton_gemm_launch import Operand

from .test_hopper_strips import quantized_rows
from .test_hopper_ways import PROCESSORS, name_of

N, K = 1024, 2048


class Launch(NamedTuple):
    kernel: Any
    programs: int
    args: tuple[Any, ...]
    options: dict[str, Any]


@pytest.fixture
def launches(monkeypatch):
    """In place of launches; each has values for all of its kernel's parameters."""
    seen = []

    def launch(
        kernel, grid, threads, device, *args, max_registers=None, second=False, cluster=1, cluster_bytes=0, **rest
    ):
        assert sorted(kernel.arg_names[len(args) :]) == sorted(rest)
        assert grid[0] % cluster == 0 and (cluster_bytes > 0) == (cluster > 1) and threads % 32 == 0
        options = {"second": second, "cluster": cluster, **rest}
        seen.append(Launch(kernel, grid[0], args, options))

    monkeypatch.setattr(_hopper_launch, "launch", launch)
    return seen


def multiply(way, fmt, quantized):
    m = way.BM - 3
    chosen = cut(way, m, N, K, PROCESSORS, fmt.name)
    if chosen is None:
        pytest.skip("not a way for these sizes")
    weight = torch.zeros(N, K // fmt.elements_per_byte, dtype=torch.uint8)
    scale = torch.zeros(N, K // fmt.block_size, dtype=torch.uint8)
    a = quantized_rows(m, K, fmt, "128x4", 0) if quantized else Operand(torch.zeros(m, K, dtype=torch.bfloat16))
    out = torch.empty(m, N, dtype=torch.bfloat16)
    _hopper_launch.multiply(a, weight, scale, fmt, out, None, chosen)
    return chosen


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("fmt", [NVFP4, MXFP8], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(
    "way", [*WAYS, *AT_ONCE], ids=lambda way: str(way) if isinstance(way, AtOnce) else name_of(way)
)
def test_only_kernels_behind_one_of_the_same_call_are_second(launches, monkeypatch, way, fmt, quantized):
    decoded = []
    monkeypatch.setattr(
        _hopper_launch,
        "decoded",
        lambda a, dtype: decoded.append(a) or torch.zeros(a.elements.shape[0], a.k, dtype=dtype),
    )
    chosen = multiply(way, fmt, quantized)
    first, *others = launches
    assert len(decoded) == (quantized and not decodes(way, fmt.name, K, way.BM - 3))
    assert first.programs == chosen.programs and first.options["second"] == bool(decoded)
    assert first.options["cluster"] == getattr(way, "CLUSTER", 1)
    assert [other.options["second"] for other in others] == [True] * (chosen.parts > 1)


@pytest.mark.parametrize("way", [STRIPS["nvfp4"][0], STRIPS["nvfp4"][-1]], ids=str)
@pytest.mark.parametrize("in_product", [False, True])
def test_strips_are_second_where_activations_are_decoded_before(launches, monkeypatch, way, in_product):
    assert isinstance(way, Strips)
    monkeypatch.setattr(_hopper_launch, "decodes", lambda *_: in_product)
    monkeypatch.setattr(_hopper_launch, "decoded", lambda a, dtype: torch.zeros(a.elements.shape[0], a.k, dtype=dtype))
    multiply(way, NVFP4, True)
    (only,) = launches
    assert only.options["second"] != in_product and (only.options["X_LAYOUT"] > 0) == in_product
