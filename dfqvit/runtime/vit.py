"""timm's ViT block in integers."""

from __future__ import annotations

from typing import ClassVar

import torch
from timm.models.vision_transformer import Block

from .block import IntegerBlock


class IntegerVitBlock(IntegerBlock, Block):
    """timm's Block in integers; masks go the simulated way."""

    family: ClassVar = Block

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """[B, N, C] to float32 [B, N, C]."""
        found = self.integer(x) if attn_mask is None and not is_causal else None
        return super().forward(x, attn_mask=attn_mask, is_causal=is_causal) if found is None else found
