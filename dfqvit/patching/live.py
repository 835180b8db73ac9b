"""The layer that `dfqvit.patch` makes of an `nn.Linear`: it quantizes its own float weight and its input as it is called."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..kernels import pack_weight, quant_linear
from ..quantization.quantizers import RANGE_RULES, WEIGHT_RULES
from ..quantization.ranges import affine_parameters

_BUFFERS = ("input_scale", "input_zero", "weight_packed", "weight_scale")


@dataclass
class LiveSettings:
    """What all layers of one patched model have in common."""

    w_bits: int
    a_bits: int
    quantizer: str
    trainable: bool
    observing: bool = False  # compute in float: calibration is measuring the inputs


class LiveQuantLinear(nn.Linear):
    """An `nn.Linear` that computes `kernels.quant_linear` of its own float weight.

    A layer becomes one by taking this class (`take`) and goes back by giving it up (`release`); the object, its parameters
    and its hooks stay. So nothing that refers to the layer notices: optimisers, hooks, state_dict, ties.

    Buffers, none of them in the state_dict: `input_scale` and `input_zero`, scalars, or None while each call takes the range
    of its own input; `weight_packed` and `weight_scale`, or None while each call quantizes the live weight.
    """

    live: LiveSettings
    packed_from: tuple[weakref.ref[torch.Tensor], int]
    input_scale: torch.Tensor | None
    input_zero: torch.Tensor | None
    weight_packed: torch.Tensor | None
    weight_scale: torch.Tensor | None

    @classmethod
    def take(cls, linear: Any, settings: LiveSettings) -> None:
        """Turns an `nn.Linear` into a layer of this class, in place."""
        linear.__class__ = cls
        linear.live = settings
        for name in _BUFFERS:
            linear.register_buffer(name, None, persistent=False)
        if not settings.trainable:
            linear.pack()

    def release(self) -> None:
        """Turns the layer back into the `nn.Linear` that it was, in place."""
        for name in _BUFFERS:
            delattr(self, name)
        for name in ("live", "packed_from"):
            self.__dict__.pop(name, None)
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def fix_range(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """From now on every input is quantized by these two scalars."""
        with torch.inference_mode(False):  # what inference mode makes cannot be saved for a gradient later
            self.input_scale, self.input_zero = scale.clone(), zero_point.clone()

    def pack(self) -> None:
        """Quantizes the weight once and for all, until it is seen to change."""
        with torch.inference_mode(False):
            weight = self.weight.detach().clone() if self.weight.is_inference() else self.weight.detach()
            self.weight_scale = self._scale_of(weight)
            self.weight_packed = pack_weight(weight, self.weight_scale, self.live.w_bits)
        self.packed_from = (weakref.ref(self.weight), _version(self.weight))

    def __getstate__(self) -> dict[str, Any]:
        """A copy has a weight of its own, and packs it when it is called."""
        return {name: value for name, value in vars(self).items() if name != "packed_from"}

    def _packed(self) -> bool:
        """Whether what is packed is of the weight that stands here now, as it is now."""
        weight, version = vars(self).get("packed_from", (None, 0))
        return weight is not None and weight() is self.weight and version == _version(self.weight)

    def forward(self, x: torch.Tensor, activation: str | None = None) -> torch.Tensor:
        """[..., in_features] to [..., out_features]; `activation` as in `quant_linear`."""
        if self.live.observing:
            return super().forward(x)
        weight, w_scale = self._quantized_weight()
        x_scale, x_zero = self._range_of(x)
        return quant_linear(
            x,
            weight,
            self.bias,
            x_scale=x_scale,
            x_zero=x_zero,
            w_scale=w_scale,
            a_bits=self.live.a_bits,
            w_bits=self.live.w_bits,
            activation=activation,
        )

    def _quantized_weight(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.live.trainable:
            return self.weight, self._scale_of(self.weight)
        if not torch.compiler.is_compiling() and not self._packed():
            self.pack()  # load_state_dict or an optimiser wrote to the weight, or another took its place
        assert self.weight_packed is not None
        assert self.weight_scale is not None
        return self.weight_packed, self.weight_scale

    def _scale_of(self, weight: torch.Tensor) -> torch.Tensor:
        return WEIGHT_RULES[self.live.quantizer](weight, self.live.w_bits, "uniform")

    def _range_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.input_scale is not None and self.input_zero is not None:
            return self.input_scale, self.input_zero
        if not x.numel():
            return x.new_ones((), dtype=torch.float32), x.new_zeros((), dtype=torch.float32)
        least, greatest = (end.float() for end in x.detach().aminmax())
        return affine_parameters(least, greatest, self.live.a_bits)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{super().extra_repr()}, w_bits={self.live.w_bits}, a_bits={self.live.a_bits}"


def new_range(linear: LiveQuantLinear) -> Any:
    """A range rule for the inputs of a layer."""
    return RANGE_RULES[linear.live.quantizer](linear.live.a_bits)


def _version(weight: torch.Tensor) -> int:
    """Counts the writes to a tensor (not those through `.data`); torch keeps no count of tensors made in inference mode."""
    return -1 if weight.is_inference() else weight._version
