"""The operator `layer_norm_quantize`: public function, checks, registration."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks
from ..dispatch import Backend, Operator, Verdict, anything, checking, compiled, in_triton, not_float64
from . import reference


def layer_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float = 1e-6,
    scale: torch.Tensor | float,
    zero_point: torch.Tensor | float,
    bits: int = 8,
) -> torch.Tensor:
    """LayerNorm over the last dimension, rounded to the integers that `quant_linear` takes; no gradient.

        q = clamp(round(layer_norm(x) / scale) + zero_point, 0, 2^bits - 1)

    Rounding is half to even. Backends sum in different orders, so where a value lies within float rounding of the middle
    between two integers they may differ by one.

    Args:
        x: [..., C], float32, bfloat16, float16 or float64; computed in float32 (float64 for float64).
        weight: [C], float32 (or the dtype of x).
        bias: [C], likewise.
        eps: added to the variance.
        scale: scalar, positive.
        zero_point: scalar, a whole number in [0, 2^bits - 1].
        bits: 2 to 8.

    Returns:
        uint8 [..., C].

    Raises:
        TypeError: x, weight or bias is not a float tensor.
        ValueError: shapes, devices or values do not fit.
    """
    checks.floating("x", x)
    checks.bits("bits", bits)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps was {eps}; it must be a finite number of at least 0")
    checks.same_device(x=x, weight=weight, bias=bias)
    for name, value in (("weight", weight), ("bias", bias)):
        checks.floating(name, value)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x had shape {tuple(x.shape)}; it must be [..., C] with at least one channel")
    for name, value in (("weight", weight), ("bias", bias)):
        if value.shape != x.shape[-1:]:
            raise ValueError(f"{name} had shape {tuple(value.shape)}; it must be [{x.shape[-1]}]")
    scale, zero_point = checks.scalar("scale", scale, x), checks.scalar("zero_point", zero_point, x)
    checks.positive("scale", scale)
    checks.whole("zero_point", zero_point, (1 << bits) - 1)
    weight, bias = weight.detach().to(scale.dtype), bias.detach().to(scale.dtype)
    return forward(x.detach(), weight, bias, eps, scale, zero_point, bits)


def _check_values(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *_: Any) -> None:
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        checks.finite(name, value)


def _supports_triton(x: torch.Tensor, *rest: Any) -> Verdict:
    if x.shape[-1] > _WIDEST:
        return False, f"x had {x.shape[-1]} channels; a Triton program holds rows of up to {_WIDEST}"
    return not_float64(x, *rest)


_WIDEST = 32768  # of the registers of one program, half full

forward = Operator(
    "layer_norm_quantize(Tensor x, Tensor weight, Tensor bias, float eps, Tensor scale, Tensor zero_point, int bits) -> Tensor",
    fake=lambda x, *_: torch.empty_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format),
    backends=[
        checking(in_triton("layer_norm_quantize", __package__, _supports_triton), _check_values),
        compiled("layer_norm_quantize", "cpu", not_float64),
        checking(Backend("reference", reference.layer_norm_quantize, anything), _check_values),
    ],
)
