"""What README and docs/backends.md say of ops, backends and compute capabilities is what the backends themselves say."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch

from torch_fp4ops import OPS
from torch_fp4ops.ops import _flashinfer
from torch_fp4ops.ops.cutlass_fused_moe import _modes
from torch_fp4ops.testing import samples

ROOT = Path(__file__).parent.parent
COLUMNS = {
    "8.0 to 8.9": ((8, 0), (8, 6), (8, 9)),
    "9.0": ((9, 0),),
    "10.0, 10.3": ((10, 0), (10, 3)),
    "10.7": ((10, 7),),
    "11.0": ((11, 0),),
    "12.0, 12.1": ((12, 0), (12, 1)),
    "10.0 to 12.1": ((10, 0), (10, 3), (10, 7), (11, 0), (12, 0), (12, 1)),
}
MODES = {
    "W4A16 MXFP4": "w4a16_mxfp4",
    "W4A8 MXFP4": "w4a8_mxfp4",
    "W4A4 NVFP4": "w4a4_nvfp4",
    "MXFP4 x MXFP8": "w4a8_mxfp4_mxfp8",
    "bf16": "bf16",
    "fp16": "bf16",
}
CAPABILITIES = COLUMNS["8.0 to 8.9"] + COLUMNS["9.0"] + COLUMNS["10.0 to 12.1"]

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("flashinfer", reason="FlashInfer is not installed", exc_type=ImportError)
if (_flashinfer.version() or ()) < (0, 7):
    pytest.skip("the tables are those of FlashInfer 0.7", allow_module_level=True)


def table(page: str, heading: str) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of the table whose first line starts so."""
    lines = iter((ROOT / page).read_text().splitlines())
    title = next(line for line in lines if line.startswith(heading))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [cell.strip() for cell in title.strip("|").split("|")], rows


def names(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


@functools.cache
def real_samples(name: str) -> list:
    return samples(OPS[name])


@pytest.fixture
def takes(pretend_gpu, monkeypatch):
    """Whether a backend takes any sample of an op (of a mode) on a GPU of some capability, were all packages there."""
    monkeypatch.setattr(_flashinfer, "has_package", lambda name: True)
    by_name = {name: real_samples(name) for name in OPS}
    found: dict[tuple[str, str, str | None], set[tuple[int, int]]] = {}
    for capability in CAPABILITIES:
        pretend_gpu(capability)
        for name, op in OPS.items():
            for sample in by_name[name]:
                fake = sample.map_tensors(
                    lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
                )
                call = op.check(*fake.args, **fake.kwargs)
                mode = None
                if name == "cutlass_fused_moe":
                    flags = (call.use_w4_group_scaling, call.use_mxfp8_act_scaling)
                    mode = _modes.find_mode(call.fc1_expert_weights.dtype, len(call.quant_scales), *flags).name
                for backend in op.backend_names():
                    if op.find_backend(backend, "test").unsupported(call) is None:
                        for key in ((name, backend, None), (name, backend, mode)):
                            found.setdefault(key, set()).add(capability)

    def any_of(op: str, backend: str, column: str, mode: str | None = None) -> bool:
        able = found.get((op, backend, mode), set()) & set(COLUMNS[column])
        assert able in (set(), set(COLUMNS[column])), f"{op}, {backend}: only {able} of {column}"
        return bool(able)

    return any_of


def test_docs_backends(takes):
    columns, rows = table("docs/backends.md", "| op | `backend=`")
    on_gpu = (ROOT / "tests/ops/test_flashinfer_on_gpu.py").read_text()
    said, ops, in_moe = set(), [], False
    for first, second, *cells in rows:
        if names(first):
            ops, in_moe = names(first), "cutlass_fused_moe" in first
        modes = [mode for text, mode in MODES.items() if in_moe and re.search(rf"\b{text}\b", first)] or [None]
        assert not in_moe or modes != [None], first
        for column, cell in zip(columns[2:], cells, strict=True):
            for op in ops:
                for backend in names(second):
                    for mode in modes:
                        said.add((op, backend, mode))
                        here = cell in ("tested",) or cell.startswith("kernel run")
                        if cell.endswith(" only"):
                            here = op in names(cell)
                        assert here or cell == "-" or cell.startswith("refused") or cell.endswith(" only"), cell
                        assert takes(op, backend, column, mode) is here, f"{op}, {backend}, {mode}, {column}: {cell!r}"
                        if cell.startswith("kernel run"):
                            assert column == "9.0" and op in on_gpu
    for op, spec in OPS.items():
        own = set(spec.backend_names()) - {"reference", "triton", "gluon"}
        listed = {backend for name, backend, _ in said if name == op}
        # "flashinfer" is a name for one of the others where there are others, and "cutlass" one for it in the MoE.
        assert own - {"flashinfer"} - ({"cutlass"} if op == "cutlass_fused_moe" else set()) <= listed, op
        assert not own or listed, op
    assert {mode for _, _, mode in said if mode} == {m for m in MODES.values()}


def test_readme(takes):
    columns, rows = table("README.md", "| op | `triton`")
    family, kinds = "", []
    for title in columns[1:]:
        family = (names(title) or [family])[0]
        kinds.append((family, title.rpartition("`")[2].strip()))
    seen = []
    for first, *cells in rows:
        seen += names(first)
        for (kind, column), cell in zip(kinds, cells, strict=True):
            word = cell.partition(" ")[0]
            assert word in ("verified", "tested", "-")
            for op in names(first):
                able = kind in OPS[op].backend_names() and takes(op, kind, column)
                assert able is (word != "-"), f"{op}, {kind}, {column}: {cell!r}"
            assert word != "verified" or column == "9.0"  # the one GPU that this project has
    assert sorted(seen) == sorted(OPS)


def test_the_tables_agree():
    """Where FlashInfer is verified in README, a kernel of the op was run in docs/backends.md."""
    columns, rows = table("docs/backends.md", "| op | `backend=`")
    run = {op for row in rows if row[columns.index("9.0")].startswith("kernel run") for op in names(row[0])}
    columns, rows = table("README.md", "| op | `triton`")
    assert {op for row in rows if row[5].startswith("verified") for op in names(row[0])} == run
