"""Scenes composed from Fashion-MNIST items: several, of several sizes, over one another, before a textured ground.

They are what the embedded dense models were trained on and are measured on. A scene is drawn from a generator seeded by
(seed, number of its group), so the first scenes of a larger set are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import UsageError
from ..models import demo
from ..models.dense import OF_ITEM, SIDE

MOST_ITEMS, GROUP = 3, 50
_SIZES = (24.0, 34.0)  # pixels of an item's 28 x 28 square
_TURN = 0.12  # radians, at most, to either side
_OPAQUE = 0.08  # of an item's brightness from 0 to 1: less is its ground
_LEAST_SHARE, _LEAST_PIXELS = 0.4, 30  # of an item that must be seen for it to have a box


@dataclass(frozen=True)
class Scenes:
    """Grey scenes and what is in them.

    Attributes:
        images: uint8 [n, 1, 56, 56].
        masks: uint8 [n, 56, 56], 0 for the ground, k + 1 for class k.
        boxes: for each scene float32 [items, 4], pixels (left, top, right, bottom), around what is seen of an item.
        labels: for each scene int64 [items], classes from 0.
    """

    images: torch.Tensor
    masks: torch.Tensor
    boxes: list[torch.Tensor]
    labels: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.images)


def items_of(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 [n, 1, 28, 28], int64 [n]): the Fashion-MNIST items in an .npz as those that ship with the demo models."""
    with np.load(path, allow_pickle=False) as file:
        return torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()


def compose(count: int, seed: int = 0, items: tuple[torch.Tensor, torch.Tensor] | None = None) -> Scenes:
    """`count` scenes.

    Args:
        count: how many, 1 at least.
        seed: of everything that is drawn; the same seed and items give the same scenes.
        items: (uint8 [n, 1, 28, 28], int64 [n]) to compose from, labels as Fashion-MNIST's; default the test split.

    Raises:
        UsageError: count below 1, or no items.
    """
    if count < 1:
        raise UsageError(f"count was {count}; it must be at least 1")
    images, labels = items or items_of(demo.TEST_IMAGES)
    if not len(images):
        raise UsageError("items were none; a scene is composed from one at least")
    groups = [_group(images, labels, seed, number) for number in range(-(-count // GROUP))]
    joined = [
        torch.cat([group.images for group in groups])[:count],
        torch.cat([group.masks for group in groups])[:count],
    ]
    boxes = [each for group in groups for each in group.boxes][:count]
    return Scenes(joined[0], joined[1], boxes, [each for group in groups for each in group.labels][:count])


def _group(images: torch.Tensor, labels: torch.Tensor, seed: int, number: int) -> Scenes:
    generator = torch.Generator().manual_seed((seed << 24) + number)

    def uniform(least: float, greatest: float, *shape: int) -> torch.Tensor:
        return least + (greatest - least) * torch.rand(shape, generator=generator)

    slots = GROUP * MOST_ITEMS
    chosen = torch.randint(len(images), (slots,), generator=generator)
    there = torch.rand(GROUP, MOST_ITEMS, generator=generator).argsort(1).argsort(1) < torch.randint(
        1, MOST_ITEMS + 1, (GROUP, 1), generator=generator
    )
    size = uniform(*_SIZES, slots)
    centre = torch.stack([(size / 2 + uniform(0, 1, slots) * (SIDE - size)) for _ in range(2)], dim=1)
    layers = _placed(images[chosen], size, centre, uniform(-_TURN, _TURN, slots), uniform(0, 1, slots) < 0.5)
    value, opaque = (each.view(GROUP, MOST_ITEMS, SIDE, SIDE) for each in layers)
    opaque &= there[:, :, None, None]
    value = value * uniform(0.7, 1.0, GROUP, MOST_ITEMS, 1, 1) + uniform(0.0, 0.15, GROUP, MOST_ITEMS, 1, 1)
    scene, classes = _grounds(generator), OF_ITEM[labels[chosen]].view(GROUP, MOST_ITEMS)
    owner = torch.zeros(GROUP, SIDE, SIDE, dtype=torch.long)  # 0 the ground, k + 1 the k-th item, later ones in front
    for k in range(MOST_ITEMS):
        scene = torch.where(opaque[:, k], value[:, k], scene)
        owner = torch.where(opaque[:, k], k + 1, owner)
    scene = scene + 0.02 * torch.randn(scene.shape, generator=generator)
    masks = F.pad(classes + 1, (1, 0)).gather(1, owner.flatten(1)).view_as(owner)
    boxes, found = _boxes(owner, opaque, classes)
    pixels = (scene.clamp(0, 1) * 255).round().to(torch.uint8)
    return Scenes(pixels[:, None], masks.to(torch.uint8), boxes, found)


def _placed(
    items: torch.Tensor, size: torch.Tensor, centre: torch.Tensor, turn: torch.Tensor, mirrored: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(brightness from 0 to 1, whether opaque), [n, 56, 56] each, of items drawn at their places."""
    scale = SIDE / size
    cos, sin, sign = turn.cos() * scale, turn.sin() * scale, torch.where(mirrored, -1.0, 1.0)
    middle = 2 * centre / SIDE - 1
    rows = torch.stack([torch.stack([sign * cos, sign * sin], 1), torch.stack([-sin, cos], 1)], 1)
    theta = torch.cat([rows, -rows @ middle[:, :, None]], dim=2)
    grid = F.affine_grid(theta, [len(items), 1, SIDE, SIDE], align_corners=False)
    value = F.grid_sample(items.float() / 255, grid, padding_mode="zeros", align_corners=False)[:, 0]
    return value, value > _OPAQUE


def _grounds(generator: torch.Generator) -> torch.Tensor:
    """[GROUP, 56, 56]: noise whose amplitude falls with frequency, another slope, brightness and contrast for each."""
    rows, columns = torch.fft.fftfreq(SIDE), torch.fft.rfftfreq(SIDE)
    frequency = (rows[:, None] ** 2 + columns**2).sqrt().clamp_min(1 / SIDE)
    slope = 0.8 + 1.4 * torch.rand(GROUP, 1, 1, generator=generator)
    noise = torch.randn(GROUP, SIDE, SIDE, generator=generator)
    field = torch.fft.irfft2(torch.fft.rfft2(noise) * frequency**-slope, s=(SIDE, SIDE))
    field = (field - field.mean((1, 2), keepdim=True)) / field.std((1, 2), keepdim=True)
    middle = 0.04 + 0.2 * torch.rand(GROUP, 1, 1, generator=generator)
    return middle + (0.02 + 0.06 * torch.rand(GROUP, 1, 1, generator=generator)) * field


def _boxes(
    owner: torch.Tensor, opaque: torch.Tensor, classes: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    seen = owner[:, None] == torch.arange(1, MOST_ITEMS + 1).view(1, -1, 1, 1)
    pixels = seen.sum((2, 3))
    shown = (pixels >= _LEAST_PIXELS) & (pixels >= _LEAST_SHARE * opaque.sum((2, 3)))
    ends = []
    for along in (seen.any(2), seen.any(3)):  # columns, then rows
        first = along.int().argmax(2)
        last = SIDE - along.flip(2).int().argmax(2)
        ends.append((first, last))
    box = torch.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], dim=2).float()
    return [box[i][shown[i]] for i in range(len(box))], [classes[i][shown[i]] for i in range(len(box))]


def batches(scenes: Scenes, size: int) -> Iterator[Scenes]:
    """The scenes in parts of `size`."""
    for start in range(0, len(scenes), size):
        part = slice(start, start + size)
        yield Scenes(scenes.images[part], scenes.masks[part], scenes.boxes[part], scenes.labels[part])
