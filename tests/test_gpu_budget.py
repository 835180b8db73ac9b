"""scripts/gpu_budget.py: its counting, its multiprocessor, and the budgets that the CUDA kernels must keep."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
BUDGET = {"step": 120, "bytes": 16.0, "gelu_bytes": 19.5, "floats": 16.5}  # instructions of a warp, weights of 8 bits
# Microseconds of a layer and of the forward pass, milliseconds of 256 images.
ATTENTION, ENTROPY, DEIT_B = 90.0, 150.0, 8.8


@pytest.fixture(scope="module")
def budget():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        names = ("sass", "machine", "kernel", "linear", "attention", "entropy", "layer_norm", "whole")
        yield SimpleNamespace(**{name: importlib.import_module(f"budget.{name}") for name in names})
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture
def tools(budget):
    if budget.sass.tools() is None:
        pytest.skip("no nvcc, or no cuobjdump")


LINES = [
    "MOV R1, c[0x0][0x28]",
    "IADD3 R0, R0, 0x1, RZ",  # the outer loop
    "LDS.128 R4, [R2]",  # the inner one
    "@P0 BRA 0x60",
    "MUFU.RCP R5, R5",
    "FMUL R5, R5, R5",
    "@!P1 BRA 0x80",
    "STG.E [R6], R5",
    "@P2 BRA 0x20",
    "@P3 BRA 0x10",
    "EXIT",
    "BRA 0xb0",
]


def listing(lines, control=0x7 << 8 | 0x7 << 5 | 1):
    """As cuobjdump prints them: no barriers, one cycle to stall."""
    rows = [
        f"        /*{16 * i:04x}*/  {line} ;  /* 0x{0:016x} */\n    /* 0x{control << 41:016x} */"
        for i, line in enumerate(lines)
    ]
    return "\n\t\tFunction : name\n" + "\n".join(rows)


def test_loops_and_the_shortest_way_that_does_the_work(budget):
    code = budget.sass.parsed(listing(LINES))["name"]
    assert budget.sass.loops(code) == [(1, 9), (2, 8)]
    assert budget.sass.innermost(code) == [(2, 8)]
    assert budget.linear.shortest(code, 2, 8, "STG") == 5  # past the slow part, not past the store
    assert budget.linear.shortest(code, 2, 8, "MUFU") == 6  # not past what is asked for; past the store
    assert budget.linear.shortest(code, 2, 8, "LDG") == 4


def test_a_warp_goes_round_its_loops(budget):
    code = budget.sass.parsed(listing(LINES))["name"]
    path = budget.sass.way(code, 0, 10, "STG")
    assert path == [0, 1, 2, 3, 6, 7, 8, 9, 10]
    inner = [2, 3, 6, 7, 8]
    assert budget.sass.trace(code, path, {(1, 9): 2, (2, 8): 3}) == [0, *([1, *inner * 3, 9] * 2), 10]
    assert budget.sass.trace(code, path, {(1, 9): 1, (2, 8): 0}) == [0, 1, 9, 10]
    with pytest.raises(ValueError, match="no way from 0 to 11"):
        budget.sass.way(code, 0, 11, "STG")


def test_control_bits(budget):
    """Stall 5 cycles; set barrier 2 when written; wait for 0 and 3."""
    code = budget.sass.parsed(listing(["LDS R0, [R1]"], 0b001001 << 11 | 7 << 8 | 2 << 5 | 5))["name"]
    one = code[0]
    assert (one.stall, one.set_when_written, one.set_when_read, one.waits) == (5, 2, 7, (0, 3))


def test_wavefronts(budget):
    of = budget.machine.wavefronts
    assert of(range(0, 128, 4)) == 1
    assert of(range(0, 32 * 80, 80)) == 4  # rows of 80 bytes: every eighth lane in the same bank
    assert of([0] * 32) == 1
    assert of(range(0, 512, 16), 16) == 4
    assert of([8 * (lane % 4) for lane in range(32)], 8) == 2


def simulated(budget, lines, warps, control=0x7 << 8 | 0x7 << 5 | 1, blocks=1, resident=1):
    code = budget.sass.parsed(listing(lines, control))["name"]
    path = list(range(len(code)))
    return budget.machine.simulated(code, [path] * warps, blocks, resident, budget.machine.H200)


def test_a_multiprocessor_issues_and_waits(budget):
    many = 400
    for operation, each in (("FFMA R0, R1, R2, R3", 1), ("IADD3 R0, R1, R2, RZ", 2), ("MUFU.EX2 R0, R1", 8)):
        for warps in (1, 4):  # one on each part
            assert simulated(budget, [operation] * many, warps) == pytest.approx(many * each, rel=0.03)
        assert simulated(budget, [operation] * many, 8) == pytest.approx(2 * many * each, rel=0.03)
    stall = 7 << 8 | 7 << 5 | 4
    assert simulated(budget, ["FFMA R0, R1, R2, R3"] * many, 4, stall) == pytest.approx(4 * many, rel=0.03)
    assert simulated(budget, ["FFMA R0, R1, R2, R3"] * many, 16, stall) == pytest.approx(4 * many, rel=0.03)  # hidden
    waiting = 1 << 11 | 7 << 8 | 0 << 5 | 1  # each waits for the one before it
    assert simulated(budget, ["LDS R0, [R1]"] * 50, 1, waiting) == pytest.approx(50 * 29, rel=0.1)
    found = simulated(budget, ["LDSM.16.M88.4 R0, [R1]"] * 50, 16, waiting)
    assert found == pytest.approx(50 * 16 * 4, rel=0.05)  # 512 bytes each, and no latency shows


def test_blocks_follow_each_other(budget):
    lines = ["FFMA R0, R1, R2, R3"] * 100
    one = simulated(budget, lines, 1)
    four = simulated(budget, lines, 1, blocks=4)
    assert four == pytest.approx(4 * one + 3 * budget.machine.LAUNCH, rel=0.02)
    assert simulated(budget, lines, 1, blocks=4, resident=4) < four / 2


def test_the_model_of_time(budget):
    counts = budget.linear.Counts(step=100, bytes=10.0, gelu_bytes=20.0, floats=15.0, panel=0.5)
    qkv, proj, fc1, fc2 = budget.linear.layers(counts, 768, 256 * 197)
    assert qkv.tensor == pytest.approx(50432 * 2304 * 768 / 4096 / 132 / 1.83e9 * 1e6, rel=1e-9)
    tiles = 50432 // 128 * 2304 // 128
    assert qkv.issue == pytest.approx(tiles * (8 * 6 * 100 + 512 * 10.5) / 4 / 132 / 1.83e9 * 1e6, rel=1e-3)
    assert fc1.issue > fc1.tensor
    assert fc2.tensor == pytest.approx(4 * proj.tensor)
    assert proj.time == proj.memory
    one = budget.whole.model("DeiT-B", counts, attention=80.0, norm=90.0)
    assert one.attention == pytest.approx(0.96)
    assert one.norms == pytest.approx(2.25)
    assert one.linear > 12 * (qkv.time + proj.time + fc1.time + fc2.time) / 1e3
    assert one.total > one.linear + one.attention + one.norms


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [True, False])
def test_quant_linear_keeps_its_budget(budget, tools, tiles):
    counts, most = budget.linear.count(8, tiles), BUDGET | ({"step": 48} if tiles else {})
    found = {name: getattr(counts, name) for name in most}
    assert all(found[name] <= most[name] for name in most), found
    assert all(found[name] > most[name] / 2 for name in most), found  # else something was not counted
    if tiles:  # what the schedulers issue never keeps the tensor cores waiting
        qkv, _, fc1, fc2 = budget.linear.layers(counts, 768, 256 * 197)
        assert all(layer.issue <= layer.tensor for layer in (qkv, fc1, fc2))


@pytest.mark.slow
def test_attention_and_a_whole_model_keep_their_budgets(budget, tools):
    pytest.importorskip("triton")
    kernel = budget.attention.kernel(197, 64)
    attention = budget.attention.predict(kernel, 197, 64, 3, 5, 256 * 12, budget.machine.H200)
    products = sum(kernel.code[i].operation.startswith("IMMA") for i in kernel.warp(lambda *_: 1, 0))
    assert products == 26 * 2 + 7 * 9  # of 16 queries: scores with 208 keys; steps with 64 channels and with ones
    assert ATTENTION / 2 < attention.floor < attention.time <= ATTENTION, attention
    norm = budget.layer_norm.predict(256 * 197, 768, budget.machine.H200)
    assert norm.time > norm.memory
    whole = budget.whole.model("DeiT-B", budget.linear.count(8, True), attention.time, norm.time)
    assert DEIT_B / 2 < whole.total <= DEIT_B, whole


@pytest.mark.slow
def test_the_entropy_keeps_its_budget(budget, tools):
    found = budget.entropy.predictions(budget.machine.H200, ("range", "density"))
    least = 384 * 7 * 64**3 / 128 / 132 / 1.83e9 * 1e6  # multiply-adds of 7 tiles of the 10 that a set's triangle has
    assert all(one.floor > least for one in found.values()), found
    assert budget.entropy.times(found)["forward"] <= ENTROPY, found
