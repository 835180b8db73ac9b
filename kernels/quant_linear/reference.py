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
    """The formula of `op.quant_linear`. Integers are summed in float64, exact below 2^53, on every device."""
    qx = _straight_through(x.to(x_scale.dtype) / x_scale, x_zero, 0, (1 << a_bits) - 1)
    if weight.dtype == torch.uint8:
        qw = unpack_weight(weight, w_bits, x.shape[-1]).to(x_scale.dtype)
    else:
        half = 1 << (w_bits - 1)
        ratio = weight.to(x_scale.dtype) / w_scale.reshape(-1, 1)
        qw = _straight_through(ratio, torch.zeros_like(x_zero), -half, half - 1)
    total = qx.double() @ qw.double().t() - x_zero.double() * qw.double().sum(1)
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
    *constants: object,
) -> list[torch.Tensor]:
    """The straight-through gradients of x, weight, bias and acm, by autograd; an empty tensor where there is none."""
    inputs = [x, weight, bias, acm]
    leaves = [
        value.detach().requires_grad_() if value is not None and value.is_floating_point() else value
        for value in inputs
    ]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    with torch.enable_grad():
        y = quant_linear(*leaves, *constants)  # type: ignore[arg-type]
    found = iter(torch.autograd.grad(y, wanted, grad))
    return [next(found) if leaf is not None and leaf.requires_grad else grad.new_empty(0) for leaf in leaves]


def _straight_through(ratio: torch.Tensor, zero: torch.Tensor, quant_min: int, quant_max: int) -> torch.Tensor:
    q = ratio + (ratio.round() - ratio).detach() + zero
    inside = (q >= quant_min) & (q <= quant_max)
    return torch.where(inside | q.isnan(), q, q.clamp(quant_min, quant_max).detach())
