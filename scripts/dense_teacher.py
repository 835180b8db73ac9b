"""The convolutional teacher of the embedded dense models: it learns in minutes what a small ViT is then told."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from timm.models.resnet import BasicBlock
from torch import nn

from dfqvit.models import dense


class Outputs(NamedTuple):
    """What the detector gives, what the segmenter gives, and features [B, 128, 14, 14] to imitate."""

    detected: tuple[torch.Tensor, torch.Tensor]
    planes: torch.Tensor
    features: torch.Tensor


def fresh_detector() -> dense.DemoDetector:
    """An untrained one, for which every place begins as ground."""
    detector = dense.demo_detector()
    nn.init.constant_(detector.classifier.bias, -4.0)
    return detector


class Teacher(nn.Module):
    """A U-Net with the heads of the detector and of the segmenter, for scenes [B, 1, 56, 56].

    Source of the form: arXiv 1505.04597, with residual blocks.
    """

    WIDTHS: ClassVar = (64, 128, 256)  # channels at 28 x 28, 14 x 14 and 7 x 7

    def __init__(self) -> None:
        super().__init__()
        fine, middle, coarse = self.WIDTHS
        self.down = nn.ModuleList(
            [
                nn.Sequential(ConvNormAct(1, 32, 3), ConvNormAct(32, fine, 3, stride=2), _residual(fine)),
                nn.Sequential(ConvNormAct(fine, middle, 3, stride=2), _residual(middle)),
                nn.Sequential(ConvNormAct(middle, coarse, 3, stride=2), _residual(coarse), _residual(coarse)),
            ]
        )
        self.lateral = nn.ModuleList([nn.Conv2d(middle, fine, 1), nn.Conv2d(coarse, middle, 1)])
        self.up = nn.ModuleList([_residual(fine), _residual(middle)])
        self.planes = nn.Conv2d(fine, 4 * (len(dense.CLASSES) + 1), 1)
        self.detector = fresh_detector()
        self.detector.backbone, self.detector.neck = nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> Outputs:
        stages = []
        for down in self.down:
            x = down(x)
            stages.append(x)
        fine, middle, coarse = stages
        middle = self.up[1](middle + _doubled(self.lateral[1](coarse)))
        fine = self.up[0](fine + _doubled(self.lateral[0](middle)))
        return Outputs(self.detector.head(middle), F.pixel_shuffle(self.planes(fine), 2), middle)


def _residual(channels: int) -> BasicBlock:
    return BasicBlock(channels, channels)


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
