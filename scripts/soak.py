"""Many calls of the integer runtime from several threads, in random batch sizes: every image must keep the bits of its logits.

Each image's logits are computed once, alone and in one thread. Then every call takes images at random; now and then one has a
wrong shape or holds NaN, which must raise, or is cut off by a signal between two operators. Nothing of that may show in
the others, and resident memory may not grow. Prints one JSON line a model; exit status 1 when something was wrong.

python scripts/soak.py [--calls 10000] [--threads 4] [--models demo demo-swin] [--w-bits 4] [--seed N]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import dfqvit
from dfqvit.models import Preprocessing, load_model

POOL = 48  # different images
LARGEST = 33  # images in a call
CANCELLED = 0.05  # share of calls, made in the main thread, that a signal cuts off
GROWTH = 16 << 20  # bytes of resident memory, from the first tenth of the calls to the end, that pass as noise


class Cancelled(Exception):
    """Raised by the signal, wherever the call happens to be."""


class Soak:
    """One model under load. `wrong` gathers what should not have been."""

    def __init__(self, model: torch.nn.Module, size: tuple[int, ...], seed: int) -> None:
        self.model, self.seed = model, seed
        self.images = torch.randn(POOL, *size, generator=torch.Generator().manual_seed(seed))
        self.expected = torch.Tensor()
        self.wrong: list[str] = []
        self.done = 0
        self.resident: list[int] = []

    def run(self, calls: int, threads: int) -> dict[str, Any]:
        """`calls` calls from `threads` threads; what was seen."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        alone = copy.deepcopy(self.model)  # so that the threads meet a model that was never called
        with torch.no_grad():
            self.expected = torch.cat([alone(image[None]) for image in self.images])
        torch.set_num_threads(before)
        begin = time.perf_counter()
        share = int(calls * (1 - CANCELLED)) // threads
        workers = [threading.Thread(target=self._work, args=(self.seed + k, share)) for k in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        cut = self._cancel(calls - share * threads)
        return {
            "calls": self.done,
            "threads": threads,
            "cancelled": cut,
            "wrong": len(self.wrong),
            "first_wrong": self.wrong[:3],
            "growth_mb": self.growth() / 1e6,
            "resident_mb": [round(value / 1e6, 1) for value in self.resident[:: max(1, len(self.resident) // 8)]],
            "seconds": round(time.perf_counter() - begin, 1),
        }

    def growth(self) -> int:
        """Bytes of resident memory gained since a tenth of the calls were done."""
        start = len(self.resident) // 10
        return self.resident[-1] - self.resident[start] if self.resident else 0

    def _work(self, seed: int, calls: int) -> None:
        draw = random.Random(seed)
        for _ in range(calls):
            try:
                (self._usual if draw.random() < 0.95 else self._disturbed)(draw)
            except Exception as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
            self._count()

    def _count(self) -> None:
        self.done += 1
        if self.done % 50 == 0:
            self.resident.append(resident())

    def _usual(self, draw: random.Random) -> None:
        chosen = draw.choices(range(POOL), k=draw.choice([1, draw.randint(1, LARGEST)]))
        with torch.no_grad():
            self._compare(self.model(self.images[chosen]), chosen)

    def _disturbed(self, draw: random.Random) -> None:
        images = self.images[draw.choices(range(POOL), k=draw.randint(2, 9))]
        if draw.random() < 0.5:
            images, what = images[:, :, :-1], "of a wrong shape"
        else:
            images[0, ..., 0], what = draw.choice([float("nan"), float("inf"), -float("inf")]), "that are not finite"
        with contextlib.suppress(AssertionError, RuntimeError, ValueError), torch.no_grad():
            self.model(images)
            self.wrong.append(f"images {what} were taken")

    def _compare(self, found: torch.Tensor, chosen: list[int]) -> None:
        if not torch.equal(found, self.expected[chosen]):
            worst = (found - self.expected[chosen]).abs().max()
            self.wrong.append(f"logits of {len(chosen)} images differ by up to {worst:.3g}")

    def _cancel(self, calls: int) -> int:
        """Calls in this thread that a timer cuts off, each followed by a whole one; how many were cut off.

        Gradients are off around all of it: a cut within `no_grad` itself would leave them off for good.
        """
        draw, cut = random.Random(self.seed), 0
        with torch.no_grad(), _timer() as start:
            for _ in range(calls // 2):
                try:
                    start(draw.uniform(1e-4, 5e-3))
                    self.model(self.images[: draw.randint(1, LARGEST)])
                    start(0)
                except Cancelled:
                    cut += 1
                self._count()
                self._usual(draw)
                self._count()
        return cut


@contextlib.contextmanager
def _timer() -> Iterator[Any]:
    """A function that lets `Cancelled` be raised here after so many seconds; 0 calls it off."""

    def cut(*_: object) -> None:
        raise Cancelled

    before = signal.signal(signal.SIGALRM, cut)
    try:
        yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def quantized(name: str, w_bits: int) -> tuple[torch.nn.Module, tuple[int, ...]]:
    """(an embedded model in integers, fresh: no call was made yet; the size of its images)."""
    model = load_model(name)
    options: dict[str, Any] = {"calib": "noise", "samples": 4, "rounding": "nearest", "runtime": "integer"}
    return dfqvit.quantize(model, w_bits, 8, **options), Preprocessing.of(model).input_size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--models", nargs="+", default=["demo", "demo-swin"])
    parser.add_argument("--w-bits", type=int, default=4)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    args = parser.parse_args()
    failed = False
    for name in args.models:
        soak = Soak(*quantized(name, args.w_bits), args.seed)
        found = soak.run(args.calls, args.threads)
        failed |= bool(found["wrong"]) or soak.growth() > GROWTH
        print(json.dumps({"model": name, "w_bits": args.w_bits, "seed": args.seed, **found}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
