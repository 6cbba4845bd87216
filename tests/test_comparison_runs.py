"""What compare makes of models that call, share and change things in ways of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from torch_fp4ops import compare
from torch_fp4ops.nn import quantize_

QUICK = {"warmup": 0, "repeats": 1}
TWICE = ("reference", "reference")


@pytest.fixture(scope="module")
def x():
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 64).bfloat16()


def quantized(model: nn.Module) -> nn.Module:
    return quantize_(copy.deepcopy(model), "nvfp4", "bf16")


class Counting(nn.Module):
    """Its output depends on how often the object that it is given has been used."""

    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, x, state):
        state.uses += 1
        return self.layer(x * state.uses)


class State:
    uses = 0


class Only(State):
    def __deepcopy__(self, memo):
        raise TypeError("there is one only")


def test_objects_in_the_inputs_are_copied(x):
    state = State()
    found = compare(quantized(Counting()), (x, state), TWICE, **QUICK)
    assert [row.accumulated.relative_l2 for row in found.rows] == [0] * len(found.rows) and state.uses == 0
    shared = Only()
    compare(quantized(Counting()), (x, shared), TWICE, local=False, **QUICK)
    assert shared.uses > 2  # what can't be copied is handed on


def test_a_layer_alone_gets_what_came_before_its_own_hooks(x):
    model = quantized(nn.Sequential(linear(), linear()))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[1].register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
    found = compare(model, x, TWICE, **QUICK)
    assert [row.local.relative_l2 for row in found.rows if row.local] == [0, 0]


def test_a_layer_that_fails_and_is_called_again(x):
    class Retrying(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear()
            self.layer.register_forward_pre_hook(self.refuse)

        def refuse(self, module, args):
            if args[0].isnan().any():
                raise FloatingPointError

        def forward(self, x):
            for scale in (float("nan"), 1.0, 2.0):
                try:
                    x = self.layer(x * scale)
                except FloatingPointError:
                    continue
            return x

    model = Retrying()
    found = compare(model, x, TWICE, layers="leaves", **QUICK)
    assert [(row.call, row.local.relative_l2) for row in found.rows if row.local] == [(0, 0), (1, 0)]


class Twice(nn.Module):
    def __init__(self, shared: bool):
        super().__init__()
        self.a = linear()
        self.b = self.a if shared else copy.deepcopy(self.a)

    def forward(self, x):
        return self.b(self.a(x))


def test_a_module_that_only_one_model_shares_is_no_row(x):
    found = compare(quantized(Twice(shared=False)), x, "reference", baseline=Twice(shared=True), **QUICK)
    assert [row.layer for row in found.rows if row.local] == []
    assert found.unmatched == (
        "a, which is one module with b in baseline",
        "b, which is one module with a in baseline",
    )
    both = compare(quantized(Twice(shared=True)), x, "reference", baseline=Twice(shared=True), **QUICK)
    assert [(row.layer, row.call) for row in both.rows if row.local] == [("a", 0), ("a", 1)] and not both.unmatched


def test_layers_without_floats_are_not_equal_but_unmatched(x):
    class Counts(nn.Module):
        calls = 0

        def forward(self, x):
            Counts.calls += 1
            return torch.full((3,), Counts.calls)

    class Turns(nn.Module):
        calls = 0

        def forward(self, x):
            Turns.calls += 1
            return torch.full((3,), complex(0, Turns.calls))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.counts, self.turns, self.layer = Counts(), Turns(), linear()

        def forward(self, x):
            self.counts(x)
            self.turns(x)
            return self.layer(x)

    found = compare(Model(), x, TWICE, layers="leaves", **QUICK)
    assert found.unmatched == ("call 1 of counts: it gives no floating-point tensors",)
    relative = {row.layer: row.accumulated.relative_l2 for row in found.rows}
    assert relative["turns"] > 0.1 and relative["layer"] == 0


def test_unmatched_layers_are_named_in_order(x):
    base = nn.Sequential(linear())
    model = nn.Sequential(linear(), *[nn.Sequential(nn.Identity()) for _ in range(9)])
    found = compare(model, x, "auto", baseline=base, layers="leaves", **QUICK)
    assert [line.split(",")[0] for line in found.unmatched] == [f"{i}.0" for i in range(1, 10)]
