"""What dfqvit knows about timm's model families. Beside this folder only `patching` and `runtime`, which put classes of their
own in the place of timm's, depend on timm's internals.

An adapter answers, for one model: which are its blocks, what are the features of an attention layer, where does a placement
put quantizers. `find_adapter(model)` picks it. To know another family better than `generic` does, add a file and name its class
here.
"""

from __future__ import annotations

from torch import nn

from ...errors import UsageError
from .base import Adapter, Features, LayerNames
from .generic import GenericAdapter
from .network import NetworkAdapter, flattened, is_network, rescaled_by
from .swin import SwinAdapter
from .vit import VitAdapter

ADAPTERS: tuple[type[Adapter], ...] = (VitAdapter, SwinAdapter, NetworkAdapter, GenericAdapter)


def find_adapter(model: nn.Module, compat: str = "") -> Adapter:
    """The adapter for `model`; the generic one where no family has its own; UsageError when nothing in it can be quantized."""
    for adapter in ADAPTERS:
        if adapter.supports(model):
            return adapter(model, compat)
    raise UsageError(
        f"model was a {type(model).__name__}; it may be a timm model that takes images alone and multiplies in linear layers, "
        "1x1 or patch convolutions beside its classifier, such as ViT, Swin, EVA or ConvNeXt, or a network that holds one"
    )


__all__ = [
    "Adapter",
    "Features",
    "LayerNames",
    "NetworkAdapter",
    "find_adapter",
    "flattened",
    "is_network",
    "rescaled_by",
]
