"""Scenes: what is drawn is where the boxes and masks say it is."""

from __future__ import annotations

import pytest
import torch

from dfqvit import UsageError
from dfqvit.evaluation import scenes
from dfqvit.models import dense


def test_the_same_seed_gives_the_same_scenes_and_a_longer_set_begins_alike():
    short, long, other = scenes.compose(30, 5), scenes.compose(70, 5), scenes.compose(30, 6)
    assert torch.equal(short.images, long.images[:30])
    assert torch.equal(short.masks, long.masks[:30])
    assert all(torch.equal(a, b) for a, b in zip(short.boxes, long.boxes[:30], strict=True))
    assert not torch.equal(short.images, other.images)
    assert len(long) == 70 == sum(len(part) for part in scenes.batches(long, 16))


def test_boxes_are_the_ends_of_what_is_seen(seed):
    """With one class an item may hide behind another of it, so the masks' pixels inside a box bound it from within."""
    found = scenes.compose(60, seed % 1000)
    boxes = 0
    for mask, box, label in zip(found.masks, found.boxes, found.labels, strict=True):
        assert ((mask > 0).float().mean() > 0) == (len(mask[mask > 0]) > 0)
        for (left, top, right, bottom), k in zip(box.long().tolist(), label.tolist(), strict=True):
            part = mask[top:bottom, left:right] == k + 1
            assert part[0].any()
            assert part[-1].any()
            assert part[:, 0].any()
            assert part[:, -1].any()
            boxes += 1
    assert boxes > 60


def test_a_lone_item_is_drawn_where_its_mask_is(seed):
    """An item as bright as can be on a ground that is darker: what is bright is the mask."""
    white = torch.full((1, 1, 28, 28), 255, dtype=torch.uint8)
    found = scenes.compose(50, seed % 1000, (white, torch.tensor([8])))
    assert set(found.masks.unique().tolist()) == {0, 6}
    alone = [i for i in range(50) if len(found.boxes[i]) == 1 and (found.masks[i] > 0).sum() > 0]
    for index in alone:
        image, mask = found.images[index, 0].float(), found.masks[index] > 0
        assert image[mask].mean() > image[~mask].mean() + 20


def test_classes_are_merged_from_the_ten():
    assert len(dense.OF_ITEM) == 10
    assert set(dense.OF_ITEM.tolist()) == set(range(len(dense.CLASSES)))


def test_no_scenes_and_no_items_are_refused():
    with pytest.raises(UsageError, match="count was 0; it must be at least 1"):
        scenes.compose(0)
    with pytest.raises(UsageError, match="items were none"):
        scenes.compose(1, 0, (torch.zeros(0, 1, 28, 28, dtype=torch.uint8), torch.zeros(0, dtype=torch.long)))
