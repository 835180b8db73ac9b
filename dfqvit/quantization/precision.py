"""Scales, zero points and what goes with them are float32: a model that is moved keeps them so, whatever dtype is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Change = Callable[[torch.Tensor], torch.Tensor]


class KeepsPrecision(nn.Module):
    """A module on which `half()`, `bfloat16()`, `double()` and `to(dtype)` change no dtype; `to(device)` works as ever."""

    def _apply(self, fn: Change, recurse: bool = True) -> Any:
        return super()._apply(_without_casts(fn), recurse)


def _without_casts(fn: Change) -> Change:
    """`fn` without its change of dtype. The values come from the tensor itself: a trip through half would round them."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return moved
