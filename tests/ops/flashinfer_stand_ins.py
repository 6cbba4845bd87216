"""Stand-ins for FlashInfer's functions: what their documentation says, over the reference.

Each binds the call to the installed function's real signature and takes its arguments in FlashInfer's form.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from torch_fp4ops import OPS
from torch_fp4ops.ops import _flashinfer
from torch_fp4ops.ops.cutlass_fused_moe import cutlass_fused_moe

INSTALLED = _flashinfer.version() or ()


def exists(name: str) -> bool:
    """Whether the installed version has the function."""
    since = _flashinfer.SIGNATURES[name].since
    return since is None or since <= INSTALLED


def stand_in(name: str, function: Callable[..., Any], calls: list[tuple[str, dict[str, Any]]]) -> Any:
    """In place of FlashInfer's ``function`` of that name; notes the calls made."""
    signature = inspect.signature(function)

    def run(**given: Any) -> Any:
        signature.bind(**given)
        calls.append((name, dict(given)))
        return op_by_meaning(name, given)

    run.__signature__ = signature
    for question in ("is_backend_supported",):
        if hasattr(function, question):
            setattr(run, question, getattr(function, question))
    return run


def op_by_meaning(name: str, given: dict[str, Any]) -> Any:
    """What FlashInfer's function gives for arguments in its form."""
    reference = OPS[name].__wrapped__ if name in OPS else None
    backend = given.pop("backend", None)
    if name == "fp4_quantize":
        assert given.pop("nvfp4_4over6", None) is None and backend in ("cuda", "cute-dsl")
        assert given["input"].is_contiguous() and given["input"].dim() == 2
        assert not (backend == "cute-dsl" and given["is_global_scale_inversed"])  # it ignores the flag
    elif name == "silu_and_mul_nvfp4_quantize":
        assert given.pop("nvfp4_4over6", None) is None
        x = given.pop("input")
        assert x.is_contiguous() and x.dim() == 2 and x.dtype != torch.float32 and given["global_scale"].shape == (1,)
        gate, up = x.float().chunk(2, dim=-1)
        product = torch.nn.functional.silu(gate) * up
        return OPS["fp4_quantize"].__wrapped__(product.to(x.dtype), **given)  # it rounds before it quantises
    elif name == "mxfp8_quantize":
        given["sf_swizzle_layout"] = given["sf_swizzle_layout"].value
    elif name in ("mm_fp4", "mm_mxfp8"):
        given["b_layout"] = "trtllm" if backend == "trtllm" else "plain"
        assert given["a"].is_contiguous() and given["b"].T.is_contiguous()
        dimensions = 2 if name == "mm_fp4" else 1
        assert given["a_descale"].dim() == given["b_descale"].dim() == dimensions
        assert not given["use_8x4_sf_layout"] or backend == "trtllm"
    elif name == "prepare_bf16_fp4_weights":
        return (given["b"], (given["b_descale"], backend), given["alpha"])
    elif name == "mm_bf16_fp4":
        given["b_descale"], prepared_for = given["b_descale"]
        assert prepared_for == backend
    elif name == "nvfp4_kv_dequantize_paged":
        outputs = given.pop("output_k"), given.pop("output_v")
        caches = (*given.pop("paged_kv_cache"), *given.pop("kv_cache_sf"))
        assert given["seq_lens"].dtype == torch.int32
        longest = outputs[0].shape[1]
        found = reference(*caches, **given, output_dtype=outputs[0].dtype, max_seq_len=longest)
        there = torch.arange(longest) < given["seq_lens"][:, None]  # the rest it leaves alone
        for output, right in zip(outputs, found, strict=True):
            output[there] = right[there]
        return None
    elif name == "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping":
        scales = given.pop("kv_cache_sf")
        assert all(t.dtype == torch.float8_e4m3fn for t in scales)
        caches = (*given.pop("paged_kv_cache"), *(t.view(torch.uint8) for t in scales))
        new = (given.pop("append_key"), given.pop("append_value"), given.pop("slot_mapping"))
        return OPS["nvfp4_kv_quantize_store"].__wrapped__(*new, *caches, **given)
    elif name.startswith("nvfp4_kv"):
        assert all(t.is_contiguous() for t in given.values() if isinstance(t, torch.Tensor))
    else:
        return moe_by_meaning(given)
    return reference(**given)


def moe_by_meaning(given: dict[str, Any]) -> list[torch.Tensor]:
    assert given.pop("use_fused_finalize", False) is False
    four_bit, eight_bit = given["use_w4_group_scaling"], given["use_mxfp8_act_scaling"]
    weights = given["fc1_expert_weights"].dtype
    if given["quant_scales"]:
        assert weights == (torch.uint8 if four_bit else torch.int64)
    else:  # not quantised: one dtype throughout, and rows of 16 bytes
        assert weights == given["input"].dtype == given["output_dtype"] != torch.float32
        assert given["fc1_expert_weights"].shape[2] % 8 == given["fc2_expert_weights"].shape[2] % 8 == 0
    assert (given["fc1_expert_biases"] is None) is (given["fc2_expert_biases"] is None)
    assert given["token_selected_experts"].dtype == torch.int32
    for name in ("token_selected_experts", "token_final_scales", "swiglu_alpha", "swiglu_beta", "swiglu_limit"):
        assert given[name] is None or given[name].is_contiguous(), name
    for i, t in enumerate(given["quant_scales"]):
        if t.dtype != torch.int32:  # a factor: without a dimension only where it is an activation's
            assert t.dim() == 1 or (i in ((2,) if four_bit else (0, 3)) and not eight_bit)
    for bias in ("fc1_expert_biases", "fc2_expert_biases"):
        assert given[bias] is None or given[bias].dtype == given["output_dtype"]
    given["activation_type"] = int(given["activation_type"])
    out = cutlass_fused_moe.__wrapped__(**given, weight_layout="flashinfer")
    return [out, *(torch.empty(1) for _ in range(3))]  # what else it returns means nothing here
