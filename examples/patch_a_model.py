"""Quantization-aware training of a timm model for a few steps, through `dfqvit.patch`; then the same model in float again.

python examples/patch_a_model.py
"""

from __future__ import annotations

import torch

import dfqvit
from dfqvit.models import load_model


def main() -> tuple[float, float]:
    """The distance of the W3/A8 logits from the float ones, before and after 30 steps."""
    torch.manual_seed(0)
    model = load_model("demo")  # any timm ViT, DeiT or Swin
    images = torch.randn(64, 1, 28, 28)  # no data: noise, with the float model as the teacher
    with torch.no_grad():
        wanted = model(images)

    def distance() -> torch.Tensor:
        return (model(images) - wanted).square().mean()

    with dfqvit.patch(model, w_bits=3, a_bits=8, calib=images) as handle:
        print(f"{len(handle.skipped)} layers stay float: {', '.join(handle.skipped)}")
        with torch.no_grad():
            before = distance().item()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
        for _ in range(30):
            optimizer.zero_grad()
            distance().backward()  # straight through the rounding
            optimizer.step()
        with torch.no_grad():
            after = distance().item()
    print(f"mean squared distance of the W3/A8 logits: {before:.4f} before, {after:.4f} after 30 steps")
    return before, after


if __name__ == "__main__":
    main()
