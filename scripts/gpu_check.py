"""`make gpu-check OUT=DIR`, for a machine with an NVIDIA GPU: build, every GPU test, every GPU benchmark in short, JSON under DIR.

On Hopper the tests of quant_linear run with both products, mma.sync and wgmma, and its benchmark has rows for both.
Uses the Python that runs it (torch with CUDA, triton, timm, pytest, pybind11 and ninja must be there). Every step is timed and
bounded, and so is the whole, by TOTAL: what comes later is cut short or not begun (status 124). A failed step is reported and
the next one runs all the same. Exit status 1 when any failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 525  # seconds for everything: a machine that is lent for ten minutes is left in time
MODELS = ["deit_tiny", "deit_base", "swin_tiny", "deit_small"]
CONTENDERS = ["eager-float32", "compile-bf16", "dfqvit-w8a8", "dfqvit-w8a8-graph", "dfqvit-w4a8-graph"]
BENCHMARKS: dict[
    str, tuple[list[str], int]
] = {  # name: options that bound it, seconds at most; what matters most first
    "quant_linear": (["--models", "deit_base,swin_tiny", "--batch", "1,256", "--seconds", "0.3"], 60),
    "inference": (
        [
            *("--models", *MODELS, "--batches", "1", "256", "--contenders", *CONTENDERS),
            *("--rounds", "5", "--slice", "0.2", "--limit", "60", "--seconds", "130"),
        ],
        160,
    ),
    "quant_attention": (["--seconds", "1"], 40),
    "layer_norm_quantize": (["--seconds", "1"], 30),
    "acm": (["--models", "deit_base_patch16_224", "--batches", "1", "256", "--gammas", "0", "1", "--seconds", "1"], 40),
    "synthesis": (["--seconds", "10"], 60),
    "patch_similarity_entropy": (["--seconds", "2"], 90),
    "fake_quantize": (["--seconds", "1"], 30),
    "total_variation": (["--seconds", "1"], 20),
    "roll_resize": (["--seconds", "1"], 20),
}


def steps(out: Path) -> list[tuple[str, list[str], int]]:
    """(name, command, seconds at most), in order."""
    python = sys.executable
    places = [*(ROOT / "tests" / "kernels").glob("test_*.py"), *(ROOT / "tests").glob("test_*.py")]
    tests = sorted(str(place) for place in places if place.name not in ELSEWHERE and "cuda" in place.read_text())
    found: list[tuple[str, list[str], int]] = [
        ("build", [python, "setup.py", "build_ext", "--inplace"], 200),
        ("info", [python, "-m", "dfqvit", "info", "--json"], 30),
        (
            "tests",
            [python, "-m", "pytest", "-q", "--maxfail=20", "-m", "not slow", "-p", "no:cacheprovider", *tests],
            150,
        ),
    ]
    for name, (options, limit) in BENCHMARKS.items():
        command = [
            python,
            str(ROOT / "benchmarks" / f"{name}.py"),
            "--device",
            "cuda",
        ]  # by path: they import their runner
        found.append((name, [*command, "--out", str(out / f"{name}.jsonl"), *options], limit))
    return found


ELSEWHERE = ("test_cli.py", "test_energy.py", "test_dispatch.py", "test_tuning.py", "test_gpu_check.py")  # need no GPU


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the logs and JSON lines")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # the tree itself: nothing is installed on that machine
    summary, failed, end = [], False, time.perf_counter() + TOTAL
    for name, command, limit in steps(out):
        started = time.perf_counter()
        if started >= end:
            summary.append({"step": name, "status": 124, "seconds": 0.0})
            print(json.dumps(summary[-1]), flush=True)
            failed = True
            continue
        with open(out / f"{name}.log", "w") as log:
            try:
                status = subprocess.run(
                    command,
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=min(limit, end - started),
                    check=False,
                    env=environment,
                ).returncode
            except subprocess.TimeoutExpired:
                status = 124
        failed |= status != 0
        row = {"step": name, "status": status, "seconds": round(time.perf_counter() - started, 1)}
        summary.append(row)
        print(json.dumps(row), flush=True)
        if status:
            print("\n".join((out / f"{name}.log").read_text().splitlines()[-15:]), flush=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
