"""How fast models are beside each other, and what a calibration costs beside a light fine-tuning."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from ..api import quantize
from ..kernels import fake_quantize
from ..models import Preprocessing
from ..models.adapters import find_adapter
from ..quantization.quantizers import WEIGHT_RULES
from ..synthesis import synthesize
from .energy import Cost, Energy

FINE_TUNING_RATE = 1e-5  # AdamW's learning rate; the cost does not depend on it


@dataclass
class Speed:
    """One model at one batch size. Latencies are of whole calls, in milliseconds."""

    model: str
    batch: int
    images_per_second: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    calls: int
    times_first: float  # how many times as fast as the first model; the median of the rounds' ratios
    times_first_range: tuple[float, float]  # the least and the greatest of them
    joules_per_image: float | None

    def ratio(self, digits: int = 2) -> str:
        """How many times as fast as the first model, with the range, as "1.25 (1.10 to 1.31)"."""
        low, high = self.times_first_range
        middle = f"{self.times_first:.{digits}f}"
        return middle if low == high else f"{middle} ({low:.{digits}f} to {high:.{digits}f})"


def race(
    models: Mapping[str, nn.Module],
    batches: Sequence[int],
    size: tuple[int, ...],
    energy: Energy,
    *,
    rounds: int = 9,
    seconds: float = 0.5,
    report: Callable[[], object] | None = None,
) -> list[Speed]:
    """Calls the models in turn on noise, round after round, so that a slow moment of the machine meets all of them.

    Args:
        models: by name, all on the device of `energy`; the first is what the others are compared with.
        batches: batch sizes.
        size: (C, H, W) of an image.
        energy: what counts the joules.
        rounds: how often each model has its turn.
        seconds: of a turn; one call at least.
        report: called after every turn.
    """
    found = []
    for batch in batches:
        images = torch.randn(batch, *size, device=energy.device)
        turns: dict[str, list[list[float]]] = {name: [] for name in models}
        costs = {name: Cost(0.0, {}) for name in models}
        for model in models.values():
            _turn(model, images, 0.0)  # warm-up: chains are made, backends chosen
            _turn(model, images, seconds / 4)
        for _ in range(rounds):
            for name, model in models.items():
                with energy.account() as cost:
                    turns[name].append(_turn(model, images, seconds))
                costs[name] += cost
                if report is not None:
                    report()
        first = [statistics.median(turn) for turn in next(iter(turns.values()))]
        for name in models:
            found.append(_speed(name, batch, turns[name], first, costs[name]))
    return found


@torch.no_grad()
def _turn(model: nn.Module, images: torch.Tensor, seconds: float) -> list[float]:
    """Seconds of each call, one after the other until they fill `seconds`."""
    calls: list[float] = []
    while not calls or sum(calls) < seconds:
        begin = time.perf_counter()
        model(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        calls.append(time.perf_counter() - begin)
    return calls


def _speed(name: str, batch: int, turns: list[list[float]], first: list[float], cost: Cost) -> Speed:
    calls = sorted(call for turn in turns for call in turn)
    p50, p90, p99 = (1e3 * calls[round(q * (len(calls) - 1))] for q in (0.5, 0.9, 0.99))
    ratios = [a / statistics.median(turn) for a, turn in zip(first, turns, strict=True)]
    total = cost.total
    return Speed(
        model=name,
        batch=batch,
        images_per_second=1e3 * batch / p50,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        calls=len(calls),
        times_first=statistics.median(ratios),
        times_first_range=(min(ratios), max(ratios)),
        joules_per_image=None if total is None else total / (batch * len(calls)),
    )


def calibration_cost(
    model: nn.Module, energy: Energy, *, w_bits: int, samples: int, iters: int, measured: int = 5, **settings: Any
) -> dict[str, Cost]:
    """What `quantize` costs: "synthesis" of `iters` steps, extrapolated from `measured` steps, and "calibration", whole.

    Every step of the synthesis is the same work, so two short runs tell the cost of a step and what comes beside the steps.
    """
    preprocessing = Preprocessing.of(model)
    costs = []
    for steps in (1, 1, 1 + measured):  # the first is a warm-up
        with energy.account() as cost:
            images = synthesize(model, samples, steps, preprocessing=preprocessing)
        costs.append(cost)
    step = (costs[2] + costs[1].times(-1)).times(1 / measured)
    if step.seconds <= 0:  # the shorter run was held up
        step = costs[2].times(1 / (1 + measured))
    with energy.account() as calibration:
        quantize(model, w_bits, calib=images, preprocessing=preprocessing, progress=False, **settings)
    return {"synthesis": costs[1] + step.times(iters - 1), "calibration": calibration}


def fine_tuning_cost(
    model: nn.Module, images: torch.Tensor, energy: Energy, *, w_bits: int, steps: int, measured: int = 3
) -> Cost:
    """What `steps` steps of light fine-tuning on the same images cost, extrapolated from `measured` steps.

    A step: weights of the blocks rounded to w_bits (straight-through), the whole batch forward and backward, the distance to
    the float logits, AdamW. Activations stay float and no data is loaded, so this is less than real training would cost.
    """
    student = copy.deepcopy(model).train().requires_grad_(True)
    for block in find_adapter(student).blocks():
        for layer in [module for module in block.modules() if isinstance(module, nn.Linear)]:
            parametrize.register_parametrization(layer, "weight", _Rounded(w_bits))
    optimizer = torch.optim.AdamW(student.parameters(), FINE_TUNING_RATE)
    with torch.no_grad():
        goal = model(images).log_softmax(dim=1)

    def step() -> None:
        optimizer.zero_grad()
        F.kl_div(student(images).log_softmax(dim=1), goal, reduction="batchmean", log_target=True).backward()
        optimizer.step()

    step()
    with energy.account() as cost:
        for _ in range(measured):
            step()
    return cost.times(steps / measured)


class _Rounded(nn.Module):
    """A weight on its grid, as fine-tuning sees it."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """[N, K] to the same, rounded."""
        scale = WEIGHT_RULES["minmax"](weight, self.bits, "uniform")
        top = 1 << (self.bits - 1)
        return fake_quantize(weight, scale, quant_min=-top, quant_max=top - 1, axis=0)
