"""The loader that feeds a device with labelled images, which other processes read."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from ..errors import DfqvitError
from ..synthesis.interruption import uninterrupted
from .data import ArrayImages, Images, Item

_MOST_PLAIN = 0.1  # of the images
_KILLED = "data: a process that reads images was killed; fewer --workers need less memory"


class Batches:
    """(images [n, C, H, W], labels [n]) on `device`, in the data set's own order; every pass over it reads anew.

    Pixels are decoded in `workers` processes while the model computes, travel as uint8 (a quarter of the bytes), and are
    normalised on the device: the same bits as `images[i]` gives. None picks the number of processes. Warns after a pass in which
    images were of one colour.

    Raises, when a pass comes to it:
        DfqvitError: a file cannot be decoded, by its name (left out with a warning where the images say
            `unreadable="skip"`); a worker process was killed.
    """

    def __init__(
        self,
        images: Images | Subset,
        batch_size: int = 64,
        workers: int | None = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.tasks = _Tasks(images)
        self.preprocessing = self.tasks.images.preprocessing
        self.workers = default_workers(self.tasks.images, self.device) if workers is None else workers
        pin = self.device.type == "cuda"
        self.loader = DataLoader(
            self.tasks,
            batch_size=batch_size,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=pin,
            worker_init_fn=leave_to_parent,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        plain = total = 0
        for pixels, labels, errors in read_by(self.loader):
            for error in errors:
                if self.tasks.images.unreadable == "refuse":
                    raise DfqvitError(error)
                warnings.warn(f"{error}, skipped", stacklevel=2)
            if len(labels):
                rows = pixels.flatten(2)
                plain += int((rows == rows[..., :1]).flatten(1).all(1).sum())
                total += len(labels)
                pixels = pixels.to(self.device, non_blocking=True)
                yield self.preprocessing.normalise(pixels), labels.to(self.device, non_blocking=True)
        if plain > _MOST_PLAIN * total:
            warnings.warn(
                f"data: {plain} of {total} images are of one colour, as those are whose picture is in what was left out of them "
                "(transparency, bits): they tell nothing",
                stacklevel=2,
            )


def read_by(loader: DataLoader) -> Iterator[Any]:
    """What the loader reads; DfqvitError where one of its processes was killed.

    A signal waits until these are made: of what a handler raises while one is half made, Python prints a part, "ignored".
    """
    try:
        with uninterrupted():
            found = iter(loader)
        yield from found
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DfqvitError(_KILLED) from error


def leave_to_parent(_: int) -> None:
    """Of a worker: signals that end the whole group come to it too, and its parent ends it."""
    for number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
        signal.signal(number, signal.SIG_IGN)


class _Tasks(Dataset):
    """What a worker does: pixels and label, or the text of the error, which would lose its form on the way as an exception."""

    def __init__(self, images: Images | Subset) -> None:
        parts = isinstance(images, Subset)
        self.images: Images = images.dataset if parts else images  # type: ignore[assignment,union-attr]
        self.indices: Sequence[int] = images.indices if parts else range(len(images))  # type: ignore[union-attr]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Item | str:
        try:
            return self.images.pixels(self.indices[place])
        except DfqvitError as error:
            return str(error)


def _collate(found: list[Item | str]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    good = [item for item in found if not isinstance(item, str)]
    pixels = torch.stack([item[0] for item in good]) if good else torch.empty(0)
    labels = torch.tensor([item[1] for item in good], dtype=torch.long)
    return pixels, labels, [item for item in found if isinstance(item, str)]


def default_workers(images: Images, device: torch.device) -> int:
    """Processes that read images: none for an .npz; for a GPU one a core, at most 8; beside a model on the CPU, one."""
    if isinstance(images, ArrayImages):
        return 0
    return min(8, os.cpu_count() or 1) if device.type == "cuda" else 1
