"""Swin: shifted windows, relative position bias, patch merging."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
)
from torch import nn

from ...quantization.layers import quantize_output
from ...quantization.quantizers import ActivationQuantizer
from .attentions import apart, together
from .base import Adapter, add_block_sites, expect_psaq, heads_mean, last_of_mlp
from .constants import quantize_constant_
from .scalings import absent


class SwinAdapter(Adapter):
    """timm's SwinTransformer."""

    patchable: ClassVar = {WindowAttention: ("qkv", "proj"), PatchMerging: ("reduction",)}
    heeds_compat = True

    @classmethod
    def supports(cls, model: nn.Module) -> bool:
        """Whether `model` is a SwinTransformer (the first version)."""
        return isinstance(model, SwinTransformer)

    def blocks(self) -> list[Any]:
        """The blocks of every stage, in order."""
        return [block for stage in self.model.layers for block in stage.blocks]

    def feature_of(self, attention: Any, output: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Every window is a set of vectors of its own. Swin has no class token; PSAQ-ViT drops the first vector all the same."""
        skip = 1 if self.compat == "psaq" else 0
        return heads_mean(output, attention.num_heads, skip), self._windows[attention]

    @functools.cached_property
    def _windows(self) -> dict[nn.Module, int]:
        return {block.attn: _windows_of(block) for block in self.blocks()}

    def last_linear(self, block: Any) -> nn.Module | None:
        """fc2 of timm's block."""
        return last_of_mlp(block.mlp) if isinstance(block, SwinTransformerBlock) else None

    def add_psaq_sites(self, bits: int, quantizer: str) -> None:
        """Patch tokens, every block, patch merging, the last norm, the pooled features, logits."""
        model = self.model
        for index, block in enumerate(self.blocks()):
            expect_psaq(index, block, SwinTransformerBlock, WindowAttention)
            block.residual_quantizer = ActivationQuantizer(bits, quantizer)
            block.__class__ = PsaqSwinBlock
            block.attn.scores_quantizer = ActivationQuantizer(bits, quantizer)
            block.attn.biased_scores_quantizer = ActivationQuantizer(bits, quantizer)
            block.attn.__class__ = PsaqWindowAttention
            add_block_sites(block, bits, quantizer)
        for stage in model.layers:
            if hasattr(stage.downsample, "reduction"):
                quantize_output(stage.downsample.reduction, "output_quantizer", bits, quantizer)
        if not absent(model.patch_embed, "norm"):
            quantize_output(model.patch_embed.proj, "output_quantizer", bits, quantizer)
        quantize_output(model.patch_embed, "output_quantizer", bits, quantizer)
        quantize_output(model.norm, "output_quantizer", bits, quantizer)
        if not isinstance(model.head.fc, nn.Identity):
            quantize_output(model.head.fc, "output_quantizer", bits, quantizer)

    def quantize_constants(self, bits: int) -> None:
        """The relative position bias tables, each on its own grid."""
        for block in self.blocks():
            attention: Any = block.attn
            quantize_constant_(attention.relative_position_bias_table, bits)


def _windows_of(block: Any) -> int:
    """How many windows an image has in this block, padding included."""
    counts = (-(-size // window) for size, window in zip(block.input_resolution, block.window_size, strict=True))
    rows, columns = counts
    return rows * columns


class PsaqWindowAttention(WindowAttention):
    """timm's WindowAttention with the scores quantized before and after the relative position bias, as PSAQ-ViT does."""

    scores_quantizer: ActivationQuantizer
    biased_scores_quantizer: ActivationQuantizer

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """[B * windows, N, C] to the same; mask is [windows, N, N] or None."""
        q, k, v = apart(self.qkv(x), self.num_heads)
        scores = self.scores_quantizer((q * self.scale) @ k.mT)
        scores = self.biased_scores_quantizer(scores + self._get_rel_pos_bias())
        if mask is not None:
            scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask.unsqueeze(1)).flatten(0, 1)
        return self.proj_drop(self.proj(together(self.attn_drop(self.softmax(scores)) @ v)))


class PsaqSwinBlock(SwinTransformerBlock):
    """timm's SwinTransformerBlock with its first residual sum quantized."""

    residual_quantizer: ActivationQuantizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        x = self.residual_quantizer(x + self.drop_path1(self._attn(self.norm1(x))))
        tokens = x.flatten(1, 2)
        return (tokens + self.drop_path2(self.mlp(self.norm2(tokens)))).view_as(x)
