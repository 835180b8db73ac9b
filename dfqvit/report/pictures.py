"""Pictures of synthetic images: PNG files, and what a page holds of them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ..models import Preprocessing
from ..storage.atomic import atomic

_PAGE_WIDTH = 960  # pixels of a picture in a page
_PAGE_QUALITY = 75  # of its JPEG
_SMALL = 60_000  # bytes of a PNG that is put into a page as it is
_LEAST_SIDE = 96  # smaller images are enlarged to about this, in whole steps, so that a person can see them


def to_pixels(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """[n, C, H, W] normalised to [n, 1 or 3, H, W] in [0, 1], enlarged if small; other channel counts are averaged to grey."""
    pixels = preprocessing.pixels(images.detach().cpu())
    if pixels.shape[1] not in (1, 3):
        pixels = pixels.mean(dim=1, keepdim=True)
    factor = max(1, _LEAST_SIDE // pixels.shape[-1])
    return pixels.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)


def save_grid(images: torch.Tensor, path: Path, preprocessing: Preprocessing, columns: int = 8) -> Path:
    """A grid of the images, [n, C, H, W] normalised."""
    return write_grid(make_grid(to_pixels(images, preprocessing), nrow=min(columns, len(images)), padding=4), path)


def save_curriculum(frames: Mapping[int, torch.Tensor], path: Path, preprocessing: Preprocessing) -> Path:
    """The same images at several steps: a row for each step, first to last. `frames` maps step to [n, C, H, W]."""
    rows = torch.cat([frames[step] for step in sorted(frames)])
    columns = len(next(iter(frames.values())))
    return write_grid(make_grid(to_pixels(rows, preprocessing), nrow=columns, padding=4), path)


def for_page(path: Path) -> tuple[str, bytes]:
    """(media type, bytes) of a picture for a page: a small PNG as it is, else a JPEG that is no wider than the page."""
    data = path.read_bytes()
    if len(data) <= _SMALL:
        return "image/png", data
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    if picture.width > _PAGE_WIDTH:
        height = round(picture.height * _PAGE_WIDTH / picture.width)
        picture = picture.resize((_PAGE_WIDTH, height), Image.Resampling.LANCZOS)
    kept = io.BytesIO()
    picture.save(kept, format="JPEG", quality=_PAGE_QUALITY, optimize=True)
    return "image/jpeg", kept.getvalue()


def write_grid(grid: torch.Tensor, path: Path) -> Path:
    """Writes [3, H, W] in [0, 1] as PNG, atomically."""
    with atomic(path) as temporary:
        to_pil_image(grid).save(temporary, format="PNG")
    return path
