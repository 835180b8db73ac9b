"""How good a network is at detection or segmentation: average precision and mean intersection over union, by torchmetrics."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_iou

from ..errors import UsageError, expect_one_of, is_whole
from ..models.frame import evaluating
from .labels import Confusion

TASKS = ("detection", "segmentation")
IGNORED = 255  # value of mask pixels that count for nothing
_FIELDS = ("boxes", "scores", "labels")
# COCO's, in float64 as its own code has them; torchmetrics takes them from float32, and recalls that lie on one count elsewhere.
_OVERLAPS, _RECALLS = np.linspace(0.5, 0.95, 10).tolist(), np.linspace(0, 1, 101).tolist()
_MOST_TURNED = 0.1  # of the detected boxes
_SAME = 0.5  # intersection over union of a box and what was detected of it
_REMEDY = "the data must name all of the network's classes in its order, or their ids must be its labels (--label-ids)"
Target = dict[str, torch.Tensor]  # detection: boxes [n, 4], labels [n]; segmentation: mask [H, W]


@dataclass(frozen=True)
class DenseEvaluation:
    """Figures in percent, over `images` images.

    Attributes:
        images: how many.
        figures: detection: "mAP@50" (IoU 0.5) and "mAP" (COCO's mean over IoU 0.50 to 0.95); segmentation: "mIoU" (mean over the
            classes that occur) and "pixel accuracy".
        against: the same of the other network, or None.
        images_per_second: of the network alone.
    """

    images: int
    figures: dict[str, float]
    against: dict[str, float] | None
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class DetectionMeter:
    """Gathers detections; COCO's evaluation, as torchmetrics runs it on pycocotools.

    Attributes:
        categories: labels are places in a list of so many; a detection of another label is refused. None does not check.
    """

    def __init__(self, categories: int | None = None) -> None:
        from torchmetrics.detection import MeanAveragePrecision

        self.metric = MeanAveragePrecision("xyxy", "bbox", _OVERLAPS, _RECALLS, backend="pycocotools")
        self.metric.warn_on_many_detections = False
        self.categories, self.confusion, self.boxes = categories, Confusion(), 0
        self.detected, self.turned, self.longest = 0, 0, 0.0  # boxes, those that end before they begin, pixels

    def add(self, found: list[Target], targets: list[Target]) -> None:
        """Of one batch."""
        found, targets = [_on_cpu(each) for each in found], [_on_cpu(each) for each in targets]
        for each, target in zip(found, targets, strict=True):
            self._check_labels(each["labels"])
            self._measure(each["boxes"])
            self._count(each, target)
        self.metric.update(found, targets)

    def _measure(self, boxes: torch.Tensor) -> None:
        sides = boxes[:, 2:] - boxes[:, :2]
        self.detected += len(boxes)
        self.turned += int((sides < 0).any(dim=1).sum())
        self.longest = max(self.longest, float(sides.max())) if len(boxes) else self.longest

    def _check_labels(self, labels: torch.Tensor) -> None:
        if (
            self.categories is not None
            and len(labels)
            and not 0 <= int(labels.min()) <= int(labels.max()) < self.categories
        ):
            wrong = int(labels.max()) if int(labels.max()) >= self.categories else int(labels.min())
            raise UsageError(
                f"the network gave the label {wrong}; the data has {self.categories} categories, with the labels 0 to "
                f"{self.categories - 1}; {_REMEDY}"
            )

    def _count(self, found: Target, target: Target) -> None:
        """The label of each box beside that of the best detection that covers it."""
        boxes, labels = target["boxes"], target["labels"]
        if "iscrowd" in target:
            boxes, labels = boxes[target["iscrowd"] == 0], labels[target["iscrowd"] == 0]
        self.boxes += len(boxes)
        if not len(boxes) or not len(found["boxes"]):
            return
        scores = torch.where(box_iou(boxes, found["boxes"]) > _SAME, found["scores"].float(), -1.0)
        best, at = scores.max(dim=1)
        labels, guesses = labels[best >= 0].long(), found["labels"][at[best >= 0]].long()
        if len(labels):
            self.confusion.count(labels, guesses, 1 + max(int(labels.max()), int(guesses.max())))

    def doubt(self) -> str:
        """What looks wrong with the detected boxes, or with the labels; or ""."""
        wanted = "boxes must be (left, top, right, bottom) in pixels of the input"
        if self.turned > _MOST_TURNED * self.detected:
            return (
                f"{self.turned} of {self.detected} detected boxes end left of where they begin or above it, as (left, top, width, "
                f"height) or a middle and a size do; {wanted}"
            )
        if self.detected and self.longest <= 1:
            return f"no detected box is longer than a pixel, as shares of the image are; {wanted}"
        return self.confusion.doubt("boxes", _REMEDY)

    def figures(self) -> dict[str, float]:
        """In percent; UsageError where there was no box to find."""
        if not self.boxes:
            raise UsageError("no box is counted: the data has none on its images, other than those of crowds")
        found = self.metric.compute()
        return {"mAP@50": 100 * max(float(found["map_50"]), 0.0), "mAP": 100 * max(float(found["map"]), 0.0)}


class SegmentationMeter:
    """Gathers pixels' classes; torchmetrics' Jaccard index over all of them."""

    def __init__(self) -> None:
        self.metrics: list[Any] = []
        self.confusion, self.counted, self.ignored, self.greatest = Confusion(), 0, 0, 0

    def add(self, logits: torch.Tensor, targets: list[Target]) -> None:
        """Of one batch; logits [B, classes, h, w] are resized to each mask."""
        if not self.metrics:
            from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

            self.metrics = [
                MulticlassJaccardIndex(logits.shape[1], average="macro", ignore_index=IGNORED),
                MulticlassAccuracy(logits.shape[1], average="micro", ignore_index=IGNORED),
            ]
        for each, target in zip(logits, targets, strict=True):
            mask = target["mask"].long().cpu()
            _check_mask(mask, logits.shape[1])
            sized = each[None].float().cpu()
            if sized.shape[2:] != mask.shape:
                sized = F.interpolate(sized, tuple(mask.shape), mode="bilinear", align_corners=False)
            guesses, counts = sized.argmax(1), mask[None] != IGNORED
            self.counted += int(counts.sum())
            self.ignored += int((~counts).sum())
            self.greatest = max(self.greatest, int(mask[None][counts].max())) if bool(counts.any()) else self.greatest
            self.confusion.count(mask[None][counts], guesses[counts], logits.shape[1])
            for metric in self.metrics:
                metric.update(guesses, mask[None])

    def doubt(self) -> str:
        """What looks wrong with the masks; or ""."""
        return self.confusion.doubt("pixels", "a mask's values must be the network's classes")

    def figures(self) -> dict[str, float]:
        """In percent; UsageError where no pixel counts."""
        if not self.counted:
            raise UsageError(f"no pixel is counted: every mask is {IGNORED} throughout, which counts for nothing")
        if self.ignored and self.greatest == 0:
            raise UsageError(
                f"the masks hold 0 and {IGNORED} alone, and {IGNORED} counts for nothing, so only the ground is left; where "
                f"{IGNORED} stands for an object, it must be the number of its class"
            )
        return {
            name: 100 * float(metric.compute())
            for name, metric in zip(("mIoU", "pixel accuracy"), self.metrics, strict=True)
        }


@torch.no_grad()
def evaluate_dense(
    network: nn.Module,
    batches: Iterable[tuple[torch.Tensor, list[Target]]],
    task: str,
    against: nn.Module | None = None,
    report: Callable[[int], object] | None = None,
    categories: int | None = None,
) -> DenseEvaluation:
    """Runs every batch through `network`, and through `against` if given.

    Args:
        network: of images [n, C, H, W]. For detection it has a method `detections(outputs)`, or gives itself, a dict for each
            image with `boxes` [k, 4] (left, top, right, bottom, in pixels of its input), `scores` [k] and `labels` [k]. For
            segmentation it gives logits [n, classes, h, w], or a dict with them as "out", as torchvision's do.
        batches: (images, a target for each) as `dense_data` opens them.
        task: "detection" or "segmentation".
        against: the network to compare with, usually the float one.
        report: called with the number of images after every batch.
        categories: how many the boxes' labels are of, counted from 0, as `dense_data` says; None does not check.

    Warns where the predictions show that the labels are of another order than the network's, or one off.

    Raises:
        UsageError: an unknown task, a network whose outputs are of another form, a package of the extra `dense` is missing; a
            network of other classes than `categories`; masks of which no pixel counts.
    """
    check_task(task)
    device = next(iter([*network.parameters(), *network.buffers()])).device
    _check_categories(network, task, categories)
    ours, theirs = meter(task, categories), None if against is None else meter(task, categories)
    count, seconds = 0, 0.0
    with evaluating(network):
        for images, targets in batches:
            images = images.to(device)
            start = time.perf_counter()
            outputs = network(images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds += time.perf_counter() - start
            ours.add(understood(network, outputs, task), targets)
            if against is not None and theirs is not None:
                with evaluating(against):
                    theirs.add(understood(against, against(images), task, "the network of against"), targets)
            count += len(images)
            if report is not None:
                report(len(images))
    if not count:
        raise UsageError("data held no images; it must hold one at least")
    figures, compared = ours.figures(), None if theirs is None else theirs.figures()
    if doubt := ours.doubt() or ("" if theirs is None else theirs.doubt()):
        warnings.warn(doubt, stacklevel=2)
    return DenseEvaluation(count, figures, compared, count / seconds if seconds else 0.0)


def meter(task: str, categories: int | None = None) -> DetectionMeter | SegmentationMeter:
    """An empty one; UsageError when the packages for it are missing."""
    for package in ("torchmetrics", "pycocotools") if task == "detection" else ("torchmetrics",):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"evaluation of {task} needs {package}; install dfqvit[dense]")
    return DetectionMeter(categories) if task == "detection" else SegmentationMeter()


def check_task(task: str) -> None:
    """UsageError unless `task` is one."""
    expect_one_of("task", task, TASKS)


def understood(network: nn.Module, outputs: Any, task: str, whose: str = "FILE's network") -> Any:
    """What `evaluate_dense` says of outputs: dicts of detections, or logits; UsageError, which names `whose`, where neither."""
    kind = type(network).__name__
    if task == "segmentation":
        logits = outputs.get("out") if isinstance(outputs, dict) else outputs
        if not isinstance(logits, torch.Tensor) or logits.dim() != 4:
            raise UsageError(
                f"{whose} is a {kind}, which gives {_described(outputs)}; for segmentation it must give logits "
                "[B, classes, H, W], or a dict with them as 'out'"
            )
        return logits
    decode = getattr(network, "detections", None)
    found = decode(outputs) if callable(decode) else outputs
    if not isinstance(found, list) or not all(isinstance(each, dict) and each.keys() >= set(_FIELDS) for each in found):
        raise UsageError(
            f"{whose} is a {kind}, which gives {_described(outputs)}; for detection it must have a method "
            "detections(outputs), or give a list of dicts with boxes, scores and labels"
        )
    return [{name: each[name] for name in _FIELDS} for each in found]


def _described(outputs: Any) -> str:
    if isinstance(outputs, torch.Tensor):
        return f"a tensor {list(outputs.shape)}"
    return f"a dict of {', '.join(map(str, outputs))}" if isinstance(outputs, dict) else f"a {type(outputs).__name__}"


def _check_categories(network: nn.Module, task: str, categories: int | None) -> None:
    """Where the network says how many classes it has; it may count the ground as one."""
    classes = getattr(network, "num_classes", None)
    if task != "detection" or categories is None or not is_whole(classes):
        return
    if classes > 0 and categories not in (classes, classes - 1):
        raise UsageError(f"the data has {categories} categories and the network {classes} classes; {_REMEDY}")


def _on_cpu(target: Target) -> Target:
    return {name: value.cpu() if name != "boxes" else value.cpu().float() for name, value in target.items()}


def _check_mask(mask: torch.Tensor, classes: int) -> None:
    counted = mask[mask != IGNORED]
    if len(counted) and int(counted.max()) >= classes:
        raise UsageError(
            f"a mask held class {int(counted.max())}; the network's classes are 0 to {classes - 1}, and {IGNORED} is ignored"
        )
