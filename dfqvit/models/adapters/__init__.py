"""What dfqvit knows about timm's model families. Nothing outside this folder depends on timm's internals.

An adapter answers, for one model: which are its blocks, what are the features of an attention layer, where does a placement
put quantizers. `find_adapter(model)` picks it. To support another family, add a file and name its class here.
"""

from __future__ import annotations

from torch import nn

from ...errors import UsageError
from .base import Adapter, Features, LayerNames
from .swin import SwinAdapter
from .vit import VitAdapter

ADAPTERS: tuple[type[Adapter], ...] = (VitAdapter, SwinAdapter)


def find_adapter(model: nn.Module, compat: str = "") -> Adapter:
    """The adapter for `model`; UsageError when its class is of no supported family."""
    for adapter in ADAPTERS:
        if adapter.supports(model):
            return adapter(model, compat)
    raise UsageError(
        f"model was a {type(model).__name__}; it may be a timm VisionTransformer, VisionTransformerDistilled or SwinTransformer"
    )


__all__ = ["Adapter", "Features", "LayerNames", "find_adapter"]
