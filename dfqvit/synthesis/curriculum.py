"""The easy-to-hard curriculum: how large a crop each step optimises, and the crop itself as one differentiable operation."""

from __future__ import annotations

import math

import torch

from ..kernels import roll_resize

SCHEDULES = ("e2h", "fixed", "hard-to-easy")
JITTER = 30 / 224  # greatest circular shift as a share of the side, as in PSAQ-ViT
DRAWS = 5  # random numbers of one image in one step: crop centre (2), aspect ratio, shift (shared by x and y), flip
_LOG_ASPECT = math.log(4 / 3)  # crops are between 3:4 and 4:3, as in RandomResizedCrop


def crop_ratio(schedule: str, step: int, steps: int, lower: float, upper: float) -> float:
    """The crop's share of the image's area at `step` of `steps`.

    "e2h": `lower + (upper - lower) * (1 + cos(pi * step / steps)) / 2`, from upper to lower (DFQ-ViT, arXiv 2507.14481);
    "hard-to-easy": the same backwards; "fixed": always upper.
    """
    if schedule == "fixed":
        return upper
    progress = step / steps if schedule == "e2h" else 1 - step / steps
    return lower + (upper - lower) * (1 + math.cos(math.pi * progress)) / 2


def crop_shift_flip(
    images: torch.Tensor, draws: torch.Tensor, ratio: float | torch.Tensor, jitter: float
) -> torch.Tensor:
    """A random crop of each image, circularly shifted and flipped, resized to the full size; differentiable in `images`.

    Args:
        images: [B, C, H, W].
        draws: [B, DRAWS] uniform in [0, 1), on the device of the images: no host synchronisation.
        ratio: area of the crop as a share of the image's; a tensor may be on the device.
        jitter: greatest shift as a share of the side.

    Returns:
        [B, C, H, W], bilinear.
    """
    height, width = images.shape[2:]
    draws = draws.to(torch.promote_types(images.dtype, torch.float32))
    aspect = torch.exp((2 * draws[:, 2] - 1) * _LOG_ASPECT).sqrt()
    flip = torch.where(draws[:, 4] < 0.5, -1.0, 1.0)
    columns = _positions(width, (ratio**0.5 * aspect).clamp(max=1.0), draws[:, 0], flip)
    rows = _positions(height, (ratio**0.5 / aspect).clamp(max=1.0), draws[:, 1])
    way = 2 * draws[:, 3:4] - 1  # a table of the two reaches would be a copy from the host
    shift = torch.cat([way * int(jitter * height), way * int(jitter * width)], dim=1).round().long()
    return roll_resize(images, rows, columns, shift)


def _positions(size: int, share: torch.Tensor, centre: torch.Tensor, flip: torch.Tensor | float = 1.0) -> torch.Tensor:
    """[B, size]: where the pixels of the resized crop lie along one axis, in pixels from the centre of the first."""
    middle = size * (share / 2 + centre * (1 - share))
    steps = (torch.arange(size, device=share.device, dtype=share.dtype) + 0.5) - size / 2
    return middle[:, None] + (share * flip)[:, None] * steps - 0.5
