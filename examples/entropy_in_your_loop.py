"""The fused patch-similarity entropy as a loss in a synthesis loop of your own: no `dfqvit.synthesize`, any features.

python examples/entropy_in_your_loop.py
"""

from __future__ import annotations

import torch

from dfqvit.kernels import patch_similarity_entropy
from dfqvit.models import load_model


def main() -> tuple[float, float]:
    """The mean entropy before and after 20 steps."""
    torch.manual_seed(0)
    model = load_model("demo").requires_grad_(False)  # any model whose blocks give tokens [B, T, C]
    features: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, tokens: features.append(tokens[:, 1:]))  # without the class token

    def entropy(images: torch.Tensor) -> torch.Tensor:
        features.clear()
        model(images)
        return patch_similarity_entropy(torch.stack(features)).mean()  # [layers, images] to a scalar

    images = torch.randn(4, 1, 28, 28, requires_grad=True)
    optimizer = torch.optim.Adam([images], lr=0.1)
    before = entropy(images).item()
    for _ in range(20):
        optimizer.zero_grad()
        (-entropy(images)).backward()  # greater entropy: more varied patches
        optimizer.step()
    after = entropy(images).item()
    print(f"patch-similarity entropy: {before:.3f} before, {after:.3f} after 20 steps")
    return before, after


if __name__ == "__main__":
    main()
