"""Where a model lets channels be scaled or shifted so that what it computes stays the same.

Only classes of timm whose forward pass is known are named here: in a block of another class the same attribute may stand for
something else (in Swin v2 the norms follow the layers). The last norm is left alone: `forward_features` shows its output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from timm.layers import Attention, AttentionRope, GluMlp, LayerNorm, LayerNormFp32, Mlp
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
NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32)  # the same arithmetic on float32
SCALED = "_scaled_in"  # the attribute by which the modules between which a model's channels are scaled tell it

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

    def among(self, layers: Collection[str]) -> Scalings:
        """Those between `layers`, without what stays float."""
        norms = tuple(pair for pair in self.norms if pair[1] in layers)
        values = tuple(pair for pair in self.values if set(pair) <= set(layers))
        scores, hidden = (tuple(name for name in names if name in layers) for names in (self.scores, self.hidden))
        return Scalings(norms, self.padded, values, scores, hidden)

    def results(self) -> list[str]:
        """The modules whose results may be others than the float model's."""
        return sorted({name for name, _ in (*self.norms, *self.values)} | {*self.scores})

    def inputs(self) -> list[str]:
        """The modules that take them."""
        return sorted(name for _, name in (*self.norms, *self.values))


def scalings(model: nn.Module) -> Scalings:
    """Of a timm model, converted or not."""
    norms, padded, values, scores, hidden = [], [], [], [], []
    held = _places(model)
    for name, block in model.named_modules():
        if type(block) is PatchMerging and _scalable(block.norm, held):
            norms.append((f"{name}.norm", f"{name}.reduction"))
        if type(block) not in _BLOCKS or "forward" in vars(block):
            continue
        attention: Any = block.attn
        mlp: Any = block.mlp
        own_attention, own_mlp = (held[id(part)] == 1 and "forward" not in vars(part) for part in (attention, mlp))
        qkv, kind = f"{name}.attn.qkv", _TIMMS.get(type(attention), type(attention))
        # three projections, or biases that are added after one, are left alone
        together = getattr(attention, "qkv", None) is not None and getattr(attention, "q_bias", None) is None
        if own_attention and kind in _ATTENTIONS and together and getattr(attention, "gate", None) is None:
            if _scalable(block.norm1, held):
                norms.append((f"{name}.norm1", qkv))
                if type(block) is SwinTransformerBlock:
                    padded.append(f"{name}.norm1")
            if absent(attention, "norm"):
                values.append((qkv, f"{name}.attn.proj"))
            if kind not in _ROTARY and absent(attention, "q_norm") and absent(attention, "k_norm"):
                scores.append(qkv)
        if own_mlp and type(mlp) in (Mlp, GluMlp) and _scalable(block.norm2, held):
            norms.append((f"{name}.norm2", f"{name}.mlp.fc1"))
        if own_mlp and type(mlp) is Mlp and absent(mlp, "norm"):
            hidden.append(f"{name}.mlp.fc2")
    return Scalings(tuple(norms), frozenset(padded), tuple(values), tuple(scores), tuple(hidden))


def _places(model: nn.Module) -> Counter[int]:
    """{id of a module or parameter: in how many places it stands}."""
    return Counter(
        id(each)
        for module in model.modules()
        for table in (module._modules, module._parameters)
        for each in table.values()
        if each is not None
    )


def _scalable(norm: Any, held: Counter[int]) -> bool:
    """Whether gain and bias of a norm can be written, and neither another place nor a hook reads these or what it gives."""
    if type(norm) not in NORMS or norm.weight is None or norm.bias is None:  # of another class where it is parametrized
        return False
    alone = all(held[id(each)] == 1 for each in (norm, norm.weight, norm.bias))
    return alone and not norm._forward_hooks and "forward" not in vars(norm)


def absent(module: Any, name: str) -> bool:
    """Whether a part is not there, or does nothing."""
    return isinstance(getattr(module, name, nn.Identity()), nn.Identity)
