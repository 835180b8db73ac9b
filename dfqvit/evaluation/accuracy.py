"""How good a model is on labelled images, alone or against another."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..calibration.given import judge
from ..distributed import reduce_
from ..errors import DfqvitError, UsageError
from ..models import Preprocessing
from ..models.frame import evaluating
from ..models.preprocessing import config_of
from ..models.spec import class_count
from .batches import Batches
from .labels import REMEDY, Confusion


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent, over `images` images; the comparison is None when there was no other model."""

    images: int
    top1: float
    top5: float
    images_per_second: float  # of the model alone
    overall_images_per_second: float  # with reading the images, and with the other model
    waiting: float  # percent of the time spent waiting for images
    against_top1: float | None = None
    against_top5: float | None = None
    agreement: float | None = None  # percent of images on which both models have the same first class
    logit_error: float | None = None  # mean absolute difference of the logits

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    against: nn.Module | None = None,
    report: Callable[[int], object] | None = None,
) -> Evaluation:
    """Runs every batch through `model`, and through `against` if given; in a torchrun the result is that of all processes.

    Args:
        model: images [n, C, H, W] to logits [n, classes].
        batches: (images, labels) pairs, on any device; `Batches` reads ahead in other processes.
        against: the model to compare with, usually the float one.
        report: called with the number of images after every batch.

    Warns where the predictions show that the labels are of another order than the model's, or counted from 1, and where the first
    images are hardly normalised as the model expects.

    Raises:
        UsageError: a model gives no logits [n, classes], or has no classifier; labels are no whole numbers [n], one for each
            image; a label is outside the model's classes; `against` has others; there were no images.
        DfqvitError: logits hold NaN or Inf.
    """
    with contextlib.ExitStack() as stack:
        for name, each in (("model", model), ("against", against)):
            if each is not None:
                if class_count(each) == 0:
                    raise UsageError(f"{name} has no classifier; evaluate counts predictions of classes")
                stack.enter_context(evaluating(each))
        return _evaluate(model, batches, against, report)


def _evaluate(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    against: nn.Module | None,
    report: Callable[[int], object] | None,
) -> Evaluation:
    device = next(iter([*model.parameters(), *model.buffers()])).device
    hits: dict[str, float] = {"top1": 0, "top5": 0, "against_top1": 0, "against_top5": 0, "agreement": 0}
    total, seconds, waited, error, values = 0, 0.0, 0.0, 0.0, 0
    confusion = Confusion()
    began = last = time.perf_counter()
    for images, labels in batches:
        waited += time.perf_counter() - last
        if not total and not isinstance(batches, Batches):
            _doubt_normalised(model, images)
        labels = _whole(labels, len(images))
        images, labels = images.to(device), labels.to(device)
        start = time.perf_counter()
        logits = logits_of(model, images, "model")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds += time.perf_counter() - start
        total += len(labels)
        _check_labels(labels, logits.shape[1])
        confusion.add(logits, labels)
        hits["top1"] += count_hits(logits, labels, 1)
        hits["top5"] += count_hits(logits, labels, 5)
        if against is not None:
            others = logits_of(against, images, "against")
            if others.shape != logits.shape:
                raise UsageError(
                    f"against gives {others.shape[1]} classes and the model {logits.shape[1]}; they must be of the same ones"
                )
            hits["against_top1"] += count_hits(others, labels, 1)
            hits["against_top5"] += count_hits(others, labels, 5)
            hits["agreement"] += int((logits.argmax(1) == others.argmax(1)).sum())
            error += float((logits - others).abs().double().sum())
            values += logits.numel()
        if report is not None:
            report(len(labels))
        last = time.perf_counter()
    overall = max(time.perf_counter() - began, 1e-9)
    sums = reduce_(torch.tensor([*hits.values(), total, error, values], dtype=torch.float64)).tolist()
    hits = dict(zip(hits, sums, strict=False))
    total, error, values = int(sums[-3]), sums[-2], int(sums[-1])
    if not total:
        raise UsageError("batches held no images; they must hold one at least")
    seconds, overall = reduce_(torch.tensor([seconds, overall], dtype=torch.float64), "max").tolist()
    remedy = batches.tasks.images.remedy if isinstance(batches, Batches) else REMEDY
    if doubt := confusion.doubt(remedy=remedy):
        warnings.warn(doubt, stacklevel=3)
    percent = {key: 100.0 * count / total for key, count in hits.items()}
    compared = against is not None
    return Evaluation(
        images=total,
        top1=percent["top1"],
        top5=percent["top5"],
        images_per_second=total / seconds if seconds else 0.0,
        overall_images_per_second=total / overall,
        waiting=100.0 * waited / overall,
        against_top1=percent["against_top1"] if compared else None,
        against_top5=percent["against_top5"] if compared else None,
        agreement=percent["agreement"] if compared else None,
        logit_error=error / max(values, 1) if compared else None,
    )


def _doubt_normalised(model: nn.Module, images: Any) -> None:
    """Warns where the images are hardly normalised, as far as the model says what it expects.

    Those that `data` opens are normalised as they were asked for.
    """
    if config_of(model) is None or not isinstance(images, torch.Tensor) or not images.is_floating_point():
        return
    preprocessing = Preprocessing.of(model)
    if images.dim() != 4 or not len(images) or images.shape[1] != preprocessing.input_size[0]:
        return
    if said := "".join(judge(images.float(), preprocessing)):
        how = "Preprocessing.of(model).normalise(images) of dfqvit.models takes uint8, or floats from 0 to 1"
        warnings.warn(f"batches {said}: {how}", stacklevel=4)


def logits_of(model: nn.Module, images: torch.Tensor, name: str) -> torch.Tensor:
    """[n, classes] in float32; UsageError where the model gives something else, DfqvitError where that is not finite."""
    found = model(images)
    if not isinstance(found, torch.Tensor) or found.dim() != 2 or len(found) != len(images):
        what = list(found.shape) if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
        raise UsageError(f"{name} gave {what} for {len(images)} images; it must give logits [{len(images)}, classes]")
    if not bool(torch.isfinite(found).all()):
        raise DfqvitError(f"{name} gave logits that hold NaN or Inf, of which no class is the first")
    return found.float()


def _whole(labels: Any, images: int) -> torch.Tensor:
    """The labels of a batch in int64; UsageError unless they are whole numbers [n], one for each image."""
    wanted = f"they must be a tensor of whole numbers [{images}], one for each image"
    if not isinstance(labels, torch.Tensor):
        raise UsageError(f"labels were a {type(labels).__name__}; {wanted}")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex() or labels.shape != (images,):
        dtype = str(labels.dtype).removeprefix("torch.")
        raise UsageError(f"labels were {dtype} of shape {tuple(labels.shape)}; {wanted}")
    return labels.long()


def _check_labels(labels: torch.Tensor, classes: int) -> None:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UsageError(
            f"labels were from {int(labels.min())} to {int(labels.max())}; the model's classes are 0 to {classes - 1}"
        )


def count_hits(logits: torch.Tensor, labels: torch.Tensor, k: int) -> int:
    """How many rows of logits [n, classes] have their label among the k first; of equal logits the lower class comes first."""
    own = logits.gather(1, labels[:, None])
    lower = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return int((((logits > own) | ((logits == own) & lower)).sum(dim=1) < k).sum())
