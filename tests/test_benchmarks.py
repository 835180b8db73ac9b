"""The benchmark of whole networks: a short run on the embedded model, its rows, and what it does about peers that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .fresh import python

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def run(tmp_path):
    """Runs inference.py on the embedded model: (finished process, rows)."""

    def call(*arguments, **environment):
        out = tmp_path / "rows.jsonl"
        short = ["--models", "demo", "--rounds", "2", "--slice", "0.02", "--device", "cpu", "--threads", "1"]
        environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), **environment}
        done = python(BENCHMARKS / "inference.py", *short, "--out", out, *arguments, env=environment)
        return done, [json.loads(line) for line in out.read_text().splitlines()]

    return call


def test_rows_of_each_contender_and_batch(run, tmp_path):
    """A peer that is missing or fails is a row with the reason."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('broken on purpose')\n")
    for name in ("onnx", "onnxscript"):
        (tmp_path / f"{name}.py").write_text("")
    path = os.pathsep.join([str(tmp_path), str(BENCHMARKS.parent)])
    contenders = ["onnxruntime-int8", "openvino-int8", "eager-float32", "dfqvit-w8a8"]
    done, found = run("--batches", "1", "3", "--contenders", *contenders, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert {row["contender"] for row in found} == set(contenders)
    skipped = {row["contender"]: row["skipped"] for row in found if "skipped" in row}
    assert "broken on purpose" in skipped["onnxruntime-int8"]
    assert skipped.get("openvino-int8", "openvino, nncf not installed") == "openvino, nncf not installed"
    assert "onnxruntime-int8: left out: ImportError: broken on purpose" in done.stdout

    rows = [row for row in found if row["contender"] in contenders[2:]]
    assert [(row["batch"], row["contender"]) for row in rows] == [
        (1, "eager-float32"),
        (1, "dfqvit-w8a8"),
        (3, "eager-float32"),
        (3, "dfqvit-w8a8"),
    ]
    for row in rows:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["p50_ms"])
        assert row["lowest"] <= row["highest"]
        assert row["rounds"] == 2
        assert row["calls"] >= 2
    float_row, ours = rows[:2]
    assert float_row["times_float32"] == 1.0
    assert float_row["error"] == 0.0
    assert 0 < ours["error"] < 0.1
    assert ours["integer_blocks"] == 4
    assert ours["weights_mb"] < 0.4 * float_row["weights_mb"]
    assert "dfqvit-w8a8" in done.stdout


def test_the_cost_of_acm_is_measured_in_pairs_beside_a_copy_without_any(tmp_path):
    out = tmp_path / "rows.jsonl"
    short = ["--models", "demo", "--batches", "2", "--gammas", "0", "3", "--seconds", "0.1", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    done = python(BENCHMARKS / "acm.py", *short, "--out", out, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["gamma"], row["blocks"]) for row in rows] == [(0, 0), (3, 2)]
    for row in rows:
        low, high = row["interval_percent"]
        assert low <= row["cost_percent"] <= high
        assert row["pairs"] >= 15


def test_the_speed_of_a_family_is_that_of_its_float_model_beside_it(tmp_path):
    """And the table of docs/models.md takes what was measured, by timm's file; a failure is a row, and no speed."""
    out = tmp_path / "rows.jsonl"
    short = ["--only", "efficientvit_m3", "--batches", "2", "1", "--seconds", "0.1"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    done = python(BENCHMARKS / "models.py", *short, "--out", out, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["batch"] for row in rows] == [2, 1]
    for row in rows:
        assert row["times_float32"] == pytest.approx(row["float32_p50_ms"] / row["dfqvit_p50_ms"])
        assert 0 <= row["integer"] <= row["blocks"]
    with out.open("a") as file:
        file.write(json.dumps({"architecture": "swin_tiny_patch4_window7_224", "failed": "ValueError"}) + "\n")
    code = "import coverage, json, pathlib, sys; print(json.dumps(coverage.measured(pathlib.Path(sys.argv[1]))))"
    environment["PYTHONPATH"] += os.pathsep + str(BENCHMARKS.parent / "scripts")
    found = json.loads(python("-c", code, out, env=environment).stdout)
    ratios = " / ".join(f"{row['times_float32']:.1f}" for row in reversed(rows))
    assert found == {"efficientvit_msra": [f"efficientvit_m3: {ratios}"]}


def accuracy_row(**values):
    row = {
        "model": "M",
        "recipe": "default",
        "calibration": "synthetic",
        "samples": 16,
        "w_bits": 4,
        "a_bits": 8,
        "seed": 0,
    }
    figures = {"float_top1": 80.0, "top1": 79.0, "low": -2.0, "high": 0.5, "kl": 0.1, "agreement": 90.0, "images": 500}
    return {**row, **figures, "data": "set", **values}


def test_tables_of_accuracy_are_the_rows(tmp_path):
    page, rows = tmp_path / "page.md", tmp_path / "rows.jsonl"
    page.write_text("before\n<!-- rows: M -->\nold\n<!-- end -->\nafter\n")
    lines = [accuracy_row(), accuracy_row(seed=1, top1=78.0), accuracy_row(calibration="noise", w_bits=8, top1=12.3)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"model": "M", "top1": 1.0}]))
    command = [sys.executable, str(BENCHMARKS / "accuracy_tables.py"), str(rows), "--page", str(page)]
    assert subprocess.run([*command, "--check"], check=False, capture_output=True).returncode == 1
    subprocess.run(command, check=True)
    text = page.read_text()
    assert text.startswith("before\n<!-- rows: M -->\n\nset, float 80.0, 500 images:\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "| calibration | W8/A8 | W4/A8 |" in text
    assert (
        "| **16 synthetic and 48 procedural** (the default) |  | 78.5 (-1.5; -2.0 to +0.5), KL 0.100, 2 seeds |" in text
    )
    assert "| 32 of noise | 12.3 (-67.7; -2.0 to +0.5), KL 0.100 |  |" in text
    assert subprocess.run([*command, "--check"], check=False).returncode == 0


@pytest.mark.parametrize(("page", "machine"), [("accuracy", "epyc-avx512-2-cores"), ("dense", "epyc-zen5-2-cores")])
def test_the_page_is_up_to_date(page, machine):
    rows = BENCHMARKS / "results" / machine / f"{page}.jsonl"
    command = [sys.executable, str(BENCHMARKS / f"{page}_tables.py"), str(rows), "--check"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rows_of_dense_models_are_made_once_and_make_the_tables(tmp_path):
    """Two rows of one run; a second run of more adds what is not there; the page's tables are their means."""
    out, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    few = [
        "--models",
        "demo-segmenter",
        "--recipes",
        "paper",
        "--acm",
        "none",
        "--samples",
        "2",
        "--scenes",
        "20",
        "--bits",
        "8",
    ]
    script = [BENCHMARKS / "dense.py", *few, "--out", out, "--seeds", "0", "--sources"]
    for sources in (["noise", "real"], ["noise", "real", "procedural"]):
        done = python(*script, *sources, env=environment)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["calibration"] for row in rows] == ["noise", "real", "procedural"]
    assert len({row["float mIoU"] for row in rows}) == 1
    assert all(abs(row["mIoU"] - row["float mIoU"]) < 20 and row["iters"] == 0 for row in rows)
    with out.open("a") as file:
        file.write(json.dumps({**rows[1], "seed": 1, "mIoU": rows[1]["mIoU"] + 3.0}) + "\n")
    page.write_text(
        "before\n<!-- rows: demo-segmenter -->\n<!-- end -->\n<!-- rows: demo-detector -->\n<!-- end -->\nafter\n"
    )
    tables = [sys.executable, str(BENCHMARKS / "dense_tables.py"), str(out), "--page", str(page)]
    assert subprocess.run([*tables, "--check"], check=False, capture_output=True).returncode == 1
    subprocess.run(tables, check=True)
    base, real = rows[1]["float mIoU"], rows[1]["mIoU"] + 1.5
    text = page.read_text()
    assert f"| real scenes | paper's | none | {real:.1f} ({real - base:+.1f}; 3.0 of 2) |" in text
    assert "No rows yet." in text
    assert subprocess.run([*tables, "--check"], check=False).returncode == 0


def test_the_paired_interval_holds_the_difference():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import accuracy
    finally:
        sys.path.remove(str(BENCHMARKS))
    theirs = torch.rand(500) < 0.8
    flipped = torch.rand(500) < 0.1
    low, high = accuracy.paired_interval(theirs ^ flipped, theirs)
    change = 100 * float((theirs ^ flipped).double().mean() - theirs.double().mean())
    assert low < change < high
    error = 100 * (flipped.double().mean() / 500) ** 0.5  # of the mean of +1, 0 and -1
    assert 2.5 * error < high - low < 5.5 * error
    assert accuracy.paired_interval(theirs, theirs) == (0.0, 0.0)
