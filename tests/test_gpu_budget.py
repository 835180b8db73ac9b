"""scripts/gpu_budget.py: its counting, and the budgets that quant_linear's CUDA kernel must keep."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUDGET = {"step": 120, "bytes": 16.0, "gelu_bytes": 19.5, "floats": 16.5}  # instructions of a warp, weights of 8 bits


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_budget", ROOT / "scripts" / "gpu_budget.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_budget"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_budget"]


CODE = [
    (0x00, "MOV R1, c[0x0][0x28]"),
    (0x10, "IADD3 R0, R0, 0x1, RZ"),  # the outer loop
    (0x20, "LDS.128 R4, [R2]"),  # the inner one
    (0x30, "@P0 BRA 0x60"),
    (0x40, "MUFU.RCP R5, R5"),
    (0x50, "FMUL R5, R5, R5"),
    (0x60, "@!P1 BRA 0x80"),
    (0x70, "STG.E [R6], R5"),
    (0x80, "@P2 BRA 0x20"),
    (0x90, "@P3 BRA 0x10"),
    (0xA0, "EXIT"),
    (0xB0, "BRA 0xb0"),
]


def test_loops_and_the_shortest_way_that_does_the_work(script):
    assert script.loops(CODE) == [(2, 8)]
    assert script.shortest(CODE, 2, 8, "STG") == 5  # past the slow part, not past the store
    assert script.shortest(CODE, 2, 8, "MUFU") == 6  # not past what is asked for; past the store
    assert script.shortest(CODE, 2, 8, "LDG") == 4


def test_the_model_of_time(script):
    counts = script.Counts(step=100, bytes=10.0, gelu_bytes=20.0, floats=15.0, panel=0.5)
    qkv, proj, fc1, fc2 = script.layers(counts, 768, 256 * 197)
    assert qkv.tensor == pytest.approx(50432 * 2304 * 768 / 4096 / 132 / 1.83e9 * 1e6, rel=1e-9)
    tiles = 50432 // 128 * 2304 // 128
    assert qkv.issue == pytest.approx(tiles * (8 * 6 * 100 + 512 * 10.5) / 4 / 132 / 1.83e9 * 1e6, rel=1e-3)
    assert fc1.issue > fc1.tensor
    assert fc2.tensor == pytest.approx(4 * proj.tensor)
    assert proj.time == proj.memory


@pytest.mark.slow
def test_the_kernel_keeps_its_budget(script):
    if script.tools() is None:
        pytest.skip("no nvcc, or no cuobjdump")
    counts = script.count(8)
    found = {name: getattr(counts, name) for name in BUDGET}
    assert all(found[name] <= most for name, most in BUDGET.items()), found
    assert all(found[name] > most / 2 for name, most in BUDGET.items()), found  # else something was not counted
