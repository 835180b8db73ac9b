"""Whole networks: images a second and latency of dfqvit's integer runtime, of torch, and of other int8 runtimes.

python benchmarks/inference.py [--models deit_tiny ...] [--batches 1 32] [--contenders NAME ...] [--rounds N] [--out FILE.jsonl]

Each contender runs in a process of its own, made ready first; then they are timed in turn, round after round, one at a
time. Peers that are not installed (`pip install dfqvit[peers]`) or fail are listed with the reason. Weights are random without
--checkpoint: times do not depend on them. `error` is the relative distance of the logits from the float model's, on noise.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import runner
import torch
from contenders import CONTENDERS

MODELS = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
}
BASE = "eager-float32"
COLUMNS = ["model", "batch", "contender", "images_per_s", "lowest", "highest", "p50_ms", "p90_ms", "p99_ms", "calls"]
COLUMNS += ["times_float32", "weights_mb", "memory_mb", "error", "quantized"]


class Failed(Exception):
    """A contender's process gave up; the message says why."""


class Process:
    """A contender in its own process, see contenders/serve.py."""

    def __init__(self, name: str, arguments: dict[str, Any], limit: float) -> None:
        self.name, self.limit = name, limit
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (close() closes it)
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments["threads"])}
        command = [sys.executable, __file__, "--serve", json.dumps({"name": name, **arguments})]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, bufsize=1, env=environment
        )

    def started(self) -> None:
        """Waits until it is; Failed when it does not."""
        self._answer()

    def ask(self, **order: Any) -> dict[str, Any]:
        """The answer to an order; Failed when there is none."""
        try:
            print(json.dumps(order), file=self.process.stdin, flush=True)
        except BrokenPipeError as error:
            raise Failed(self._last_words()) from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], self.limit)[0]:
            self.close()
            raise Failed(f"no answer in {self.limit:.0f} s")
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"failed": self._last_words()}
        if "failed" in answer:
            self.close()
            raise Failed(answer["failed"])
        return answer

    def _last_words(self) -> str:
        status = self.process.wait()
        self.log.seek(0)
        lines = [line for line in self.log.read().splitlines() if line.strip()]
        return f"ended with status {status}: {lines[-1] if lines else ''}"[:200]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            if pipe is not None:
                pipe.close()


class Match:
    """The contenders of one model, through all batch sizes."""

    def __init__(self, args: argparse.Namespace, model: str, writer: runner.Writer) -> None:
        self.args, self.model, self.writer = args, model, writer
        self.processes: dict[str, Process] = {}
        arguments = {
            "model": MODELS.get(model, model),
            "checkpoint": args.checkpoint and str(args.checkpoint),
            "device": args.device,
            "threads": args.threads,
        }
        at_once = len(args.contenders) if args.device == "cuda" else 1  # on a CPU they would share its cores and memory
        for start in range(0, len(args.contenders), at_once):
            names = args.contenders[start : start + at_once]
            say(f"{model}: {', '.join(names)}")
            for name in names:
                reason = CONTENDERS[name].why_not(args.device)
                if reason:
                    self.skip(name, None, Failed(reason))
                else:
                    self.processes[name] = Process(name, arguments, args.limit)
            for name in names:
                try:
                    if name in self.processes:
                        self.processes[name].started()
                except Failed as failure:
                    self.skip(name, None, failure)

    def skip(self, name: str, batch: int | None, why: Failed) -> None:
        say(f"{self.model}: {name} left out: {why}")
        self.writer.add(model=self.model, batch=batch, contender=name, skipped=str(why))
        self.processes.pop(name, None)

    def run(self, batch: int) -> None:
        held: dict[str, dict[str, Any]] = {}
        rounds: dict[str, list[list[float]]] = {}
        for name, process in list(self.processes.items()):
            try:
                say(f"{self.model}: {name}, batch {batch}")
                held[name] = process.ask(batch=batch)
                process.ask(seconds=self.args.slice / 2)  # warm-up
                rounds[name] = []
            except Failed as failure:
                self.skip(name, batch, failure)
        for number in range(self.args.rounds):
            say(f"{self.model}: batch {batch}, round {number + 1} of {self.args.rounds}")
            for name, process in list(self.processes.items()):
                time.sleep(self.args.pause)  # lets the last one's threads fall asleep
                try:
                    rounds[name].append(process.ask(seconds=self.args.slice)["times"])
                except Failed as failure:
                    self.skip(name, batch, failure)
                    del rounds[name]
        base = [statistics.median(times) for times in rounds.get(BASE, [])]
        for name, found in rounds.items():
            self.writer.add(
                model=self.model, batch=batch, contender=name, **speed(batch, found, base), **size(held[name])
            )

    def close(self) -> None:
        for process in self.processes.values():
            process.close()


def speed(batch: int, rounds: list[list[float]], base: list[float]) -> dict[str, Any]:
    """Percentiles over all calls; images a second by the median, its range over the rounds; ratios within each round."""
    timing = runner.Timing([seconds for times in rounds for seconds in times])
    medians = [statistics.median(times) for times in rounds]
    ratios = [b / m for b, m in zip(base, medians, strict=True)] if base else []
    return {
        "images_per_s": batch / timing.median,
        "lowest": batch / max(medians),
        "highest": batch / min(medians),
        "p50_ms": 1e3 * timing.median,
        "p90_ms": 1e3 * timing.quantile(0.9),
        "p99_ms": 1e3 * timing.quantile(0.99),
        "calls": len(timing.seconds),
        "rounds": len(rounds),
        "times_float32": statistics.median(ratios) if ratios else None,
        "times_float32_range": [min(ratios), max(ratios)] if ratios else None,
    }


def size(held: dict[str, Any]) -> dict[str, Any]:
    megabytes = {f"{key}_mb": held[key] / 1e6 for key in ("weights", "memory")}
    return {**megabytes, "error": held["error"], **held["facts"]}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=["deit_tiny"], help=f"{', '.join(MODELS)}, or any timm name")
    parser.add_argument("--checkpoint", type=Path, help="weights, for a single model")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--slice", type=float, default=1.0, help="seconds of each contender in a round")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between two contenders")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds to make a contender ready, at most")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no model or batch size after these")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each contender")
    parser.add_argument("--out", type=Path, help="a JSON-lines file to append to")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.serve is not None:
        from contenders.serve import serve

        return serve(args.serve)
    torch.set_num_threads(args.threads)  # for the record of the machine
    writer = runner.Writer("inference", args.device, args.out)
    end = time.monotonic() + args.seconds
    for model in args.models:
        if time.monotonic() >= end:
            say(f"{model}: not begun, {args.seconds:g} s are over")
            continue
        match = Match(args, model, writer)
        try:
            for batch in args.batches:
                if time.monotonic() < end:
                    match.run(batch)
                else:
                    say(f"{model}: batch {batch} not begun, {args.seconds:g} s are over")
        finally:
            match.close()
    skipped = [row for row in writer.rows if "skipped" in row]
    writer.rows = [row for row in writer.rows if "skipped" not in row]
    writer.show(COLUMNS)
    for row in skipped:
        print(f"{row['model']} {row['contender']}: left out: {row['skipped']}")


if __name__ == "__main__":
    main()
