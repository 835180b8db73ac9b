"""timm's two-layer MLP in integers: the first layer rounds its result, after the activation, to what the second takes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import Mlp
from torch import nn

from ..kernels.quant_linear.op import forward as quant_linear
from ..quantization.layers import QuantLinear, check_tokens
from .parts import activation_of


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
        return "" if activation_of(mlp.act) else f"its activation is {type(mlp.act).__name__}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] to float32 [..., C']."""
        fc1, fc2 = self.fc1, self.fc2
        if self.training or self.why_not(self) or self._differentiated(x) or self._hooked():
            return super().forward(x)
        check_tokens(fc2.acm, x)
        name = activation_of(self.act)
        scale = fc2.input.scale if fc2.factor is None else fc2.input.scale * fc2.factor
        grid = (scale.expand(fc1.out_features).contiguous(), fc2.input.zero_point.expand(fc1.out_features).contiguous())
        weight, _, sums = fc1.operands()
        hidden = quant_linear(
            x.float(), weight, fc1.bias, None, fc1.input.scale, fc1.input.zero_point, fc1.weight_scale,
            fc1.input.bits, fc1.w_bits, name, None, *grid, fc2.input.bits, "uint8", sums,
        )  # fmt: skip
        weight, acm, sums = fc2.operands()
        return quant_linear(
            hidden, weight, fc2.bias, acm, fc2.input.scale, fc2.input.zero_point, fc2.weight_scale,
            fc2.input.bits, fc2.w_bits, "none", None, None, None, 8, "float32", sums,
        )  # fmt: skip

    def _differentiated(self, x: torch.Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(each.requires_grad for each in self.parameters())

    def _hooked(self) -> bool:
        return any(child._forward_hooks or child._forward_pre_hooks for child in self.modules() if child is not self)
