"""Models to compare without any code: the demo's encoder, and any architecture of transformers with random weights."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..demo import load_model, load_sentences

__all__ = ["Loaded", "demo_encoder", "from_config"]

# What there is of these in a configuration is made as small.
_REDUCED = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}


class Loaded(NamedTuple):
    """A model in bfloat16, its keyword arguments, and a line about both."""

    model: nn.Module
    inputs: dict[str, Tensor]
    what: str


def demo_encoder(device: torch.device, batch: int) -> Loaded:
    """The demo's pretrained sentence encoder on its first sentences."""
    _, sentences = load_sentences()
    if not 1 <= batch <= len(sentences):
        raise ValueError(f"--batch is {batch}; allowed: 1 to {len(sentences)}, the demo's sentences")
    model, ids, mask = load_model(device, sentences)
    what = f"all-MiniLM-L6-v2, {batch} sentences of {ids.shape[1]} tokens, padding included"
    return Loaded(model.bfloat16(), {"input_ids": ids[:batch], "attention_mask": mask[:batch]}, what)


def from_config(name: str, device: torch.device, batch: int, tokens: int, seed: int, full_size: bool) -> Loaded:
    """A text model of transformers with random weights, and random tokens.

    Args:
        name: a type that transformers knows ("llama"), or what ``AutoConfig.from_pretrained`` takes: a folder or
            config.json, or a model's name if its configuration is in the cache.
        full_size: with the configuration's own sizes, instead of two layers of width 256.

    Raises:
        ValueError: transformers knows no such configuration, can't build a model of it, or not one of text.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    config = _configuration(transformers, name, full_size)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a cache would be an output beside the hidden states
    size = min(getattr(config, "vocab_size", None) or 0, _REDUCED["vocab_size"])
    if not size:
        raise ValueError(f"--model {name}: a {config.model_type} model reads no tokens; use torch_fp4ops.compare")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = transformers.AutoModel.from_config(config)
        except Exception as error:  # a library's many ways to say that sizes don't fit
            hint = (
                "" if full_size else "; --size full keeps its own sizes, a config.json of yours may have smaller ones"
            )
            raise ValueError(f"--model {name}: transformers can't build it: {error}{hint}") from error
        ids = torch.randint(size, (batch, tokens))
    inputs = {"input_ids": ids.to(device)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    model = model.bfloat16().eval().to(device)
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        raise ValueError(f"--model {name}: it can't run on {batch} x {tokens} tokens: {error}") from error
    what = f"{type(model).__name__} with random weights (seed {seed}), {batch} x {tokens} random tokens"
    return Loaded(model, inputs, what)


def _configuration(transformers: Any, name: str, full_size: bool) -> Any:
    try:
        if name in transformers.CONFIG_MAPPING:
            config = transformers.CONFIG_MAPPING[name]()
        else:
            config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        config = config.get_text_config()
        if not full_size:
            _reduce(config)
        return config
    except Exception as error:  # a library's many ways to say that it is none, or none that can be made smaller
        if name in transformers.CONFIG_MAPPING:
            raise ValueError(f"--model {name}: its sizes can't be reduced ({error}); --size full keeps them") from error
        kind = "file" if Path(name).exists() else "type, folder or cached model"
        raise ValueError(
            f"--model {name}: no such {kind} that transformers reads; "
            "allowed: demo, a type such as llama, bert, qwen3_moe or t5, or the path of a config.json"
        ) from error


def _reduce(config: Any) -> None:
    one_head_each = getattr(config, "num_key_value_heads", None) == getattr(config, "num_attention_heads", None)
    for name, size in _REDUCED.items():
        if one_head_each and name == "num_key_value_heads":
            size = _REDUCED["num_attention_heads"]
        if isinstance(getattr(config, name, None), int):
            with contextlib.suppress(AttributeError):  # computed from others, without a setter
                setattr(config, name, min(getattr(config, name), size))
    if getattr(config, "layer_types", None):
        with contextlib.suppress(AttributeError):  # likewise
            config.layer_types = config.layer_types[: config.num_hidden_layers]
    if (getattr(config, "pad_token_id", None) or 0) >= (getattr(config, "vocab_size", None) or 0):
        config.pad_token_id = None
