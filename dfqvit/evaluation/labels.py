"""Which class a folder or a label means: what can be known is used and said, what cannot be the model's is refused."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.utils.misc import natural_key

from ..errors import DfqvitError, UsageError

_WNID = re.compile(r"n\d{8}")
_NO_CLASSES = ("__MACOSX",)  # folders that archives and notebooks leave, beside hidden ones
_SPLITS = ("train", "val", "valid", "validation", "test", "training", "testing")
_MOST_TABLE = 2048  # classes of a table of confusions
_LEAST = 20  # images, before labels are doubted
REMEDY = "labels must be the model's classes, counted from 0"


def class_folders(root: Path) -> list[str]:
    """The names of the folders in `root` that may be classes."""
    found = (path.name for path in root.iterdir() if path.is_dir())
    return sorted(name for name in found if not name.startswith(".") and name not in _NO_CLASSES)


def order_of(
    root: Path, folders: Sequence[str], names: Sequence[str] | None, num_classes: int | None
) -> tuple[dict[str, int], str]:
    """({folder: class}, what that was taken from, for people).

    Args:
        root: the folder of the data, for messages.
        folders: the names of its folders.
        names: of the classes in their order, from --classes; a line may go on after a name without blanks.
        num_classes: of the model; None does not check.

    Raises:
        UsageError: the folders cannot be the model's classes.
    """
    if names is not None:
        return _by_file(root, folders, names, num_classes)
    inner = [name for name in folders if name.lower() in _SPLITS]
    wnids = all(_WNID.fullmatch(name) for name in folders)
    subset = infer_imagenet_subset({"num_classes": num_classes}) if wnids and num_classes else None
    if subset:
        known = {name: index for index, name in enumerate(ImageNetInfo(subset).label_names())}
        if all(name in known for name in folders):
            return {name: known[name] for name in folders}, f"the folders are WordNet ids, in the order of {subset}"
    if num_classes is not None and len(folders) != num_classes:
        hint = (
            f"give one of its folders, such as '{root / inner[0]}'"
            if inner
            else ("give --classes FILE, whose line k is the folder of the model's class k")
        )
        raise UsageError(
            f"data '{root}' has {len(folders)} folders and the model {num_classes} classes, so which is which cannot be known; "
            f"{hint}"
        )
    if len(inner) == len(folders):
        raise UsageError(
            f"data '{root}' has the folders {', '.join(folders)}, which look like parts of a data set and not like classes; give "
            f"one of them, such as '{root / inner[0]}', or --classes FILE where they are the classes"
        )
    ordered = sorted(folders, key=natural_key)
    if ordered != sorted(folders):
        warnings.warn(
            f"data '{root}': its folders were taken in timm's order, numbers by their value and small letters as great ones "
            f"({', '.join(ordered[:3])}, ...); torchvision sorts them as texts: where the model was trained so, give --classes",
            stacklevel=3,
        )
    return {name: index for index, name in enumerate(ordered)}, (
        f"the {len(folders)} folders in order are the classes 0 to {len(folders) - 1}"
    )


def _by_file(
    root: Path, folders: Sequence[str], names: Sequence[str], num_classes: int | None
) -> tuple[dict[str, int], str]:
    present = set(folders)
    _check_lines(names)
    first = {name: (name.split() or [""])[0] for name in names}
    short = [first[name] if first[name] in present and name not in present else name for name in names]
    _check_lines(short)
    _check_numbers(names, short)
    if num_classes is not None and len(short) != num_classes:
        raise UsageError(
            f"classes had {len(short)} lines and the model has {num_classes} classes; there must be a line for each"
        )
    order = {name: index for index, name in enumerate(short)}
    strangers = [name for name in folders if name not in order]
    if strangers:
        raise UsageError(f"data '{root}' has the folder '{strangers[0]}', which is no class of the classes file")
    return order, "the classes file says which folder is which class"


def _check_numbers(names: Sequence[str], short: Sequence[str]) -> None:
    """UsageError where a number stands after every name, from 0 or 1 on, and says another class than the line does."""
    numbers = [_number_of(name.removeprefix(first).split()) for name, first in zip(names, short, strict=True)]
    if -1 in numbers:
        return
    least = min(numbers)
    wanted = list(range(least, least + len(numbers)))
    if least in (0, 1) and sorted(numbers) == wanted and numbers != wanted:
        line = next(index for index, (one, other) in enumerate(zip(numbers, wanted, strict=True)) if one != other)
        raise UsageError(
            f"classes had '{names[line]}' in line {line + 1}, where class {wanted[line]} was due; line k is class k: sort the "
            "lines by their numbers"
        )


def _number_of(words: Sequence[str]) -> int:
    """The number that they begin with, or the only one among them ("= 3", "tabby cat 281"); -1 where there is none such."""
    numbers = [word for word in words if word.isdecimal()]
    return int(numbers[0]) if numbers and (len(numbers) == 1 or words[0] == numbers[0]) else -1


def _check_lines(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise UsageError(f"classes had '{twice}' in two lines; line k is the folder name of class k")


def read_classes(path: Path) -> list[str]:
    """The lines of a classes file; UsageError when there is none, it is no text, or a line between others is empty."""
    if not path.is_file():
        raise UsageError(f"classes was '{path}'; there is no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"classes was '{path}'; it must be a text file in UTF-8") from error
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if "" in lines:
        raise UsageError(
            f"classes was '{path}'; its line {lines.index('') + 1} is empty, and line k is the folder of class k"
        )
    return lines


def read_labels(path: Path, labels: np.ndarray, num_classes: int | None) -> torch.Tensor:
    """int64 [n] from the labels of an .npz file, checked against the model's classes.

    Raises:
        DfqvitError: they are no whole numbers, one for each image.
        UsageError: they cannot be the model's classes.
    """
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    with np.errstate(invalid="ignore"):  # of Inf, NaN and numbers that no int64 holds
        whole = labels.astype(np.int64) if labels.dtype.kind in "iuf" else None
    if labels.ndim != 1 or whole is None or (whole != labels).any():
        raise DfqvitError(f"data '{path}' holds labels {labels.dtype} {labels.shape}; they must be whole numbers [n]")
    found = torch.from_numpy(whole)
    if num_classes is None or not len(found):
        return found
    least, greatest = int(found.min()), int(found.max())
    if least >= 1 and greatest == num_classes:
        raise UsageError(
            f"data '{path}' has labels from {least} to {greatest}, counted from 1; the model's classes are 0 to {num_classes - 1}: "
            "subtract 1"
        )
    if least < 0 or greatest >= num_classes:
        raise UsageError(
            f"data '{path}' has labels from {least} to {greatest}; the model's classes are 0 to {num_classes - 1}"
        )
    return found


class Confusion:
    """Counts of (label, prediction), and whether they look like labels of another order than the model's."""

    def __init__(self) -> None:
        self.pairs: Counter[tuple[int, int]] = Counter()
        self.classes = 0

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """logits [n, classes] and labels [n] of a batch."""
        self.count(labels, logits.argmax(1), logits.shape[1])

    def count(self, labels: torch.Tensor, guesses: torch.Tensor, classes: int) -> None:
        """Labels [n] and predicted classes [n], all of them from 0 to classes - 1; `classes` may grow."""
        labels, guesses = labels.long().cpu(), guesses.long().cpu()
        self.classes = max(self.classes, classes)
        if not bool(((labels >= 0) & (labels < classes) & (guesses >= 0) & (guesses < classes)).all()):
            return
        if classes <= _MOST_TABLE:  # pixels are many
            table = (labels * classes + guesses).bincount()
            codes = table.nonzero()[:, 0]
            counts = table[codes]
        else:
            codes, counts = (labels * classes + guesses).unique(return_counts=True)
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
            self.pairs[divmod(code, classes)] += count

    def doubt(self, what: str = "images", remedy: str = REMEDY) -> str:
        """What is wrong with the labels of `what`, as far as the predictions show it; or ""."""
        total = self.pairs.total()
        if total < _LEAST or self.classes < 2:
            return ""
        right = self._moved(0)
        most: dict[int, tuple[int, int]] = {}  # {label: (how often, the class that is predicted most)}
        for (label, guess), count in sorted(self.pairs.items()):
            if count > most.get(label, (0, 0))[0]:
                most[label] = count, guess
        for step, said in ((-1, "counted from 1, or one too high"), (1, "one too low")):
            moved = self._moved(step)
            of_labels = sum(guess == label + step for label, (_, guess) in most.items()) / len(most)
            if moved > 0.5 and moved > 3 * right and of_labels > 0.5:  # else all went into one class
                return f"labels look {said}: {moved:.0%} of the predictions are the label {'-' if step < 0 else '+'} 1"
        share = sum(count for count, _ in most.values()) / total
        distinct = len({guess for _, guess in most.values()}) / len(most)
        if total / len(most) >= 4 and distinct > 0.7 and share > 0.5 and share > 2 * right + 0.1:
            return (
                f"the order of the classes looks wrong: {share:.0%} of the {what} fall into one class for each label, mostly "
                f"another than the label; {remedy}"
            )
        if not right:
            return (
                f"not one of {total} {what} falls into the class of its label, as if these counted other classes or the model "
                f"knew none; {remedy}"
            )
        return ""

    def _moved(self, step: int) -> float:
        """The share of the predictions that are the label and `step`."""
        return sum(count for (label, guess), count in self.pairs.items() if guess == label + step) / self.pairs.total()
