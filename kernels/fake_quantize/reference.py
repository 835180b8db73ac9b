"""Fake quantization in plain differentiable torch: the oracle of every other backend."""

from __future__ import annotations

import torch


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    axis: int,
) -> torch.Tensor:
    """`(clamp(round(x / s) + z, quant_min, quant_max) - z) * s`, half to even; differentiable straight through.

    The gradient passes where q was not clamped, to x and, in the LSQ form (arXiv 1902.08153), to scale and zero_point.
    Computed in float32 (float64 for a float64 x) and returned in the dtype of x.
    """
    scale, zero_point = _along(axis, x, scale), _along(axis, x, zero_point)
    wide = x.to(scale.dtype)
    exact = ((wide / scale).round() + zero_point).detach()
    clamped = exact.clamp(quant_min, quant_max)
    inside = (exact == clamped) | exact.isnan()
    ratio = torch.where(inside, wide, 0.0) / scale  # what is clamped may be infinite, or become so
    q = torch.where(inside, ratio + (ratio.round() - ratio).detach() + zero_point, clamped)
    return ((q - zero_point) * scale).to(x.dtype)


def fake_quantize_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    axis: int,
) -> torch.Tensor:
    """The gradient for x: `grad` where q was not clamped, else 0."""
    scale, zero_point = _along(axis, x, scale), _along(axis, x, zero_point)
    q = (x.to(scale.dtype) / scale).round() + zero_point
    return torch.where((q < quant_min) | (q > quant_max), torch.zeros_like(grad), grad)


def _along(axis: int, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values`, one or one for each channel, shaped to broadcast against x along `axis`."""
    if values.numel() == 1:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[axis] = values.numel()
    return values.reshape(shape)
