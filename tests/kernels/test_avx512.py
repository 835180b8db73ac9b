"""AVX-512, with products of bytes and without, and the tiles of AMX, emulated: for processors that have AVX2 at most.

Every instruction is written out in without_torch/avx512.h, which shows what is computed, not how fast. Where a processor has a
path, the operators' own tests run it.
"""

from __future__ import annotations

import subprocess

import pytest
import torch

from dfqvit.kernels import extension

from . import again
from .again import on_every_path
from .cuda_emulator import COMPILER
from .emulated import SOURCES, Operators, compile_operators

# What the processor has: its best path.
PROCESSORS = {"avx512": "avx512", "vnni": "avx512", "amx": "amx"}
globals().update(again.names())


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """All operators, with AVX-512 and AMX written out."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    module, reason = extension.load()
    if module is None:
        pytest.skip(reason)
    if module.detected_isa() not in ("avx2", "avx512", "amx"):
        pytest.skip(f"this processor has up to '{module.detected_isa()}'; the emulation wants 'avx2'")
    header = ("-include", str(SOURCES / "avx512.h"))
    return compile_operators(
        tmp_path_factory.mktemp("avx512"), COMPILER, "-mavx2", "-mfma", "-mf16c", "-Wno-psabi", *header
    )


@pytest.fixture(scope="module", params=PROCESSORS)
def operators(program, request):
    if extension.load()[0].detected_isa() == "amx" and request.param != "avx512":
        pytest.skip("this processor has these instructions")
    running = Operators(program, EMULATED=request.param)
    yield running
    running.close()


@pytest.fixture
def isa(operators):
    best = operators.detected_isa()
    operators.set_isa(best)
    with operators.as_cpu():
        yield best


def test_the_bits_of_avx2(seed, operators):
    expected = again.by_avx2(seed)
    for _ in on_every_path(operators, "avx2", operators.detected_isa()):
        for i, (found, wanted) in enumerate(zip(again.sums_of_everything(seed), expected, strict=True)):
            assert torch.equal(found, wanted), i


def test_the_path_is_what_the_processor_has(program):
    """It says so, and refuses the others."""
    for processor, best in PROCESSORS.items():
        operators = Operators(program, EMULATED=processor)
        assert operators.detected_isa() == best
        if best != "amx":
            with pytest.raises(RuntimeError, match="isa was 'amx'; this processor has up to 'avx512'"):
                operators.set_isa("amx")
        operators.close()


def test_no_instruction_of_avx512_is_left(program):
    code = subprocess.run(["objdump", "-d", program], capture_output=True, text=True, check=True).stdout
    assert "zmm" not in code
    assert "tmm" not in code
