"""Pictures of synthetic images, as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ..models import Preprocessing
from ..storage.atomic import atomic

_LEAST_SIDE = 96  # smaller images are enlarged to about this, in whole steps, so that a person can see them


def to_pixels(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """[n, C, H, W] normalised to [n, 1 or 3, H, W] in [0, 1], enlarged if small; other channel counts are averaged to grey."""
    mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std).view(-1, 1, 1)
    pixels = (images.detach().cpu().float() * std + mean).clamp(0, 1)
    if pixels.shape[1] not in (1, 3):
        pixels = pixels.mean(dim=1, keepdim=True)
    factor = max(1, _LEAST_SIDE // pixels.shape[-1])
    return pixels.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)


def save_grid(images: torch.Tensor, path: Path, preprocessing: Preprocessing, columns: int = 8) -> Path:
    """A grid of the images, [n, C, H, W] normalised."""
    return _write(make_grid(to_pixels(images, preprocessing), nrow=min(columns, len(images)), padding=4), path)


def save_curriculum(frames: Mapping[int, torch.Tensor], path: Path, preprocessing: Preprocessing) -> Path:
    """The same images at several steps: a row for each step, first to last. `frames` maps step to [n, C, H, W]."""
    rows = torch.cat([frames[step] for step in sorted(frames)])
    columns = len(next(iter(frames.values())))
    return _write(make_grid(to_pixels(rows, preprocessing), nrow=columns, padding=4), path)


def _write(grid: torch.Tensor, path: Path) -> Path:
    with atomic(path) as temporary:
        to_pil_image(grid).save(temporary, format="PNG")
    return path
