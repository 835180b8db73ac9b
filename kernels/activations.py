"""The activations that the operators have, by name, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

SLOPES = {"quick_gelu": 1.702, "silu": 1.0}  # of y * sigmoid(slope * y): OpenAI's CLIP approximates GELU by the first
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "quick_gelu": lambda y: y * torch.sigmoid(SLOPES["quick_gelu"] * y),
    "silu": F.silu,
}


def check_activation(activation: str | None) -> None:
    """ValueError for the name of none."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation was {activation!r}; it may be None, 'gelu', 'gelu_tanh', 'quick_gelu' or 'silu'")


def activation_backward(grad: torch.Tensor, y: torch.Tensor, activation: str) -> torch.Tensor:
    """The gradient of y, given that of activation(y); not of "none"."""
    if activation in SLOPES:
        slope = SLOPES[activation]
        gate = torch.sigmoid(slope * y)
        return grad * gate * (1 + slope * y * (1 - gate))
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, y, approximate=approximate)
