"""What importing the package costs and pulls in, and that imports inside it go one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torch_fp4ops

ROOT = Path(torch_fp4ops.__file__).parent

# A module may import from its own layer and those before it.
LAYERS = (
    {
        "formats",
        "codecs",
        "block_quantization",
        "scale_layouts",
        "hopper_layout",
        "weight_layouts",
        "prepared_weights",
        "contracts",
        "schemas",
        "capture",
        "tables",
        "replay",
        "no_backward",
    },
    {"registry", "backends", "selection"},
    {"ops", "testing", "probe", "extern"},
    {"nn", "kv_cache", "_partition_graphs", "cuda_graphs", "compile_passes"},
    {"demo", "check", "comparison", "benchmarks"},
    {"cli", "__main__"},
)


def layer_of(module: str) -> int | None:
    return next((i for i, names in enumerate(LAYERS) if module in names), None)


def imports(path: Path) -> list[tuple[str, bool]]:
    """Absolute names of everything a file imports, and whether that happens when the file is imported."""
    relative = path.relative_to(ROOT.parent).with_suffix("")
    package = relative.parent.parts
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lazy = {id(n) for f in functions for n in ast.walk(f)}
    typing_only = [n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    lazy |= {id(n) for block in typing_only for n in ast.walk(block)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(a.name, id(node) not in lazy) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *([node.module] if node.module else [])])
            found += [(f"{name}.{a.name}", id(node) not in lazy) for a in node.names]
    return found


FILES = sorted(p for p in ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = path.relative_to(ROOT).with_suffix("").parts[0]
    if own == "__init__":
        return
    assert layer_of(own) is not None, f"{own} has no layer"
    for name, eager in imports(path):
        parts = name.split(".")
        if parts[0] != "torch_fp4ops" or not eager or len(parts) < 2 or layer_of(parts[1]) is None:
            continue
        assert layer_of(parts[1]) <= layer_of(own), f"{own} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_flashinfer_is_imported_by_its_adapters_only(path):
    adapter = path.name in ("flashinfer.py", "_flashinfer.py")
    assert adapter or not any(name.split(".")[0] == "flashinfer" for name, _ in imports(path))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 420


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_needs_neither_triton_nor_flashinfer_and_loads_neither():
    block = "import sys\nfor name in ('triton', 'flashinfer', 'transformers', 'safetensors', 'hypothesis'):\n    sys.modules[name] = None\n"
    # A plain torch import may load triton by itself; what counts is what we add.
    added = (
        "import sys, torch\nbefore = set(sys.modules)\nimport torch_fp4ops\n"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} & {'triton', 'flashinfer', 'transformers'}))"
    )
    assert run(added).strip() == "[]"
    works = (
        block + "import torch, torch_fp4ops, torch_fp4ops.kv_cache, torch_fp4ops.nn\nx = torch.ones(1, 16)\n"
        "print(torch.ops.fp4.fp4_quantize(x, torch.ones(1))[0].sum().item())"
    )
    assert int(run(works)) > 0


@pytest.mark.parametrize("module", ["torch_fp4ops", "torch_fp4ops.nn", "torch_fp4ops.kv_cache"])
def test_import_adds_under_300_ms_to_torch(module):
    code = f"import torch, time\nt = time.perf_counter()\nimport {module}\nprint(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.3


def test_public_names():
    for name in torch_fp4ops.__all__:
        assert getattr(torch_fp4ops, name) is not None
    assert set(torch_fp4ops.OPS) <= set(torch_fp4ops.__all__)
