"""The CPU operators on 64-bit ARM, emulated: the tests of every operator again on each path, and what the paths promise together.

A test that `AGAIN` names is the operator's own, with this file's `isa`, `path` and `backend`. An emulator shows what is computed,
not how fast.
"""

from __future__ import annotations

import random
import re
import subprocess
from collections import Counter

import pytest
import torch

from dfqvit.kernels import (
    extension,
    gate_quantize,
    layer_norm_quantize,
    patch_similarity_entropy,
    quant_attention,
    quant_block,
    quant_conv_block,
    quant_linear,
    similarity_range,
    use_backend,
)

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
from .arm_emulator import COMPILER, EMULATOR, OBJDUMP, Operators, compile_operators, compile_products, needed

PATHS = ["neon", "dotprod", "i8mm"]  # and portable, which scales without a fast quotient take
AGAIN = {
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
    test_round_second_order: ["backends_find_the_same"],
    test_total_variation: ["gradient_matches_the_float64_reference"],
}
for _module, _names in AGAIN.items():
    for _name in _names:
        globals()[f"{_module.__name__.rpartition('.')[2]}_{_name}"] = getattr(_module, f"test_{_name}")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """All operators, compiled for ARM.

    Compiled and run through once, -Og takes least: -O1 compiles twice as long, -O0 runs twice as long.
    """
    needed((COMPILER, "aarch64-linux-gnu-g++"), (EMULATOR, "qemu-aarch64"))
    if extension.load()[0] is None:
        pytest.skip(extension.load()[1])
    return str(compile_operators(tmp_path_factory.mktemp("arm"), COMPILER, "-Og"))


@pytest.fixture(scope="module")
def operators(program):
    running = Operators(EMULATOR, "-cpu", "max", program)
    yield running
    running.close()


@pytest.fixture(params=PATHS)
def isa(request, operators):
    operators.set_isa(request.param)
    with operators.as_cpu():
        yield request.param


@pytest.fixture
def path(isa):
    with use_backend("cpu"):
        yield isa


@pytest.fixture
def backend(path):
    return test_patch_similarity_entropy.Live("cpu", "cpu")


def on_every_path(operators, *paths):
    """Each path of `paths` in turn, its name."""
    for name in paths:
        operators.set_isa(name)
        with operators.as_cpu(), use_backend("cpu"):
            yield name


def sums_of_everything(seed):
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


def test_the_bits_of_avx2(seed, operators):
    """Where docs/inference.md promises that a model gives the same on any processor."""
    module = extension.load()[0]
    before = module.active_isa()
    try:
        module.set_isa("avx2")
    except ValueError as error:
        pytest.skip(str(error))
    with use_backend("cpu"):
        expected = list(sums_of_everything(seed))
    module.set_isa(before)
    for name in on_every_path(operators, *PATHS):
        for i, (found, wanted) in enumerate(zip(sums_of_everything(seed), expected, strict=True)):
            assert torch.equal(found, wanted), (name, i)


def test_all_paths_give_the_same_bits(seed, operators):
    """They differ in integer products only. And any number of threads."""
    features = torch.randn(2, 3, 70, 33)
    results = []
    for _ in on_every_path(operators, *PATHS):
        for threads in (1, 3):
            operators.call("set_threads", ("int", threads))
            leaf = features.clone().requires_grad_()
            entropy = patch_similarity_entropy(leaf)
            entropy.sum().backward()
            results.append([*sums_of_everything(seed), entropy.detach(), leaf.grad])
    operators.call("set_threads", ("int", 1))
    for each in results[1:]:
        assert all(torch.equal(found, first) for found, first in zip(each, results[0], strict=True))


@pytest.mark.parametrize("zeros", [0, 255])
@pytest.mark.parametrize("steps", [0, 255])
def test_products_of_the_greatest_and_the_least_values(operators, zeros, steps):
    """An activation less 128 times a weight of -128 is the greatest product of two signed bytes."""
    x = torch.full((9, 70), steps, dtype=torch.uint8)
    for value in (-128.0, 127.0):
        weight = torch.full((20, 70), value)
        p = {**test_quant_linear_cpu.IDENTITY, "x_zero": zeros, "w_scale": torch.ones(20)}
        for name in on_every_path(operators, "portable", *PATHS):
            found = quant_linear(x, weight, **p, out_dtype=torch.float32)
            assert bool((found == 70 * (steps - zeros) * value).all()), name


@pytest.mark.parametrize(
    ("processor", "best"), [("cortex-a72", "neon"), ("neoverse-n1", "dotprod"), ("max", "i8mm")], ids=str
)
def test_the_path_is_what_the_processor_has(seed, program, processor, best):
    """And its instructions are no others: each of these processors refuses those that it lacks."""
    operators = Operators(EMULATOR, "-cpu", processor, program)
    try:
        assert operators.detected_isa() == best
        assert bool(operators.call("has_peak")[0]) == (best != "neon")
        for lesser in PATHS[PATHS.index(best) + 1 :]:
            with pytest.raises(RuntimeError, match=f"isa was '{lesser}'; this processor has up to '{best}'"):
                operators.set_isa(lesser)
        with pytest.raises(RuntimeError, match="isa was 'avx2'; it may be 'portable', 'neon', 'dotprod' or 'i8mm'"):
            operators.set_isa("avx2")
        with operators.as_cpu():
            found = list(sums_of_everything(seed))
    finally:
        operators.close()
    assert all(each.numel() for each in found)


# For each path: the instruction that multiplies, how often in the innermost loop, of how many rows and values of each, and the
# most instructions of that loop, with GCC 12 (docs/kernels/arm.md).
LOOPS = {
    "neon": ({"smull": 32, "smull2": 32, "sadalp": 64}, 2 * 16, 164),
    "dotprod": ({"sdot": 96}, 6 * 16, 128),
    "i8mm": ({"usmmla": 24}, 6 * 8, 53),
}


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    """The integer products, compiled and taken apart."""
    needed((COMPILER, "aarch64-linux-gnu-g++"), (OBJDUMP, "aarch64-linux-gnu-objdump"))
    compiled = compile_products(tmp_path_factory.mktemp("products"), COMPILER)
    command = [OBJDUMP, "-dC", "--no-show-raw-insn", compiled]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", PATHS)
def test_the_instructions_of_the_innermost_loop(instructions, name):
    function = re.search(rf"<dfqvit::quant::{name}::multiply\(.*?>:\n(.*?)(?:\n\n|\Z)", instructions, re.DOTALL)
    lines = [line.split("\t") for line in function[1].splitlines()]
    code = {int(place.strip(" :"), 16): words for place, *words in lines if words}
    wanted, values, most = LOOPS[name]
    loops = []
    for end, words in code.items():
        target = re.search(r"^b\.\w+\s+([0-9a-f]+)", " ".join(words))
        if target and (begin := int(target[1], 16)) < end:
            loops.append([words[0].split()[0] for place, words in code.items() if begin <= place <= end])
    loop = min((each for each in loops if set(wanted) <= set(each)), key=len)
    counts = Counter(loop)
    print(f"{name}: {len(loop)} instructions, {len(loop) / (16 * values):.3f} a multiply-add: {dict(counts)}")
    assert {key: counts[key] for key in wanted} == wanted
    assert len(loop) <= most + 16  # another compiler may move some; sums on the stack would be more
