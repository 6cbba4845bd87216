"""The examples of docs/ run as written, and its tables speak of what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from torch_fp4ops import OPS, probe
from torch_fp4ops.ops.nvfp4_kv_dequantize import nvfp4_kv_dequantize

PAGE = (Path(__file__).parent.parent / "docs" / "backends.md").read_text()


def test_examples_run(capsys, fresh_dynamo, monkeypatch):
    nvfp4_kv_dequantize.backend_names()
    monkeypatch.setattr(nvfp4_kv_dequantize, "_backends", dict(nvfp4_kv_dequantize._backends))
    monkeypatch.setattr(probe, "_verdicts", {})
    before = dict(OPS)
    try:
        namespace: dict[str, object] = {}
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(compile(block, "backends.md", "exec", dont_inherit=True), namespace)
        assert namespace["y"].shape == (4, 1000)
        assert capsys.readouterr().out.strip() == "tensor([2.0000, 0.5000])"
    finally:
        for name in OPS.keys() - before.keys():
            del OPS[name]


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_and_backend_is_in_the_page(name):
    assert f"`{name}`" in PAGE
    for backend in OPS[name].backend_names():
        assert backend in ("reference", "triton") or f"`{backend}`" in PAGE
