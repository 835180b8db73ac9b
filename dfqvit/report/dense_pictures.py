"""Boxes and masks drawn on images, one row for each network: what they were before quantization and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from .pictures import write_grid

_ENLARGED = 3
_SHOWN = 0.3  # least score of a box that is drawn
# Okabe and Ito's colours, which most people can tell apart, by class
_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


def save_boxes(images: torch.Tensor, rows: Mapping[str, Sequence[Mapping[str, torch.Tensor]]], path: Path) -> Path:
    """A row for each entry of `rows`: its boxes [n, 4] (pixels) and labels [n] on uint8 images [n, 1 or 3, H, W].

    Where there are scores, boxes below 0.3 are left out.
    """
    tiles = []
    for found in rows.values():
        for image, each in zip(images, found, strict=True):
            large = _enlarged(image)
            kept = each["scores"] >= _SHOWN if "scores" in each else torch.ones(len(each["labels"]), dtype=torch.bool)
            colours = [_COLOURS[int(label) % len(_COLOURS)] for label in each["labels"][kept]]
            if colours:
                boxes = _ordered(each["boxes"][kept] * _ENLARGED)
                large = draw_bounding_boxes(large, boxes, colors=colours, width=2)
            tiles.append(large)
    return _save(tiles, len(images), path)


def save_masks(images: torch.Tensor, rows: Mapping[str, torch.Tensor], path: Path) -> Path:
    """A row for each entry of `rows`: its masks [n, H, W], 0 the ground, over uint8 images [n, 1 or 3, H, W]."""
    tiles = []
    for masks in rows.values():
        for image, mask in zip(images, masks, strict=True):
            wide = mask.repeat_interleave(_ENLARGED, 0).repeat_interleave(_ENLARGED, 1)
            layers = torch.stack([wide == k + 1 for k in range(len(_COLOURS))])
            tiles.append(draw_segmentation_masks(_enlarged(image), layers, alpha=0.6, colors=list(_COLOURS)))
    return _save(tiles, len(images), path)


def _enlarged(image: torch.Tensor) -> torch.Tensor:
    wide = image.repeat_interleave(_ENLARGED, 1).repeat_interleave(_ENLARGED, 2)
    return wide.expand(3, -1, -1) if len(wide) == 1 else wide


def _ordered(boxes: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], dim=1)


def _save(tiles: list[torch.Tensor], columns: int, path: Path) -> Path:
    return write_grid(make_grid(torch.stack(tiles).float() / 255, nrow=columns, padding=4), path)
