"""The examples of docs/ run as written, on whatever this machine has; its links and tables speak of what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch._inductor import config

from torch_fp4ops import OPS, probe
from torch_fp4ops.kv_cache import methods
from torch_fp4ops.ops.nvfp4_kv_dequantize import nvfp4_kv_dequantize

DOCS = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
every_page = pytest.mark.parametrize("page", DOCS, ids=lambda p: p.name)


@pytest.fixture
def fresh_ops(monkeypatch):
    """Ops, backends and verdicts that an example adds are gone after it."""
    nvfp4_kv_dequantize.backend_names()
    monkeypatch.setattr(nvfp4_kv_dequantize, "_backends", dict(nvfp4_kv_dequantize._backends))
    monkeypatch.setattr(probe, "_verdicts", {})
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    before = dict(OPS)
    yield
    for name in OPS.keys() - before.keys():
        del OPS[name]


@every_page
def test_examples_run(page, capsys, fresh_dynamo, fresh_ops):
    namespace: dict[str, object] = {}
    if page.name == "kv_cache.md":
        pytest.importorskip("transformers")
    # A compiler pass does not run over a graph that comes from a cache.
    with config.patch(force_disable_caches=page.name == "fusion.md"):
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            exec(compile(block, page.name, "exec", dont_inherit=True), namespace)
    printed = capsys.readouterr().out.strip()
    if page.name == "compile.md":
        for size in (1, 2, 4, 8):
            assert f"size {size}:\n  mm_bf16_fp4: " in printed
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == 1 + 2 * 2  # the model; the smallest size in pieces and all others, for either replay
    elif page.name == "backends.md":
        assert namespace["y"].shape == (4, 1000)
        assert printed == "tensor([2.0000, 0.5000])"
    elif page.name == "kv_cache.md":
        # Two layers of keys and values, 2 x 19 tokens of two heads, each 36 bytes.
        assert f"torch.Size([2, 20]) {2 * 2 * 2 * 19 * 2 * 36}\n" in printed
        assert "v_sf_layout is 'interleaved'; allowed: 'linear'" in printed
        assert printed.endswith("amax/2688 amax/448 [6.0, 6.0]")
        assert torch.equal(namespace["k"][0, :20], namespace["k_of_slots"])
        assert not torch._dynamo.utils.counters["graph_break"]
    elif page.name == "fusion.md":
        assert printed == "True {'rms_norm': 1, 'silu_and_mul': 1}"


@every_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_and_backend_is_in_the_page(name):
    page = (DOCS[0].parent / "backends.md").read_text()
    assert f"`{name}`" in page
    for backend in OPS[name].backend_names():
        assert backend in ("reference", "triton") or f"`{backend}`" in page
