"""timm's blocks with rotary embeddings in integers: of DINOv3, the Perception Encoder and others of Eva's kin."""

from __future__ import annotations

from typing import ClassVar

import torch
from timm.models.eva import EvaBlock

from .block import IntegerBlock


class IntegerRotaryBlock(IntegerBlock, EvaBlock):
    """timm's EvaBlock in integers, with a two-layer MLP, gated or not; masks go the simulated way."""

    family: ClassVar = EvaBlock

    def forward(
        self,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """[B, N, C] to float32 [B, N, C]; rope [N - prefix, 2 * D], or one for each head, holds sines, then cosines."""
        found = None
        if attn_mask is None and not is_causal and (rope is None or _common(rope)):
            found = self.integer(x, *([] if rope is None else [rope]))
        return super().forward(x, rope, attn_mask, is_causal) if found is None else found


def _common(rope: torch.Tensor) -> bool:
    """Whether it is for all images, and no gradient of it is wanted."""
    return rope.dim() in (2, 3) and not (torch.is_grad_enabled() and rope.requires_grad)
