"""Trains the embedded dense models on scenes composed from Fashion-MNIST's training items.

    python scripts/train_dense.py

The detector and the segmenter are trained together on one backbone: pixels teach faster than boxes do. Each is then
saved with the backbone as its own. As DeiT, they are distilled from a convolutional teacher (`scripts/dense_teacher.py`),
which this script trains first.
The items are of Debian's package dataset-fashion-mnist (MIT licence). Every scene is drawn anew, so none is seen twice. The
held-out scenes, of test items, are used for nothing but the figures printed at the end. The moving average of the weights is
saved, as float16. An interrupted run goes on from its snapshots. Results: dfqvit/models/assets/README.md.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from dense_teacher import Outputs, Teacher, fresh_detector
from torchvision.ops import generalized_box_iou_loss
from train_demo import DEBIAN_FOLDER, read_split
from training import adamw, moving_average

from dfqvit.evaluation import scenes
from dfqvit.evaluation.dense import evaluate_dense
from dfqvit.evaluation.dense_data import SceneImages
from dfqvit.models import Preprocessing, demo, dense
from dfqvit.storage.atomic import atomic

HELD_OUT = 1_000  # scenes of test items, seed 0
_TRAINING_SEED = 1 << 12  # of the first step's scenes; held-out ones are drawn by small seeds from other items
_TEACHING_SEED = 1 << 17  # of the teacher's first step


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    """Normalised."""
    return (images.float() / 255 - dense.MEAN) / dense.STD


def targets_of(found: scenes.Scenes) -> tuple[torch.Tensor, torch.Tensor]:
    """(classes int64 [B, patches], -1 for the ground; boxes [B, patches, 4]): a place near an item's middle is its own."""
    centre = dense.centres().view(-1, 1, 2)
    classes, boxes = [], []
    for box, label in zip(found.boxes, found.labels, strict=True):
        if not len(box):
            classes.append(torch.full((len(centre),), -1))
            boxes.append(torch.zeros(len(centre), 4))
            continue
        size = box[:, 2:] - box[:, :2]
        away = (centre - (box[:, :2] + box[:, 2:]) / 2).abs()
        near = (away < (0.25 * size).clamp_min(4.0)).all(dim=2) & (away < size / 2).all(dim=2)
        area = torch.where(near, size.prod(dim=1), torch.inf)
        least, which = area.min(dim=1)
        classes.append(torch.where(least.isfinite(), label[which], -1))
        boxes.append(box[which])
    return torch.stack(classes), torch.stack(boxes)


def detection_loss(outputs: tuple[torch.Tensor, torch.Tensor], found: scenes.Scenes) -> torch.Tensor:
    """Quality focal loss of the classes and generalised IoU of the boxes."""
    logits, boxes = (each.float() for each in outputs)
    classes, wanted = targets_of(found)
    mine = classes >= 0
    quality = box_iou_of(boxes[mine].detach(), wanted[mine])
    goal = torch.zeros_like(logits)
    goal[mine] = F.one_hot(classes[mine], logits.shape[2]).float() * quality[:, None]
    focal = F.binary_cross_entropy_with_logits(logits, goal, reduction="none") * (logits.sigmoid() - goal).abs() ** 2
    count = max(int(mine.sum()), 1)
    sides = generalized_box_iou_loss(boxes[mine], wanted[mine], reduction="sum")
    return 4 * focal.sum() / count + 2 * sides / count


def box_iou_of(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """[n] of two lists of boxes [n, 4], one by one."""
    low, high = torch.maximum(ours[:, :2], theirs[:, :2]), torch.minimum(ours[:, 2:], theirs[:, 2:])
    shared = (high - low).clamp_min(0).prod(1)
    return shared / ((ours[:, 2:] - ours[:, :2]).prod(1) + (theirs[:, 2:] - theirs[:, :2]).prod(1) - shared)


def segmentation_loss(logits: torch.Tensor, found: scenes.Scenes) -> torch.Tensor:
    """Cross-entropy of the pixels, and the Dice loss of each class, over the batch."""
    masks, logits = found.masks.long(), logits.float()
    given, there = logits.softmax(1), F.one_hot(masks, logits.shape[1]).movedim(-1, 1).float()
    shared, both = (given * there).sum((0, 2, 3)), (given + there).sum((0, 2, 3))
    return 2 * F.cross_entropy(logits, masks) + (1 - (2 * shared + 1) / (both + 1)).mean()


def imitation_loss(outputs: Outputs, told: Outputs) -> torch.Tensor:
    """How far the classes of places and of pixels are from the teacher's, and the directions of the features."""
    goal, logits = told.detected[0].float().sigmoid(), outputs.detected[0].float()
    apart = F.binary_cross_entropy_with_logits(logits, goal, reduction="none") * (logits.sigmoid() - goal).abs() ** 2
    ours, theirs = (each.planes.float().log_softmax(1) for each in (outputs, told))
    pixels = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1).mean()
    turned = (1 - F.cosine_similarity(outputs.features.float(), told.features.float(), dim=1)).mean()
    return 4 * apart.sum() / goal.sum().clamp_min(1) + 4 * pixels + turned


class Both(torch.nn.Module):
    """The detector and the segmenter on one backbone, and what compares its tokens with the teacher's features."""

    def __init__(self) -> None:
        super().__init__()
        self.detector, self.segmenter = fresh_detector(), dense.demo_segmenter()
        self.segmenter.backbone = self.detector.backbone
        self.compared = torch.nn.Conv2d(self.detector.backbone.embed_dim, Teacher.WIDTHS[1], 1)
        for module in self.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # whose backward pass is slow on a CPU

    def forward(self, x: torch.Tensor) -> Outputs:
        tokens = dense.tokens_of(self.detector.backbone, x)
        return Outputs(self.detector.head(tokens), self.segmenter.head(x, tokens), self.compared(tokens))


def figures(name: str, model: torch.nn.Module, count: int = HELD_OUT) -> dict[str, float]:
    """Of held-out scenes, in percent."""
    task = "detection" if name == "demo-detector" else "segmentation"
    held = SceneImages(scenes.compose(count), Preprocessing.of(model), task)
    return evaluate_dense(model, held.batches(100), task).figures


def fit(
    model: torch.nn.Module,
    items: tuple[torch.Tensor, torch.Tensor],
    options: argparse.Namespace,
    steps: int,
    lr: float,
    teacher: torch.nn.Module | None = None,
) -> torch.nn.Module:
    """The moving average of the model's weights after `steps` steps, the first of them after those of its snapshot."""
    average, optimizer = moving_average(model), adamw(model, lr, betas=(0.9, 0.98))
    snapshot = options.snapshot if teacher else options.teacher
    seed = (_TRAINING_SEED if teacher else _TEACHING_SEED) + options.seed * (1 << 18)
    first = 0
    if snapshot and snapshot.exists():
        kept = torch.load(snapshot, weights_only=True)
        for each, state in ((model, "model"), (average, "average"), (optimizer, "optimizer")):
            each.load_state_dict(kept[state])
        first = kept["step"]
    started, losses = time.time(), 0.0
    for step in range(first, steps):
        warm = (step + 1) / options.warmup
        done = (step - options.warmup) / (steps - options.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * (warm if warm < 1 else max(0.5 * (1 + math.cos(math.pi * done)), 0.005))
        found = scenes.compose(options.batch_size, seed + step, items)
        pixels = pixels_of(found.images).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(pixels)
        loss = detection_loss(outputs.detected, found) + segmentation_loss(outputs.planes, found)
        if teacher:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                told = teacher(pixels)
            loss = loss + imitation_loss(outputs, told)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step >= 0.3 * steps:
            average.update_parameters(model)
        losses += loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {losses / 100:.4f}, {time.time() - started:.0f} s", flush=True)
            losses = 0.0
            if snapshot:
                state = {"model": model.state_dict(), "average": average.state_dict(), "step": step + 1}
                with atomic(snapshot) as temporary:
                    torch.save({**state, "optimizer": optimizer.state_dict()}, temporary)
    return average.module.eval()


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    images, labels = read_split(options.data, "train")
    items = torch.from_numpy(images.copy()), torch.from_numpy(labels)
    print("teacher:")
    teacher = fit(Teacher().train().to(memory_format=torch.channels_last), items, options, options.teacher_steps, 2e-3)
    print("detector and segmenter:")
    both = Both().train().to(memory_format=torch.channels_last)
    model = fit(both, items, options, options.steps, options.lr, teacher)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, each in (("demo-detector", model.detector), ("demo-segmenter", model.segmenter)):
        target = options.out / dense.WEIGHTS[name].name
        weights = {
            key: (value.half() if value.is_floating_point() else value).contiguous()
            for key, value in each.state_dict().items()
        }
        with atomic(target) as temporary:
            metadata = {"dataset": "scenes of Fashion-MNIST items", "steps": str(options.steps)}
            safetensors.torch.save_file(weights, temporary, metadata)
        print(f"{target.name}: {HELD_OUT} held-out scenes: {figures(name, dense.load_dense(name, target))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of the idx files (default: Debian's)")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=50, help="a multiple of 50 wastes no scene")
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--teacher-steps", type=int, default=3000)
    parser.add_argument("--teacher", type=Path, help="file that the teacher is kept in, and goes on from")
    parser.add_argument("--snapshot", type=Path, help="file that an interrupted run goes on from")
    parser.add_argument("--out", type=Path, default=demo.ASSETS, help="folder of the weights")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options)


if __name__ == "__main__":
    sys.exit(main())
