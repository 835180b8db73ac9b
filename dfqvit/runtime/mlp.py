"""timm's two-layer MLP in integers: the first layer rounds its result, after the activation, to what the second takes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import Mlp
from torch import nn

from ..quantization.layers import QuantLinear, expect_floats
from ..quantization.prepared import Bind, Call, through_torch
from .linear import product
from .parts import activation_of, replaced_forward, watched_or_differentiated


class IntegerMlp(Mlp):
    """Mlp whose hidden values are bytes; takes the class of a timm instance.

    It computes as simulated, layer by layer, in training, where a gradient is wanted and where a hook waits on a layer inside.
    """

    family: ClassVar[type] = Mlp

    @classmethod
    def take(cls, mlp: nn.Module) -> None:
        """Turns an Mlp into one of this class, in place."""
        mlp.__class__ = cls

    @classmethod
    def why_not(cls, mlp: Any) -> str:
        """Why this Mlp stays layer by layer, or ""."""
        if not all(type(layer) is QuantLinear and layer.frozen for layer in (mlp.fc1, mlp.fc2)):
            return "its layers are not both linear and quantized"
        if mlp.fc1.acm is not None or mlp.fc1.exponents is not None:
            return "its first layer has a correction or factors for its channels"
        if type(mlp.norm) is not nn.Identity:
            return "it has a norm"
        return replaced_forward(mlp) if activation_of(mlp.act) else f"its activation is {type(mlp.act).__name__}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] to float32 [..., C']."""
        expect_floats(x)
        if watched_or_differentiated(self, x) or self.why_not(self):
            return super().forward(x)
        self.fc1.expect_channels(x)
        return product(self.fc2)(hidden_bytes(self)(x))


def hidden_bytes(mlp: Any, bind: Bind = through_torch) -> Call:
    """What the second layer of an IntegerMlp takes, uint8 [..., H], as a function of x [..., C], float or bytes."""
    activation = activation_of(mlp.act)
    assert activation is not None  # `why_not` has asked
    return product(mlp.fc1, activation=activation, reader=mlp.fc2, bind=bind)
