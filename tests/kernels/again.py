"""The tests of the operators that an emulated processor takes once more, and what all its paths promise together.

test_arm.py and test_avx512.py give them their own `isa`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dfqvit.kernels import (
    gate_quantize,
    layer_norm_quantize,
    quant_attention,
    quant_block,
    quant_conv_block,
    quant_linear,
    similarity_range,
    use_backend,
)

from ..conftest import on_path
from . import (
    test_fake_quantize,
    test_gate_quantize,
    test_layer_norm_quantize,
    test_patch_similarity_entropy,
    test_quant_attention,
    test_quant_block,
    test_quant_conv_block,
    test_quant_linear_cpu,
    test_quantize_heads,
    test_roll_resize,
    test_round_second_order,
    test_total_variation,
)
from .emulated import Operators

_AGAIN = {
    test_fake_quantize: ["matches_brute_force_on_every_cpu_path", "gradient_passes_where_nothing_was_clamped"],
    test_gate_quantize: ["far_values", "a_scale_that_no_reciprocal_serves", "values_that_are_not_finite_are_refused"],
    test_layer_norm_quantize: ["extreme_values_are_clamped"],
    test_patch_similarity_entropy: ["random_cases", "half_precision", "zero_vectors_have_similarity_0"],
    test_quant_attention: ["float_result_matches_the_oracle", "integer_result_is_the_float_result_rounded"],
    test_quant_block: ["one_call_gives_the_bits_of_seven", "cosines_and_norms_that_come_last"],
    test_quant_conv_block: ["close_to_the_operators_one_by_one", "the_convolution_is_that_of_float64"],
    test_quant_linear_cpu: [
        "same_bits_as_the_reference",
        "tiles_in_the_order_of_their_tokens",
        "edges_of_the_tiles",
        "sums_up_to_the_limit_of_int32",
        "quotients_near_ties_are_exact",
        "scales_at_the_ends_of_float32",
        "huge_values_saturate",
        "activations",
        "activations_of_what_is_not_finite",
        "activations_with_every_addend_in_every_dtype",
        "one_strange_value_anywhere_is_an_error",
        "empty_and_single_shapes",
    ],
    test_quantize_heads: ["all_paths_give_the_references_bits", "values_that_are_not_finite_are_refused"],
    test_roll_resize: ["gradient_is_the_transpose", "integer_positions_roll_and_flip_exactly"],
    test_round_second_order: ["backends_find_the_same", "alone_each_weight_takes_the_nearest_level"],
    test_total_variation: ["gradient_matches_the_float64_reference"],
}


def names() -> dict[str, Callable[..., Any]]:
    """What a test file takes among its own: those tests, and the fixtures beside `isa` that they ask for."""
    tests = {
        f"{module.__name__.rpartition('.')[2]}_{name}": getattr(module, f"test_{name}")
        for module, each in _AGAIN.items()
        for name in each
    }
    return tests | {"path": path, "backend": backend}


@pytest.fixture
def path(isa):
    with use_backend("cpu"):
        yield isa


@pytest.fixture
def backend(path):
    return test_patch_similarity_entropy.Live("cpu", "cpu")


def on_every_path(operators: Operators, *paths: str) -> Iterator[str]:
    """Each path of `paths` in turn, its name."""
    for name in paths:
        operators.set_isa(name)
        with operators.as_cpu(), use_backend("cpu"):
            yield name


def by_avx2(seed: int) -> list[torch.Tensor]:
    """`sums_of_everything` as this processor computes them."""
    with on_path("avx2"), use_backend("cpu"):
        return list(sums_of_everything(seed))


def sums_of_everything(seed: int) -> Iterator[torch.Tensor]:
    """Results whose bits every path that fuses multiply-adds must give, each from the same random arguments."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for activation in (None, "gelu", "gelu_tanh", "quick_gelu", "silu"):
        (x, weight, bias, acm), p = test_quant_linear_cpu.random_call(rng, 37, 41, 90)
        p = {key: value for key, value in p.items() if not key.startswith("out_")}
        yield quant_linear(x, weight, bias, acm, **p, activation=activation, out_scale=0.05, out_zero=99)
        if activation in (None, "quick_gelu", "silu"):
            yield quant_linear(x, weight, bias, acm, **p, activation=activation)
    for activation in test_gate_quantize.ALL:
        gate, value, options = test_gate_quantize.sample(((31,), 77))
        yield gate_quantize(gate, value, **options, activation=activation)
    for case in ((2, 2, 24, 3, 21), (1, 1, 64, 1, 197), (1, 2, 5, 1, 70)):
        qkv, heads, options = test_quant_attention.sample(case)
        yield quant_attention(qkv, heads, **options)
        yield quant_attention(qkv, heads, **options, out_scale=torch.tensor(0.02), out_zero=120)
    x, weight, bias = test_layer_norm_quantize.sample((30, 100), torch.float32)
    yield layer_norm_quantize(x, weight, bias, scale=0.02, zero_point=100)
    x, named = test_quant_block.sample(rng, 2, 24, 2, 20, 70, windows=2, acm=True)
    yield quant_block(x, **named)
    yield quant_block(x, **test_quant_block.swin_v2(rng, x, named)[1])
    x, named = test_quant_conv_block.sample(rng, (2, 9, 11, 21), 40)
    yield quant_conv_block(x, **named)
    features = torch.randn(2, 3, 70, 33)
    yield similarity_range(features)
