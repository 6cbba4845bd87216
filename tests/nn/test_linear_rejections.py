"""Every error that the quantised layers raise."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from torch_fp4ops.nn import FP4Linear, MXFP8Linear, quantize_

ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FP4Linear(24, 8), "FP4Linear: in_features is 24; allowed: a positive multiple of 16 (nvfp4)"),
        (lambda: FP4Linear(0, 8), "FP4Linear: in_features is 0"),
        (lambda: FP4Linear(48, 8, weight_format="mxfp4"), "in_features is 48; allowed: a positive multiple of 32"),
        (lambda: FP4Linear(32, 0), "FP4Linear: out_features is 0; allowed: 1 or more"),
        (lambda: MXFP8Linear(48, 8), "MXFP8Linear: in_features is 48; allowed: a positive multiple of 32 (mxfp8)"),
        (lambda: FP4Linear(32, 8, weight_format="mxfp8"), "weight_format is 'mxfp8'; allowed: 'nvfp4' or 'mxfp4'"),
        (lambda: FP4Linear(32, 8, activations="fp8"), "activations is 'fp8'; allowed: 'same' or 'bf16'"),
    ],
)
def test_construction(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("linear", "kwargs", "message"),
    [
        (nn.Conv2d(16, 16, 1), {}, "linear is a Conv2d; allowed: nn.Linear"),
        (nn.Linear(24, 8), {}, "FP4Linear.from_linear: in_features is 24; allowed: a positive multiple of 16"),
        (nn.Linear(48, 8), {"weight_format": "mxfp4"}, "in_features is 48; allowed: a positive multiple of 32"),
        (nn.Linear(32, 8), {"weight_format": "int4"}, "weight_format is 'int4'"),
        (nn.Linear(32, 8), {"activations": "int8"}, "activations is 'int8'"),
        (nn.Linear(32, 8, dtype=torch.float64), {}, "weight is torch.float64"),
        (
            nn.Linear(32, 8),
            {"weight_format": "mxfp4", "input_global_scale": ONE},
            "input_global_scale is given with weight_format='mxfp4', activations='same'",
        ),
        (nn.Linear(32, 8), {"activations": "bf16", "input_global_scale": ONE}, "activations='bf16'; allowed: None"),
        (nn.Linear(32, 8), {"input_global_scale": torch.ones(2)}, "one finite element above zero"),
        (nn.Linear(32, 8), {"input_global_scale": ONE.double()}, "one finite element above zero"),
        (nn.Linear(32, 8), {"input_global_scale": ONE * 0}, "one finite element above zero"),
        (nn.Linear(32, 8), {"input_global_scale": ONE / 0}, "one finite element above zero"),
    ],
)
def test_from_linear(linear, kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FP4Linear.from_linear(linear, **kwargs)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_from_linear_without_outputs():
    with pytest.raises(ValueError, match="out_features is 0; allowed: 1 or more"):
        FP4Linear.from_linear(nn.Linear(32, 0))


def test_from_linear_of_mxfp8():
    with pytest.raises(ValueError, match="MXFP8Linear.from_linear: in_features is 48"):
        MXFP8Linear.from_linear(nn.Linear(48, 8))


@pytest.mark.parametrize(
    "layer", [FP4Linear(32, 8), FP4Linear(32, 8, activations="bf16"), MXFP8Linear(32, 8)], ids=repr
)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 16), "the input is of shape (2, 16); allowed: [..., 32]"),
        (torch.tensor(1.0), "the input is of shape (); allowed: [..., 32]"),
        (torch.ones(2, 32, dtype=torch.float64), "the input is torch.float64; allowed: torch.bfloat16 or"),
        # What a parent that casts its input to `weight.dtype` comes with.
        (torch.ones(2, 32, dtype=torch.uint8), "the input is torch.uint8"),
        (torch.ones(2, 32).to(torch.float8_e4m3fn), "the input is torch.float8_e4m3fn"),
    ],
)
def test_inputs(layer, x, message):
    with pytest.raises(ValueError, match=re.escape(f"{type(layer).__name__}: {message}")):
        layer(x)


def test_gradients():
    x = torch.ones(2, 32, requires_grad=True)
    for weight_format in ("nvfp4", "mxfp4"):
        with pytest.raises(NotImplementedError, match="use torch.no_grad"):
            FP4Linear(32, 8, weight_format=weight_format)(x)
    for layer in (FP4Linear(32, 8, activations="bf16"), MXFP8Linear(32, 8)):
        with pytest.raises(NotImplementedError, match="use torch.no_grad"):
            layer(x).sum().backward()
    with torch.no_grad():
        assert not FP4Linear(32, 8)(x).requires_grad


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _with(change) -> nn.Linear:
    linear = nn.Linear(32, 8)
    change(linear)
    return linear


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        (Scaled(32, 8), "it has a forward of its own"),
        (_with(lambda m: m.add_module("adapter", nn.Identity())), "it has more than a weight and a bias (adapter)"),
        (_with(lambda m: m.register_buffer("scale", torch.ones(1))), "it has more than a weight and a bias (scale)"),
        (_with(lambda m: m.register_parameter("gain", nn.Parameter(torch.ones(1)))), "a weight and a bias (gain)"),
        (_with(nn.utils.parametrizations.weight_norm), "it has more than a weight and a bias (parametrizations)"),
        (_with(lambda m: m.register_full_backward_hook(lambda *_: None)), "it has hooks (backward_hooks)"),
        (_with(lambda m: m.register_state_dict_post_hook(lambda *_: None)), "it has hooks (state_dict_hooks)"),
        (_with(lambda m: setattr(m, "weight", nn.Parameter(m.weight.to_sparse()))), "weight is torch.sparse_coo"),
    ],
)
def test_from_linear_keeps_what_it_can_not_take_over(linear, message):
    for layer in (FP4Linear, MXFP8Linear):
        with pytest.raises(ValueError, match=re.escape(message)):
            layer.from_linear(linear)


def test_from_linear_of_a_subclass_that_computes_the_same():
    linear = nn.modules.linear.NonDynamicallyQuantizableLinear(32, 8)
    assert FP4Linear.from_linear(linear).weight.shape == (8, 16)


def test_arguments_of_other_types():
    linear = nn.Linear(32, 8)
    with pytest.raises(ValueError, match=r"FP4Linear: input_global_scale is 5.0; allowed: a float32 tensor"):
        FP4Linear.from_linear(linear, input_global_scale=5.0)
    with pytest.raises(ValueError, match=r"FP4Linear: weight_format is \['nvfp4'\]; allowed: 'nvfp4' or 'mxfp4'"):
        FP4Linear.from_linear(linear, weight_format=["nvfp4"])
    with pytest.raises(ValueError, match=r"FP4Linear: weight_format is 'int4'; allowed: 'nvfp4' or 'mxfp4'"):
        FP4Linear.from_linear("linear", weight_format="int4")
    with pytest.raises(ValueError, match=r"quantize_: weight_format is \['nvfp4'\]; allowed: 'nvfp4'"):
        quantize_(nn.Sequential(linear), ["nvfp4"])
    with pytest.raises(ValueError, match=r"quantize_: filter_fn is '0'; allowed: a function"):
        quantize_(nn.Sequential(linear), "nvfp4", filter_fn="0")


def test_a_bias_can_be_registered():
    layer = FP4Linear(32, 8, bias=False)
    layer.register_parameter("bias", nn.Parameter(torch.ones(8), requires_grad=False))
    assert layer(torch.zeros(2, 32)).eq(1).all()
