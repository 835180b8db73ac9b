"""The operator `fake_quantize`: public function, checks, registration, autograd."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks
from ..dispatch import Backend, Operator, anything, compiled, not_float64
from . import reference


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor | float,
    zero_point: torch.Tensor | float = 0,
    *,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> torch.Tensor:
    """Rounds x to the grid of a quantizer and back: `(clamp(round(x / s) + z, quant_min, quant_max) - z) * s`.

    Rounding is half to even. The backward is straight-through: the gradient passes where q was not clamped. Scale and
    zero point get no gradient here; `reference.fake_quantize` gives the LSQ form.

    Args:
        x: float32, bfloat16, float16 or float64, any shape; computed in float32 (float64 for float64).
        scale: positive; a scalar, or [x.shape[axis]] for a scale per channel.
        zero_point: whole numbers in [quant_min, quant_max]; a scalar, or one for each scale.
        quant_min: least integer, as 0 or -2^(b-1).
        quant_max: greatest integer, as 2^b - 1 or 2^(b-1) - 1.
        axis: the channel dimension of x; needed with more than one scale.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        TypeError: x is not a float tensor.
        ValueError: shapes, devices or ranges do not fit, a scale is not positive, a zero point is not a whole number in the
            range; or a gradient is wanted of either.

    Source: Jacob et al., arXiv 1712.05877; Krishnamoorthi, arXiv 1806.08342.
    """
    checks.floating("x", x)
    scale = checks.parameter("scale", scale, x)
    zero_point = checks.parameter("zero_point", zero_point, x)
    checks.no_gradient("fake_quantize", scale=scale, zero_point=zero_point)
    for name, end in (("quant_min", quant_min), ("quant_max", quant_max)):
        checks.integer(name, end)
    if axis is not None:
        checks.integer("axis", axis)
    if quant_min >= quant_max:
        raise ValueError(f"quant_min was {quant_min}; it must be less than quant_max, {quant_max}")
    if scale.numel() != 1:
        if axis is None:
            raise ValueError(f"axis was None; with {scale.numel()} scales it must name the channel dimension of x")
        if not -x.dim() <= axis < x.dim():
            raise ValueError(f"axis was {axis}; x has {x.dim()} dimensions")
        if x.shape[axis] != scale.numel():
            raise ValueError(f"scale had {scale.numel()} values; dimension {axis} of x has {x.shape[axis]} channels")
    if zero_point.numel() not in (1, scale.numel()):
        raise ValueError(f"zero_point had {zero_point.numel()} values; it must have 1 or {scale.numel()}, like scale")
    checks.positive("scale", scale)
    checks.whole("zero_point", zero_point, quant_max, quant_min)
    zero_point = zero_point.reshape(-1).expand(scale.numel()).reshape(scale.shape).contiguous()
    arguments = (x, scale, zero_point, quant_min, quant_max, (axis or 0) % max(x.dim(), 1))
    return _FakeQuantize.apply(*arguments) if torch.is_grad_enabled() and x.requires_grad else forward(*arguments)


_ARGUMENTS = "Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int axis"

forward = Operator(
    f"fake_quantize({_ARGUMENTS}) -> Tensor",
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    backends=[
        compiled("fake_quantize", "cuda", not_float64),
        compiled("fake_quantize", "cpu", not_float64),
        Backend("reference", lambda *args: reference.fake_quantize(*args).contiguous(), anything),
    ],
)

backward = Operator(
    f"fake_quantize_backward(Tensor grad, {_ARGUMENTS}) -> Tensor",
    fake=lambda grad, x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    backends=[
        compiled("fake_quantize_backward", "cuda", not_float64),
        compiled("fake_quantize_backward", "cpu", not_float64),
        Backend("reference", lambda *args: reference.fake_quantize_backward(*args).contiguous(), anything),
    ],
)


class _FakeQuantize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> torch.Tensor:
        return forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.constants = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        return (backward(grad, *ctx.saved_tensors, *ctx.constants), None, None, None, None, None)
