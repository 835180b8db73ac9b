"""`make gpu-check OUT=DIR`, for a machine with an NVIDIA GPU: build, every GPU test, every GPU benchmark, JSON under DIR.

Uses the Python that runs it (torch with CUDA, triton, timm, pytest, pybind11 and ninja must be there). Every step is timed and
bounded; a failed step is reported and the next one runs all the same. Exit status 1 when any failed.
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


def steps(out: Path) -> list[tuple[str, list[str], int]]:
    """(name, command, seconds at most), in order."""
    python = sys.executable
    kernels = [str(path) for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py"))]
    found: list[tuple[str, list[str], int]] = [
        ("build", [python, "setup.py", "build_ext", "--inplace"], 240),
        ("info", [python, "-m", "dfqvit", "info", "--json"], 60),
        ("tests", [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *kernels], 200),
    ]
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        if path.stem not in ("runner", "accuracy"):  # no benchmark; needs images
            out_file = str(out / f"{path.stem}.jsonl")
            command = [python, str(path), "--device", "cuda", "--out", out_file]  # by path: they import their runner
            found.append((path.stem, command, 120))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the logs and JSON lines")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # the tree itself: nothing is installed on that machine
    summary, failed = [], False
    for name, command, limit in steps(out):
        started = time.perf_counter()
        with open(out / f"{name}.log", "w") as log:
            try:
                status = subprocess.run(
                    command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False, env=environment
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
