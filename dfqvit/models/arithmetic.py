"""Where a model's multiply-adds lie, counted without its weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .adapters import find_adapter
from .network import NetworkSpec
from .preprocessing import image_shape
from .spec import ModelSpec

OTHER = "products that are no layers"  # attention's


def multiply_adds(spec: ModelSpec | NetworkSpec) -> dict[str, float]:
    """{name of a layer: its share of the multiply-adds of one image}, for linear layers and convolutions; the rest as OTHER."""
    try:
        model, counts = _counted(spec, "meta")
    except (RuntimeError, NotImplementedError):  # a model that computes with values
        model, counts = _counted(spec, "cpu")
    whole = counts["Global"]
    prefix = f"{type(model).__name__}."
    layers = {
        name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }
    shares = {name: counts[prefix + name] / whole for name in layers if counts.get(prefix + name)}
    return {**shares, OTHER: max(0.0, 1 - sum(shares.values()))}


def _counted(spec: ModelSpec | NetworkSpec, device: str) -> tuple[nn.Module, dict[str, int]]:
    """(the model, {name of a module as torch's counter gives it: its operations})."""
    model = spec.build(device)
    find_adapter(model).prepare()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *image_shape(model), device=device))
    return model, {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
