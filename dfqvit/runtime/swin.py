"""timm's Swin, of both versions, in integers: its blocks, and the layers between its stages."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, window_partition
from timm.models.swin_transformer_v2 import PatchMerging as PatchMergingV2
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import nn

from ..kernels import extension
from ..quantization.layers import expect_floats
from .block import IntegerBlock
from .linear import normed, product, quantized
from .parts import parts_of, replaced_forward, watched_or_differentiated


class _Windows(IntegerBlock):
    """Mixed in before timm's block; shift and windows are lists of token indices that the attention reads by.

    A buffer, in no state_dict: `window_index` int32 [W, N], as `quant_attention` takes it. timm's `set_input_size` makes it anew.
    """

    post_norm: ClassVar[bool] = False  # whether its norms come last
    attn: Any
    norm1: Any
    input_resolution: Any
    window_size: Any
    shift_size: Any
    attn_mask: torch.Tensor | None
    dynamic_mask: bool
    window_index: torch.Tensor
    _windows_of: tuple[Any, ...]

    @classmethod
    def take(cls, block: Any) -> None:
        """Turns one of timm's blocks into one of this class, in place."""
        super().take(block)
        block._make_windows()

    @classmethod
    def parts(cls, block: Any) -> Any:
        """As IntegerBlock's; not of windows that are padded, or whose mask is made in every call."""
        if block.dynamic_mask:
            return "its mask is made in every call"
        if getattr(block, "_windows_of", _windows(block)) != _windows(block):
            return "its shift or its windows were changed"
        return "its windows are padded" if _padded(block) else parts_of(block, post_norm=cls.post_norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] to float32 [B, H, W, C]."""
        found = self.integer(x.flatten(1, 2)) if x.shape[1:3] == self.input_resolution else None
        return super().forward(x) if found is None else found.view_as(x)

    def geometry(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The position bias as the attention gives it now; mask and index of the windows."""
        bias = self.attn.position_bias()
        mask = None if self.attn_mask is None else self.attn_mask.float()
        return bias.view(-1, *bias.shape[-2:]).float().contiguous(), mask, self.window_index

    def sources(self) -> list[torch.Tensor]:
        """The mask, and what the position bias is looked up by."""
        index = getattr(self.attn, "relative_position_index", None)
        return [tensor for tensor in (self.attn_mask, index) if tensor is not None]

    def _init_buffers(self) -> None:
        super()._init_buffers()  # type: ignore[misc]
        self._make_windows()

    def _make_windows(self) -> None:
        height, width = self.input_resolution
        device = self.norm1.weight.device
        places = torch.arange(height * width, dtype=torch.int32, device=device).view(1, height, width, 1)
        rolled = places.roll((-self.shift_size[0], -self.shift_size[1]), (1, 2))
        index = None if _padded(self) else window_partition(rolled, self.window_size).flatten(1).contiguous()
        self.register_buffer("window_index", index, persistent=False)
        self._windows_of = _windows(self)


def _windows(block: Any) -> tuple[Any, ...]:
    """What the index of the windows is made from."""
    return tuple(block.shift_size), tuple(block.window_size), tuple(block.input_resolution)


def _padded(block: Any) -> bool:
    """Whether its windows are."""
    return any(size % window for size, window in zip(block.input_resolution, block.window_size, strict=True))


class IntegerSwinBlock(_Windows, SwinTransformerBlock):
    """Of Swin."""

    family: ClassVar = SwinTransformerBlock

    def sources(self) -> list[torch.Tensor]:
        """And the table of the relative position bias."""
        return [*super().sources(), self.attn.relative_position_bias_table]


class IntegerSwinV2Block(_Windows, SwinTransformerV2Block):
    """Of Swin V2: attention by cosines, norms that come last."""

    family: ClassVar = SwinTransformerV2Block
    post_norm: ClassVar = True

    def sources(self) -> list[torch.Tensor]:
        """And the scales of the heads, the network of the relative position bias with what it takes."""
        known = self.attn.logit_scale, self.attn.relative_coords_table, *self.attn.cpb_mlp.parameters()
        return [*super().sources(), *known]


class _Merging(nn.Module):
    """Mixed in before timm's merging of 2 x 2 patches: bytes from the norm where it comes first, and no padding by nothing.

    As simulated in training, where a gradient is wanted, where a hook waits on a part, and for sizes that are odd.
    """

    norm_first: ClassVar[bool]
    norm: Any
    reduction: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] to float32 [B, H / 2, W / 2, C']."""
        expect_floats(x)
        batch, height, width, channels = x.shape
        odd, known = height % 2 or width % 2, quantized(self.reduction) and not replaced_forward(self)
        if odd or not known or watched_or_differentiated(self, x):
            return super().forward(x)
        pairs = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
        x = extension.gathered(pairs.permute(0, 1, 3, 4, 2, 5)).flatten(3)
        self.reduction.expect_channels(x)
        reduce = product(self.reduction)
        return reduce(normed(self.norm, self.reduction)(x)) if self.norm_first else self.norm(reduce(x))


class IntegerMerging(_Merging, PatchMerging):
    """Of Swin."""

    norm_first: ClassVar = True


class IntegerMergingV2(_Merging, PatchMergingV2):
    """Of Swin V2."""

    norm_first: ClassVar = False


MERGINGS: dict[type, type] = {PatchMerging: IntegerMerging, PatchMergingV2: IntegerMergingV2}


def take_mergings(model: nn.Module) -> None:
    """Turns all quantized mergings of a model into integer ones, in place."""
    for module in model.modules():
        if type(module) in MERGINGS and quantized(module.reduction):
            module.__class__ = MERGINGS[type(module)]
