"""Where a model lets channels be scaled or shifted so that what it computes stays the same.

Only classes of timm whose forward pass is known are named here: in a block of another class the same attribute may stand for
something else (in Swin v2 the norms follow the layers). The last norm is left alone: `forward_features` shows its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.layers import Attention, AttentionRope, GluMlp, Mlp
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Block
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock
from torch import nn

from .attentions import QUANTIZED

_BLOCKS = (Block, SwinTransformerBlock, EvaBlock, BeitBlock, RelPosBlock)  # each part after its norm
_ROTARY = (AttentionRope, EvaAttention)  # which mix channels of queries, and of keys, before they meet
_ATTENTIONS = (Attention, WindowAttention, BeitAttention, RelPosAttention, *_ROTARY)


_TIMMS = {ours: timms for timms, ours in QUANTIZED.items()}


@dataclass(frozen=True)
class Scalings:
    """Names of modules of one model.

    Args:
        norms: (LayerNorm, the linear layer that alone reads it): its output may be scaled and shifted for each channel.
        padded: those of these norms between which and their reader zeros may come in (Swin's windows): scaled, never shifted.
        values: (qkv, proj): values likewise, since the rows of attention's probabilities sum to 1.
        scores: qkv: queries against keys; keys may also be shifted, which moves all scores of a row alike.
        hidden: the second layers of MLPs: their inputs come straight from an activation, which lets no scale through, but
            the layer before may round every channel to a step of its own.
    """

    norms: tuple[tuple[str, str], ...]
    padded: frozenset[str]
    values: tuple[tuple[str, str], ...]
    scores: tuple[str, ...]
    hidden: tuple[str, ...]


def scalings(model: nn.Module) -> Scalings:
    """Of a timm model, converted or not."""
    norms, padded, values, scores, hidden = [], [], [], [], []
    for name, block in model.named_modules():
        if type(block) is PatchMerging and _affine(block.norm):
            norms.append((f"{name}.norm", f"{name}.reduction"))
        if type(block) not in _BLOCKS:
            continue
        attention: Any = block.attn
        qkv, kind = f"{name}.attn.qkv", _TIMMS.get(type(attention), type(attention))
        # three projections, or biases that are added after one, are left alone
        together = getattr(attention, "qkv", None) is not None and getattr(attention, "q_bias", None) is None
        if kind in _ATTENTIONS and together and getattr(attention, "gate", None) is None:
            if _affine(block.norm1):
                norms.append((f"{name}.norm1", qkv))
                if type(block) is SwinTransformerBlock:
                    padded.append(f"{name}.norm1")
            if _absent(attention, "norm"):
                values.append((qkv, f"{name}.attn.proj"))
            if kind not in _ROTARY and _absent(attention, "q_norm") and _absent(attention, "k_norm"):
                scores.append(qkv)
        mlp: Any = block.mlp
        if type(mlp) in (Mlp, GluMlp) and _affine(block.norm2):
            norms.append((f"{name}.norm2", f"{name}.mlp.fc1"))
        if type(mlp) is Mlp and _absent(mlp, "norm"):
            hidden.append(f"{name}.mlp.fc2")
    return Scalings(tuple(norms), frozenset(padded), tuple(values), tuple(scores), tuple(hidden))


def _affine(norm: Any) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def _absent(module: Any, name: str) -> bool:
    return isinstance(getattr(module, name, nn.Identity()), nn.Identity)
