"""Inductor writes KV caches in place, however a model holds them: no cache is cloned, and none is copied back."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from torch_fp4ops.testing import assert_same_bytes
from torch_fp4ops.testing.samples import values

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

PAGES, PAGE, KV_HEADS, DIM = 64, 16, 2, 64
LAST = (DIM // 2, DIM // 2, DIM // 16, DIM // 16)  # of keys, values and the scales of each
SHAPES = [(PAGES, PAGE, KV_HEADS, last) for last in LAST]
SCALE = torch.tensor([5 / 2688])
TABLES = torch.tensor([[0, 4], [4, 63]], dtype=torch.int32)
LENGTHS = torch.tensor([1, 20], dtype=torch.int32)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def store(key: Tensor, value: Tensor, slots: Tensor, *caches: Tensor) -> None:
    torch.ops.fp4.nvfp4_kv_quantize_store(key, value, slots, *caches, SCALE, SCALE)


class Attention(nn.Module):
    """Buffers, which are read after they were written."""

    def __init__(self):
        super().__init__()
        for name, shape in zip("abcd", SHAPES, strict=True):
            self.register_buffer(name, zeros(*shape))

    def forward(self, key, slots):
        store(key * 2, key * 3, slots, self.a, self.b, self.c, self.d)
        rows = [t.flatten(0, 2) for t in (self.a, self.c)]
        return torch.ops.fp4.nvfp4_kv_dequantize(*rows, SCALE)[:4] + 1


class Holder(nn.Module):
    """Buffers of given shapes and a function of them."""

    def __init__(self, function, shapes):
        super().__init__()
        self.function = function
        self.names = [f"cache{i}" for i in range(len(shapes))]
        for name, shape in zip(self.names, shapes, strict=True):
            self.register_buffer(name, zeros(*shape))

    def forward(self, key, slots):
        return self.function(key, slots, *(getattr(self, name) for name in self.names))


def as_arguments(key, slots, *caches):
    store(key * 2, key * 3, slots, *caches)
    return key + 1


def attended(key, slots, *caches):
    """A decoding step: both ops that read take the caches as the store left them."""
    store(key * 2, key * 3, slots, *caches)
    keys, _ = torch.ops.fp4.nvfp4_kv_dequantize_paged(*caches, TABLES, LENGTHS, SCALE, SCALE, max_seq_len=20)
    q = keys[:, 0].repeat(1, 2, 1) + 1
    return torch.ops.fp4.fp4_kv_attention_decode(q, *caches, TABLES, LENGTHS, SCALE, SCALE, window_left=8)


def read_before_and_after(key, slots, *caches):
    before = caches[0][0].sum()
    store(key * 2, key * 3, slots, *caches)
    return before, caches[0][0].sum()


def layers_of_one_tensor(key, slots, *stacked):
    for layer in range(3):
        key = key + 1
        store(key, key * 2, slots, *(t[layer] for t in stacked))
    return key


def keys_beside_values(key, slots, codes, scales):
    store(key * 2, key * 3, slots, codes[:, 0], codes[:, 1], scales[:, 0], scales[:, 1])
    return key + 1


def everything_in_a_page(key, slots, pages):
    sizes = [PAGE * KV_HEADS * last for last in LAST]
    parts = [p.view(PAGES, PAGE, KV_HEADS, -1) for p in pages.split(sizes, 1)]
    store(key * 2, key * 3, slots, *parts)
    return key + 1


HOLDERS = {
    "buffers": Attention,
    "buffers in a list": lambda: Holder(as_arguments, SHAPES),
    "attended": lambda: Holder(attended, SHAPES),
    "read before and after": lambda: Holder(read_before_and_after, SHAPES),
    "layers of one tensor": lambda: Holder(layers_of_one_tensor, [(3, *s) for s in SHAPES]),
    "keys beside values": lambda: Holder(
        keys_beside_values, [(PAGES, 2, PAGE, KV_HEADS, d) for d in (DIM // 2, DIM // 16)]
    ),
    "everything in a page": lambda: Holder(everything_in_a_page, [(PAGES, PAGE * KV_HEADS * sum(LAST))]),
}


@pytest.mark.parametrize("held_as", HOLDERS)
def test_caches_are_written_in_place(held_as):
    module, eager = HOLDERS[held_as](), HOLDERS[held_as]()
    smallest = min(t.numel() for t in module.buffers())
    pointers = [t.data_ptr() for t in module.buffers()]
    key, slots = values(0, 3, KV_HEADS, DIM), torch.tensor([0, 77, -1])
    torch._dynamo.decorators.mark_unbacked(key, 0)
    with torch.no_grad():
        out, (code,) = run_and_get_code(torch.compile(module, fullgraph=True), key, slots)
        torch.testing.assert_close(out, eager(key, slots))
    for given, wanted in zip(module.buffers(), eager.buffers(), strict=True):
        assert_same_bytes(given, wanted)
    assert any(bool(t.any()) for t in module.buffers())
    assert pointers == [t.data_ptr() for t in module.buffers()]

    body = code[code.index("def call") :]
    assert "torch.ops.fp4.nvfp4_kv_quantize_store" in body
    assert ".copy_(" not in body and ".clone(" not in body
    # Nothing as large as a cache is allocated. Sizes that are symbols are those of the new rows.
    for shape in re.findall(r"empty_strided\w*\(\(([^)]*)\)", body):
        sizes = [int(n) for n in shape.replace(" ", "").split(",") if n.isdigit()]
        assert math.prod(sizes) < smallest / 2, shape
