"""`quant_linear` in plain differentiable torch: the oracle of every other backend, and the fallback."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..pack_weight import unpack_weight

ACTIVATIONS = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


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
) -> torch.Tensor:
    """The formula of `op.quant_linear`. The integers are summed in a float type wide enough to be exact, on every device."""
    qx = _straight_through(x.to(x_scale.dtype) / x_scale, x_zero, 0, (1 << a_bits) - 1)
    if weight.dtype == torch.uint8:
        qw = unpack_weight(weight, w_bits, x.shape[-1]).to(x_scale.dtype)
    else:
        half = 1 << (w_bits - 1)
        ratio = weight.to(x_scale.dtype) / w_scale.reshape(-1, 1)
        qw = _straight_through(ratio, torch.zeros_like(x_zero), -half, half - 1)
    largest = x.shape[-1] * ((1 << a_bits) - 1) << (w_bits - 1)
    exact = torch.float32 if largest < 1 << 24 and x_scale.dtype == torch.float32 else torch.float64
    qx, qw = qx.to(exact), qw.to(exact)
    total = qx @ qw.t() - x_zero.to(exact) * qw.sum(1)
    y = (x_scale * w_scale) * total.to(x_scale.dtype)
    if bias is not None:
        y = y + bias
    if acm is not None:
        y = (y.reshape(-1, *acm.shape) + acm).reshape(y.shape)
    return ACTIVATIONS[activation](y).to(x.dtype)


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
) -> list[torch.Tensor]:
    """The straight-through gradients of x, weight, bias and acm; an empty tensor where there is none.

    Written out rather than left to autograd, which does not record inside an operator.
    """
    if activation != "none":
        inputs = (x, weight, bias, acm, x_scale, x_zero, w_scale, a_bits, w_bits, "none")
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        grad = torch.ops.aten.gelu_backward(grad, quant_linear(*inputs), approximate=approximate)
    rows = grad.reshape(-1, grad.shape[-1]).to(x_scale.dtype)
    ratio = x.to(x_scale.dtype) / x_scale
    qx = ratio.round() + x_zero
    fake_x = (qx.clamp(0, (1 << a_bits) - 1) - x_zero) * x_scale
    results = [grad.new_empty(0)] * 4
    if weight.dtype == torch.uint8:
        fake_w = unpack_weight(weight, w_bits, x.shape[-1]).to(x_scale.dtype) * w_scale.reshape(-1, 1)
    else:
        half = 1 << (w_bits - 1)
        qw = (weight.to(x_scale.dtype) / w_scale.reshape(-1, 1)).round()
        fake_w = qw.clamp(-half, half - 1) * w_scale.reshape(-1, 1)
        grad_weight = rows.t() @ fake_x.reshape(-1, x.shape[-1])
        results[1] = torch.where((qw < -half) | (qw >= half), 0.0, grad_weight).to(weight.dtype)
    grad_x = (rows @ fake_w).reshape(x.shape)
    results[0] = torch.where((qx < 0) | (qx >= 1 << a_bits), 0.0, grad_x).to(x.dtype)
    if bias is not None:
        results[2] = rows.sum(0).to(bias.dtype)
    if acm is not None:
        results[3] = rows.reshape(-1, *acm.shape).sum(0).to(acm.dtype)
    return results


def _straight_through(ratio: torch.Tensor, zero: torch.Tensor, quant_min: int, quant_max: int) -> torch.Tensor:
    q = ratio + (ratio.round() - ratio).detach() + zero
    inside = (q >= quant_min) & (q <= quant_max)
    return torch.where(inside | q.isnan(), q, q.clamp(quant_min, quant_max).detach())
