"""Images and classes files that are read, and of which something says that they are hardly meant so."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dfqvit.errors import UsageError
from dfqvit.evaluation import evaluate
from dfqvit.evaluation.batches import Batches
from dfqvit.evaluation.data import open_images
from dfqvit.models import Preprocessing

SIDE = 12
GREY = Preprocessing((1, SIDE, SIDE), (0.5,), (0.5,), crop_pct=1.0)


class Brightest(nn.Module):
    """The row of the greatest mean is the class."""

    def __init__(self):
        super().__init__()
        self.num_classes, self.scale = SIDE, nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.scale * images.mean((1, 3))


def pictures(seed, count=8):
    values = np.random.default_rng(seed).integers(0, 200, (count, SIDE, SIDE), dtype=np.uint8)
    for index, value in enumerate(values):
        value[index % SIDE] = 255
    return [Image.fromarray(value) for value in values]


def saved(folder, images, end="png", **options):
    for index, image in enumerate(images):
        place = folder / f"{index:02d}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"x.{end}", **options)
    for index in range(len(images), SIDE):
        (folder / f"{index:02d}").mkdir()
    return folder


def measured(folder):
    return evaluate(Brightest(), Batches(open_images(folder, GREY, num_classes=SIDE), workers=0)).top1


def test_pictures_in_the_transparency_are_told(tmp_path, seed):
    images = pictures(seed)
    opaque = [Image.merge("LA", [image, Image.new("L", image.size, 255)]) for image in images]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured(saved(tmp_path / "opaque", opaque)) == 100
    hidden = [Image.merge("LA", [Image.new("L", image.size, 255), image]) for image in images]
    with pytest.warns(UserWarning, match="8 of 8 images are of one colour, .*transparency"):
        measured(saved(tmp_path / "hidden", hidden))
    colours = [Image.merge("RGBA", [Image.new("L", image.size, 0)] * 3 + [image]) for image in images]
    with pytest.warns(UserWarning, match="8 of 8 images are of one colour"):
        measured(saved(tmp_path / "colours", colours))


def test_images_that_are_stored_turned_are_told(tmp_path, seed):
    """As timm has them: turned, but for TIFF, which Pillow turns."""
    upright, turned = Image.Exif(), Image.Exif()
    upright[274], turned[274] = 1, 3
    images = pictures(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_images(saved(tmp_path / "upright", images, "jpg", exif=upright), GREY, num_classes=SIDE)
        half = [image.rotate(180) for image in images]
        found = open_images(saved(tmp_path / "tiff", half, "tif", exif=turned), GREY, num_classes=SIDE)
    assert all(np.array_equal(found.pixels(index)[0][0], image) for index, image in enumerate(images))
    saved(tmp_path / "turned", half, "jpg", exif=turned, quality=100)
    with pytest.warns(
        UserWarning,
        match=r"8 of 8 images that were looked at are stored turned, .*Exif orientation.* not followed, as in timm",
    ):
        found = open_images(tmp_path / "turned", GREY, num_classes=SIDE)
    for index, image in enumerate(half):
        pixels = np.asarray(found.pixels(index)[0][0], int)
        assert (
            abs(pixels - np.asarray(image, int)).mean() < 3
        )  # of JPEG at its best; other pixels are 60 and more apart


@pytest.mark.parametrize("greatest", [0, 2, 15, 16, 63])
def test_arrays_of_few_levels_are_told(tmp_path, seed, greatest):
    """The digits of scikit-learn go up to 16."""
    images = np.random.default_rng(seed).integers(0, greatest + 1, (3, 1, SIDE, SIDE), dtype=np.uint8)
    images[0, 0, 0, 0] = greatest
    np.savez(tmp_path / "n.npz", images=images, labels=np.arange(3))
    with pytest.warns(
        UserWarning, match=f"has pixels up to {greatest} only; they are taken as of 255, and so for dark"
    ):
        open_images(tmp_path / "n.npz", GREY)


@pytest.mark.parametrize(("first", "between"), [(0, " "), (1, " "), (0, " = "), (0, " tabby cat ")])
def test_numbers_in_a_classes_file_that_say_another_order(tmp_path, seed, first, between):
    names = [chr(97 + each) for each in np.random.default_rng(seed).permutation(SIDE)]
    for name in names:
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (SIDE, SIDE)).save(tmp_path / "data" / name / "x.png")
    lines = [f"{name}{between}{first + index}" for index, name in enumerate(names)]
    (tmp_path / "c.txt").write_text("\n".join(lines))
    found = open_images(tmp_path / "data", GREY, tmp_path / "c.txt", num_classes=SIDE)
    assert all(names[label] == path.parent.name for path, label in found.items)
    lines[3], lines[7] = lines[7], lines[3]
    (tmp_path / "c.txt").write_text("\n".join(lines))
    with pytest.raises(
        UsageError, match=f"in line 4, where class {first + 3} was due; line k is class k: sort the lines"
    ):
        open_images(tmp_path / "data", GREY, tmp_path / "c.txt", num_classes=SIDE)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("npz", "labels must be the model's classes, counted from 0"),
        ("folder", "--classes FILE gives the model's order"),
        ("classes", "line k of the classes file must be the folder of the model's class k"),
    ],
)
def test_what_is_advised_can_be_done(tmp_path, seed, source, wanted):
    """Found here: --classes was advised beside an .npz, for which it is refused, and to who had given it."""
    images, classes = pictures(seed, 5 * SIDE), None
    moved = [(index + SIDE // 2) % SIDE for index in range(len(images))]
    if source == "npz":
        path = tmp_path / "data.npz"
        np.savez(path, images=np.stack([np.asarray(each) for each in images])[:, None], labels=moved)
    else:
        path = tmp_path / "data"
        for index, (label, image) in enumerate(zip(moved, images, strict=True)):
            (path / f"{label:02d}").mkdir(parents=True, exist_ok=True)
            image.save(path / f"{label:02d}" / f"{index}.png")
        if source == "classes":
            classes = tmp_path / "classes.txt"
            classes.write_text("\n".join(f"{label:02d}" for label in range(SIDE)))
    with pytest.warns(UserWarning, match=f"the order of the classes looks wrong: .*; {re.escape(wanted)}$"):
        evaluate(Brightest(), Batches(open_images(path, GREY, classes, num_classes=SIDE), workers=0))
