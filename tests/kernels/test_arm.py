"""The CPU operators on 64-bit ARM, emulated: the tests of every operator again on each path, and what the paths promise together.

An emulator shows what is computed, not how fast.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter

import pytest
import torch

from dfqvit.kernels import extension, patch_similarity_entropy, quant_linear

from . import again, test_quant_linear_cpu
from .again import on_every_path
from .emulated import Operators, compile_operators
from .loops import disassembled, loops_of


def tool(variable: str, *names: str) -> str | None:
    """The program that the environment variable names, or the first of `names` on the PATH."""
    return os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)


COMPILER = tool("CXX_AARCH64", "aarch64-linux-gnu-g++")
EMULATOR = tool("QEMU_AARCH64", "qemu-aarch64-static", "qemu-aarch64")
OBJDUMP = tool("OBJDUMP_AARCH64", "aarch64-linux-gnu-objdump")
PATHS = ["neon", "dotprod", "i8mm"]  # and portable, which scales without a fast quotient take
globals().update(again.names())


def needed(*tools: tuple[str | None, str]) -> None:
    """Skips where a tool is missing; on Debian they are in g++-aarch64-linux-gnu and qemu-user-static."""
    missing = [name for found, name in tools if found is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}: ARM64 is not tested here")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """All operators, compiled for ARM."""
    needed((COMPILER, "aarch64-linux-gnu-g++"), (EMULATOR, "qemu-aarch64"))
    if extension.load()[0] is None:
        pytest.skip(extension.load()[1])
    return compile_operators(tmp_path_factory.mktemp("arm"), COMPILER, "-static")


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


def test_the_bits_of_avx2(seed, operators):
    """Where docs/inference.md promises that a model gives the same on any processor."""
    expected = again.by_avx2(seed)
    for name in on_every_path(operators, *PATHS):
        for i, (found, wanted) in enumerate(zip(again.sums_of_everything(seed), expected, strict=True)):
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
            results.append([*again.sums_of_everything(seed), entropy.detach(), leaf.grad])
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
            found = list(again.sums_of_everything(seed))
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
    return disassembled(tmp_path_factory.mktemp("products"), COMPILER, OBJDUMP, PATHS)


@pytest.mark.parametrize("name", PATHS)
def test_the_instructions_of_the_innermost_loop(instructions, name):
    wanted, values, most = LOOPS[name]
    loops = [
        [words.split()[0] for words in loop]
        for loop in loops_of(instructions, f"dfqvit::quant::{name}::multiply", r"b\.\w+")
    ]
    loop = min((each for each in loops if set(wanted) <= set(each)), key=len)
    counts = Counter(loop)
    print(f"{name}: {len(loop)} instructions, {len(loop) / (16 * values):.3f} a multiply-add: {dict(counts)}")
    assert {key: counts[key] for key in wanted} == wanted
    assert len(loop) <= most + 16  # another compiler may move some; sums on the stack would be more
