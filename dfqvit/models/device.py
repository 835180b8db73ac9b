"""Where a model may go."""

from __future__ import annotations

import torch

from ..errors import UsageError


def expect_device(argument: str, asked: torch.device | str) -> torch.device:
    """The device that the argument of that name asks for; UsageError where torch has none such."""
    try:
        device = torch.device(asked)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"{argument} was {asked!r}; it may be cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"{argument} was '{asked}'; torch sees {torch.cuda.device_count()} CUDA devices")
    return device
