"""A ViT that is read out as DINOv2's linear classifiers are: class token and mean of the patch tokens, one after the other."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import VisionTransformer, register_model
from torch import nn


class ConcatPoolVisionTransformer(VisionTransformer):
    """timm's VisionTransformer with a head [2 * channels, classes].

    Source: the linear evaluation of DINOv2, arXiv 2304.07193; `Dinov2ForImageClassification` of transformers.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reset_classifier(self.num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head of so many classes, none for 0; the pooling stays."""
        self.num_classes = num_classes
        self.head = nn.Linear(2 * self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()

    def pool(self, x: torch.Tensor, pool_type: str | None = None) -> torch.Tensor:
        """Tokens [B, N, C] to [B, 2 C]; prefix tokens but the class token count for nothing."""
        return torch.cat([x[:, 0], x[:, self.num_prefix_tokens :].mean(dim=1)], dim=1)


@register_model
def dfqvit_vit_concat_pool(pretrained: bool = False, **kwargs: Any) -> ConcatPoolVisionTransformer:
    """Sizes of DINOv2's ViT-S/14 at 224 x 224 pixels, without weights."""
    for of_timm in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(of_timm, None)
    sizes = {"img_size": 224, "patch_size": 14, "embed_dim": 384, "depth": 12, "num_heads": 6, "init_values": 1.0}
    model = ConcatPoolVisionTransformer(**{**sizes, **kwargs})
    height, width = model.patch_embed.img_size
    model.pretrained_cfg = model.default_cfg = {
        "architecture": "dfqvit_vit_concat_pool",
        "input_size": (kwargs.get("in_chans", 3), height, width),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return model
