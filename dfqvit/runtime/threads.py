"""A model whose work is nearly all in operators of dfqvit keeps torch's threads out of their way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..kernels import extension
from ..quantization.model import refuse_fx


class SerialTorch(nn.Module):
    """Mixed in before the class of a model that runs in integers.

    What torch computes between the blocks on a CPU (patches, positions, the last norm) is small. In torch's threads it
    would cost more than it gains: they spin for milliseconds where dfqvit's threads want to work (docs/kernels/threads.md).
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        refuse_fx(self, x)
        return _serial(super().forward, x, *args, **kwargs)

    def forward_features(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        return _serial(super().forward_features, x, *args, **kwargs)  # type: ignore[misc]

    def forward_intermediates(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        return _serial(super().forward_intermediates, x, *args, **kwargs)  # type: ignore[misc]


def _serial(function: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    module = None if torch.compiler.is_compiling() else extension.load()[0]
    if module is None or not isinstance(x, torch.Tensor) or x.device.type != "cpu":
        return function(x, *args, **kwargs)
    return module.serial_torch(function, x, *args, **kwargs)


def give_threads_back() -> None:
    """Gives torch's operators their threads again within such a model's call: where a block computes as simulated after all."""
    module = None if torch.compiler.is_compiling() else extension.load()[0]
    if module is not None:
        module.lift_serial_torch()
