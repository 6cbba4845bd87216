"""The examples of docs/ run as written, on whatever this machine has, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOCS = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
every_page = pytest.mark.parametrize("page", DOCS, ids=lambda p: p.name)


@every_page
def test_examples_run(page, capsys, fresh_dynamo):
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, page.name, "exec"), namespace)
    if page.name == "compile.md":
        printed = capsys.readouterr().out
        for size in (1, 2, 4, 8):
            assert f"size {size}:\n  mm_bf16_fp4: " in printed
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == 1 + 2  # the model; the smallest size in pieces, and all others


@every_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link
