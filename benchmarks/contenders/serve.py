"""The process of one contender: reads a JSON order a line, answers a JSON line.

{"batch": n} makes the model ready for that batch size; {"seconds": s} calls it for s seconds and gives the time of each call.
Contenders live in processes of their own because their OpenMP runtimes disturb each other within one.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import runner
import torch

from dfqvit.models import Preprocessing, load_model

from . import CONTENDERS, Ready, Setting

CALIBRATION = 32  # images for the peers that calibrate


class Server:
    """One contender and the batch size it is ready for."""

    def __init__(self, name: str, model: str, checkpoint: str | None, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.device = device
        self.float_model = open_float(model, checkpoint)
        self.size = Preprocessing.of(self.float_model).input_size
        self.before = runner.resident("VmRSS")
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(CALIBRATION, *self.size, generator=generator)
        self.setting = Setting(device, threads, self.images)
        self.ready: Ready = CONTENDERS[name].build(open_float(model, checkpoint), self.setting)
        self.error: float | None = None
        self.call: Callable[[], Any] = lambda: None

    def prepare(self, batch: int) -> dict[str, Any]:
        """Ready for `batch` images: what it holds, and how far its logits are from the float model's."""
        self.call = lambda: None
        gc.collect()
        images = self.images.repeat(-(-batch // CALIBRATION), 1, 1, 1)[:batch].contiguous()
        self.call = self.ready.at(images)
        logits = torch.as_tensor(self.call()).float().cpu()
        if self.error is None:  # once, and of the images that differ: the float model runs on the CPU
            differing = images[:CALIBRATION]
            with torch.no_grad():
                expected = self.float_model(differing)
            self.error = float((logits[: len(expected)] - expected).norm() / expected.norm())
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        facts = dict(self.ready.facts)
        weights = facts.pop("weights", self.ready.weights)
        return {"weights": weights, "facts": facts, "error": self.error, "memory": self._peak()}

    def _peak(self) -> int:
        """Bytes at the most while it runs: of the GPU's memory, or of this process beyond torch and a float model."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.call()
            return torch.cuda.max_memory_allocated()
        runner.forget_peak()
        self.call()
        return runner.resident("VmHWM") - self.before

    def time(self, seconds: float) -> list[float]:
        """Seconds of each call, until they add up to `seconds`; one call at least."""
        found: list[float] = []
        while sum(found) < seconds:
            begin = time.perf_counter()
            self.call()
            found.append(time.perf_counter() - begin)
        return found


def open_float(model: str, checkpoint: str | None) -> torch.nn.Module:
    """The float model; weights are random, always the same, without a checkpoint (the demo models have their own)."""
    import timm

    if checkpoint is not None or model.startswith("demo"):
        return load_model(model, checkpoint).requires_grad_(False)
    torch.manual_seed(0)
    return timm.create_model(model).eval().requires_grad_(False)


def serve(arguments: dict[str, Any]) -> None:
    """Answers orders until stdin closes; an error is an answer, and the last one."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print does not mix with the answers
    try:
        server = Server(**arguments)
        print(json.dumps({"started": True}), file=answers)
        for line in sys.stdin:
            order = json.loads(line)
            answer = server.prepare(order["batch"]) if "batch" in order else {"times": server.time(order["seconds"])}
            print(json.dumps(answer), file=answers)
    except Exception as error:  # any library may raise anything: the benchmark goes on with the others
        text = next(iter(str(error).strip().splitlines()), "")
        print(json.dumps({"failed": f"{type(error).__name__}: {text}"[:200]}), file=answers)
        raise
