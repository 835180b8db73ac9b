"""What every quantized model is, whatever its family: the entry that images come through, and float32 inside."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from ..errors import UsageError
from .precision import KeepsPrecision


class QuantizedForward(KeepsPrecision):
    """Mixed in before a timm model's class by `quantized`. The model stays timm's in all else.

    It computes in float32 with float32 scales: images of other float dtypes are brought to float32, and what comes out is
    brought back; `half()` and the like leave the model as it is. Images that cannot be normalised ones are refused.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Images [B, C, H, W], normalised, to logits [B, classes] of the images' dtype.

        Raises:
            UsageError: the images have an integer dtype, or not the channels that the model takes.
        """
        return _like(super().forward(self._admitted(x), *args, **kwargs), x)

    def forward_features(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As timm's."""
        return _like(super().forward_features(self._admitted(x), *args, **kwargs), x)  # type: ignore[misc]

    def forward_intermediates(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As timm's; float32."""
        return super().forward_intermediates(self._admitted(x), *args, **kwargs)  # type: ignore[misc]

    def _admitted(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.Tensor):
            raise UsageError(f"images were a {type(x).__name__}; they must be a float tensor [B, C, H, W], normalised")
        if not x.is_floating_point():
            raise UsageError(
                f"images had dtype {x.dtype}; they must be floats, normalised as the model expects "
                "(model.dfqvit_record.preprocessing.normalise(images) does that to pixels)"
            )
        _refuse_tangents(x)
        channels = getattr(self, "in_chans", None)
        if channels is not None and (x.dim() != 4 or x.shape[1] != channels):
            raise UsageError(f"images had shape {list(x.shape)}; they must be [B, {channels}, H, W]")
        return x.float()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as timm's class and what is mixed into it, since the class itself is made at run time."""
        *mixins, kind = type(self).__bases__
        return _empty, (kind, tuple(mixins)), super().__reduce_ex__(protocol)[2]


class QuantizedNetwork(nn.Module):
    """Mixed in before `QuantizedModel` where the model is a network around timm models: it may take and give what it likes."""

    def _admitted(self, x: Any) -> Any:
        """Tensors of floats, also in lists, in float32; the rest as it is."""
        if isinstance(x, (list, tuple)):
            return type(x)(self._admitted(each) for each in x)
        if not isinstance(x, torch.Tensor):
            return x
        if not x.is_floating_point():
            raise UsageError(
                f"images had dtype {x.dtype}; they must be floats, normalised as the network expects "
                "(network.dfqvit_record.preprocessing.normalise(images) does that to pixels)"
            )
        _refuse_tangents(x)
        return x.float()


def _refuse_tangents(images: torch.Tensor) -> None:
    """Rounding has a gradient of its own, straight-through; torch would take a tangent of it as 0, without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if forward_ad.unpack_dual(images).tangent is not None:
        raise UsageError(
            "images had a tangent (torch.func.jvp, forward-mode derivatives), which rounding has not; differentiate backward"
        )


def quantized(model: nn.Module, *mixins: type) -> nn.Module:
    """`model`, whose class is from now on also QuantizedForward (and `mixins`, before it); in place."""
    *held, kind = type(model).__bases__ if isinstance(model, QuantizedForward) else (QuantizedForward, type(model))
    model.__class__ = _class_of(kind, (*(mixin for mixin in mixins if mixin not in held), *held))
    return model


@functools.cache
def _class_of(kind: type, mixins: tuple[type, ...]) -> type:
    return type(kind.__name__, (*mixins, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _empty(kind: type, mixins: tuple[type, ...]) -> nn.Module:
    cls: Any = _class_of(kind, mixins)
    return cls.__new__(cls)


def _like(found: Any, images: torch.Tensor) -> Any:
    """`found` in the images' dtype, as far as it is a tensor of floats, or lists, tuples and mappings of such."""
    if not isinstance(images, torch.Tensor) or images.dtype == torch.float32:
        return found
    if isinstance(found, dict):
        return type(found)({key: _like(value, images) for key, value in found.items()})
    if type(found) in (list, tuple):
        return type(found)(_like(value, images) for value in found)
    floats = isinstance(found, torch.Tensor) and found.is_floating_point()
    return found.to(images.dtype) if floats else found
