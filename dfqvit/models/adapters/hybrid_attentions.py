"""The attentions of networks between convolutions and transformers, with both products quantized; see `attentions`.

Each takes the class of a timm instance and keeps its state, and is called from its own block, which no integer block replaces.
"""

from __future__ import annotations

import torch
from timm.models.fastvit import Attention as FastVitAttention
from timm.models.gcvit import WindowAttentionGlobal
from timm.models.hiera import MaskUnitAttention
from timm.models.hieradet_sam2 import MultiScaleAttention
from timm.models.maxxvit import Attention2d, AttentionCl
from timm.models.metaformer import Attention as MetaFormerAttention
from timm.models.tiny_vit import Attention as TinyVitAttention

from ...quantization.attention import AttentionOperands, drop_of
from .attentions import apart, together


class QuantAttentionCl(AttentionCl):
    """Of MaxViT and CoAtNet, channels last."""

    operands: AttentionOperands

    def forward(self, x: torch.Tensor, shared_rel_pos: torch.Tensor | None = None) -> torch.Tensor:
        """[B, ..., C] to [B, ..., C']; shared_rel_pos [1, heads, N, N] stands in for a bias of its own."""
        qkv = self.qkv(x).flatten(1, -2)
        if self.head_first:
            q, k, v = qkv.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).chunk(3, dim=-1)
        else:
            q, k, v = apart(qkv, self.num_heads)
        y = self.operands(q, k, v, self.scale, _bias_of(self, shared_rel_pos), drop=drop_of(self))
        return self.proj_drop(self.proj(together(y).view(*x.shape[:-1], -1)))


class QuantAttention2d(Attention2d):
    """Of MaxViT and CoAtNet, channels first."""

    operands: AttentionOperands

    def forward(self, x: torch.Tensor, shared_rel_pos: torch.Tensor | None = None) -> torch.Tensor:
        """[B, C, H, W] to [B, C', H, W]; shared_rel_pos as above."""
        qkv = self.qkv(x).flatten(2)
        if self.head_first:
            parts = qkv.unflatten(1, (self.num_heads, -1)).chunk(3, dim=2)
        else:
            parts = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        q, k, v = (part.mT for part in parts)
        y = self.operands(q, k, v, self.scale, _bias_of(self, shared_rel_pos), drop=drop_of(self))
        return self.proj_drop(self.proj(y.mT.reshape(x.shape[0], -1, *x.shape[2:])))


def _bias_of(attention: AttentionCl | Attention2d, shared: torch.Tensor | None) -> torch.Tensor | None:
    return shared if attention.rel_pos is None else attention.rel_pos.get_bias()


class QuantMetaFormerAttention(MetaFormerAttention):
    """Of CAFormer."""

    operands: AttentionOperands

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, C] to [B, N, C]."""
        y = self.operands(*apart(self.qkv(x), self.num_heads), self.scale, drop=drop_of(self))
        return self.proj_drop(self.proj(together(y)))


class QuantFastVitAttention(FastVitAttention):
    """Of FastViT."""

    operands: AttentionOperands

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to [B, C, H, W]."""
        y = self.operands(*apart(self.qkv(x.flatten(2).mT), self.num_heads), self.scale, drop=drop_of(self))
        return self.proj_drop(self.proj(together(y))).mT.reshape(x.shape)


class QuantMaskUnitAttention(MaskUnitAttention):
    """Of Hiera: of whole images or of mask units, whose queries may be pooled."""

    operands: AttentionOperands

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, C] to [B, N / q_stride, C']."""
        units = x.shape[1] // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
        qkv = self.qkv(x).unflatten(1, (-1, units)).transpose(1, 2).flatten(0, 1)  # [B * units, N / units, 3 * C']
        q, k, v = apart(qkv, self.heads)
        if self.q_stride > 1:
            q = q.unflatten(2, (self.q_stride, -1)).amax(dim=2)
        y = together(self.operands(q, k, v, self.scale))
        return self.proj(y.unflatten(0, (-1, units)).transpose(1, 2).flatten(1, 2))


class QuantMultiScaleAttention(MultiScaleAttention):
    """Of SAM 2's Hiera: queries may be pooled."""

    operands: AttentionOperands

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] to [B, H', W', C']."""
        height, width = x.shape[1:3]
        q, k, v = apart(self.qkv(x.flatten(1, 2)), self.num_heads)
        if self.q_pool is not None:
            pooled = self.q_pool(q.mT.flatten(1, 2).unflatten(-1, (height, width)))
            height, width = pooled.shape[2:]
            q = pooled.flatten(2).unflatten(1, (self.num_heads, -1)).mT
        y = together(self.operands(q, k, v, self.scale))
        return self.proj(y.unflatten(1, (height, width)))


class QuantTinyVitAttention(TinyVitAttention):
    """Of TinyViT: with a norm of its own, and a table of distances."""

    operands: AttentionOperands

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, C] to [B, N, C]."""
        heads = self.qkv(self.norm(x)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q, k, v = heads.split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
        bias = self.attention_biases[:, self.attention_bias_idxs]
        return self.proj(together(self.operands(q, k, v, self.scale, bias)))


class QuantWindowAttentionGlobal(WindowAttentionGlobal):
    """Of GC ViT: windows whose queries may be those of the whole image."""

    operands: AttentionOperands

    def forward(self, x: torch.Tensor, q_global: torch.Tensor | None = None) -> torch.Tensor:
        """[B * windows, N, C] to the same; q_global [B, N, C]."""
        if self.use_global and q_global is not None:
            k, v = self.qkv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            q = q_global.repeat_interleave(x.shape[0] // q_global.shape[0], dim=0).view(
                *x.shape[:2], self.num_heads, -1
            )
            q = q.transpose(1, 2)
        else:
            q, k, v = apart(self.qkv(x), self.num_heads)
        y = self.operands(q, k, v, self.scale, self.rel_pos.get_bias(), drop=drop_of(self))
        return self.proj_drop(self.proj(together(y)))


HYBRID: dict[type, type] = {
    AttentionCl: QuantAttentionCl,
    Attention2d: QuantAttention2d,
    MetaFormerAttention: QuantMetaFormerAttention,
    FastVitAttention: QuantFastVitAttention,
    MaskUnitAttention: QuantMaskUnitAttention,
    MultiScaleAttention: QuantMultiScaleAttention,
    TinyVitAttention: QuantTinyVitAttention,
    WindowAttentionGlobal: QuantWindowAttentionGlobal,
}
