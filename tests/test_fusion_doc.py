"""The examples of docs/fusion.md run as written."""

from __future__ import annotations

import re
from pathlib import Path

from torch._inductor import config

DOC = (Path(__file__).parent.parent / "docs" / "fusion.md").read_text()


def test_examples_run(capsys, fresh_dynamo):
    namespace: dict[str, object] = {}
    with config.patch(force_disable_caches=True):  # the pass does not run over a graph that comes from a cache
        for block in re.findall(r"```python\n(.*?)```", DOC, re.DOTALL):
            exec(compile(block, "fusion.md", "exec"), namespace)
    same, counted = capsys.readouterr().out.strip().split(" ", 1)
    assert same == "True"
    assert counted == "{'rms_norm': 1, 'silu_and_mul': 1}"
