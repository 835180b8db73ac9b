"""ViT and DeiT, plain and distilled."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from ...errors import UsageError
from ...quantization.layers import quantize_output
from ...quantization.quantizers import ActivationQuantizer
from .attentions import apart, together
from .base import Adapter, add_block_sites, expect_psaq, heads_mean, last_of_mlp
from .constants import quantize_constant_
from .scalings import absent

_QUERY, _KEYS = "attn_pool.q", "attn_pool.kv"


class VitAdapter(Adapter):
    """timm's VisionTransformer and VisionTransformerDistilled."""

    patchable: ClassVar = {Attention: ("qkv", "gate", "proj")}

    @classmethod
    def supports(cls, model: nn.Module) -> bool:
        """Whether `model` is a VisionTransformer whose blocks all have timm's Attention and one MLP."""
        if not isinstance(model, VisionTransformer) or not hasattr(model.patch_embed, "proj"):
            return False
        return all(isinstance(getattr(b, "attn", None), Attention) and hasattr(b, "mlp") for b in model.blocks)

    def layers(self) -> dict[str, nn.Module]:
        """And the query of attention pooling, which a learnt vector goes through: its weight is as large as any."""
        found = super().layers()
        pooled = _QUERY if _KEYS in found else ""
        return {name: layer for name, layer in self.candidates().items() if name in found or name == pooled}

    def blocks(self) -> list[Any]:
        """`model.blocks`."""
        return list(self.model.blocks)

    def feature_of(self, attention: Any, output: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The patch tokens' features; class, distillation and register tokens are dropped."""
        return heads_mean(output, attention.num_heads, self.model.num_prefix_tokens), 1

    def last_linear(self, block: Any) -> nn.Module | None:
        """fc2 of timm's Block, if it has no LayerScale."""
        return last_of_mlp(block.mlp) if isinstance(block, Block) and type(block.ls2) is nn.Identity else None

    def add_psaq_sites(self, bits: int, quantizer: str) -> None:
        """Patch tokens, tokens before and after the position embedding, every block, logits."""
        model = self.model
        for index, block in enumerate(model.blocks):
            expect_psaq(index, block, Block, Attention)
            block.residual_quantizer = ActivationQuantizer(bits, quantizer)
            block.__class__ = PsaqBlock
            block.attn.scores_quantizer = ActivationQuantizer(bits, quantizer)
            block.attn.__class__ = PsaqAttention
            add_block_sites(block, bits, quantizer)
        if not absent(model.patch_embed, "norm"):
            quantize_output(model.patch_embed.proj, "output_quantizer", bits, quantizer)
        quantize_output(model.patch_embed, "output_quantizer", bits, quantizer)
        tokens = quantize_output(model.patch_embed, "tokens_quantizer", bits, quantizer)
        for parameter in self._prefix_tokens():
            tokens.observe(parameter)
        quantize_output(model.pos_drop, "output_quantizer", bits, quantizer)
        for head in (model.head, getattr(model, "head_dist", None)):
            if head is not None and not isinstance(head, nn.Identity):
                quantize_output(head, "output_quantizer", bits, quantizer)

    def quantize_constants(self, bits: int) -> None:
        """Class tokens on the grid of the patch tokens they join; the position embedding on its own."""
        for parameter in self._prefix_tokens():
            parameter.data = self.model.patch_embed.tokens_quantizer(parameter.data)
        if self.model.pos_embed is not None:
            quantize_constant_(self.model.pos_embed, bits)

    def _prefix_tokens(self) -> list[nn.Parameter]:
        names = ("cls_token", "dist_token", "reg_token")
        return [token for token in (getattr(self.model, name, None) for name in names) if token is not None]


class PsaqAttention(Attention):
    """timm's Attention with the scores quantized before the softmax; takes the class of a timm instance, keeps its state."""

    scores_quantizer: ActivationQuantizer

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """[B, N, C] to [B, N, C]; masks are refused rather than dropped."""
        if attn_mask is not None or is_causal:
            raise UsageError("attn_mask was given; placement 'psaq' has no masked attention, use 'gemm'")
        gate = getattr(self, "gate", None)
        q, k, v = apart(self.qkv(x), self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        scores = self.scores_quantizer((q @ k.mT) * self.scale)
        y = together(self.attn_drop(scores.softmax(dim=-1)) @ v)
        y = getattr(self, "norm", nn.Identity())(y)
        if gate is not None:
            y = y * gate(x).sigmoid()
        return self.proj_drop(self.proj(y))


class PsaqBlock(Block):
    """timm's Block with its first residual sum quantized; the second is the block's output, which a hook quantizes."""

    residual_quantizer: ActivationQuantizer

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """[B, N, C] to [B, N, C]."""
        attention = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = self.residual_quantizer(x + self.drop_path1(self.ls1(attention)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
