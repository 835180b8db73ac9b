"""How good a network is at detection or segmentation: average precision and mean intersection over union, by torchmetrics."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UsageError
from ..models.frame import evaluating

TASKS = ("detection", "segmentation")
IGNORED = 255  # value of mask pixels that count for nothing
_FIELDS = ("boxes", "scores", "labels")
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
    """Gathers detections; COCO's evaluation, as torchmetrics runs it on pycocotools."""

    def __init__(self) -> None:
        from torchmetrics.detection import MeanAveragePrecision

        self.metric = MeanAveragePrecision(box_format="xyxy", iou_type="bbox", backend="pycocotools")
        self.metric.warn_on_many_detections = False

    def add(self, found: list[Target], targets: list[Target]) -> None:
        """Of one batch."""
        self.metric.update([_on_cpu(each) for each in found], [_on_cpu(each) for each in targets])

    def figures(self) -> dict[str, float]:
        """In percent."""
        found = self.metric.compute()
        return {"mAP@50": 100 * max(float(found["map_50"]), 0.0), "mAP": 100 * max(float(found["map"]), 0.0)}


class SegmentationMeter:
    """Gathers pixels' classes; torchmetrics' Jaccard index over all of them."""

    def __init__(self) -> None:
        self.metrics: list[Any] = []

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
            for metric in self.metrics:
                metric.update(sized.argmax(1), mask[None])

    def figures(self) -> dict[str, float]:
        """In percent."""
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

    Raises:
        UsageError: an unknown task, a network whose outputs are of another form, a package of the extra `dense` is missing.
    """
    check_task(task)
    device = next(iter([*network.parameters(), *network.buffers()])).device
    ours, theirs = meter(task), None if against is None else meter(task)
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
                    theirs.add(understood(against, against(images), task), targets)
            count += len(images)
            if report is not None:
                report(len(images))
    if not count:
        raise UsageError("data held no images; it must hold one at least")
    compared = None if theirs is None else theirs.figures()
    return DenseEvaluation(count, ours.figures(), compared, count / seconds if seconds else 0.0)


def meter(task: str) -> DetectionMeter | SegmentationMeter:
    """An empty one; UsageError when the packages for it are missing."""
    for package in ("torchmetrics", "pycocotools") if task == "detection" else ("torchmetrics",):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"evaluation of {task} needs {package}; install dfqvit[dense]")
    return DetectionMeter() if task == "detection" else SegmentationMeter()


def check_task(task: str) -> None:
    """UsageError unless `task` is one."""
    if task not in TASKS:
        raise UsageError(f"task was '{task}'; it may be {', '.join(map(repr, TASKS))}")


def understood(network: nn.Module, outputs: Any, task: str) -> Any:
    """What `evaluate_dense` says of outputs: dicts of detections, or logits; UsageError where they are neither."""
    kind = type(network).__name__
    if task == "segmentation":
        logits = outputs.get("out") if isinstance(outputs, dict) else outputs
        if not isinstance(logits, torch.Tensor) or logits.dim() != 4:
            raise UsageError(
                f"FILE's network is a {kind}, which gives {_described(outputs)}; for segmentation it must give logits "
                "[B, classes, H, W], or a dict with them as 'out'"
            )
        return logits
    decode = getattr(network, "detections", None)
    found = decode(outputs) if callable(decode) else outputs
    if not isinstance(found, list) or not all(isinstance(each, dict) and each.keys() >= set(_FIELDS) for each in found):
        raise UsageError(
            f"FILE's network is a {kind}, which gives {_described(outputs)}; for detection it must have a method "
            "detections(outputs), or give a list of dicts with boxes, scores and labels"
        )
    return [{name: each[name] for name in _FIELDS} for each in found]


def _described(outputs: Any) -> str:
    if isinstance(outputs, torch.Tensor):
        return f"a tensor {list(outputs.shape)}"
    return f"a dict of {', '.join(map(str, outputs))}" if isinstance(outputs, dict) else f"a {type(outputs).__name__}"


def _on_cpu(target: Target) -> Target:
    return {name: value.cpu() if name != "boxes" else value.cpu().float() for name, value in target.items()}


def _check_mask(mask: torch.Tensor, classes: int) -> None:
    counted = mask[mask != IGNORED]
    if len(counted) and int(counted.max()) >= classes:
        raise UsageError(
            f"a mask held class {int(counted.max())}; the network's classes are 0 to {classes - 1}, and {IGNORED} is ignored"
        )
