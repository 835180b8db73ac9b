"""timm's Swin block in integers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.models.swin_transformer import SwinTransformerBlock, window_partition

from .block import IntegerBlock


class IntegerSwinBlock(IntegerBlock, SwinTransformerBlock):
    """timm's block in integers; shift and windows are lists of token indices that the attention reads by.

    Buffers, in no state_dict: `window_index` int32 [W, N] and `window_mask` float32 [W, N, N] or None, as `quant_attention` takes
    them. timm's `set_input_size` makes them anew.
    """

    family: ClassVar = SwinTransformerBlock
    attn: Any
    norm1: Any
    input_resolution: Any
    window_size: Any
    shift_size: Any
    get_attn_mask: Any
    window_index: torch.Tensor
    window_mask: torch.Tensor | None

    @classmethod
    def take(cls, block: Any) -> None:
        """Turns a SwinTransformerBlock into one of this class, in place."""
        super().take(block)
        block._make_windows()

    @classmethod
    def why_not(cls, block: Any) -> str:
        """As IntegerBlock's; and windows that are padded."""
        if any(size % window for size, window in zip(block.input_resolution, block.window_size, strict=True)):
            return "its windows are padded"
        return super().why_not(block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] to float32 [B, H, W, C]."""
        found = self.integer(x.flatten(1, 2)) if x.shape[1:3] == self.input_resolution else None
        return super().forward(x) if found is None else found.view_as(x)

    def geometry(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The relative position bias as the table gives it now; mask and index of the windows."""
        return self.attn._get_rel_pos_bias()[0].contiguous(), self.window_mask, self.window_index

    def sources(self) -> list[torch.Tensor]:
        """The table of the relative position bias."""
        return [self.attn.relative_position_bias_table]

    def _init_buffers(self) -> None:
        super()._init_buffers()
        self._make_windows()

    def _make_windows(self) -> None:
        height, width = self.input_resolution
        device = self.norm1.weight.device
        places = torch.arange(height * width, dtype=torch.int32, device=device).view(1, height, width, 1)
        rolled = places.roll((-self.shift_size[0], -self.shift_size[1]), (1, 2))
        padded = any(size % window for size, window in zip(self.input_resolution, self.window_size, strict=True))
        index = None if padded else window_partition(rolled, self.window_size).flatten(1).contiguous()
        self.register_buffer("window_index", index, persistent=False)
        self.register_buffer("window_mask", self.get_attn_mask(device=device, dtype=torch.float32), persistent=False)
