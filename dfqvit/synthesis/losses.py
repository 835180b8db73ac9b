"""The three terms of the synthesis loss, each a value per image or per batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import UsageError
from ..kernels import patch_similarity_entropy, similarity_range, total_variation
from ..models.adapters import Features

Objective = Callable[[Any], torch.Tensor]  # of what the model gives, to a scalar that the images shall lower

_TV_BATCH = 32  # PSAQ-ViT's target is for the norm over a batch of 32 images of 3 x 224 x 224
_TV_TARGET = (2500.0, 3000.0)
_TV_VALUES = 3 * 224 * 224


def entropy_loss(
    features: Features, points: int, bandwidth: float, ranges: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """Minus the patch-similarity entropy, averaged over the batch and summed over the layers; a scalar.

    `ranges`, one for each stack of features, are the ends of the similarities when these features are part of a batch.
    """
    if not features.tensors:
        raise UsageError("model has neither attention nor stages whose patches synthesis could take; give calib=images")
    layers = []
    for index, (tensor, windows) in enumerate(features.stacked()):
        ends = None if ranges is None else ranges[index]
        entropy = patch_similarity_entropy(tensor, points, bandwidth, windows=windows, value_range=ends)
        layers.append(entropy.mean(dim=1).sum())
    return -torch.stack(layers).sum()


def similarity_ranges(features: Features) -> list[torch.Tensor]:
    """[L, 2] for each stack of features: least and greatest similarity."""
    return [similarity_range(tensor) for tensor, _ in features.stacked()]


def union(ranges: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """The ranges of a batch from those of its parts."""
    ends = [torch.stack(parts) for parts in zip(*ranges, strict=True)]
    return [torch.stack([part[..., 0].amin(0), part[..., 1].amax(0)], dim=-1) for part in ends]


def onehot_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the target classes, averaged over the batch; a scalar.

    Args:
        logits: [B, classes]; or [B, ..., classes] of a model without pooling, whose every token is classified.
        labels: [B].
    """
    classified = logits.float().reshape(len(labels), -1, logits.shape[-1])
    return F.cross_entropy(classified.mT, labels[:, None].expand(-1, classified.shape[1]))


def tv_loss(images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """How far the total variation of each image is from its target, averaged over the batch; a scalar.

    PSAQ-ViT takes the norm over a batch of 32 images of 3 x 224 x 224. Here it is taken for each image, so that the result
    depends neither on the batch nor on the size: scaled such that at PSAQ-ViT's batch and size the gradients are the same.

    Args:
        images: [B, C, H, W], normalised.
        target: [B], in [0, 1): where in PSAQ-ViT's range of targets each image's lies.
    """
    least, greatest = (bound / math.sqrt(_TV_BATCH) for bound in _TV_TARGET)
    size = math.sqrt(_TV_VALUES / images[0].numel())
    wanted = least + (greatest - least) * target
    return math.sqrt(_TV_BATCH) * (total_variation(images) * size - wanted).abs().mean()


def checked(loss: Any) -> torch.Tensor:
    """What a user's objective gave; UsageError unless it is one number that depends on the images."""
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        kind = (
            f"a tensor {list(loss.shape)} of {loss.dtype}"
            if isinstance(loss, torch.Tensor)
            else f"a {type(loss).__name__}"
        )
        raise UsageError(f"objective gave {kind}; it must give a scalar tensor, a loss of what the model gives")
    if not loss.requires_grad:
        raise UsageError("objective gave a scalar without a gradient; it must be computed from what the model gives")
    if loss.device.type == "cpu" and not bool(loss.isfinite()):  # a GPU does not wait for the answer
        raise UsageError(f"objective gave {float(loss)}; it must give a finite number")
    return loss.float().reshape(())
