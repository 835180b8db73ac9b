"""An int8 backbone under torchvision's FPN: a RetinaNet head on timm's Swin, quantized without data, saved, loaded, timed.

The weights are random, so what is shown is the structure and the speed, not accuracy.
"""

from __future__ import annotations

import tempfile
import time
from collections import OrderedDict
from pathlib import Path

import timm
import torch
from torch import nn
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork

import dfqvit


class Detector(nn.Module):
    """Class logits and box offsets of every anchor of two levels; boxes are decoded and selected outside."""

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model(
            "swin_tiny_patch4_window7_224",
            features_only=True,
            out_indices=(0, 1),
            img_size=112,
            embed_dim=96,
            depths=(2, 2),
            num_heads=(3, 6),
        )
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 64)
        self.head = RetinaNetHead(64, num_anchors=3, num_classes=10)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        planes = OrderedDict((str(i), level.permute(0, 3, 1, 2)) for i, level in enumerate(self.body(images)))
        return self.head(list(self.fpn(planes).values()))


def build() -> nn.Module:
    """What a file names, to make the structure again."""
    torch.manual_seed(0)
    return Detector().eval()


@torch.no_grad()
def main() -> tuple[float, float]:
    """Runs the example; gives what it shows."""
    network = build()
    qmodel = dfqvit.quantize(network, 8, calib="procedural", samples=8, build=build, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        path = dfqvit.save(qmodel, Path(folder) / "detector.safetensors")
        loaded = dfqvit.load(path, build=build)
    images = torch.randn(4, 3, 112, 112)
    wanted, found = network(images), loaded(images)
    distance = max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)
    bodies = {"float32": network.body, "int8": loaded.body}
    times = {name: min(_seconds(body, images) for _ in range(5)) for name, body in bodies.items()}
    ratio = times["float32"] / times["int8"]
    blocks = dfqvit.integer_report(loaded)
    print(f"{sum(not reason for reason in blocks.values())} of {len(blocks)} blocks in integers")
    print(f"relative distance of the outputs {distance:.4f}; the backbone is {ratio:.1f} times as fast as float32")
    return distance, ratio


def _seconds(body: nn.Module, images: torch.Tensor) -> float:
    started = time.perf_counter()
    body(images)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
