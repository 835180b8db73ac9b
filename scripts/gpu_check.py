"""`make gpu-check OUT=DIR`, for a machine with an NVIDIA GPU: build, key numbers, GPU tests, other benchmarks; JSON under DIR.

What matters most comes first: DeiT-B at batch 256, synthesis, the entropy; then the tests marked `gpu`; then the rest. On Hopper
the tests of quant_linear run with all its products (mma.sync, wgmma, wgmma of whole tiles), and its benchmark has rows for each.
Uses the Python that runs it (torch with CUDA, triton, timm, pytest, pybind11 and ninja must be there); builds for this card only.

`--steps build tests deit_base` runs some of them, in that order; `--seconds` is the time for everything, TOTAL by default.

Every step is timed and bounded, and so is the whole: what comes later is cut short or not begun (status 124). A step
out of time is first interrupted, so that it can say where it was, and GRACE seconds later ended; a failed test is in the log at
once. A failed step is reported and the next one runs all the same. Exit status 1 when any failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 525  # seconds for everything: a machine that is lent for ten minutes is left in time
GRACE = 10  # seconds from the interruption of a step to its end by force
CONTENDERS = ["eager-float32", "compile-bf16", "dfqvit-w8a8", "dfqvit-w8a8-graph", "dfqvit-w4a8-graph"]
INFERENCE = ["--contenders", *CONTENDERS, "--rounds", "5", "--slice", "0.2", "--limit", "120"]
Step = tuple[str, str, list[str], int]  # its name, the benchmark or "", options that bound it, seconds at most
KEY: list[Step] = [
    ("deit_base", "inference", ["--models", "deit_base", "--batches", "256", *INFERENCE, "--seconds", "130"], 160),
    ("synthesis", "synthesis", ["--seconds", "10"], 60),
    ("patch_similarity_entropy", "patch_similarity_entropy", ["--seconds", "2"], 60),
]
REST: list[Step] = [
    ("quant_linear", "quant_linear", ["--models", "deit_base,swin_tiny", "--batch", "1,256", "--seconds", "0.3"], 60),
    ("quant_attention", "quant_attention", ["--seconds", "1"], 40),
    (
        "inference",
        "inference",
        ["--models", "deit_tiny", "swin_tiny", "deit_small", "--batches", "1", "256", *INFERENCE, "--seconds", "100"],
        120,
    ),
    ("layer_norm_quantize", "layer_norm_quantize", ["--seconds", "1"], 30),
    (
        "acm",
        "acm",
        ["--models", "deit_base_patch16_224", "--batches", "1", "256", "--gammas", "0", "1", "--seconds", "1"],
        40,
    ),
    ("fake_quantize", "fake_quantize", ["--seconds", "1"], 30),
    ("total_variation", "total_variation", ["--seconds", "1"], 20),
    ("roll_resize", "roll_resize", ["--seconds", "1"], 20),
]


def steps(out: Path) -> list[tuple[str, list[str], int]]:
    """(name, command, seconds at most), in order."""
    python = sys.executable
    tests = [
        python,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "--maxfail=20",
        "-m",
        "gpu and not slow",
        "-p",
        "no:cacheprovider",
    ]
    if importlib.util.find_spec("xdist"):  # most of their time is Triton's compiler, on one core each
        tests += ["-n", str(min(8, os.cpu_count() or 1))]

    def benchmarks(rows: list[Step]) -> list[tuple[str, list[str], int]]:
        def command(name: str, script: str, options: list[str]) -> list[str]:
            path = str(ROOT / "benchmarks" / f"{script}.py")  # by path: they import their runner
            return [python, path, "--device", "cuda", "--out", str(out / f"{name}.jsonl"), *options]

        return [(name, command(name, script, options), limit) for name, script, options, limit in rows]

    return [
        ("build", [python, "setup.py", "build_ext", "--inplace"], 200),
        ("info", [python, "-m", "dfqvit", "info", "--json"], 30),
        *benchmarks(KEY),
        ("tests", [*tests, "tests"], 150),
        *benchmarks(REST),
    ]


def environment() -> dict[str, str]:
    """The tree itself, for nothing is installed on that machine; failures of tests at once; code for this card alone."""
    found = {**os.environ, "PYTHONPATH": str(ROOT), "DFQVIT_TEST_AT_ONCE": "1"}
    found.setdefault("DFQVIT_TEST_SEED", str(secrets.randbelow(10**6)))  # xdist wants the same tests in every process
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    return found


def run(command: list[str], log: Path, seconds: float, variables: dict[str, str]) -> int:
    """The command's exit status, its output in `log`; 124 where it took longer."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # pytest then prints its failures, and where it stood
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return 124


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the logs and JSON lines")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for everything")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="these alone, in this order")
    args = parser.parse_args()
    out = args.out.resolve()
    every = {name: (command, limit) for name, command, limit in steps(out)}
    unknown = [name for name in args.steps or [] if name not in every]
    if unknown:
        parser.error(f"--steps held '{unknown[0]}'; it may be {', '.join(every)}")
    out.mkdir(parents=True, exist_ok=True)
    variables = environment()
    summary, failed, end = [], False, time.perf_counter() + args.seconds
    for name in args.steps or every:
        command, limit = every[name]
        started = time.perf_counter()
        begun = started < end
        log = out / f"{name}.log"
        status = run(command, log, min(limit, end - started), variables) if begun else 124
        failed |= status != 0
        summary.append({"step": name, "status": status, "seconds": round(time.perf_counter() - started, 1)})
        print(json.dumps(summary[-1]), flush=True)
        (out / "summary.json").write_text(json.dumps(summary, indent=1))
        if status and begun:
            print("\n".join(log.read_text().splitlines()[-15:]), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
