"""The CPU operators on 64-bit ARM, emulated: the tests of every operator again on each path, and what the paths promise together.

An emulator shows what is computed, not how fast.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from dfqvit.kernels import extension, patch_similarity_entropy, quant_linear

from . import again, test_quant_linear_cpu
from .again import on_every_path
from .emulated import FLAGS, ROOT, Operators, compile_operators


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


def compile_products(folder: Path, compiler: str) -> Path:
    """An object file of the integer products alone, compiled as setup.py does."""
    source, result = folder / "products.cpp", folder / "products.o"
    names = ", ".join(f"(void*)dfqvit::quant::{path}::multiply" for path in PATHS)
    source.write_text(f'#include "dfqvit/quant_linear_multiply.h"\nvoid* used[] = {{{names}}};\n')
    include = f"-I{ROOT / 'csrc' / 'include'}"
    subprocess.run([compiler, *FLAGS, "-O3", include, "-c", "-o", str(result), str(source)], check=True)
    return result


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
