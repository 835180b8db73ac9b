"""What torch's counter of operations finds in an operator is what it finds in the operator's reference, product by product."""

from __future__ import annotations

import random

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import dfqvit
from dfqvit.kernels import (
    dispatch,
    patch_similarity_entropy,
    quant_attention,
    quant_block,
    quant_conv_block,
    quant_linear,
    similarity_range,
    use_backend,
)

from ..conftest import SMALL, arguments_of
from . import test_quant_attention, test_quant_block, test_quant_conv_block, test_quant_linear_cpu

# What multiplies no matrices, or in torch's sense none: interpolation, rounding, sums.
NOTHING = {
    "fake_quantize", "fake_quantize_backward", "gate_quantize", "layer_norm_quantize", "quantize_heads", "roll_resize",
    "roll_resize_backward", "round_second_order", "total_variation", "total_variation_backward",
}  # fmt: skip


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def linear(rng):
    (x, weight, bias, acm), named = test_quant_linear_cpu.random_call(rng, 7, 11, 20)
    return "quant_linear", lambda: quant_linear(x, weight, bias, acm, **named)


def attention(rng):
    qkv, heads, options = test_quant_attention.sample((2, 2, 24, rng.choice([1, 3]), 21))
    return "quant_attention", lambda: quant_attention(qkv, heads, **options)


def block(rng):
    tokens, windows, gate = rng.choice([12, 18]), rng.choice([0, 2]), rng.choice([None, "first", "last"])
    x, named = test_quant_block.sample(rng, 3, tokens, 2, 8, 14, windows=windows, gate=gate)
    return "quant_block", lambda: quant_block(x, **named)


def conv_block(rng):
    x, named = test_quant_conv_block.sample(rng, (2, 9, 7, 12), 21, size=rng.choice([3, 7]))
    return "quant_conv_block", lambda: quant_conv_block(x, **named)


def similarities(rng):
    features = torch.randn(2, rng.randint(1, 4), 13, 5)
    return "similarity_range", lambda: similarity_range(features)


def entropy(rng):
    features = torch.randn(2, rng.randint(1, 4), 13, 5)
    ends = similarity_range(features)
    return "patch_similarity_entropy", lambda: patch_similarity_entropy(features, value_range=ends)


def entropy_backward(rng):
    features = torch.randn(2, rng.randint(1, 4), 13, 5, requires_grad=True)
    found = patch_similarity_entropy(features).sum()
    return "patch_similarity_entropy_backward", found.backward


def linear_backward(rng):
    x, weight = torch.randn(6, 20), torch.randn(11, 20)
    x.requires_grad_(rng.random() < 0.7)
    weight.requires_grad_(not x.requires_grad or rng.random() < 0.5)
    activation = rng.choice([None, "gelu"])
    call = {"x_scale": 0.03, "x_zero": 128.0, "w_scale": torch.rand(11) + 0.1, "a_bits": 8, "w_bits": 4}
    return "quant_linear_backward", lambda: quant_linear(x, weight, **call, activation=activation).sum().backward()


CASES = [linear, attention, block, conv_block, similarities, entropy, entropy_backward, linear_backward]


@pytest.mark.parametrize("case", CASES)
def test_as_in_the_reference(seed, case):
    name, call = case(random.Random(seed))
    operator = dispatch._OPERATORS[name]
    arguments = arguments_of(getattr(torch.ops.dfqvit, name).default, call)
    with torch.no_grad():
        with use_backend("reference"):
            wanted = counted(lambda: operator.run(*arguments))
        assert wanted > 0
        assert counted(lambda: operator(*arguments)) == wanted


def test_every_operator_is_counted_or_multiplies_nothing():
    registry = FlopCounterMode(display=False).flop_registry
    places = {name: dispatch.places_of(name) for name in dispatch._OPERATORS}
    assert {name for name in places if any(place in registry for place in places[name])} == set(places) - NOTHING
    assert all(place in registry for name in set(places) - NOTHING for place in places[name])


@pytest.mark.parametrize("runtime", ["integer", "simulated"])
def test_a_quantized_model_counts_as_much_as_the_float_one(seed, runtime):
    """But for the attention, which torch's counter knows on GPUs alone. It found 5 % of the whole."""
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL["vit"], "depth": 1}).eval()
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    qmodel = dfqvit.quantize(model, calib=x, rounding="nearest", runtime=runtime)
    with torch.no_grad():
        attention = 4 * 3 * 17 * 17 * 48
        assert counted(lambda: qmodel(x)) == counted(lambda: model(x)) + attention
        program = torch.export.export(qmodel, (x,)).module()
        assert counted(lambda: program(x)) == counted(lambda: qmodel(x))
