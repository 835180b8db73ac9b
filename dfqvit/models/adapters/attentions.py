"""The attentions of ViTs and Swins with both products quantized: each takes the class of a timm instance and keeps its state.

Every class computes as timm's own, with `self.operands` where that multiplies queries, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope
from timm.layers.attention import resolve_self_attn_mask
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.vision_transformer import ParallelScalingBlock
from timm.models.vision_transformer_relpos import RelPosAttention
from timm.models.vision_transformer_sam import Attention as SamAttention
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias

from ...quantization.attention import AttentionOperands, drop_of

CONSTANT = ("cpb_mlp", "rel_pos")  # networks that make a table of positions: they see no image
_MOST_SCALE = math.log(100.0)  # Swin v2's bound of the logarithm of its learnt scales


def apart(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    """[B, N, 3 * heads * D] to q, k and v [B, heads, N, D]."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def together(y: torch.Tensor) -> torch.Tensor:
    """[B, heads, N, D] to [B, N, heads * D]."""
    return y.transpose(1, 2).flatten(2)


@dataclass
class AttentionParts:
    """What projects and multiplies in an attention: its own layers, or functions that stand for them."""

    operands: Callable[..., torch.Tensor]
    qkv: Callable[..., torch.Tensor] | None = None
    q_proj: Callable[..., torch.Tensor] | None = None
    k_proj: Callable[..., torch.Tensor] | None = None
    v_proj: Callable[..., torch.Tensor] | None = None
    position_bias: Callable[[], torch.Tensor | None] | None = None


class _Projecting:
    """An attention in two steps: `mixed` gives the values as they are mixed, `forward` projects them.

    `mixed` computes by the attention's own layers, or by `parts` in their place.
    """

    operands: AttentionOperands

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[B, N, C] to [B, N, C]; further arguments as those of `mixed`."""
        return self.proj_drop(self.proj(self.mixed(x, *args, **kwargs)))

    def multiplied(self: Any, parts: AttentionParts | None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the operands make of these arguments. `parts` stand for an attention of which nobody watches a dropout."""
        return self.operands(*args, drop=drop_of(self), **kwargs) if parts is None else parts.operands(*args, **kwargs)

    def position_bias(self: Any) -> torch.Tensor | None:
        """[heads, N, N] or [1, heads, N, N], added to the scores of every image; made of the attention's own tensors."""
        return None

    def normed(self: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """[B, heads, N, D] to [B, N, C], with what timm's attentions do before they project: a norm, a gate by the input x."""
        y = self.norm(together(y)) if hasattr(self, "norm") else together(y)
        return y if getattr(self, "gate", None) is None else y * self.gate(x).sigmoid()


class QuantAttention(_Projecting, Attention):
    """Of ViT, DeiT and most others."""

    def mixed(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        parts: AttentionParts | None = None,
    ) -> torch.Tensor:
        """[B, N, C] to [B, N, C]; attn_mask is boolean or added to the scores."""
        use: Any = parts or self
        q, k, v = apart(use.qkv(x), self.num_heads)
        bias = resolve_self_attn_mask(x.shape[1], q, attn_mask, is_causal)
        return self.normed(x, self.multiplied(parts, self.q_norm(q), self.k_norm(k), v, self.scale, bias))


class _RotaryAttention(_Projecting):
    """Both attentions with rotary embeddings: one projection or three, fewer heads of K and V or as many."""

    def mixed(
        self: Any,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        parts: AttentionParts | None = None,
    ) -> torch.Tensor:
        """[B, N, C] to [B, N, C]; rope [..., N - prefix, 2 * D] holds sines, then cosines."""
        use: Any = parts or self
        if self.qkv is not None:
            q, k, v = apart(use.qkv(x), self.num_heads)
        else:
            q, k, v = (
                layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                for layer in (use.q_proj, use.k_proj, use.v_proj)
            )
        q, k = self.q_norm(q), self.k_norm(k)
        groups = self.num_heads // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        bias = resolve_self_attn_mask(x.shape[1], q, attn_mask, is_causal)
        half = getattr(self, "rotate_half", False)
        return self.normed(x, self.multiplied(parts, q, k, v, self.scale, bias, rope=rope, half=half))


class QuantAttentionRope(_RotaryAttention, AttentionRope):
    """Of DINOv3's and the Perception Encoder's kin."""


class QuantEvaAttention(_RotaryAttention, EvaAttention):
    """Of EVA."""


class QuantBeitAttention(_Projecting, BeitAttention):
    """Of BEiT: a table of relative positions."""

    def mixed(
        self, x: torch.Tensor, shared_rel_pos_bias: torch.Tensor | None = None, parts: AttentionParts | None = None
    ) -> torch.Tensor:
        """[B, N, C] to [B, N, C]."""
        use: Any = parts or self
        q, k, v = apart(use.qkv(x), self.num_heads)
        bias = use.position_bias()
        if shared_rel_pos_bias is not None:
            bias = shared_rel_pos_bias if bias is None else bias + shared_rel_pos_bias
        return self.normed(x, self.multiplied(parts, q, k, v, self.scale, bias))

    def position_bias(self) -> torch.Tensor | None:
        """[1, heads, N, N], of the table."""
        return None if self.relative_position_bias_table is None else self._get_rel_pos_bias()


class QuantRelPosAttention(_Projecting, RelPosAttention):
    """Of the ViTs with relative positions: a table, or a network that makes one."""

    def mixed(
        self, x: torch.Tensor, shared_rel_pos: torch.Tensor | None = None, parts: AttentionParts | None = None
    ) -> torch.Tensor:
        """[B, N, C] to [B, N, C]."""
        use: Any = parts or self
        q, k, v = apart(use.qkv(x), self.num_heads)
        bias = use.position_bias()
        bias = shared_rel_pos if bias is None else bias
        return self.normed(x, self.multiplied(parts, self.q_norm(q), self.k_norm(k), v, self.scale, bias))

    def position_bias(self) -> torch.Tensor | None:
        """[1, heads, N, N], of the table or the network."""
        return None if self.rel_pos is None else self.rel_pos.get_bias()


class QuantSamAttention(SamAttention):
    """Of SAM's encoder: relative positions that depend on the queries."""

    operands: AttentionOperands

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] to the same."""
        size = (x.shape[1], x.shape[2])
        q, k, v = apart(self.qkv(x.flatten(1, 2)), self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = rope = None
        if self.use_rel_pos:
            bias = get_decomposed_rel_pos_bias(q.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, size, size)
            bias = bias.unflatten(0, (-1, self.num_heads))
        elif self.rope is not None:
            rope = self.rope.get_embed()
        y = self.operands(q, k, v, self.scale, bias, rope=rope, drop=drop_of(self))
        return self.proj_drop(self.proj(together(y))).view(*x.shape[:3], -1)


class QuantWindowAttention(_Projecting, WindowAttention):
    """Of Swin."""

    def mixed(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """[B * windows, N, C] to the same; mask is [windows, N, N] or None."""
        q, k, v = apart(self.qkv(x), self.num_heads)
        return self.normed(x, self.multiplied(None, q, k, v, self.scale, self.position_bias(), mask))

    def position_bias(self) -> torch.Tensor:
        """[1, heads, N, N], of the table."""
        return self._get_rel_pos_bias()


class QuantWindowAttentionV2(_Projecting, WindowAttentionV2):
    """Of Swin v2: scores are cosines times a learnt scale of each head; a network makes the bias."""

    def mixed(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """[B * windows, N, C] to the same; mask is [windows, N, N] or None."""
        q, k, v = apart(self.qkv(x), self.num_heads)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return self.normed(x, self.multiplied(None, q, k, v, self.scales_of_heads(), self.position_bias(), mask))

    def scales_of_heads(self) -> torch.Tensor:
        """[heads], of the cosines."""
        return self.logit_scale.clamp(max=_MOST_SCALE).exp().flatten()

    def position_bias(self) -> torch.Tensor:
        """[heads, N, N], of the window as it is now."""
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        area = self.window_size[0] * self.window_size[1]
        bias = table[self.relative_position_index.view(-1)].view(area, area, -1)
        return 16 * torch.sigmoid(bias.permute(2, 0, 1).contiguous())


class QuantParallelScalingBlock(ParallelScalingBlock):
    """A block whose attention and MLP share their layers, and is its own attention."""

    operands: AttentionOperands

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """[B, N, C] to [B, N, C]; attn_mask is boolean or added to the scores."""
        hidden, *qkv = self.in_proj(self.in_norm(x)).split(self.in_split, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in qkv)
        bias = resolve_self_attn_mask(x.shape[1], x, attn_mask, is_causal)
        y = together(self.operands(self.q_norm(q), self.k_norm(k), v, self.scale, bias, drop=drop_of(self)))
        hidden = self.mlp_drop(self.mlp_act(hidden if self.mlp_bias is None else hidden + self.mlp_bias))
        if self.out_proj is not None:
            joined = self.out_proj(torch.cat((y, hidden), dim=-1))
        else:
            joined = self.attn_out_proj(y) + self.mlp_out_proj(hidden)
        return x + self.drop_path(self.ls(joined))


QUANTIZED: dict[type, type] = {
    Attention: QuantAttention,
    AttentionRope: QuantAttentionRope,
    EvaAttention: QuantEvaAttention,
    BeitAttention: QuantBeitAttention,
    RelPosAttention: QuantRelPosAttention,
    SamAttention: QuantSamAttention,
    WindowAttention: QuantWindowAttention,
    WindowAttentionV2: QuantWindowAttentionV2,
    ParallelScalingBlock: QuantParallelScalingBlock,
}
