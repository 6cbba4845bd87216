"""An FP4 key-value cache for models of ``transformers``, and its calibration. The only module here that imports it.

Written for the cache interface of transformers 5 (tested with 5.17 and 5.23).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .base import FP4KVCacheQuantMethod
from .buffers import KVBuffers
from .methods import PagedKVMethod, get_fp4_kv_cache_quant_method
from .scales import KVScales

__all__ = ["FP4Cache", "FP4DynamicLayer", "FP4StaticLayer", "calibrate_kv_scales"]


class FP4Cache(Cache):
    """Keys and values in FP4: ``model.generate(**inputs, past_key_values=FP4Cache(model.config))``.

    Attention sees what the cache holds, so a token's own key and value are quantised too, and how a prompt is cut into
    calls changes nothing.

    Without ``max_cache_len`` the cache grows, and can be cropped, reordered (beam search) and repeated, since a token's
    codes depend on that token alone. With it, buffers for so many tokens are allocated at the first call and written in
    place: a decoding step then has one graph for every length, without breaks, and can be captured. Its batch is fixed.

    Args:
        config: the model's; all its layers must have full attention.
        method: name of a method, see :func:`get_fp4_kv_cache_quant_method`.
        max_cache_len: room for so many tokens of each sequence: the prompt's and those to be generated, as ``generate``
            does not stop where it ends. A token past the end raises in eager calls (on a GPU if eager calls stored what
            is there) and in compiled ones on the CPU, for the three methods built in; elsewhere it is dropped.
        scales: global scales of the layers, see :func:`calibrate_kv_scales`; for methods that have them. None: ones.
        residual_length: the latest so many tokens stay in full precision. Only of a cache that grows.

    Raises:
        ValueError: a wrong argument, a layer without full attention, or a head size that is not whole blocks. At a call
            keys and values that do not fit each other or the cache, of which nothing is stored then.
    """

    def __init__(
        self,
        config: Any,
        method: str = "nvfp4",
        *,
        max_cache_len: int | None = None,
        scales: KVScales | None = None,
        residual_length: int = 0,
    ):
        if not isinstance(max_cache_len, int | None):
            raise ValueError(f"FP4Cache: max_cache_len is {max_cache_len!r}; allowed: an int or None")
        if not isinstance(residual_length, int):
            raise ValueError(f"FP4Cache: residual_length is {residual_length!r}; allowed: an int")
        if not isinstance(scales, KVScales | None):
            raise ValueError(f"FP4Cache: scales is {scales!r}; allowed: KVScales or None")
        kind = type(config).__name__
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"FP4Cache: config is a {kind}; allowed: a model's config")
        config = config.get_text_config(decoder=True)
        if not getattr(config, "num_attention_heads", None):
            raise ValueError(f"FP4Cache: config is a {kind}, without attention heads; allowed: one with them")
        count = config.num_hidden_layers
        template = get_fp4_kv_cache_quant_method(method, num_layers=count)
        if scales is not None:
            template.load_scales(scales.to("cpu"))  # refuses what doesn't fit
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        template.check_head_dim(head_dim)
        _require_full_attention(config)
        if residual_length < 0 or (residual_length and max_cache_len is not None):
            given = f"{residual_length} with max_cache_len={max_cache_len}"
            raise ValueError(f"FP4Cache: residual_length is {given}; allowed: 0 or more, and 0 with max_cache_len")
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"FP4Cache: max_cache_len is {max_cache_len}; allowed: 1 or more, or None")
        of_layer = [None if scales is None else scales.layer(i) for i in range(count)]
        layers: list[Any]
        if max_cache_len is None:
            layers = [FP4DynamicLayer(method, s, residual_length) for s in of_layer]
        else:
            layers = [FP4StaticLayer(max_cache_len, method, s) for s in of_layer]
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take now, scales included."""
        return sum(layer.nbytes for layer in self.layers)


def _require_full_attention(config: Any) -> None:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # then these decide, as in transformers itself
        kinds = [n for n in ("sliding_window", "attention_chunk_size") if getattr(config, n, None) is not None]
    others = sorted(set(kinds) - {"full_attention"})
    if others:
        raise ValueError(f"FP4Cache: the model has layers of {', '.join(others)}; allowed: only full_attention")


def _method_of_a_layer(name: str, scales: KVScales | None, device: torch.device) -> FP4KVCacheQuantMethod:
    method = get_fp4_kv_cache_quant_method(name, device=device)
    if scales is not None:
        method.load_scales(scales.to(device))
    return method


def _require_alike(keys: Tensor, values: Tensor, batch: int | None, heads: int | None) -> None:
    """``[batch, heads, tokens, D]`` of both, D for itself; with the batch and heads of what is stored."""
    if keys.dim() != 4 or values.dim() != 4 or keys.shape[:-1] != values.shape[:-1] or keys.dtype != values.dtype:
        given = f"{values.dtype} of shape {tuple(values.shape)}"
        allowed = f"as key_states, {keys.dtype} of shape {tuple(keys.shape)}"
        raise ValueError(f"FP4Cache: value_states is {given}; allowed: [batch, heads, tokens, D] {allowed}")
    if batch is not None and keys.shape[:2] != (batch, heads):
        given = f"of a batch of {keys.shape[0]} and {keys.shape[1]} heads"
        raise ValueError(f"FP4Cache: key_states is {given}; allowed: {batch} and {heads}, as what is stored")


class FP4DynamicLayer(DynamicLayer):
    """A layer that grows: codes and scales ``[batch, heads, tokens, ...]``, then the residual window in ``keys`` and
    ``values``. See :class:`FP4Cache`."""

    keys: Any
    values: Any

    def __init__(self, method: str, scales: KVScales | None = None, residual_length: int = 0):
        super().__init__()
        self.method_name, self.scales, self.residual_length = method, scales, residual_length
        self._stored: list[Tensor] = []  # codes and scales of keys, then of values

    @property
    def is_croppable(self) -> bool:
        """A token that has left the residual window does not come back in full precision."""
        return self.residual_length == 0

    @property
    def nbytes(self) -> int:
        residual = [self.keys, self.values] if self.is_initialized else []
        return sum(t.nbytes for t in [*self._stored, *residual])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        keys, values = key_states[..., :0, :].clone(), value_states[..., :0, :].clone()
        method = _method_of_a_layer(self.method_name, self.scales, key_states.device)
        scales = method.global_scales(0)
        empty = [method.quantize(x, scale) for x, scale in zip((keys, values), scales, strict=True)]
        # Last, since what raises leaves the layer as it was.
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values, self.method = keys, values, method
        self._stored = [t for pair in empty for t in pair]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        stored = self.keys.shape[:2] if self.is_initialized else (None, None)
        _require_alike(key_states, value_states, *stored)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        recent = [torch.cat(pair, dim=-2) for pair in ((self.keys, key_states), (self.values, value_states))]
        leaving = max(recent[0].shape[-2] - self.residual_length, 0)
        out: list[Tensor] = []
        stored_now: list[Tensor] = []
        for i, (x, scale) in enumerate(zip(recent, self.method.global_scales(0), strict=True)):
            codes, scales = self._stored[2 * i : 2 * i + 2]
            if leaving:
                new = self.method.quantize(x[..., :leaving, :], scale)
                codes, scales = (torch.cat(pair, dim=-2) for pair in zip((codes, scales), new, strict=True))
            stored_now += [codes, scales]
            out.append(torch.cat([self.method.dequantize(codes, scales, scale, x.dtype), x[..., leaving:, :]], dim=-2))
        # Copies: a view would keep what has left alive.
        self._stored = stored_now
        self.keys, self.values = (x[..., leaving:, :].clone() for x in recent)
        return out[0], out[1]

    def get_seq_length(self) -> int:
        return self._stored[0].shape[-2] + self.keys.shape[-2] if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        length = self.get_seq_length()
        if tokens_to_remove > 0 or (self.is_initialized and length + tokens_to_remove < 0):
            raise ValueError(f"FP4Cache: tokens_to_remove is {tokens_to_remove}; allowed: {-length} to 0")
        if not self.is_initialized:
            return
        left = length + tokens_to_remove
        self._stored = [t[..., :left, :] for t in self._stored]
        recent = max(left - self._stored[0].shape[-2], 0)
        self.keys, self.values = self.keys[..., :recent, :], self.values[..., :recent, :]

    def _for_all(self, change: Any) -> None:
        if self.is_initialized:
            self._stored = [change(t) for t in self._stored]
            self.keys, self.values = change(self.keys), change(self.values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._for_all(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._for_all(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._for_all(lambda t: t[indices])

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False
        self._stored = []


class FP4StaticLayer(StaticLayer):
    """A layer with buffers for ``max_cache_len`` tokens of each sequence, one page for each. See :class:`FP4Cache`."""

    is_croppable = True
    cumulative_length: Any
    buffers: KVBuffers
    _least_length: int
    """What eager calls have stored, which can be told without waiting for a GPU. Graphs may have stored more."""

    def __init__(self, max_cache_len: int, method: str, scales: KVScales | None = None):
        super().__init__(max_cache_len=max_cache_len)
        self.method_name, self.scales = method, scales
        self._least_length = 0

    @property
    def nbytes(self) -> int:
        return self.buffers.nbytes if self.is_initialized else 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if value_states.shape != key_states.shape:
            given, allowed = tuple(value_states.shape), tuple(key_states.shape)
            raise ValueError(f"FP4Cache: value_states is of shape {given}; allowed: that of key_states, {allowed}")
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads, _, self.head_dim = key_states.shape
        self.method = _method_of_a_layer(self.method_name, self.scales, self.device)
        # A page holds a sequence, so that what is dequantised has the shape that attention takes.
        (self.buffers,) = self.method.create_buffers(
            self.batch_size * self.max_cache_len,
            self.num_heads,
            self.head_dim,
            1,
            self.device,
            page_size=self.max_cache_len,
            kv_layout="HND",
        )
        self.block_tables = torch.arange(self.batch_size, device=self.device).unsqueeze(1)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            # Written in place by graphs that are captured.
            for t in (self.buffers.k, self.buffers.v, self.buffers.k_sf, self.buffers.v_sf, self.cumulative_length):
                torch._dynamo.mark_static_address(t)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        stored = (self.batch_size, self.num_heads) if self.is_initialized else (None, None)
        _require_alike(key_states, value_states, *stored)
        self._require_room(key_states.shape[-2])
        if self.is_initialized or torch.compiler.is_compiling():
            return self._update(key_states, value_states)
        try:
            return self._update(key_states, value_states)
        except BaseException:  # nothing is stored, so the next first call may have another batch
            self.is_initialized = False
            raise

    def _require_room(self, count: int) -> None:
        least = 0 if torch.compiler.is_compiling() else self._least_length
        if not torch.compiler.is_compiling() and self.cumulative_length.device.type == "cpu":
            least = int(self.cumulative_length)
        if least + count > self.max_cache_len:
            given = f"{self.max_cache_len} with {count} tokens for a cache of {least}"
            raise ValueError(f"FP4Cache: max_cache_len is {given}; allowed: {least + count} or more")

    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[-2]
        positions = torch.arange(count, device=self.device) + self.cumulative_length
        # The slot after a sequence's last is the next sequence's first: one past the end of all is no one's.
        slots = self.block_tables * self.max_cache_len + positions
        slots = torch.where(positions < self.max_cache_len, slots, self.buffers.slots)
        keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (key_states, value_states))
        self.method.quantize_and_store(self.buffers, slots.flatten(), keys, values)
        self.cumulative_length.add_(count)
        if not torch.compiler.is_compiling() and not _is_capturing(self.device):
            self._least_length += count
        return self._dequantized()

    def _dequantized(self) -> tuple[Tensor, Tensor]:
        """``[batch, heads, max_cache_len, D]``; what is not written yet is finite, and masked."""
        if isinstance(self.method, PagedKVMethod) and self.dtype != torch.float32:
            lengths = self.cumulative_length.repeat(self.batch_size)
            keys, values = self.method.dequantize_paged(self.buffers, self.block_tables, lengths, dtype=self.dtype)
            return keys.transpose(1, 2), values.transpose(1, 2)
        return self.method.dequantize_prev_kv(self.buffers, dtype=self.dtype)

    def _bytes(self) -> tuple[Tensor, ...]:
        return self.buffers.k, self.buffers.v, self.buffers.k_sf, self.buffers.v_sf

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens: their slots are written again."""
        if tokens_to_remove > 0:
            raise ValueError(f"FP4Cache: tokens_to_remove is {tokens_to_remove}; allowed: 0 or less")
        if self.is_initialized:
            self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)
            self._least_length = max(self._least_length + tokens_to_remove, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            if beam_idx.shape != (self.batch_size,):
                given = f"of shape {tuple(beam_idx.shape)}"
                raise ValueError(f"FP4Cache: beam_idx is {given}; allowed: ({self.batch_size},), the batch")
            for t in self._bytes():
                t.copy_(t.index_select(0, beam_idx.to(t.device)))

    def reset(self) -> None:
        self.cumulative_length.zero_()
        self._least_length = 0
        if self.is_initialized:
            for t in self._bytes():
                t.zero_()

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ValueError("FP4Cache: a cache with max_cache_len has a fixed batch; allowed: one without, which grows")

    def batch_select_indices(self, indices: Tensor) -> None:
        self.batch_repeat_interleave(1)


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what is called, which then has not happened."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _AmaxLayer(DynamicLayer):
    """Stores nothing but the largest magnitudes that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.amax: Tensor | None = None  # of keys and of values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        amax = torch.stack([x.abs().amax().float() for x in (key_states, value_states)])
        self.amax = amax if self.amax is None else torch.maximum(self.amax, amax)
        return key_states, value_states


@torch.no_grad()
def calibrate_kv_scales(
    model: nn.Module, prompts: Iterable[Tensor | Mapping[str, Any]], convention: str = "amax/2688"
) -> KVScales:
    """Global scales of a model's layers, from the largest keys and values of some prompts.

    Larger values than these are still stored, with a block scale that saturates: beyond amax with ``"amax/2688"``,
    beyond 6 amax with ``"amax/448"``.

    Args:
        model: a decoder of transformers; it runs in evaluation mode, and is as before then.
        prompts: token ids ``[batch, tokens]``, or the model's keyword arguments. Padding counts as tokens.
        convention: a key of :data:`SCALE_CONVENTIONS`.

    Returns:
        :class:`KVScales` on the CPU, to be given to :class:`FP4Cache` and saved by ``.save(path)``.

    Raises:
        ValueError: no prompt, or one by itself; a layer that stored nothing, only zeros or something not finite.
    """
    if isinstance(prompts, (Tensor, Mapping, str)):
        given = f"one prompt, a {type(prompts).__name__}"
        raise ValueError(f"calibrate_kv_scales: prompts is {given}; allowed: a list of them, or another iterable")
    config: Any = model.config
    count = config.get_text_config(decoder=True).num_hidden_layers
    layers = [_AmaxLayer() for _ in range(count)]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for prompt in prompts:
            inputs = {"input_ids": prompt} if isinstance(prompt, Tensor) else dict(prompt)
            model(**{**inputs, "past_key_values": Cache(layers=layers), "use_cache": True})
    finally:
        for module in training:
            module.training = True
    silent = [i for i, layer in enumerate(layers) if layer.amax is None]
    if silent:
        raise ValueError(
            f"calibrate_kv_scales: layers {silent} stored nothing; allowed: prompts that reach every layer"
        )
    amax = torch.stack([layer.amax.cpu() for layer in layers if layer.amax is not None])
    return KVScales.from_amax(amax[:, 0], amax[:, 1], convention)
