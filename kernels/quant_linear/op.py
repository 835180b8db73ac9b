"""The operator `quant_linear`: public function, checks, registration, autograd."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks
from ..dispatch import Backend, Operator, anything
from ..pack_weight import packed_row_bytes
from . import reference


def quant_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    acm: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | float,
    x_zero: torch.Tensor | float,
    w_scale: torch.Tensor | float,
    a_bits: int,
    w_bits: int,
    activation: str | None = None,
) -> torch.Tensor:
    """A linear layer in integer arithmetic, with bias, activation correction (ACM) and activation function in one pass.

        qx = clamp(round(x / x_scale) + x_zero, 0, 2^a_bits - 1)
        qw = clamp(round(weight / w_scale[n]), -2^(w_bits-1), 2^(w_bits-1) - 1)
        y[r, n] = x_scale * w_scale[n] * (sum_k qx[r, k] * qw[n, k] - x_zero * sum_k qw[n, k]) + bias[n] + acm[r mod T, n]

    then `activation`. Rounding is half to even, the integer sums are exact. The backward is straight-through: the gradient
    of x and of a float weight is zero where they were clamped; scales and x_zero get none.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64; the rows of all leading dimensions are counted through for acm.
        weight: [N, K] in the dtype of x or float32, or uint8 [N, ceil(K / 8) * w_bits] from `pack_weight`.
        bias: [N] or None.
        acm: [T, N] or None, with T tokens an image; the number of rows of x must be a multiple of T.
        x_scale: scalar, positive.
        x_zero: scalar, a whole number in [0, 2^a_bits - 1].
        w_scale: [N] or scalar, positive.
        a_bits: 2 to 8.
        w_bits: 2 to 8.
        activation: None, "gelu" or "gelu_tanh".

    Returns:
        [..., N] in the dtype of x.

    Raises:
        TypeError: a tensor has a dtype that it may not have.
        ValueError: shapes, devices, bit widths or values do not fit; the message names the argument.

    Source: integer arithmetic of arXiv 1712.05877, section 2.2; ACM of DFQ-ViT, arXiv 2507.14481.
    """
    checks.floating("x", x)
    checks.bits("a_bits", a_bits)
    checks.bits("w_bits", w_bits)
    checks.same_device(x=x, weight=weight, bias=bias, acm=acm)
    if x.dim() < 1:
        raise ValueError("x had no dimensions; it must be [..., K]")
    packed = weight.dtype == torch.uint8
    if not packed:
        checks.floating("weight", weight)
    columns = packed_row_bytes(x.shape[-1], w_bits) if packed else x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != columns:
        kind = f"packed to {w_bits} bits" if packed else "float"
        raise ValueError(f"weight had shape {tuple(weight.shape)}; for this x, {kind}, it must be [N, {columns}]")
    out_features = weight.shape[0]
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias had shape {tuple(bias.shape)}; it must be [{out_features}]")
    if acm is not None:
        if acm.dim() != 2 or acm.shape[1] != out_features or acm.shape[0] == 0:
            raise ValueError(f"acm had shape {tuple(acm.shape)}; it must be [tokens, {out_features}]")
        rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
        if rows % acm.shape[0]:
            raise ValueError(f"acm was for {acm.shape[0]} tokens; the {rows} rows of x are not a multiple of that")
    if activation is not None and activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation was {activation!r}; it may be None, 'gelu' or 'gelu_tanh'")
    x_scale, x_zero = checks.parameter("x_scale", x_scale, x), checks.parameter("x_zero", x_zero, x)
    w_scale = checks.parameter("w_scale", w_scale, x)
    for name, value in (("x_scale", x_scale), ("x_zero", x_zero)):
        if value.numel() != 1:
            raise ValueError(f"{name} had {value.numel()} values; it must be a scalar")
    if w_scale.numel() not in (1, out_features):
        raise ValueError(f"w_scale had {w_scale.numel()} values; it must have 1 or {out_features}, one for each row")
    checks.positive("x_scale", x_scale)
    checks.positive("w_scale", w_scale)
    checks.finite("x", x)
    scales = (x_scale.reshape(()), x_zero.reshape(()), w_scale.expand(out_features).contiguous())
    return _QuantLinear.apply(x, weight, bias, acm, *scales, a_bits, w_bits, activation or "none")


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? acm, Tensor x_scale, Tensor x_zero, Tensor w_scale, "
    "int a_bits, int w_bits, str activation"
)


def _fake_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    acm: torch.Tensor | None,
    *_: Any,
) -> list[torch.Tensor]:
    return [
        grad.new_empty(0) if value is None or not value.is_floating_point() else torch.empty_like(value)
        for value in (x, weight, bias, acm)
    ]


forward = Operator(
    f"quant_linear({_ARGUMENTS}) -> Tensor",
    fake=lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]),
    backends=[Backend("reference", reference.quant_linear, anything)],
)

backward = Operator(
    f"quant_linear_backward(Tensor grad, {_ARGUMENTS}) -> Tensor[]",
    fake=_fake_backward,
    backends=[Backend("reference", reference.quant_linear_backward, anything)],
)


class _QuantLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        ctx.save_for_backward(*inputs[:7])
        ctx.constants = inputs[7:]
        return forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = backward(grad, *ctx.saved_tensors, *ctx.constants)
        kept = [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)]
        return (*kept, *(None,) * 6)
