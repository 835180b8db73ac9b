"""`quant_linear` in plain differentiable torch: the oracle of every other backend, and the fallback."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..activations import ACTIVATIONS, activation_backward
from ..pack_weight import unpack_weight
from .blocked import unblock_weight


def quant_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    acm: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    w_scale: torch.Tensor,
    a_bits: int,
    w_bits: int,
    activation: str,
    residual: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    out_zero: torch.Tensor | None = None,
    out_bits: int = 8,
    out_dtype: torch.dtype | None = None,
    w_sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula of `op.quant_linear`. The integers are summed in a float type wide enough to be exact, on every device.

    `out_dtype` None means the dtype of x; `w_sums` is not needed here. Differentiable in everything but out_scale and
    out_zero, the scales in the LSQ form (arXiv 1902.08153): through `x / x_scale` the rounding counts as the identity.
    """
    dtype = x_scale.dtype
    integers = x.dtype == torch.uint8
    qx = x if integers else _straight_through(x.to(dtype) / x_scale, x_zero, 0, (1 << a_bits) - 1)
    if weight.is_floating_point():
        half = 1 << (w_bits - 1)
        ratio = weight.to(dtype) / w_scale.reshape(-1, 1)
        qw = _straight_through(ratio, torch.zeros_like(x_zero), -half, half - 1)
    else:
        qw = _integers(weight, w_bits, x.shape[-1], w_scale.numel())
    largest = x.shape[-1] * ((1 << a_bits) - 1) << (w_bits - 1)
    exact = torch.float32 if largest < 1 << 24 and dtype == torch.float32 else torch.float64
    qx, qw = qx.to(exact), qw.to(exact)
    total = qx @ qw.t() - x_zero.to(exact) * qw.sum(1)
    y = (x_scale * w_scale) * total.to(dtype)
    if acm is not None:
        addend = acm if bias is None else bias.to(dtype) + acm
        y = (y.reshape(-1, *acm.shape) + addend).reshape(y.shape)
    elif bias is not None:
        y = y + bias
    y = ACTIVATIONS[activation](y)
    if residual is not None:
        y = y + residual
    if out_scale is not None and out_zero is not None:
        return ((y / out_scale).round() + out_zero).clamp(0, (1 << out_bits) - 1).to(torch.uint8)
    return y.to(out_dtype or x.dtype)


def quant_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    acm: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    w_scale: torch.Tensor,
    a_bits: int,
    w_bits: int,
    activation: str,
    needed: Sequence[bool],
) -> list[torch.Tensor]:
    """The straight-through gradients of x, weight, bias, acm, x_scale and w_scale; empty where not `needed`.

    Written out rather than left to autograd, which does not record inside an operator.
    """
    dtype = x_scale.dtype
    grad = grad.to(dtype)
    if activation != "none":
        inputs = (x, weight, bias, acm, x_scale, x_zero, w_scale, a_bits, w_bits, "none")
        grad = activation_backward(grad, quant_linear(*inputs, out_dtype=dtype), activation)
    rows = grad.reshape(-1, grad.shape[-1])
    need_x, need_weight, need_bias, need_acm, need_x_scale, need_w_scale = needed
    results = [grad.new_empty(0)] * 6

    ratio = x.to(dtype) - x_zero if x.dtype == torch.uint8 else x.to(dtype) / x_scale
    rounded = ratio.round() + x_zero
    qx = rounded.clamp(0, (1 << a_bits) - 1)
    x_inside = rounded == qx
    half = 1 << (w_bits - 1)
    if weight.is_floating_point():
        w_ratio = weight.to(dtype) / w_scale.reshape(-1, 1)
    else:
        w_ratio = _integers(weight, w_bits, x.shape[-1], w_scale.numel()).to(dtype)
    qw = w_ratio.round().clamp(-half, half - 1)
    w_inside = w_ratio.round() == qw

    if need_x or need_x_scale:
        grad_x = (rows @ (qw * w_scale.reshape(-1, 1))).reshape(x.shape)
        if need_x:
            results[0] = torch.where(x_inside, grad_x, 0.0).to(x.dtype)
        if need_x_scale:
            # of integers nothing depends on the scale
            kept = ratio if x.dtype != torch.uint8 else torch.zeros_like(ratio)
            results[4] = (grad_x * (qx - x_zero - torch.where(x_inside, kept, 0.0))).sum()
    if need_weight or need_w_scale:
        grad_weight = rows.t() @ ((qx - x_zero) * x_scale).reshape(-1, x.shape[-1])
        if need_weight:
            results[1] = torch.where(w_inside, grad_weight, 0.0).to(weight.dtype)
        if need_w_scale:
            kept = w_ratio if weight.is_floating_point() else torch.zeros_like(w_ratio)
            results[5] = (grad_weight * (qw - torch.where(w_inside, kept, 0.0))).sum(1)
    if bias is not None and need_bias:
        results[2] = rows.sum(0).to(bias.dtype)
    if acm is not None and need_acm:
        results[3] = rows.reshape(-1, *acm.shape).sum(0).to(acm.dtype)
    return results


def _integers(weight: torch.Tensor, w_bits: int, in_features: int, out_features: int) -> torch.Tensor:
    """The integers [out_features, in_features] of a packed or blocked weight."""
    if weight.dtype == torch.uint8:
        return unpack_weight(weight, w_bits, in_features)
    return unblock_weight(weight, in_features, w_bits)[:out_features]


def _straight_through(ratio: torch.Tensor, zero: torch.Tensor, quant_min: int, quant_max: int) -> torch.Tensor:
    rounded = (ratio.round() + zero).detach()
    q = rounded.clamp(quant_min, quant_max)
    return torch.where(rounded == q, q + (ratio - ratio.detach()), q)
