"""The images that a model is calibrated on: synthesised, procedural, noise or given, and those that stand beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import UsageError, is_whole
from ..models import Preprocessing
from ..progress import Progress
from ..quantization.recipe import Recipe
from ..synthesis import synthesize
from ..synthesis.losses import Objective
from ..synthesis.procedural import procedural_images

MADE = ("synthetic", "procedural", "noise")  # images that need no data
COMPANIONS = 48  # procedural images beside the synthetic ones, where weights are rounded to second order


def check_calib(calib: str) -> None:
    """UsageError unless `calib` names images that can be made."""
    if calib not in MADE:
        names = ", ".join(map(repr, MADE))
        raise UsageError(f"calib was '{calib}'; it may be {names} or images (a tensor, an array or a list)")


def companion_count(companions: int | None, calib: str | torch.Tensor, recipe: Recipe) -> int:
    """How many procedural images stand beside the calibration images; UsageError unless `companions` can be had with `calib`."""
    synthetic = isinstance(calib, str) and calib == "synthetic"
    if companions is None:
        return COMPANIONS if synthetic and recipe.rounding == "second-order" else 0
    if not is_whole(companions) or companions < 0:
        raise UsageError(f"companions was {companions!r}; it may be a number of images, or 0")
    if companions and not synthetic:
        raise UsageError(
            f"companions was {companions}; only synthetic images have companions, so calib must be 'synthetic'"
        )
    return companions


def with_companions(images: torch.Tensor, companions: int, seed: int, preprocessing: Preprocessing) -> torch.Tensor:
    """The images [n, C, H, W] and after them as many procedural ones."""
    if not companions:
        return images
    return torch.cat([images, procedural_images(companions, seed, preprocessing).to(images)])


def calibration_images(
    model: nn.Module,
    calib: str | torch.Tensor,
    *,
    samples: int,
    iters: int,
    seed: int,
    preprocessing: Preprocessing,
    report: Callable[[Progress], None] | None = None,
    objective: Objective | None = None,
    **synthesis: Any,
) -> tuple[torch.Tensor, str]:
    """(images on the model's device, "synthetic" | "procedural" | "noise" | "images"); `calib`: a name, or given images."""
    device = next(model.parameters()).device
    if isinstance(calib, torch.Tensor):
        return calib.to(device), "images"
    if calib == "noise":
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(samples, *preprocessing.input_size, generator=generator).to(device), "noise"
    if calib == "procedural":
        return procedural_images(samples, seed, preprocessing).to(device), "procedural"
    check_calib(calib)
    synthesis |= {"preprocessing": preprocessing, "report": report, "objective": objective}
    return synthesize(model, samples, iters, seed, **synthesis), "synthetic"
