"""fp4_kv_attention_decode: attention of one new token a sequence over a paged FP4 cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...contracts import Call, Out
from ...formats import kv_format
from ...registry import op
from ...selection import Preference
from .. import _kv

HEAD_DIMS = (64, 128, 256)


def _contract(call: Call) -> Out:
    fmt = _kv.require_format(call)
    _kv.require_layout(call)
    q = call.q
    call.require_dtype("q", (torch.bfloat16, torch.float16))
    call.require_rank("q", 3)
    batch, q_heads, dim = q.shape
    known = any(dim == d for d in HEAD_DIMS)
    call.require(known, "q", f"of D = {dim}", f"D = {' or '.join(map(str, HEAD_DIMS))}")
    call.require_rank("k_cache", 4)
    heads = _kv.heads_of(call.k_cache, call.kv_layout)
    call.require(heads >= 1, "k_cache", call.k_cache.shape, "at least one head")
    allowed = f"a multiple of the {heads} heads of k_cache"
    call.require(q_heads % heads == 0, "q", f"of {q_heads} heads", allowed)
    call.require(q_heads >= 1, "q", f"of {q_heads} heads", allowed)
    _kv.require_caches(call, heads, dim, fmt)
    _kv.require_sequences(call, batch)
    _kv.require_cache_scales(call, fmt)
    call.require(call.window_left >= -1, "window_left", call.window_left, "-1 for no window, or 0 and more")
    cap, sm_scale = call.logits_soft_cap, call.sm_scale
    if cap is not None:
        for right in (cap > 0, cap < math.inf):
            call.require(right, "logits_soft_cap", cap, "None, or finite and above zero")
    call.require(sm_scale is None or abs(sm_scale) < math.inf, "sm_scale", sm_scale, "None, or finite")
    return Out(q.shape, q.dtype)


def _check_values(call: Call) -> None:
    _kv.check_cache_scales(call)
    _kv.check_sequences(call, call.block_tables.shape[1] * _kv.page_size(call.k_cache, call.kv_layout))


_PREFERENCES = (
    Preference(
        "triton",
        "cuda",
        "reads the cache once, as it is; NVIDIA H200: 781 us for 64 sequences of 32768 tokens, 32 over 8 heads of 128, "
        "2.75 times as fast as over bf16; the reference writes keys and values out in fp32 first",
    ),
)


@op(
    preferences=_PREFERENCES,
    contract=_contract,
    check_values=_check_values,
    byte_arguments=_kv.BYTES,
)
def fp4_kv_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_cache_sf: Tensor,
    v_cache_sf: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    kv_layout: str = "NHD",
    *,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Attention of one query token a sequence, its last one, over a paged FP4 cache that holds that token already.

    With ``k`` and ``v`` the values that :func:`nvfp4_kv_dequantize_paged` would give, in fp32, and g the kv head of
    query head h, ``h * heads // q_heads``::

        s_t = sm_scale * (q[h] . k[t, g])           (then logits_soft_cap * tanh(s_t / logits_soft_cap))
        out[h] = sum_t softmax(s)_t * v[t, g]       over the tokens t of the window

    Args:
        q: ``[batch, q_heads, D]``, bfloat16 or float16, D 64, 128 or 256; any strides.
        k_cache, v_cache: uint8 codes ``[pages, page_size, heads, D/2]`` (NHD) or ``[pages, heads, page_size, D/2]``
            (HND); heads divides q_heads. Any strides but a last one of 1.
        k_cache_sf, v_cache_sf: uint8 scales, the same with ``D / sf_vec_size``, linear.
        block_tables: int32 or int64 ``[batch, max_pages]``: token t of a sequence is entry ``t % page_size`` of page
            ``block_tables[sequence, t // page_size]``. Pages that the sequence does not reach may be anything.
        seq_lens: int32 or int64 ``[batch]``, tokens of each sequence, the query's own included.
        k_scale, v_scale: float32, one element, the *decode* global scales; None for formats without one.
        kv_layout: ``"NHD"`` or ``"HND"``.
        sm_scale: factor of the logits, finite; ``1 / sqrt(D)`` if None.
        window_left: how many tokens before the query's own are seen; -1 for all.
        logits_soft_cap: see above, finite and above zero; None for none.
        sf_vec_size, sf_use_ue8m0: the format: 16 and False NVFP4, 32 and True MXFP4, 16 and True BlockFP4.
        backend: ``"auto"`` or a backend's name.

    Returns:
        ``[batch, q_heads, D]`` of q's dtype; zeros for a sequence without tokens. A block with a NaN scale among the
        tokens seen makes NaN of what depends on it. On a GPU, where looking would synchronise, a length is cut to
        ``max_pages * page_size``, and the tokens of a page outside of the cache are left out. The same inputs give
        the same bits on the same GPU.

    Raises:
        ValueError: a wrong dtype, shape, stride, D, number of heads, layout, format, window or cap, and on the CPU a
            length or a page out of range, or a global scale that is not finite and above zero.

    Source: the decoding attention of FlashInfer's ``BatchDecodeWithPagedKVCacheWrapper`` (arguments ``sm_scale``,
    ``window_left`` and ``logits_soft_cap``), over the cache of its NVFP4 append.
    """
    fmt = kv_format(sf_vec_size, sf_use_ue8m0)
    assert fmt is not None
    page = _kv.page_size(k_cache, kv_layout)
    tokens = block_tables.shape[1] * page
    index, there = _kv.present(block_tables, seq_lens, k_cache.shape[0], page, tokens)
    k, v = (
        _kv.gather(cache, cache_sf, scale, fmt, kv_layout, index, there)
        for cache, cache_sf, scale in ((k_cache, k_cache_sf, k_scale), (v_cache, v_cache_sf, v_scale))
    )
    seen = in_window(there, seq_lens, window_left)
    sm_scale = q.shape[2] ** -0.5 if sm_scale is None else sm_scale
    return attend(q.float(), k, v, seen, sm_scale, logits_soft_cap).to(q.dtype)


def in_window(there: Tensor, seq_lens: Tensor, window_left: int) -> Tensor:
    """Which of the tokens that are there the last one sees, ``[batch, tokens]``."""
    if window_left < 0:
        return there
    tokens = there.shape[1]
    token = torch.arange(tokens, device=there.device)
    return there & (token >= seq_lens.clamp(max=tokens).unsqueeze(1) - 1 - min(window_left, tokens))


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sm_scale: float, cap: float | None) -> Tensor:
    """The formula, in the dtype of the arguments: ``q [batch, q_heads, D]``, k and v ``[batch, tokens, heads, D]``."""
    batch, q_heads, dim = q.shape
    v = v.where(seen[..., None, None], 0.0)  # a weight of zero would not hide a NaN
    grouped = q.reshape(batch, k.shape[2], q_heads // k.shape[2], dim)
    s = torch.einsum("bhgd,bthd->bhgt", grouped, k) * sm_scale
    if cap is not None:
        s = cap * (s / cap).tanh()
    if not s.shape[-1]:
        return q.new_zeros(q.shape)
    s = s.masked_fill(~seen[:, None, None], -torch.inf)
    most = s.amax(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).min)  # no token at all: weights of zero, no NaN
    weights = (s - most).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    return torch.einsum("bhgt,bthd->bhgd", weights, v).reshape(batch, q_heads, dim)
