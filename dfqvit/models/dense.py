"""The embedded dense models, each on a small hybrid ViT: a detector (`demo-detector`) and a segmenter (`demo-segmenter`).

Both are networks of this project around a timm backbone, trained together on scenes composed from Fashion-MNIST items
(`evaluation.scenes`) by `scripts/train_dense.py`; their weights ship in `dfqvit/models/assets` as float16.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, HybridEmbed
from timm.models import VisionTransformer
from timm.models.resnet import BasicBlock
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
_STEP = 4  # pixels from one token to the next
_FINE, _COARSE, _WIDTH = 48, 112, 160  # channels at 28 x 28, at 14 x 14, and of tokens
_PLACE, _MIXED = 128, 64  # channels of the detector's places, and of what the segmenter takes classes from
_MOST_BOXES, _LEAST_SCORE, _OVERLAP = 100, 0.02, 0.6


def _halved() -> tuple[nn.Module, nn.Module]:
    """[B, 1, 56, 56] to [B, 48, 28, 28]."""
    return ConvNormAct(1, _FINE // 2, 3), ConvNormAct(_FINE // 2, _FINE, 3, stride=2)


def _backbone() -> Any:
    """The ViT of both: convolutions make its 14 x 14 tokens, four blocks compare them. With timm's configuration of its images.

    Source of the form: arXiv 2106.14881.
    """
    stem = nn.Sequential(
        *_halved(),
        ConvNormAct(_FINE, _COARSE, 3, stride=2),
        BasicBlock(_COARSE, _COARSE),
        BasicBlock(_COARSE, _COARSE),
    )
    vit: Any = VisionTransformer(
        img_size=SIDE,
        patch_size=1,
        in_chans=1,
        num_classes=0,
        global_pool="",
        class_token=False,
        embed_dim=_WIDTH,
        depth=4,
        num_heads=5,
        embed_layer=partial(HybridEmbed, backbone=stem),
    )
    config: dict[str, Any] = {
        "input_size": (1, SIDE, SIDE),
        "mean": (MEAN,),
        "std": (STD,),
        "interpolation": "bilinear",
    }
    config |= {"crop_pct": 1.0, "first_conv": "patch_embed.backbone.0.conv", "classifier": "head", "num_classes": 0}
    vit.pretrained_cfg = vit.default_cfg = config
    return vit


def tokens_of(backbone: Any, x: torch.Tensor) -> torch.Tensor:
    """Images [B, 1, 56, 56], normalised, to the tokens of the backbone after its last norm, [B, 160, 14, 14]."""
    planes: torch.Tensor = backbone.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
    return planes


class DemoDetector(nn.Module):
    """A one-stage detector without anchors: every place gives the logits of the classes, and a box.

    Source of the scheme: FCOS, arXiv 1904.01355; of the loss in `scripts/train_dense.py`: arXiv 2006.04388.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _backbone()
        self.neck = Neck((_WIDTH,), _PLACE)
        self.classifier = nn.Linear(_PLACE, len(CLASSES))
        self.regressor = nn.Linear(_PLACE, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [B, 1, 56, 56], normalised, to (logits [B, 196, 7], boxes [B, 196, 4] in pixels: left, top, right, bottom)."""
        return self.head(tokens_of(self.backbone, x))

    def head(self, planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `forward` gives, of the backbone's tokens [B, 160, 14, 14]."""
        tokens = self.neck(planes).flatten(2).mT
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
    """Classes of pixels: the tokens meet finer convolutions of their own, each place of which gives the logits of its 2 x 2 pixels.

    Source of the two paths: arXiv 1808.00897.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _backbone()
        self.detail = nn.Sequential(*_halved(), BasicBlock(_FINE, _FINE))
        self.neck = Neck((_FINE, _WIDTH), _MIXED)
        self.mix = BasicBlock(_MIXED, _MIXED)
        self.classifier = nn.Conv2d(_MIXED, 4 * (len(CLASSES) + 1), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, 1, 56, 56], normalised, to logits [B, 8, 56, 56], the ground first."""
        return self.head(x, tokens_of(self.backbone, x))

    def head(self, x: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
        """What `forward` gives, of the images and the backbone's tokens [B, 160, 14, 14]."""
        return F.pixel_shuffle(self.classifier(self.mix(self.neck(self.detail(x), planes))), 2)


class Neck(nn.Module):
    """[B, widths[i], H / 2^i, W / 2^i] to [B, channels, H, W]: a 1x1 convolution of each, resized, and their sum through GELU."""

    def __init__(self, widths: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)

    def forward(self, *stages: torch.Tensor) -> torch.Tensor:
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
