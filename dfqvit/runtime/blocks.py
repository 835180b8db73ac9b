"""timm's blocks in integers, by family."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock, window_partition
from timm.models.vision_transformer import Block

from ..quantization.layers import exporting
from .chain import Chain, chain_of


class IntegerBlock(Block):
    """timm's Block in integers; masks, gradients and training go the simulated way."""

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """[B, N, C] to float32 [B, N, C]."""
        if attn_mask is not None or is_causal or self.training:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return chain_of(self, lambda: Chain(self))(x)


class IntegerSwinBlock(SwinTransformerBlock):
    """timm's block in integers; shift and windows are lists of token indices that the attention reads by."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] to float32 [B, H, W, C]."""
        if self.training or x.shape[1:3] != self.input_resolution or _padded(self):
            return super().forward(x)
        table = self.attn.relative_position_bias_table  # timm's set_input_size replaces it, and the rest of this key
        written = () if exporting() else (table.data_ptr(), table._version)
        geometry = (self.input_resolution, self.window_size, self.shift_size, written)
        return chain_of(self, self._make_chain, geometry)(x.flatten(1, 2)).view_as(x)

    def _make_chain(self) -> Chain:
        height, width = self.input_resolution
        device = self.norm1.weight.device
        places = torch.arange(height * width, dtype=torch.int32, device=device).view(1, height, width, 1)
        rolled = places.roll((-self.shift_size[0], -self.shift_size[1]), (1, 2))
        index = window_partition(rolled, self.window_size).flatten(1).contiguous()
        mask = self.get_attn_mask(device=device, dtype=torch.float32)
        bias = self.attn._get_rel_pos_bias()[0].detach().contiguous()
        return Chain(self, bias=bias, mask=mask, index=index)


def _padded(block: Any) -> bool:
    return any(size % window for size, window in zip(block.input_resolution, block.window_size, strict=True))


INTEGER = {Block: IntegerBlock, SwinTransformerBlock: IntegerSwinBlock}


def why_not_known(block: Any) -> str:
    """Why this block is of no family that is known, or ""."""
    if type(block) not in INTEGER:
        return f"it is a {type(block).__name__}"
    return "its windows are padded" if type(block) is SwinTransformerBlock and _padded(block) else ""
