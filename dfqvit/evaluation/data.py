"""Labelled images to evaluate on: a folder of classes, or an .npz file."""

from __future__ import annotations

import abc
import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from ..calibration.given import eight_bits
from ..errors import DfqvitError, UsageError
from ..models import Preprocessing
from .labels import REMEDY, class_folders, order_of, read_classes, read_labels

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_UNREAD = (".gif", ".jp2", ".avif", ".heic", ".heif", ".jxl", ".jfif", ".jpe", ".dng")  # images, and left out
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises of a file

_ORIENTATION = 274  # in Exif; 1 is upright
_MOST_TURNED = 0.1  # of the images that are looked at for it
_LOOKED_AT = 200  # images, evenly spread: each is opened once more
_DARK = 64  # of 255

Item = tuple[torch.Tensor, int]


class Images(Dataset, abc.ABC):
    """Labelled images; items are (image [C, H, W] as the model expects it, label).

    Attributes:
        assumed: how labels became classes, for people.
        remedy: what to do where that looks wrong, for people.
    """

    assumed: str = ""
    remedy: str = REMEDY
    preprocessing: Preprocessing
    unreadable: str = "refuse"

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many."""

    @abc.abstractmethod
    def pixels(self, index: int) -> Item:
        """(pixels [C, H, W], label): of the model's size and not yet normalised, uint8 or float32 in [0, 1]."""

    def __getitem__(self, index: int) -> Item:
        pixels, label = self.pixels(index)
        return self.preprocessing.normalise(pixels), label


class FolderImages(Images):
    """Images in `root/<class>/`, at any depth, resized and cropped by timm's evaluation transform.

    Args:
        root: the folder.
        preprocessing: size, interpolation, crop, mean, std.
        classes: line k is the folder name of class k; without it WordNet ids are known where `num_classes` is ImageNet's, and
            else the folders in order are classes 0, 1, ...
        unreadable: "refuse" raises DfqvitError on a file that is no image, "skip" leaves it out with a warning.
        num_classes: of the model, which the folders must fit; None does not check.
        labelled: False takes every image in `root`, also beside the folders; all labels are then 0.
    """

    def __init__(
        self,
        root: Path,
        preprocessing: Preprocessing,
        classes: Sequence[str] | None = None,
        unreadable: str = "refuse",
        num_classes: int | None = None,
        labelled: bool = True,
    ) -> None:
        folders = class_folders(root)
        if labelled and not folders:
            raise UsageError(f"data was '{root}'; it has no folders of classes")
        if labelled:
            order, self.assumed = order_of(root, folders, classes, num_classes)
            given = "line k of the classes file must be the folder of the model's class k"
            self.remedy = "--classes FILE gives the model's order" if classes is None else given
        self.items: list[tuple[Path, int]] = []
        left_out: Counter[str] = Counter()
        for folder in folders if labelled else [""]:
            label = order[folder] if labelled else 0
            for path in files_in(root / folder):
                suffix = path.suffix.lower()
                left_out.update([suffix] if suffix in _UNREAD else [])
                if suffix in _SUFFIXES and self._readable(path, unreadable):
                    self.items.append((path, label))
        if left_out:
            kinds = ", ".join(sorted(left_out))
            warnings.warn(
                f"data '{root}': {left_out.total()} files of other kinds were left out ({kinds}); images are read from "
                f"{', '.join(_SUFFIXES)}",
                stacklevel=3,
            )
        if not self.items:
            raise UsageError(f"data was '{root}'; it has no images ({', '.join(_SUFFIXES)})")
        some = self.items[:: -(-len(self.items) // _LOOKED_AT)]
        turned = sum(_is_turned(path) for path, _ in some)
        if turned > _MOST_TURNED * len(some):
            warnings.warn(
                f"data '{root}': {turned} of {len(some)} images that were looked at are stored turned, with a note for viewers "
                "(Exif orientation), which is not followed, as in timm: the model sees them turned; save them upright",
                stacklevel=3,
            )
        self.mode = {1: "L", 3: "RGB"}.get(preprocessing.input_size[0])
        if self.mode is None:
            raise UsageError(
                f"the model takes {preprocessing.input_size[0]} channels; image files have 1 or 3, use an .npz"
            )
        self.preprocessing, self.unreadable = preprocessing, unreadable
        self.transform = preprocessing.transform()

    @staticmethod
    def _readable(path: Path, unreadable: str) -> bool:
        try:
            if path.exists() and not path.is_file():
                raise OSError("no regular file")  # a pipe would be waited for
            with Image.open(path) as image:
                image.verify()
            return True
        except UNREADABLE as error:
            if unreadable == "refuse":
                raise DfqvitError(
                    f"data: '{path}' is not a readable image; remove it or give --unreadable skip"
                ) from error
            warnings.warn(f"data: '{path}' is not a readable image, skipped", stacklevel=2)
            return False

    def __len__(self) -> int:
        return len(self.items)

    def pixels(self, index: int) -> Item:
        """uint8 pixels; DfqvitError names a file that cannot be decoded."""
        path, label = self.items[index]
        try:
            with Image.open(path) as file:
                image = eight_bits(file).convert(self.mode)
        except UNREADABLE as error:  # a file whose header is good and whose body is not
            raise DfqvitError(f"data: '{path}' is not a readable image ({error})") from error
        return self.transform(image), label


def _is_turned(path: Path) -> bool:
    """Whether an image says of itself that viewers shall turn or mirror it; of TIFF Pillow does so itself."""
    try:
        with Image.open(path) as image:
            return image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    except Exception:  # what Pillow raises of notes that are damaged, in an image that is not
        return False


def files_in(folder: Path) -> list[Path]:
    """The files in `folder` at any depth that are not hidden, sorted; links are followed, every folder is read once.

    A link to a folder above is not followed: the files of all classes would be of this one.
    """
    found: list[Path] = []
    seen = {folder.resolve(), *folder.resolve().parents}
    for place, folders, files in os.walk(folder, followlinks=True):
        kept = []
        for name in sorted(folders):
            real = (Path(place) / name).resolve()
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        found += [Path(place) / name for name in files if not name.startswith(".")]
    return sorted(found)


class ArrayImages(Images):
    """Images of an .npz file: `images` uint8 [n, C, H, W] and `labels` [n], which must fit `num_classes` where that is given.

    The images are taken as framed already: resized to the model's input (antialiased, clamped to [0, 1]) and not cropped.
    Without `labelled`, labels are not looked at.
    """

    def __init__(
        self, path: Path, preprocessing: Preprocessing, num_classes: int | None = None, labelled: bool = True
    ) -> None:
        try:
            with path.open("rb") as raw:
                if not zipfile.is_zipfile(raw):
                    raise ValueError("it is no zip archive, as numpy.savez writes one; other images belong in a folder")
            with np.load(path, allow_pickle=False) as file:
                missing = {"images", *(["labels"] if labelled else [])} - set(file.files)
                if missing:
                    held = ", ".join(map(repr, file.files)) or "none"
                    raise DfqvitError(
                        f"data '{path}' has no array {min(missing)!r}; it must hold 'images' and 'labels', and it has {held}"
                    )
                self.images = torch.from_numpy(file["images"])
                labels = file["labels"] if labelled else np.zeros(len(self.images), np.int64)
        except DfqvitError:
            raise
        except (OSError, ValueError, EOFError, TypeError) as error:
            raise DfqvitError(f"data '{path}' is not a readable .npz file: {error}") from error
        except Exception as error:  # zipfile.BadZipFile, zlib.error: numpy lets them through
            raise DfqvitError(f"data '{path}' is damaged: {error}") from error
        self.labels = read_labels(path, labels, num_classes)
        self.assumed = "the labels are the model's classes, counted from 0"
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or len(self.images) != len(self.labels):
            shape = f"{self.images.dtype} {tuple(self.images.shape)} with {len(self.labels)} labels"
            raise DfqvitError(f"data '{path}' holds images {shape}; they must be uint8 [n, C, H, W] with n labels")
        if self.images.shape[1] != preprocessing.input_size[0]:
            raise UsageError(
                f"data '{path}' has {self.images.shape[1]} channels; the model takes {preprocessing.input_size[0]}"
                + (
                    " (channels come before height and width: images.transpose(0, 3, 1, 2))"
                    if self.images.shape[3] == preprocessing.input_size[0]
                    else ""
                )
            )
        if not len(self.images):
            raise UsageError(f"data '{path}' holds no images")
        if 0 in self.images.shape:
            height, width = self.images.shape[2:]
            raise UsageError(f"data '{path}' has images of {width} x {height} pixels; they must have one at least")
        greatest = int(self.images.max())
        if greatest == 1:
            raise UsageError(f"data '{path}' has images of 0 and 1 alone; their pixels must lie from 0 to 255")
        if greatest < _DARK:
            warnings.warn(
                f"data '{path}' has pixels up to {greatest} only; they are taken as of 255, and so for dark",
                stacklevel=3,
            )
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: int) -> Item:
        """uint8 pixels; float32 in [0, 1] where they had to be resized."""
        image, label = self.images[index], int(self.labels[index])
        size, mode = self.preprocessing.input_size[1:], self.preprocessing.interpolation
        if image.shape[1:] == size:
            return image, label
        options: dict[str, Any] = {} if mode == "nearest" else {"antialias": True}
        resized = F.interpolate(image[None].float() / 255, size, mode=mode, **options)
        return resized[0].clamp(0, 1), label


def open_images(
    path: str | Path,
    preprocessing: Preprocessing,
    classes: str | Path | None = None,
    unreadable: str = "refuse",
    *,
    num_classes: int | None = None,
    labelled: bool = True,
) -> FolderImages | ArrayImages:
    """The images at `path`, a folder of classes or an .npz file; see `FolderImages` for the arguments.

    Raises:
        UsageError: there is nothing of the kind at `path`, or it does not fit the model.
        DfqvitError: a file cannot be read.
    """
    path = Path(path)
    if unreadable not in ("refuse", "skip"):
        raise UsageError(f"unreadable was '{unreadable}'; it may be 'refuse' or 'skip'")
    if path.is_dir():
        names = None if classes is None else read_classes(Path(classes))
        return FolderImages(path, preprocessing, names, unreadable, num_classes, labelled)
    if not path.exists():
        raise UsageError(f"data was '{path}'; there is no such file or folder")
    if classes is not None:
        raise UsageError(f"classes was '{classes}'; it is for a folder of classes, and '{path}' has labels of its own")
    if unreadable == "skip":
        raise UsageError(f"unreadable was 'skip'; it is for a folder of images, and '{path}' is one file")
    return ArrayImages(path, preprocessing, num_classes, labelled)


def spread_images(images: Dataset, count: int) -> torch.Tensor:
    """`count` images spread evenly over the data set, [count, C, H, W]: calibration on real data."""
    total = len(images)  # type: ignore[arg-type]
    if count > total:
        raise UsageError(f"{count} images were asked for; the data has {total}")
    return torch.stack([images[index * total // count][0] for index in range(count)])
