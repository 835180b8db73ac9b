"""gate_quantize in plain torch: the oracle of the other backends, and the fallback."""

from __future__ import annotations

import torch

from ..activations import ACTIVATIONS


def gate_quantize(
    gate: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bits: int,
    activation: str,
) -> torch.Tensor:
    """The formula of `op.gate_quantize`, in the dtype of `scale`."""
    gated = ACTIVATIONS[activation](gate.to(scale.dtype)) * value.to(scale.dtype)
    q = (gated / scale).round() + zero_point
    return q.clamp(0, (1 << bits) - 1).to(torch.uint8)
