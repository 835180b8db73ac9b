"""roll_resize in plain torch: two matrix products, which are deterministic on every device."""

from __future__ import annotations

import torch


def roll_resize(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """[B, C, H', W']: `R @ image @ C^T` with the interpolation matrices R [H', H] and C [W', W] of each image."""
    height, width = images.shape[2:]
    down, across = _matrices(rows, columns, shift, height, width)
    return (down @ images.to(down.dtype) @ across.mT).to(images.dtype)


def roll_resize_backward(
    grad: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, shift: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """The gradient for the images [B, C, height, width]."""
    down, across = _matrices(rows, columns, shift, height, width)
    return (down.mT @ grad.to(down.dtype) @ across).to(grad.dtype)


def _matrices(
    rows: torch.Tensor, columns: torch.Tensor, shift: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _matrix(rows, height, shift[:, :1]), _matrix(columns, width, shift[:, 1:])


def _matrix(positions: torch.Tensor, size: int, shift: torch.Tensor) -> torch.Tensor:
    """[B, 1, n, size]: row i holds the two weights of the pixels that position i lies between."""
    place = positions.clamp(0, size - 1)
    below = place.floor()
    weight = place - below
    first = (below.long() + shift) % size
    second = ((below.long() + 1).clamp(max=size - 1) + shift) % size
    matrix = positions.new_zeros(*positions.shape, size)
    matrix.scatter_add_(2, first[..., None], (1 - weight)[..., None])
    matrix.scatter_add_(2, second[..., None], weight[..., None])  # equal places only meet a weight of 0
    return matrix[:, None]
