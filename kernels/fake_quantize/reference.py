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
    shape = [1] * x.dim()
    if scale.numel() > 1:
        shape[axis] = scale.numel()
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    ratio = x.to(scale.dtype) / scale
    rounded = ratio + (ratio.round() - ratio).detach()
    q = rounded + zero_point
    inside = (q >= quant_min) & (q <= quant_max)
    q = torch.where(inside | q.isnan(), q, q.clamp(quant_min, quant_max).detach())
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
    if scale.numel() > 1:
        shape = [1] * x.dim()
        shape[axis] = scale.numel()
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    q = (x.to(scale.dtype) / scale).round() + zero_point
    return torch.where((q < quant_min) | (q > quant_max), torch.zeros_like(grad), grad)
