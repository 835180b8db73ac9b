"""The innermost loops of the integer products on x86, as compiled: sums stay in registers."""

from __future__ import annotations

import shutil

import pytest

from .cuda_emulator import COMPILER
from .loops import disassembled, loops_of

# For each path: the function with its loop, the instruction that multiplies and how often, and of how many vectors each.
LOOPS = {
    "avx512": (r"void dfqvit::quant::avx512::multiply<8, 2>", "vpdpbusd", 8 * 2),
    "avxvnni": (r"dfqvit::quant::avxvnni::multiply", "{vex} vpdpbusd", 6 * 2),
    "avx2": (r"dfqvit::quant::avx2::multiply_pairs", "vpmaddubsw", 4 * 2),
}


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    objdump = shutil.which("objdump")
    if COMPILER is None or objdump is None:
        pytest.skip("no C++ compiler, or no objdump")
    return disassembled(tmp_path_factory.mktemp("products"), COMPILER, objdump, LOOPS)


@pytest.mark.parametrize("name", LOOPS)
def test_sums_stay_in_registers(instructions, name):
    """GCC keeps an array of sums in memory unless it is told to unroll: a load and a store at every product."""
    function, product, count = LOOPS[name]
    loop = min(
        (each for each in loops_of(instructions, function, r"j\w+") if any(product in words for words in each)), key=len
    )
    assert sum(product in words for words in loop) == count
    stored = [words for words in loop if words.startswith("vmov") and words.endswith(")")]
    assert not stored
