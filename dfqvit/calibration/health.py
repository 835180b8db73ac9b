"""What `quantize` measures for `dfqvit diagnose` and keeps in the record: a few numbers of the images and of every block."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ..models import Preprocessing
from ..models.adapters import find_adapter
from .correction import block_outputs, divergence
from .given import outside_share

HIGH = 0.25  # cycles a pixel; of a photograph's energy a few percent lie beyond, of white noise's 80
LOST = 1.0  # of `result_divergence`: results that tell nothing of an image
_MOST_IMAGES = 32


@torch.no_grad()
def measure(
    model: nn.Module,
    qmodel: nn.Module,
    images: torch.Tensor,
    preprocessing: Preprocessing,
    left: dict[int, float] | None = None,
) -> dict[str, Any]:
    """Plain values: `images` (see `image_statistics`), `divergence` and `rms` by block, `acm_left` as `add_corrections` gave it.

    And `results`, where they are of a kind that can be compared: see `result_divergence`.
    """
    images = images[:_MOST_IMAGES]
    results: tuple[list[Any], list[Any]] = [], []
    wanted = block_outputs(find_adapter(model), images, results=results[0])
    found = block_outputs(find_adapter(qmodel), images, results=results[1])
    share = result_divergence(*results)
    return {
        "images": image_statistics(images, preprocessing),
        **({} if share is None else {"results": round(share, 5)}),
        "divergence": [round(divergence(w, f), 5) for w, f in zip(wanted, found, strict=True)],
        "rms": [round(float(w.square().mean().sqrt()), 4) for w in wanted],
        "acm_left": {str(index): round(share, 4) for index, share in (left or {}).items()},
    }


def result_divergence(wanted: list[Any], found: list[Any]) -> float | None:
    """How far results are from those wanted, as a share of what tells one image's from another's; 1 is no better than their mean.

    The mean squared distance over the variance between images, of logits or features [n, ...], batch by batch. None where a
    result is no such tensor, or all images have the same. A block's divergence does not show it: where a few channels hold most of
    the energy, all the rest may be lost.
    """
    every = [*wanted, *found]
    if not all(isinstance(each, torch.Tensor) and each.is_floating_point() and each.dim() > 1 for each in every):
        return None
    if len({each.shape[1:] for each in every}) > 1 or any(
        w.shape != f.shape for w, f in zip(wanted, found, strict=True)
    ):
        return None  # of shapes that depend on values
    right, other = (torch.cat(list(parts)).double().flatten(1) for parts in (wanted, found))
    spread = (right - right.mean(dim=0)).square().mean()
    if not spread > 1e-12 * right.square().mean():
        return None
    return float((other - right).square().mean() / spread)


def warn_of_results(measured: dict[str, Any]) -> None:
    """A UserWarning where `measure` found that the quantized model's results tell nothing of an image."""
    share = measured.get("results", 0.0)
    if share > LOST:
        warnings.warn(
            f"the quantized model's results are off by {share:.0%} of what tells one calibration image's from another's in the "
            "float model, so they tell little of an image; more bits, another placement or a model with fewer outliers may "
            "serve (docs/low-accuracy.md)",
            stacklevel=3,
        )


def image_statistics(images: torch.Tensor, preprocessing: Preprocessing) -> dict[str, float]:
    """Of images [n, C, H, W], normalised.

    `high`: share of the energy, without the mean, at more than HIGH cycles a pixel; `contrast`: mean standard deviation of an
    image's pixels, 0 to 1; `likeness`: mean correlation between two different images; `least` and `greatest` value, and
    `outside`: share of the values that no pixel from 0 to 1 gives (see `given`).
    """
    low, top = preprocessing.channel_bounds(images.device)
    pixels = ((images - low) / (top - low)).float()
    energy = torch.fft.fft2(pixels).abs().square()
    energy[..., 0, 0] = 0
    rows, columns = (torch.fft.fftfreq(size, device=images.device) for size in images.shape[2:])
    beyond = (rows[:, None] ** 2 + columns**2).sqrt() > HIGH
    flat = pixels.flatten(1) - pixels.flatten(1).mean(dim=1, keepdim=True)
    units = nn.functional.normalize(flat, dim=1)
    pairs = len(images) * (len(images) - 1)
    likeness = float((units @ units.T).sum() - units.square().sum()) / pairs if pairs else 0.0
    return {
        "high": round(float((energy * beyond).sum() / energy.sum().clamp_min(1e-20)), 4),
        "contrast": round(float(flat.square().mean(dim=1).sqrt().mean()), 4),
        "likeness": round(likeness, 4),
        "least": round(float(images.min()), 4),
        "greatest": round(float(images.max()), 4),
        "outside": round(outside_share(images, preprocessing), 4),
    }
