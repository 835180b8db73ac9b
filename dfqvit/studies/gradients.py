"""The assumption behind easy to hard, checked: crops that shrink keep the gradients of the images large late in the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from ..models import Preprocessing
from ..synthesis import Progress, Synthesis, SynthesisConfig


def gradient_norms(
    model: nn.Module,
    preprocessing: Preprocessing,
    config: SynthesisConfig,
    report: Callable[[Progress], None] | None = None,
) -> dict[str, list[float]]:
    """{schedule: norm of the images' gradient at each step} for "e2h" and "fixed" crops, all else equal."""
    found: dict[str, list[float]] = {}
    for schedule in ("e2h", "fixed"):
        run = Synthesis(model, replace(config, schedule=schedule), preprocessing)
        norms: list[float] = []

        def note(progress: Progress, run: Synthesis = run, norms: list[float] = norms) -> None:
            assert run.images.grad is not None
            norms.append(float(run.images.grad.norm()))
            if report is not None:
                report(progress)

        run.run(note)
        found[schedule] = norms
    return found


def late_share(norms: list[float]) -> float:
    """Mean norm in the last fifth of the steps as a share of that in the first fifth."""
    part = max(1, len(norms) // 5)
    return sum(norms[-part:]) / max(sum(norms[:part]), 1e-12)
