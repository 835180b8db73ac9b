"""The easy-to-hard curriculum: how large a crop each step optimises, and the crop itself as one differentiable operation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

SCHEDULES = ("e2h", "fixed", "hard-to-easy")
DRAWS = (
    5  # random numbers that one image uses in one step: crop centre (2), aspect ratio, shift (shared by x and y), flip
)
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


def crop_shift_flip(images: torch.Tensor, draws: torch.Tensor, ratio: float, jitter: float) -> torch.Tensor:
    """A random crop of each image, circularly shifted and flipped, resized to the full size; differentiable in `images`.

    Args:
        images: [B, C, H, W].
        draws: [B, DRAWS] uniform in [0, 1), on the device of the images: no host synchronisation.
        ratio: area of the crop as a share of the image's.
        jitter: greatest shift as a share of the side.

    Returns:
        [B, C, H, W], bilinear.
    """
    batch, channels, height, width = images.shape
    aspect = torch.exp((2 * draws[:, 2] - 1) * _LOG_ASPECT).sqrt()
    crop_h = (math.sqrt(ratio) / aspect).clamp(max=1.0)
    crop_w = (math.sqrt(ratio) * aspect).clamp(max=1.0)
    reach = (int(jitter * height), int(jitter * width))
    shift = 2 * draws[:, 3] - 1
    padded = F.pad(images, (reach[1], reach[1], reach[0], reach[0]), mode="circular") if max(reach) else images
    flip = torch.where(draws[:, 4] < 0.5, -1.0, 1.0)

    theta = images.new_zeros(batch, 2, 3)
    for axis, (size, crop, pad) in enumerate(((width, crop_w, reach[1]), (height, crop_h, reach[0]))):
        whole = size + 2 * pad
        centre = pad + size * (crop / 2 + draws[:, axis] * (1 - crop)) + (shift * pad).round()
        theta[:, axis, 2] = 2 * centre / whole - 1
        theta[:, axis, axis] = crop * size / whole * (flip if axis == 0 else 1.0)
    grid = F.affine_grid(theta, [batch, channels, height, width], align_corners=False)
    return F.grid_sample(padded, grid, mode="bilinear", padding_mode="border", align_corners=False)
