"""Models with the true structure of known architectures, at a small size, with seeded random weights, quantised.

Attention is torch's, or an opaque operator as serving engines have it (``attention="opaque"``): that one traces with
unbacked sizes, where torch's own asks whether the batch is 1, and a graph can be split at it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_fp4ops.block_quantization import quantize_nvfp4
from torch_fp4ops.nn import quantize_

HIDDEN, HEADS, VOCABULARY = 64, 4, 128
_COMMON = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, "vocab_size": VOCABULARY}
_DECODER = {**_COMMON, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 8192}
OPAQUE = "torch_fp4ops_tests_attention"


@torch.library.custom_op("torch_fp4ops_tests::attention", mutates_args=())
def opaque_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of ``[batch, heads, tokens, D]``, grouped heads repeated; contiguous ``[batch, tokens, heads, D]``."""
    out = nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


@opaque_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return q.new_empty(q.transpose(1, 2).shape)


def _transformers_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return opaque_attention(q, k, v, mask), None


class FusedExperts(nn.Module):
    """The experts of a Qwen-MoE layer in NVFP4, through ``cutlass_fused_moe``.

    Such experts are 3-D parameters, not ``nn.Linear``, so ``quantize_`` doesn't see them, and their own loop over the
    experts that were hit breaks a graph. Called like the module they replace.
    """

    def __init__(self, experts: Any):
        super().__init__()
        gate, up = experts.gate_up_proj.detach().float().chunk(2, dim=1)
        for name, w in (("fc1", torch.cat([up, gate], dim=1)), ("fc2", experts.down_proj.detach().float())):
            encode = 2688 / w.abs().amax((1, 2))
            codes, scales = quantize_nvfp4(w, encode.view(-1, 1, 1), 1 / encode.view(-1, 1, 1))
            for suffix, t in (("", codes), ("_scales", scales), ("_global", 1 / encode)):
                self.register_buffer(name + suffix, t)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return torch.ops.fp4.cutlass_fused_moe(
            hidden_states,
            top_k_index,
            top_k_weights.float(),
            self.fc1,
            self.fc2,
            hidden_states.dtype,
            [self.fc1_scales, self.fc1_global, self.fc2_scales, self.fc2_global],
            use_w4_group_scaling=True,
            weight_layout="linear",
        )


class DiffusionTransformer(nn.Module):
    """Two blocks of a diffusion transformer: image and text tokens in one stream, modulated by a time embedding."""

    class Block(nn.Module):
        def __init__(self, attend: Callable[..., Tensor]):
            super().__init__()
            self.attend = attend
            self.modulation = nn.Linear(HIDDEN, 6 * HIDDEN)
            self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
            self.norms = nn.ModuleList([nn.LayerNorm(HIDDEN, elementwise_affine=False) for _ in range(2)])
            self.qk_norm = nn.RMSNorm(HIDDEN // HEADS)
            self.out = nn.Linear(HIDDEN, HIDDEN)
            self.mlp = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU("tanh"), nn.Linear(4 * HIDDEN, HIDDEN))

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            shift, scale, gate, shift2, scale2, gate2 = self.modulation(nn.functional.silu(time))[:, None].chunk(6, -1)
            h = self.norms[0](x) * (1 + scale) + shift
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
            attended = self.attend(self.qk_norm(q), self.qk_norm(k), v, None).flatten(-2)
            x = x + gate * self.out(attended)
            return x + gate2 * self.mlp(self.norms[1](x) * (1 + scale2) + shift2)

    def __init__(self, attend: Callable[..., Tensor]):
        super().__init__()
        self.patches = nn.Linear(16, HIDDEN)
        self.text = nn.Linear(32, HIDDEN)
        self.time = nn.Sequential(nn.Linear(32, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN))
        self.blocks = nn.ModuleList([self.Block(attend) for _ in range(2)])
        self.final = nn.Linear(HIDDEN, 16)

    def forward(self, patches: Tensor, text: Tensor, time: Tensor) -> Tensor:
        frequencies = torch.exp(torch.arange(16, device=time.device) * -0.5)
        angles = time[:, None] * frequencies
        t = self.time(torch.cat([angles.cos(), angles.sin()], -1).to(patches.dtype))
        x = torch.cat([self.text(text), self.patches(patches)], dim=1)
        for block in self.blocks:
            x = block(x, t)
        return self.final(x[:, text.shape[1] :])


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def _build(name: str, attention: str) -> nn.Module:
    if name == "dit":
        return DiffusionTransformer(opaque_attention if attention == "opaque" else _torch_attention)
    import transformers

    implementation = {"attn_implementation": "sdpa" if attention == "torch" else OPAQUE}
    if attention == "opaque":
        transformers.AttentionInterface.register(OPAQUE, _transformers_attention)
        transformers.AttentionMaskInterface.register(OPAQUE, transformers.masking_utils.sdpa_mask)
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(**_COMMON, **implementation, intermediate_size=128))
    if name == "llama":
        config = transformers.LlamaConfig(**_DECODER, **implementation, intermediate_size=128)
        return transformers.LlamaForCausalLM(config)
    experts = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    config = transformers.Qwen3MoeConfig(**_DECODER, **implementation, **experts, intermediate_size=128)
    return transformers.Qwen3MoeForCausalLM(config)


NAMES = ("llama", "qwen_moe", "dit", "bert")


@functools.cache
def unquantized(name: str, attention: str = "torch") -> nn.Module:
    torch.manual_seed(0)
    return _build(name, attention).bfloat16().eval()


def quantized(name: str, weight_format: str = "nvfp4", activations: str = "bf16", attention: str = "torch") -> Any:
    """The model with its linear layers quantised, but for an output head, and its experts where it has any."""
    torch.manual_seed(0)
    model: Any = _build(name, attention).bfloat16().eval()
    if name == "qwen_moe":
        for layer in model.model.layers:
            layer.mlp.experts = FusedExperts(layer.mlp.experts)
    # The patches' rows are shorter than a block of MXFP4.
    return quantize_(model, weight_format, activations, lambda m, n: n not in ("lm_head", "patches"))


def inputs(name: str, size: int, mask: bool = False) -> dict[str, Any]:
    """Arguments of ``size`` rows (tokens of an image for the diffusion transformer). The same for the same size.

    ``mask`` adds an attention mask that fits any batch, so that none has to be made from the batch's size.
    """
    generator = torch.Generator().manual_seed(size)
    if name == "dit":
        rows = [torch.randn(1, n, k, generator=generator).bfloat16() for n, k in ((size, 16), (3, 32))]
        return {"patches": rows[0], "text": rows[1], "time": torch.tensor([0.3])}
    tokens = 3
    made: dict[str, Any] = {"input_ids": torch.randint(VOCABULARY, (size, tokens), generator=generator)}
    if name != "bert":
        made["use_cache"] = False
    if mask:
        ones = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
        made["attention_mask"] = ones if name == "bert" else ones.tril()
    return made


def dynamic_input(name: str, given: dict[str, Any]) -> tuple[Tensor, int]:
    """The tensor and the dimension that the size is of."""
    return (given["patches"], 1) if name == "dit" else (given["input_ids"], 0)


def output(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]
