"""What every benchmark shares: interleaved timing, peak memory, a record of the machine, JSON lines, a table.

A benchmark checks its results first, then calls `interleave` with its variants, and writes one row a variant with `Writer`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

ROOT = Path(__file__).parents[1]


def options(description: str | None, seconds: float, each: str, device: bool = True) -> argparse.ArgumentParser:
    """What most benchmarks take: --device, --seconds for `each` of what they time, and --out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if device:
        here = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", default=here, choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=seconds, help=f"for each {each}, at most; default {seconds:g}")
    parser.add_argument("--out", type=Path, help="a JSON-lines file to append to")
    return parser


@dataclass
class Timing:
    """Seconds of each call of one variant."""

    seconds: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self) -> dict[str, Any]:
        return {
            "p20_ms": 1e3 * self.quantile(0.2),
            "p50_ms": 1e3 * self.median,
            "p80_ms": 1e3 * self.quantile(0.8),
            "calls": len(self.seconds),
        }


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    device: str,
    seconds: float = 20.0,
    rounds: int = 9,
    least_rounds: int = 3,
) -> dict[str, Timing]:
    """Times the variants in turn, round after round, so that a slow minute of the machine meets all of them.

    Each is called once to warm up. A round calls a variant several times when it is fast. At most `rounds` rounds; fewer, but
    at least `least_rounds`, once `seconds` have passed.
    """
    repeats = {}
    for name, variant in variants.items():
        timed(variant, device)
        repeats[name] = max(1, min(10, int(0.1 / max(timed(variant, device), 1e-6))))
    timings = {name: Timing() for name in variants}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= least_rounds and time.perf_counter() - start > seconds:
            break
        for name, variant in variants.items():
            timings[name].seconds += [timed(variant, device) for _ in range(repeats[name])]
    return timings


BUSY_CYCLES = 2_000_000  # about a millisecond


def timed(variant: Callable[[], Any], device: str) -> float:
    """Seconds of a call. On a GPU of its work there: the device is kept busy until the host has queued it all."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(BUSY_CYCLES)
        begin.record()
        variant()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin_s = time.perf_counter()
    variant()
    return time.perf_counter() - begin_s


def peak_memory(function: Callable[[], Any], device: str) -> int:
    """Bytes by which memory in use grows while `function` runs. On the CPU call this in a process of its own."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    forget_peak()
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def forget_peak() -> None:
    """Lets this process's VmHWM start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(name: str) -> int:
    """Bytes of this process's memory: now ("VmRSS"), or at the most so far ("VmHWM")."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def in_child(arguments: Sequence[str], timeout: float = 600.0) -> dict[str, Any] | None:
    """Runs the calling script again with `arguments`; its last line is the JSON that comes back. None when it fails."""
    command = [sys.executable, sys.argv[0], *arguments]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True)
        return json.loads(run.stdout.strip().splitlines()[-1])
    except (subprocess.SubprocessError, IndexError, json.JSONDecodeError):
        return None


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on; never fails."""
    record: dict[str, Any] = {
        "device": device,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # other processes: ratios in one run still compare, times do not
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }
    for package in ("triton", "timm", "dfqvit"):
        try:
            record[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            record[package] = None
    if device == "cuda":
        record |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return record


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


class Writer:
    """Appends rows to a JSON-lines file, each with the machine's record, and keeps them for the table."""

    def __init__(self, benchmark: str, device: str, out: Path | None) -> None:
        self.common = {"benchmark": benchmark, **machine(device)}
        self.out = out
        self.rows: list[dict[str, Any]] = []
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(json.dumps({**self.common, **row}) + "\n")

    def show(self, columns: Sequence[str], **more: Any) -> None:
        """Prints the machine's record, and `more`, as a line of JSON, and the rows as a table."""
        print(json.dumps({**self.common, **more}))
        print(tabulate([[row.get(c) for c in columns] for row in self.rows], headers=list(columns), floatfmt=".4g"))
