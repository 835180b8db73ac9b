"""A segmenter of one's own on timm's ViT: synthesis with an objective of the outputs, quantization, and export to ONNX.

The weights are random, so what is shown is how the pieces go together, not accuracy.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import timm
import torch
from torch import nn

import dfqvit
from dfqvit.models import Preprocessing
from dfqvit.storage.export import export_onnx
from dfqvit.synthesis.procedural import procedural_images


class Segmenter(nn.Module):
    """Logits [B, 6, 64, 64] of images [B, 3, 64, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            "vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=0
        )
        self.head = nn.Conv2d(96, 6, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.backbone.forward_features(images)[:, 1:]
        planes = self.head(tokens.mT.unflatten(2, (8, 8)))
        return nn.functional.interpolate(planes, scale_factor=8.0, mode="bilinear", align_corners=False)


def build() -> nn.Module:
    """What a file names, to make the structure again."""
    torch.manual_seed(0)
    return Segmenter().eval()


def sure(logits: torch.Tensor) -> torch.Tensor:
    """Images shall be such that the segmenter is sure of every pixel."""
    p = logits.softmax(dim=1)
    return -(p * p.clamp_min(1e-8).log()).sum(dim=1).mean()


def main() -> tuple[float, dict[str, int]]:
    """Runs the example; gives what it shows."""
    network = build()
    qmodel = dfqvit.quantize(network, 8, samples=4, iters=20, objective=sure, build=build, progress=False)
    images = procedural_images(4, 1, Preprocessing.of(network))  # none of those it was calibrated on
    with torch.no_grad():
        agreement = float((qmodel(images).argmax(1) == network(images).argmax(1)).float().mean())
    with tempfile.TemporaryDirectory() as folder:
        written = export_onnx(qmodel, Path(folder) / "segmenter.onnx")
    print(f"{100 * agreement:.1f} % of the pixels keep their class")
    print(f"ONNX: {written['bytes'] / 1e6:.2f} MB, weights {written['weights']}")
    return agreement, written["weights"]


if __name__ == "__main__":
    main()
