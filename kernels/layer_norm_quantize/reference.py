"""layer_norm_quantize in plain torch: the oracle of the other backends, and the fallback."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def layer_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """`clamp(round(layer_norm(x) / scale) + zero_point, 0, 2^bits - 1)` as uint8, in the dtype of `scale`."""
    normed = F.layer_norm(x.to(scale.dtype), x.shape[-1:], weight.to(scale.dtype), bias.to(scale.dtype), eps)
    q = (normed / scale).round() + zero_point
    return q.clamp(0, (1 << bits) - 1).to(torch.uint8)
