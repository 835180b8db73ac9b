"""Blocks of an attention and an MLP, each after a norm and within a residual sum, whatever these two are.

The norms give bytes to the layers that read them, and the residual sums ride in the epilogues of the last layers, as in
`quant_block`; between them the attention (see `attention`) and the MLP compute part by part.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import GluMlp, LayerScale, Mlp, SwiGLU
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from timm.models.vision_transformer_relpos import RelPosBlock
from torch import nn

from ..models.adapters.attentions import QUANTIZED
from ..quantization.layers import QuantLinear
from .attention import IntegerOperands
from .company import lift
from .linear import normed, product
from .mlp import IntegerMlp, hidden_bytes
from .parts import watched_or_differentiated

_GATED = (GluMlp, SwiGLU)


class IntegerResidual(nn.Module):
    """Mixed in before timm's block class. As simulated in training, with a gradient, and while a hook waits on a part."""

    family: ClassVar[type]

    @classmethod
    def take(cls, block: nn.Module) -> None:
        """Turns a block of `family` into one of this class, in place."""
        block.__class__ = cls

    @classmethod
    def why_not(cls, block: Any) -> str:
        """Why the parts of this block cannot be run this way, or ""."""
        attention, mlp = block.attn, block.mlp
        if type(attention) not in QUANTIZED.values() or not isinstance(attention.operands, IntegerOperands):
            return "the products of its attention are not in integers"
        if type(mlp) not in (Mlp, IntegerMlp, *_GATED):
            return f"its MLP is a {type(mlp).__name__}"
        gains = _gains(block)
        for layer, gain in zip((attention.proj, mlp.fc2), gains, strict=True):
            if type(layer) is not QuantLinear or not layer.frozen:
                return "a last layer is not quantized"
            if gain is not None and (layer.acm is not None or gain.dtype != torch.float32):
                return "a correction lies before a LayerScale"
        return (
            "" if all(isinstance(gain, (torch.Tensor, type(None))) for gain in gains) else "a LayerScale is not known"
        )

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[B, N, C] to float32 [B, N, C]; further arguments as timm's block takes them, for the attention."""
        if watched_or_differentiated(self, x) or self.why_not(self):
            lift()
            return super().forward(x, *args, **kwargs)
        attention, mlp, (first, second) = self.attn, self.mlp, _gains(self)
        alone = getattr(attention, "gate", None) is None
        y = normed(self.norm1, x, _quantized(attention.qkv) if alone else None)
        x = product(attention.proj, attention.mixed(y, *args, **kwargs), residual=x.float(), gain=first)
        y = normed(self.norm2, x, _quantized(getattr(mlp, "fc1", None)))
        return product(mlp.fc2, _hidden(mlp, y), residual=x, gain=second)


def _quantized(layer: Any) -> QuantLinear | None:
    return layer if type(layer) is QuantLinear and layer.frozen else None


def _gains(block: Any) -> tuple[Any, Any]:
    """LayerScale of both results: tensors, or None; anything else is not known."""
    found = []
    for scale, gamma in (("ls1", "gamma_1"), ("ls2", "gamma_2")):
        module = getattr(block, scale, None)
        if module is None or type(module) is nn.Identity:
            found.append(getattr(block, gamma, None))
        else:
            found.append(module.gamma if type(module) is LayerScale else module)
    return found[0], found[1]


def _hidden(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """What the last layer of one of timm's MLPs takes; x may be bytes, where one layer alone reads it."""
    if isinstance(mlp, Mlp):
        return hidden_bytes(mlp, x) if type(mlp) is IntegerMlp else mlp.norm(mlp.act(mlp.fc1(x)))
    if isinstance(mlp, GluMlp):
        first, second = mlp.fc1(x).chunk(2, dim=-1)
        return mlp.norm(first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second)
    return mlp.norm(mlp.act(mlp.fc1_g(x)) * mlp.fc1_x(x))


class IntegerEvaBlock(IntegerResidual, EvaBlock):
    """Of EVA, DINOv3, the Perception Encoder."""

    family: ClassVar = EvaBlock


class IntegerBeitBlock(IntegerResidual, BeitBlock):
    """Of BEiT."""

    family: ClassVar = BeitBlock


class IntegerRelPosBlock(IntegerResidual, RelPosBlock):
    """Of the ViTs with relative positions."""

    family: ClassVar = RelPosBlock


class IntegerPlainBlock(IntegerResidual, Block):
    """Of ViTs whose parts `quant_block` does not have."""

    family: ClassVar = Block


RESIDUAL: dict[type, type[IntegerResidual]] = {
    kind.family: kind for kind in (IntegerEvaBlock, IntegerBeitBlock, IntegerRelPosBlock, IntegerPlainBlock)
}
