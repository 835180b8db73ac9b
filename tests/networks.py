"""Networks around timm models, as users build them; each function makes one without arguments, as `build` asks."""

from __future__ import annotations

from collections import OrderedDict

import timm
import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

from .conftest import SMALL, small_swin, small_vit

# Of heads of vectors: the sums of a few may all be near 0, and what is relative to them large. The length of 64 is within an
# eleventh (1 / sqrt(2 * 64)) of what it is on average, give or take.
OUTPUTS = 64
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}


class Segmenter(nn.Module):
    """A ViT, a neck of 1x1 and 3x3 convolutions, a 1x1 head; gives a dict."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.backbone = small_vit(depth=depth)
        self.neck = nn.Sequential(nn.Conv2d(48, 32, 1), nn.GELU(), nn.Conv2d(32, 32, 3, padding=1), nn.GELU())
        self.head = nn.Conv2d(32, 5, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        planes = self.backbone.forward_features(x)[:, 1:].mT.unflatten(2, (4, 4))
        return {"out": self.head(self.neck(planes))}


class Siamese(nn.Module):
    """One ViT, held under two names and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left = small_vit()
        self.right = self.left
        self.head = nn.Linear(96, OUTPUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = [self.left.forward_features(x)[:, 0], self.right.forward_features(x.flip(3))[:, 0]]
        return self.head(torch.cat(both, dim=1))


class Pair(nn.Module):
    """A ViT, of which the last block is not used, and a Swin; gives a list."""

    def __init__(self, size: int = 32, depth: int = 3, depths: tuple[int, int] = (2, 2)) -> None:
        super().__init__()
        self.vit, self.swin = small_vit(depth=depth), small_swin(img_size=size, depths=depths)
        self.head = nn.Linear(96, OUTPUTS)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        early = self.vit.forward_intermediates(
            x,
            indices=[len(self.vit.blocks) - 2],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            norm=False,
        )[0]
        both = torch.cat([early.mean(1), self.swin.forward_features(x).mean((1, 2))], dim=1)
        return [self.head(both), early]


class Pyramid(nn.Module):
    """torchvision's FPN on timm's features_only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, out_indices=(0, 1), **SWIN)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 32)
        self.out_channels = 32

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        return self.fpn(OrderedDict((str(i), f.permute(0, 3, 1, 2)) for i, f in enumerate(self.body(x))))


class Masked(Segmenter):
    """Its forward needs more than images."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return super().forward(x * mask)


def segmenter() -> nn.Module:
    return Segmenter().eval()


def shallow_segmenter() -> nn.Module:
    return Segmenter(depth=1).eval()


def siamese() -> nn.Module:
    return Siamese().eval()


def rotary() -> nn.Module:
    network = siamese()
    network.left = network.right = timm.create_model("vit_base_patch16_rope_224", **SMALL["vit"]).eval()
    return network


def pair() -> nn.Module:
    return Pair().eval()


def shallow_pair() -> nn.Module:
    return Pair(depth=2, depths=(1, 1)).eval()


def retina() -> nn.Module:
    anchors = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
    network = RetinaNet(Pyramid(), 5, min_size=64, max_size=64, anchor_generator=anchors, score_thresh=0.0)
    return network.eval()


def number() -> int:
    return 3
