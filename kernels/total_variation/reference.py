"""Total variation in plain torch: the oracle of the other backends, and the fallback."""

from __future__ import annotations

import torch


def total_variation(images: torch.Tensor) -> torch.Tensor:
    """[B, 4] of images [B, C, H, W]: the Euclidean norms of the differences across, down and along both diagonals."""
    wide = images if images.dtype == torch.float64 else images.float()
    return torch.stack([d.flatten(1).norm(dim=1) for d in _differences(wide)], dim=1)


def total_variation_backward(weights: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The gradient for the images; weights [B, 4] are the gradients of the norms divided by the norms."""
    wide = images if images.dtype == torch.float64 else images.float()
    across, down, falling, rising = (
        weights[:, d].reshape(-1, 1, 1, 1) * difference for d, difference in enumerate(_differences(wide))
    )
    gradient = torch.zeros_like(wide)
    for part, first, second in (
        (across, gradient[..., :-1], gradient[..., 1:]),
        (down, gradient[..., :-1, :], gradient[..., 1:, :]),
        (falling, gradient[..., 1:, :-1], gradient[..., :-1, 1:]),
        (rising, gradient[..., :-1, :-1], gradient[..., 1:, 1:]),
    ):
        first += part
        second -= part
    return gradient.to(images.dtype)


def _differences(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (
        images[..., :-1] - images[..., 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., :-1, :-1] - images[..., 1:, 1:],
    )
