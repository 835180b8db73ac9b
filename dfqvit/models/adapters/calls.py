"""Which layers a model holds for itself alone, and how it uses them, of which one image's way through it tells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..spec import dotted


def at_one_place(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[str, Any]:
    """{name: layer} of those wanted that stand at one place of the model, with a weight that is no one else's.

    A layer that holds it and is itself held twice is one place. A weight that a hook computes, as torch.nn.utils.prune has it, is
    no one's.
    """
    places: dict[nn.Module, list[str]] = {}
    owners: Counter[int] = Counter()
    for prefix, parent in model.named_modules():
        owners.update(id(parameter) for parameter in parent._parameters.values())
        for child, module in parent._modules.items():
            if module is not None and wanted(module):
                places.setdefault(module, []).append(dotted(prefix, child))
    found: dict[str, Any] = {names[0]: layer for layer, names in places.items() if len(names) == 1}
    return {name: layer for name, layer in found.items() if owners[id(layer.weight)] == 1}


class Probe(nn.Module):
    """Stands in for a layer during one pass: computes as it, and notes how it was used.

    `taken` and `made` are the nodes of torch's graph that its inputs and outputs came from.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.depends = self.read = False
        self.taken: list[Any] = []
        self.made: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.depends |= x.requires_grad
        if isinstance(self.layer, nn.Conv2d) and x.dim() != 4:
            self.read = True
        y = self.layer(x)
        self.taken.append(x.grad_fn)
        self.made.append(y.grad_fn)
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(self._modules["layer"], name)
            if name not in ("in_features", "out_features"):  # a quantized layer has those
                object.__setattr__(self, "read", True)
            return found
