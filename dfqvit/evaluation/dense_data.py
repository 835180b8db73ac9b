"""Images with boxes or masks: COCO's JSON, PNG masks, and the scenes of the embedded models."""

from __future__ import annotations

import abc
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..calibration.given import eight_bits
from ..errors import DfqvitError, UsageError
from ..models import Preprocessing
from .batches import leave_to_parent, read_by
from .data import UNREADABLE
from .dense import Target, check_task
from .scenes import Scenes

ANNOTATIONS, IMAGES, MASKS = "annotations.json", "images", "masks"
_SLACK = 1.0  # pixels that a box may reach out of its image
_PIL = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class DenseImages(abc.ABC):
    """Images [C, H, W] as the network expects them, stretched to its input size, each with a target.

    Attributes:
        categories: labels are places in a list of so many, counted from 0; None where nothing says so.
    """

    preprocessing: Preprocessing
    categories: int | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        """(image, target)."""

    def batches(self, size: int, workers: int = 0) -> Iterator[tuple[torch.Tensor, list[Target]]]:
        """(images [n, C, H, W], targets) of up to `size` each, in order, read in `workers` processes.

        Raises:
            DfqvitError: a process that reads was killed, or a file cannot be read.
            UsageError: what was read does not fit.
        """
        loader = DataLoader(
            _Tasks(self), batch_size=size, num_workers=workers, collate_fn=list, worker_init_fn=leave_to_parent
        )
        for found in read_by(loader):
            wrong = next((each for each in found if isinstance(each, (UsageError, DfqvitError))), None)
            if wrong is not None:
                raise wrong
            yield torch.stack([image for image, _ in found]), [target for _, target in found]

    def _open(self, path: Path) -> tuple[torch.Tensor, tuple[int, int]]:
        """(the image, its height and width in the file)."""
        channels, height, width = self.preprocessing.input_size
        mode = {1: "L", 3: "RGB"}.get(channels)
        if mode is None:
            raise UsageError(f"the network takes {channels} channels; image files have 1 or 3")
        try:
            with Image.open(path) as file:
                size = (file.height, file.width)
                image = eight_bits(file).convert(mode)
                if size != (height, width):
                    image = image.resize((width, height), _PIL[self.preprocessing.interpolation])
                pixels = np.array(image)
        except FileNotFoundError as error:
            raise DfqvitError(f"data: '{path}' is missing; the annotations name it") from error
        except UNREADABLE as error:
            raise DfqvitError(f"data: '{path}' is not a readable image ({error})") from error
        planes = torch.from_numpy(pixels).view(height, width, channels).permute(2, 0, 1)
        return self.preprocessing.normalise(planes), size


class _Tasks(Dataset):
    """What a process does: an item, or the error, which would lose its form on the way as an exception."""

    def __init__(self, images: DenseImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target] | UsageError | DfqvitError:
        try:
            return self.images[index]
        except (UsageError, DfqvitError) as error:
            return error


class CocoImages(DenseImages):
    """Boxes of `root/annotations.json`, COCO's format, on the images in `root/images`.

    Args:
        root: the folder.
        preprocessing: size, mean, std, interpolation.
        label_ids: labels are the ids of the categories; else category k, by ascending ids, is class k, counted from 0.
    """

    def __init__(self, root: Path, preprocessing: Preprocessing, label_ids: bool = False) -> None:
        self.root, self.preprocessing = root, preprocessing
        path = root / ANNOTATIONS
        if not path.is_file():
            raise UsageError(f"data was '{root}'; for detection it must hold {ANNOTATIONS} and a folder {IMAGES}")
        try:
            found = json.loads(path.read_bytes())  # in any of Unicode's encodings
            self.images = list(found["images"])
            _check_once(path, "categories", found["categories"])
            _check_once(path, "images", self.images)
            _check_once(path, "annotations", [each for each in found["annotations"] if "id" in each])
            order = sorted(_whole_id(path, each["id"]) for each in found["categories"])
            labels = {number: number if label_ids else place for place, number in enumerate(order)}
            self.targets: dict[Any, list[tuple[list[float], int, int]]] = {each["id"]: [] for each in self.images}
            sizes = {each["id"]: (each["width"], each["height"], each["file_name"]) for each in self.images}
            for each in found["annotations"]:
                _check_annotation(path, each, self.targets, labels)
                left, top, width, height = each["bbox"]
                _check_box(path, each, sizes[each["image_id"]])
                box = [left, top, left + width, top + height]
                self.targets[each["image_id"]].append((box, labels[each["category_id"]], int(each.get("iscrowd", 0))))
            _check_pixels(path, [each["bbox"] for each in found["annotations"]])
            self.categories = None if label_ids else len(order)
        except (LookupError, TypeError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise DfqvitError(f"data: '{path}' is not COCO's format ({type(error).__name__}: {error})") from error

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        entry = self.images[index]
        image, (height, width) = self._open(self.root / IMAGES / entry["file_name"])
        if (height, width) != (entry["height"], entry["width"]):
            raise UsageError(
                f"data: '{entry['file_name']}' is {width} x {height} pixels; {ANNOTATIONS} says "
                f"{entry['width']} x {entry['height']}"
            )
        rows = self.targets[entry["id"]]
        _, wanted_height, wanted_width = self.preprocessing.input_size
        factor = torch.tensor([wanted_width / width, wanted_height / height] * 2)
        return image, {
            "boxes": torch.tensor([row[0] for row in rows], dtype=torch.float32).view(-1, 4) * factor,
            "labels": torch.tensor([row[1] for row in rows], dtype=torch.int64),
            "iscrowd": torch.tensor([row[2] for row in rows], dtype=torch.int64),
        }


class MaskImages(DenseImages):
    """Images of `root/images` with a mask of the same name in `root/masks`: a PNG whose pixels are classes, 255 counts not.

    Of a palette the indices are the classes, whatever its colours are.
    """

    def __init__(self, root: Path, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        if not (root / IMAGES).is_dir() or not (root / MASKS).is_dir():
            raise UsageError(f"data was '{root}'; for segmentation it must hold folders {IMAGES} and {MASKS}")
        self.paths = sorted(path for path in (root / IMAGES).iterdir() if not path.name.startswith("."))
        self.masks = [root / MASKS / f"{path.stem}.png" for path in self.paths]
        for path, mask in zip(self.paths, self.masks, strict=True):
            if not mask.is_file():
                raise DfqvitError(f"data: '{path}' has no mask '{mask}'")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        image, size = self._open(self.paths[index])
        try:
            with Image.open(self.masks[index]) as file:
                if file.mode not in ("L", "P"):
                    raise UsageError(
                        f"data: '{self.masks[index]}' is a PNG of mode {file.mode}; masks are of mode L or P"
                    )
                mask = torch.from_numpy(np.array(file))
                if file.mode == "P":
                    _check_palette(self.masks[index], mask, file.getpalette() or [])
        except UsageError:
            raise
        except UNREADABLE as error:
            raise DfqvitError(f"data: '{self.masks[index]}' is not a readable image ({error})") from error
        if tuple(mask.shape) != size:
            raise UsageError(
                f"data: '{self.masks[index]}' is {mask.shape[1]} x {mask.shape[0]} pixels and its image {size[1]} x {size[0]}; "
                "both must be of one size"
            )
        return image, {"mask": mask}


class SceneImages(DenseImages):
    """Scenes in memory."""

    def __init__(self, scenes: Scenes, preprocessing: Preprocessing, task: str) -> None:
        check_task(task)
        self.scenes, self.preprocessing, self.task = scenes, preprocessing, task

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        scenes = self.scenes
        image = self.preprocessing.normalise(scenes.images[index])
        if self.task == "segmentation":
            return image, {"mask": scenes.masks[index]}
        return image, {"boxes": scenes.boxes[index], "labels": scenes.labels[index]}


def _check_palette(path: Path, mask: torch.Tensor, palette: list[int]) -> None:
    """UsageError where a palette looks like greys that a program for smaller files has numbered anew.

    Black and white for 0 and 1 is a usual palette of two classes.
    """
    used, reds = mask.unique().tolist(), palette[::3]
    if reds != palette[1::3] or reds != palette[2::3] or used[-1] >= len(reds):
        return  # it has colours
    greys = [reds[index] for index in used]
    if greys != used and not set(greys) <= {0, 255}:
        index, grey = next((i, g) for i, g in zip(used, greys, strict=True) if i != g)
        raise UsageError(
            f"data: '{path}' has a palette of greys in which entry {index} is the grey {grey}, so it cannot be known which of the "
            "two is the class; save it without a palette (mode L), with the classes as its values"
        )


def open_dense(root: Path, preprocessing: Preprocessing, task: str, label_ids: bool = False) -> DenseImages:
    """What is in the folder `root`; see `CocoImages` and `MaskImages`.

    Raises:
        UsageError: an unknown task, nothing of the kind at `root`, a box outside its image, a mask of another size.
        DfqvitError: a file cannot be read.
    """
    check_task(task)
    if not root.is_dir():
        raise UsageError(f"data was '{root}'; for {task} it must be a folder")
    return CocoImages(root, preprocessing, label_ids) if task == "detection" else MaskImages(root, preprocessing)


def _whole_id(path: Path, value: Any) -> int:
    """The id of a category, which orders them and may be a label."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) < 1 << 31 or value != int(value):
        raise UsageError(f"data: '{path}' has a category of the id {value!r}; ids are whole numbers of 32 bits")
    return int(value)


def _check_once(path: Path, kind: str, entries: list[dict[str, Any]]) -> None:
    """Every id, and every image's file, is named once; a file's name is text."""
    for key in ("id", "file_name") if kind == "images" else ("id",):
        seen = set()
        for each in entries:
            value = each[key]
            if key == "file_name" and not isinstance(value, str):
                raise UsageError(f"data: '{path}' has an image whose file_name is {value!r}; it must be text")
            if value in seen:
                raise UsageError(f"data: '{path}' has {kind} with the {key} {value!r} twice; each may be there once")
            seen.add(value)


def _check_pixels(path: Path, boxes: list[list[float]]) -> None:
    if boxes and all(width <= 1 and height <= 1 for _, _, width, height in boxes):
        raise UsageError(
            f"data: '{path}' has no box of more than 1 pixel; the boxes look like shares of the image, and they must be in pixels"
        )


def _check_annotation(path: Path, each: dict[str, Any], images: Collection[Any], categories: Collection[Any]) -> None:
    """It is of an image and a category that the file names, and of a crowd or not."""
    for key, known, kind in (("image_id", images, "images"), ("category_id", categories, "categories")):
        if each[key] not in known:
            raise UsageError(f"data: '{path}' has an annotation of {key} {each[key]!r}, which is none of its {kind}")
    if each.get("iscrowd", 0) not in (0, 1):
        raise UsageError(f"data: '{path}' has an annotation whose iscrowd is {each['iscrowd']!r}; it must be 0 or 1")


def _check_box(path: Path, annotation: dict[str, Any], image: tuple[int, int, str]) -> None:
    (left, top, width, height), (wide, high, name) = annotation["bbox"], image
    fits = left >= -_SLACK and top >= -_SLACK and left + width <= wide + _SLACK and top + height <= high + _SLACK
    if not (fits and width > 0 and height > 0):
        raise UsageError(
            f"data: '{path}' has a box {annotation['bbox']} on '{name}', which is {wide} x {high} pixels; boxes are "
            "[left, top, width, height] inside their image, of a width and a height above 0"
        )
