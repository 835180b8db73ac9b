"""The operator `gate_quantize`: public function, checks, registration."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks
from ..activations import check_activation
from ..dispatch import Backend, Operator, anything, checking, compiled, in_triton, not_float64
from . import reference


def gate_quantize(
    gate: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: torch.Tensor | float,
    zero_point: torch.Tensor | float,
    bits: int = 8,
    activation: str | None = "silu",
) -> torch.Tensor:
    """The hidden values of a gated MLP (SwiGLU, GEGLU), rounded to the integers that `quant_linear` takes; no gradient.

        q = clamp(round(activation(gate) * value / scale) + zero_point, 0, 2^bits - 1)

    Rounding is half to even. Backends compute the activation in different ways, so where a value lies within float rounding
    of the middle between two integers they may differ by one.

    Args:
        gate: [..., H], float32, bfloat16, float16 or float64; computed in float32 (float64 for float64). Halves of one tensor
            are read in place.
        value: likewise, of the same shape and dtype.
        scale: scalar or [H], positive.
        zero_point: scalar, a whole number in [0, 2^bits - 1].
        bits: 2 to 8.
        activation: None, "gelu", "gelu_tanh", "quick_gelu" or "silu".

    Returns:
        uint8 [..., H].

    Raises:
        TypeError: gate or value is not a float tensor, or they differ in dtype.
        ValueError: shapes, devices or values do not fit.

    Source: gated linear units of arXiv 2002.05202; integers of arXiv 1712.05877.
    """
    checks.bits("bits", bits)
    for name, tensor in (("gate", gate), ("value", value)):
        checks.floating(name, tensor)
    checks.same_device(gate=gate, value=value)
    if gate.dim() < 1 or gate.shape[-1] == 0:
        raise ValueError(f"gate had shape {tuple(gate.shape)}; it must be [..., H] with at least one channel")
    if value.shape != gate.shape:
        raise ValueError(f"value had shape {tuple(value.shape)}; it must be that of gate, {list(gate.shape)}")
    if value.dtype != gate.dtype:
        raise TypeError(f"value had dtype {value.dtype}; it must be that of gate, {gate.dtype}")
    check_activation(activation)
    scale, zero_point = checks.parameter("scale", scale, gate), checks.scalar("zero_point", zero_point, gate)
    if scale.numel() not in (1, gate.shape[-1]):
        raise ValueError(f"scale had {scale.numel()} values; it must have 1 or {gate.shape[-1]}, one for each channel")
    checks.positive("scale", scale)
    checks.whole("zero_point", zero_point, (1 << bits) - 1)
    return forward(gate.detach(), value.detach(), scale.reshape(-1), zero_point, bits, activation or "none")


def _check_values(gate: torch.Tensor, value: torch.Tensor, *_: Any) -> None:
    for part in (gate, value):
        checks.finite("gate or value", part)


forward = Operator(
    "gate_quantize(Tensor gate, Tensor value, Tensor scale, Tensor zero_point, int bits, str activation) -> Tensor",
    fake=lambda gate, *_: torch.empty_like(gate, dtype=torch.uint8, memory_format=torch.contiguous_format),
    backends=[
        checking(in_triton("gate_quantize", __package__, not_float64), _check_values),
        compiled("gate_quantize", "cpu", not_float64),
        checking(Backend("reference", reference.gate_quantize, anything), _check_values),
    ],
)
