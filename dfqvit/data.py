"""Labelled images to evaluate on: a folder of classes, or an .npz file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset

from .errors import DfqvitError, UsageError
from .models import Preprocessing

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class FolderImages(Dataset):
    """Images in `root/<class>/*`, through timm's evaluation transform; items are (image [C, H, W], label).

    Args:
        root: the folder.
        preprocessing: size, interpolation, crop, mean, std.
        classes: line k is the folder name of class k; by default the sorted folder names are classes 0, 1, ...
        unreadable: "refuse" raises DfqvitError on a file that is no image, "skip" leaves it out with a warning.
    """

    def __init__(
        self, root: Path, preprocessing: Preprocessing, classes: Sequence[str] | None = None, unreadable: str = "refuse"
    ) -> None:
        folders = sorted(path.name for path in root.iterdir() if path.is_dir())
        if not folders:
            raise UsageError(f"data was '{root}'; it has no folders of classes")
        order = {name: index for index, name in enumerate(classes if classes is not None else folders)}
        strangers = [name for name in folders if name not in order]
        if strangers:
            raise UsageError(f"data '{root}' has the folder '{strangers[0]}', which is no class of the classes file")
        self.items: list[tuple[Path, int]] = []
        for folder in folders:
            for path in sorted((root / folder).iterdir()):
                if path.suffix.lower() in _SUFFIXES and self._readable(path, unreadable):
                    self.items.append((path, order[folder]))
        if not self.items:
            raise UsageError(f"data was '{root}'; it has no images ({', '.join(_SUFFIXES)})")
        self.mode = {1: "L", 3: "RGB"}.get(preprocessing.input_size[0])
        if self.mode is None:
            raise UsageError(
                f"the model takes {preprocessing.input_size[0]} channels; image files have 1 or 3, use an .npz"
            )
        self.transform = create_transform(
            input_size=preprocessing.input_size,
            is_training=False,
            interpolation=preprocessing.interpolation,
            mean=preprocessing.mean,
            std=preprocessing.std,
            crop_pct=preprocessing.crop_pct,
            crop_mode=preprocessing.crop_mode,
        )

    @staticmethod
    def _readable(path: Path, unreadable: str) -> bool:
        try:
            with Image.open(path) as image:
                image.verify()
            return True
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            if unreadable == "refuse":
                raise DfqvitError(
                    f"data: '{path}' is not a readable image; remove it or give --unreadable skip"
                ) from error
            warnings.warn(f"data: '{path}' is not a readable image, skipped", stacklevel=2)
            return False

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.items[index]
        try:
            with Image.open(path) as image:
                return self.transform(image.convert(self.mode)), label
        except OSError as error:  # a file whose header is good and whose body is cut off
            raise DfqvitError(f"data: '{path}' is not a readable image ({error})") from error


class ArrayImages(Dataset):
    """Images of an .npz file: `images` uint8 [n, C, H, W] and `labels` [n]; items are (image [C, H, W], label).

    The images are taken as framed already: resized to the model's input (antialiased, clamped to [0, 1]) and not cropped.
    """

    def __init__(self, path: Path, preprocessing: Preprocessing) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                self.images, self.labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()
        except KeyError as error:
            raise DfqvitError(f"data '{path}' has no array {error}; it must hold 'images' and 'labels'") from error
        except (OSError, ValueError, EOFError, TypeError) as error:
            raise DfqvitError(f"data '{path}' is not a readable .npz file: {error}") from error
        except Exception as error:  # zipfile.BadZipFile, zlib.error: numpy lets them through
            raise DfqvitError(f"data '{path}' is damaged: {error}") from error
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or len(self.images) != len(self.labels):
            shape = f"{self.images.dtype} {tuple(self.images.shape)} with {len(self.labels)} labels"
            raise DfqvitError(f"data '{path}' holds images {shape}; they must be uint8 [n, C, H, W] with n labels")
        if self.images.shape[1] != preprocessing.input_size[0]:
            raise UsageError(
                f"data '{path}' has {self.images.shape[1]} channels; the model takes {preprocessing.input_size[0]}"
            )
        if not len(self.images):
            raise UsageError(f"data '{path}' holds no images")
        self.size = preprocessing.input_size[1:]
        self.interpolation = preprocessing.interpolation
        self.mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
        self.std = torch.tensor(preprocessing.std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index].float() / 255
        if image.shape[1:] != self.size:
            options: dict[str, Any] = {} if self.interpolation == "nearest" else {"antialias": True}
            image = F.interpolate(image[None], self.size, mode=self.interpolation, **options)[0].clamp(0, 1)
        return (image - self.mean) / self.std, int(self.labels[index])


def open_images(
    path: str | Path, preprocessing: Preprocessing, classes: str | Path | None = None, unreadable: str = "refuse"
) -> FolderImages | ArrayImages:
    """The images at `path`, a folder of classes or an .npz file.

    Raises:
        UsageError: there is nothing of the kind at `path`, or it does not fit the model.
        DfqvitError: a file cannot be read.
    """
    path = Path(path)
    if unreadable not in ("refuse", "skip"):
        raise UsageError(f"unreadable was '{unreadable}'; it may be 'refuse' or 'skip'")
    if path.is_dir():
        names = None
        if classes is not None:
            if not Path(classes).is_file():
                raise UsageError(f"classes was '{classes}'; there is no such file")
            names = Path(classes).read_text().split("\n")
            names = [line.split()[0] for line in names if line.strip()]
        return FolderImages(path, preprocessing, names, unreadable)
    if not path.exists():
        raise UsageError(f"data was '{path}'; there is no such file or folder")
    return ArrayImages(path, preprocessing)


def batches(images: Dataset, batch_size: int = 64, workers: int = 0) -> DataLoader:
    """A loader in the data set's own order."""
    return DataLoader(images, batch_size=batch_size, shuffle=False, num_workers=workers)


def spread_images(images: Dataset, count: int) -> torch.Tensor:
    """`count` images spread evenly over the data set, [count, C, H, W]: calibration on real data."""
    total = len(images)  # type: ignore[arg-type]
    if count > total:
        raise UsageError(f"{count} images were asked for; the data has {total}")
    return torch.stack([images[index * total // count][0] for index in range(count)])
