"""A quantised module through torch.export and AOTInductor into a package, which another process loads and runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_fp4ops.nn import quantize_
from torch_fp4ops.testing import assert_same_bytes
from torch_fp4ops.testing.samples import values

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

LOAD_AND_RUN = """
import sys, torch, torch_fp4ops
import torch._inductor.codecache  # which torch 2.10 forgets
model = torch._inductor.aoti_load_package(sys.argv[1])
inputs = torch.load(sys.argv[2])
torch.save([model(x) for x in inputs], sys.argv[3])
"""


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.fc1, self.fc2 = (nn.Parameter(values(i, 2, rows, 64, scale=0.1)) for i, rows in ((1, 128), (2, 64)))

    def forward(self, x):
        x = x + self.down(torch.nn.functional.relu(self.up(x)))
        ids = torch.arange(x.shape[0], dtype=torch.int32).unsqueeze(1) % 2
        no_scales = []  # AOTInductor hands that on as None
        experts = torch.ops.fp4.cutlass_fused_moe(
            x, ids, torch.ones(x.shape[0], 1), self.fc1, self.fc2, torch.bfloat16, no_scales
        )
        return x + experts


@pytest.mark.skipif(shutil.which("g++") is None and "CXX" not in os.environ, reason="AOTInductor needs a C++ compiler")
def test_a_package_runs_in_another_process(tmp_path):
    """Layers with quantised activations and with 16-bit ones, and experts that are not quantised."""
    model = Mlp().bfloat16().eval()
    quantize_(model, "nvfp4", "same", lambda module, name: name == "up")
    quantize_(model, "nvfp4", "bf16")
    model.up.input_global_scale = torch.tensor([2688 / 6.0])  # calibrated: a row doesn't depend on the others
    rows = torch.export.Dim("rows", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(model, (values(0, 17, 64),), dynamic_shapes=({0: rows},), strict=False)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        inputs = [values(m, m, 64) for m in (2, 17, 129)]
        wanted = [model(x) for x in inputs]
    torch.save(inputs, tmp_path / "inputs.pt")
    root = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", LOAD_AND_RUN, package, tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for given, expected in zip(torch.load(tmp_path / "outputs.pt"), wanted, strict=True):
        assert given.shape == expected.shape
        torch.testing.assert_close(given, expected, atol=0.02, rtol=0.02)
    with torch.no_grad():  # and the exported program gives exactly what the module gives
        assert_same_bytes(program.module()(inputs[1]), wanted[1])
