"""The README's examples run as written, and what it says of files and ops is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from torch_fp4ops import OPS

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_examples_run(capsys, fresh_dynamo):
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    w4a4, w4a16, *explained = capsys.readouterr().out.splitlines()
    assert 0.12 < float(w4a4) < 0.145 and 0.085 < float(w4a16) < 0.105  # the figures that the comment rounds
    assert explained[0].startswith("mm_bf16_fp4 on ")


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_listed(name):
    assert f"`{name}`" in README


def test_links_lead_somewhere():
    root = Path(__file__).parent.parent
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("http") or (root / link).exists(), link
