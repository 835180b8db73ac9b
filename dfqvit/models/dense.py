"""The embedded dense models, each on a small Swin: a detector (`demo-detector`) and a segmenter (`demo-segmenter`).

Both are networks of this project around a timm backbone, trained together on scenes composed from Fashion-MNIST items
(`evaluation.scenes`) by `scripts/train_dense.py`; their weights ship in `dfqvit/models/assets` as float16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import SwinTransformer
from torch import nn
from torchvision.ops import batched_nms

from ..errors import expect_one_of
from .checkpoint import load_state
from .demo import ASSETS

SIDE = 56  # pixels of a scene
MEAN, STD = 0.2860, 0.3530  # of Fashion-MNIST, as the embedded classifiers take it
CLASSES = ("Top", "Trousers", "Dress", "Sandal", "Sneaker", "Bag", "Ankle boot")
# Of Fashion-MNIST's ten classes: T-shirt, pullover, coat and shirt are tops.
OF_ITEM = torch.tensor([0, 1, 0, 2, 0, 3, 0, 4, 5, 6])
WEIGHTS = {
    "demo-detector": ASSETS / "demo_detector.safetensors",
    "demo-segmenter": ASSETS / "demo_segmenter.safetensors",
}
_STEP, _WIDTHS, _NECK = 4, (48, 96, 192), 128  # pixels from one of the detector's places to the next; channels
_MOST_BOXES, _LEAST_SCORE, _OVERLAP = 100, 0.02, 0.6


def _backbone() -> Any:
    """The Swin of both, with timm's configuration of its images."""
    swin: Any = SwinTransformer(
        img_size=SIDE,
        patch_size=2,
        in_chans=1,
        num_classes=0,
        embed_dim=48,
        depths=(2, 2, 2),
        num_heads=(2, 4, 6),
        window_size=7,
    )
    config: dict[str, Any] = {
        "input_size": (1, SIDE, SIDE),
        "mean": (MEAN,),
        "std": (STD,),
        "interpolation": "bilinear",
    }
    config |= {"crop_pct": 1.0, "first_conv": "patch_embed.proj", "classifier": "head", "num_classes": 0}
    swin.pretrained_cfg = swin.default_cfg = config
    return swin


class DemoDetector(nn.Module):
    """A one-stage detector without anchors: every place gives the logits of the classes, and a box.

    Source of the scheme: FCOS, arXiv 1904.01355; of the loss in `scripts/train_dense.py`: arXiv 2006.04388.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _backbone()
        self.neck = Neck(_WIDTHS[1:])
        self.classifier = nn.Linear(_NECK, len(CLASSES))
        self.regressor = nn.Linear(_NECK, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [B, 1, 56, 56], normalised, to (logits [B, 196, 7], boxes [B, 196, 4] in pixels: left, top, right, bottom)."""
        return self.head(self.backbone.forward_intermediates(x, indices=[1, 2], intermediates_only=True))

    def head(self, stages: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What `forward` gives, of the outputs of the last two stages, [B, 96, 14, 14] and [B, 192, 7, 7]."""
        tokens = self.neck(stages).flatten(2).mT
        logits, sides = self.classifier(tokens), F.softplus(self.regressor(tokens)) * 2 * _STEP
        centre = centres(sides.device)
        return logits, torch.cat([centre - sides[..., :2], centre + sides[..., 2:]], dim=-1)

    def detections(self, outputs: tuple[torch.Tensor, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """For each image `boxes` [n, 4], `scores` [n] and `labels` [n] (classes from 0), best first, without overlapping twins."""
        found = []
        for logits, boxes in zip(*outputs, strict=True):
            scores, labels = logits.float().sigmoid().max(dim=1)
            kept = scores > _LEAST_SCORE
            boxes, scores, labels = boxes[kept].float().clamp(0, SIDE), scores[kept], labels[kept]
            chosen = batched_nms(boxes, scores, labels, _OVERLAP)[:_MOST_BOXES]
            found.append({"boxes": boxes[chosen], "scores": scores[chosen], "labels": labels[chosen]})
        return found


def centres(device: torch.device | None = None) -> torch.Tensor:
    """[196, 2]: the middle of each of the detector's places, in pixels from the left and from the top."""
    middle = _STEP * (torch.arange(SIDE // _STEP, device=device) + 0.5)
    rows, columns = torch.meshgrid(middle, middle, indexing="ij")
    return torch.stack([columns, rows], dim=-1).view(-1, 2)


class DemoSegmenter(nn.Module):
    """Classes of pixels: all stages meet at the first one's tokens, each of which gives the logits of its 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _backbone()
        self.neck = Neck(_WIDTHS)
        self.classifier = nn.Conv2d(_NECK, 4 * (len(CLASSES) + 1), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, 1, 56, 56], normalised, to logits [B, 8, 56, 56], the ground first."""
        return self.head(self.backbone.forward_intermediates(x, indices=[0, 1, 2], intermediates_only=True))

    def head(self, stages: list[torch.Tensor]) -> torch.Tensor:
        """What `forward` gives, of the outputs of the stages, [B, 48, 28, 28], [B, 96, 14, 14] and [B, 192, 7, 7]."""
        return F.pixel_shuffle(self.classifier(self.neck(stages)), 2)


class Neck(nn.Module):
    """Stages [B, widths[i], H / 2^i, W / 2^i] to [B, 128, H, W]: a 1x1 convolution of each, resized, their sum through GELU."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, _NECK, 1) for width in widths)

    def forward(self, stages: list[torch.Tensor]) -> torch.Tensor:
        size = stages[0].shape[2:]
        planes = [convolution(stage) for convolution, stage in zip(self.lateral, stages, strict=True)]
        resized = [F.interpolate(plane, size=size, mode="bilinear", align_corners=False) for plane in planes[1:]]
        return F.gelu(sum(resized, planes[0]))


def demo_detector() -> DemoDetector:
    """The structure of `demo-detector`, in eval mode, with fresh weights."""
    return DemoDetector().eval()


def demo_segmenter() -> DemoSegmenter:
    """The structure of `demo-segmenter`, in eval mode, with fresh weights."""
    return DemoSegmenter().eval()


BUILDERS = {"demo-detector": demo_detector, "demo-segmenter": demo_segmenter}


def load_dense(name: str, weights: Path | None = None) -> nn.Module:
    """An embedded dense model with its weights, float32, in eval mode.

    Args:
        name: "demo-detector" or "demo-segmenter".
        weights: a .safetensors file in place of the weights that ship.

    Raises:
        UsageError: another name, or weights that are no floats.
        DfqvitError: the file is unreadable, or of another network.
    """
    expect_one_of("name", name, BUILDERS)
    model = BUILDERS[name]()
    load_state(model, weights or WEIGHTS[name], name)
    model.dfqvit_build = f"{__name__}:{BUILDERS[name].__name__}"  # type: ignore[assignment]
    return model
