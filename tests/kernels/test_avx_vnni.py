"""The products of processors that multiply bytes in 256 bits, as Intel's since Alder Lake do: emulated, and their machine code.

Where a processor has the instruction, all tests of the path "avx2" run it.
"""

from __future__ import annotations

import platform
import random
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from .cuda_emulator import COMPILER, Emulator

SOURCE, INCLUDE = Path(__file__).with_name("avx_vnni.cpp"), Path(__file__).parents[2] / "csrc" / "include"
pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="no x86 processor"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


def compiled(path: Path, *flags: str) -> Path:
    subprocess.run([COMPILER, "-std=c++17", "-Wall", f"-I{INCLUDE}", *flags, "-o", path, SOURCE], check=True)
    return path


def test_products_are_exact(seed, tmp_path):
    kernels = Emulator(compiled(tmp_path / "avx_vnni.so", "-O2", "-DEMULATED", "-shared", "-fPIC"))
    rng, tile = random.Random(seed), kernels("rows_of_a_tile")
    drawn = [(rng.randint(1, 20), rng.randint(1, 300), rng.randint(1, 2)) for _ in range(8)]
    for rows, depth, blocks in [(1, 1, 1), (2 * tile, 192, 2), *drawn]:
        a = torch.randint(0, 256, (rows, depth), dtype=torch.uint8)
        weight = torch.randint(-128, 128, (16 * blocks, depth), dtype=torch.int8)
        a[0], weight[0] = 255, -128
        starts = torch.randint(-1000, 1000, (blocks, 16), dtype=torch.int32)
        expected = (a.double() @ weight.double().T).int().view(rows, blocks, 16) + starts
        a = F.pad(a, (0, -depth % 64), value=77)  # what lies beyond K meets zeros
        panels = F.pad(weight, (0, -depth % 64)).view(blocks, 16, -1, 4).transpose(1, 2).contiguous()
        for first in range(0, rows, tile):
            sums, count = torch.full((blocks, tile, 16), -12345, dtype=torch.int32), min(tile, rows - first)
            sizes = (a.shape[1], first, rows, panels, panels[0].numel())
            kernels("multiply", a, *sizes, starts, blocks, depth, sums)
            assert torch.equal(sums[:, :count].transpose(0, 1), expected[first : first + count])


def test_one_instruction_a_product_and_none_of_avx512(tmp_path):
    """As setup.py compiles it: six rows of two vectors, and no sum on the stack within the loop."""
    code = compiled(tmp_path / "avx_vnni.s", "-O3", "-S").read_text()
    loops = [part for part in code.split("\n.L") if "vpdpbusd" in part]
    assert max(part.count("vpdpbusd") for part in loops) % 12 == 0
    assert not any("rsp" in line for part in loops for line in part.splitlines() if "vpdpbusd" in line)
    assert "zmm" not in code
    assert "ymm16" not in code
