"""Which linear layers of timm's modules `dfqvit.patch` can take over, and timm's MLP with GELU in fc1's epilogue.

A layer is taken only where timm is known to call it as a module: a parent that reads `layer.weight` itself (as
ParallelScalingBlock does) would go on computing in float unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..models.adapters import LayerNames
from ..quantization.layers import QuantLinear
from ..runtime.parts import activation_of
from .live import LiveQuantLinear

MLP_LAYERS: LayerNames = {Mlp: ("fc1", "fc2"), GluMlp: ("fc1", "fc2"), SwiGLU: ("fc1_g", "fc1_x", "fc2")}
_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, QuantLinear)


def linear_layers(
    model: nn.Module, known: LayerNames, exclude: Sequence[str]
) -> Iterator[tuple[str, nn.Module, nn.Module, str]]:
    """(name, layer, its parent, "" or the reason to leave it float) for every layer of the model that multiplies by weights."""
    for name, layer in model.named_modules():
        if isinstance(layer, _WEIGHTED):
            path, _, child = name.rpartition(".")
            parent = model.get_submodule(path)
            excluded = next((pattern for pattern in exclude if fnmatchcase(name, pattern)), None)
            reason = _why_not(layer, parent, child, known) if excluded is None else f"excluded by '{excluded}'"
            yield name, layer, parent, reason


def _why_not(layer: nn.Module, parent: nn.Module, child: str, known: LayerNames) -> str:
    if type(layer) is not nn.Linear:
        return f"a {type(layer).__name__}, not a plain nn.Linear"
    if "forward" in vars(layer):
        return "its own forward was replaced by another"
    if child not in known.get(type(parent), ()):
        return f"part of a {type(parent).__name__}, not of an attention, MLP or patch merging that is known"
    return ""


class FusedMlp(Mlp):
    """timm's Mlp with GELU or QuickGELU in fc1's epilogue; takes the class of a timm instance, keeps its state.

    Where a hook watches fc1 or the activation it computes as timm does, so that the hook sees what it saw before.
    """

    @classmethod
    def take(cls, mlp: Any) -> None:
        """Turns a timm Mlp into one of this class, in place."""
        mlp.__class__ = cls

    def release(self) -> None:
        """Turns the module back into timm's, in place."""
        self.__class__ = Mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        fc1, activation = self.fc1, _epilogue(self.act)
        if activation is None or not isinstance(fc1, LiveQuantLinear) or _hooked(fc1) or _hooked(self.act):
            return super().forward(x)
        x = self.norm(self.drop1(fc1.forward(x, activation)))
        return self.drop2(self.fc2(x))


def can_fuse(mlp: Any, fc1: nn.Module) -> bool:
    """Whether `mlp` is timm's plain Mlp, `fc1` its first layer, and its activation one that `quant_linear` has."""
    plain = type(mlp) is Mlp and "forward" not in vars(mlp)
    return plain and mlp.fc1 is fc1 and _epilogue(mlp.act) is not None


def is_patched(model: nn.Module) -> bool:
    """Whether any module of `model` is one that `dfqvit.patch` made."""
    return any(isinstance(module, (LiveQuantLinear, FusedMlp)) for module in model.modules())


def _epilogue(activation: nn.Module) -> str | None:
    """What `quant_linear` calls this activation module, if it has it."""
    name = activation_of(activation)
    return None if name == "none" else name  # nothing to fuse


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )
