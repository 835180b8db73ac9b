"""Which of timm's attentions are known, and their products quantized.

To teach dfqvit another attention, write its class beside its kin and name it in their table; what is in none keeps its products
in float.
"""

from __future__ import annotations

from torch import nn

from ...quantization.attention import AttentionOperands
from .attentions import QUANTIZED
from .hybrid_attentions import HYBRID

KNOWN: dict[type, type] = {**QUANTIZED, **HYBRID}  # timm's class: the one that it becomes


def quantize_products(model: nn.Module, bits: int, quantizer: str) -> None:
    """Quantizes, in place, the products of every attention that is known here and has no forward of its own."""
    for module in model.modules():
        kind = KNOWN.get(type(module))
        if kind is not None and "forward" not in vars(module):
            module.operands = AttentionOperands(bits, quantizer).train(module.training)
            module.__class__ = kind
