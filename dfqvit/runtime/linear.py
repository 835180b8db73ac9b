"""A quantized layer as one call of `quant_linear`, with what comes before and after it in a block."""

from __future__ import annotations

from typing import Any

import torch

from ..kernels.layer_norm_quantize.op import forward as layer_norm_quantize
from ..kernels.quant_linear.op import forward as quant_linear
from ..quantization.layers import QuantLinear, check_tokens
from ..quantization.prepared import Bind, Call, through_torch
from .parts import other_norm, scaled

_X, _RESIDUAL = 0, 10  # their places among the arguments of `quant_linear`


def product(
    layer: QuantLinear,
    *,
    activation: str = "none",
    gain: torch.Tensor | None = None,
    reader: QuantLinear | None = None,
    bind: Bind = through_torch,
) -> Call:
    """What a frozen layer makes of its input, in one pass, as a function.

    Args:
        layer: whose product it is.
        activation: of the result.
        gain: [N], LayerScale of the result; only for a layer without correction.
        reader: the layer that the result is rounded for.
        bind: see `prepared`.

    Returns:
        A function of x [..., K], float or bytes on the grid of the layer's input, and of a residual float32 [..., N] or None,
        which is added to the result: [..., N], float32, or bytes on the grid of the reader's input.
    """
    grid: tuple[torch.Tensor | None, torch.Tensor | None, int, str] = (None, None, 8, "float32")
    if reader is not None:
        scale, size = reader.input.scale, (layer.out_features,)
        scale = scale if reader.factor is None else scale * reader.factor
        zero_point = reader.input.zero_point.expand(size).contiguous()
        grid = (scale.expand(size).contiguous(), zero_point, reader.input.grid_bits, "uint8")
    weight, acm, sums = layer.operands()
    bias = None if layer.bias is None else scaled(layer.bias, gain)
    w_scale, factor, correction = scaled(layer.weight_scale, gain), layer.factor, layer.acm
    arguments = (
        None, weight, bias, acm, layer.input.scale, layer.input.zero_point, w_scale,
        layer.input.grid_bits, layer.packed_bits, activation, None, *grid, sums,
    )  # fmt: skip
    run = bind(quant_linear, arguments, (_X, _RESIDUAL))
    site, table = layer.input, None if reader is None else reader.input.table

    def call(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        check_tokens(correction, x)
        if x.dtype != torch.uint8:
            x = x.float() if factor is None else x.float() / factor
            x = x if site.table is None else site(x)
        result = run(x, residual)
        return result if table is None else table[result.int()]

    return call


def linear(layer: Any, bind: Bind = through_torch) -> Any:
    """The product of a frozen layer as a function; anything else as it is."""
    return product(layer, bind=bind) if quantized(layer) else layer


def quantized(layer: Any) -> bool:
    """Whether it is a frozen QuantLinear."""
    return type(layer) is QuantLinear and layer.frozen


def normed(norm: Any, reader: Any, bind: Bind = through_torch) -> Any:
    """The norm as a function of x [..., C]: to bytes where it is a LayerNorm that one quantized layer, `reader`, alone reads."""
    if not quantized(reader) or reader.factor is not None or reader.input.table is not None or other_norm(norm):
        return norm
    grid = (reader.input.scale, reader.input.zero_point, reader.input.bits)
    run = bind(layer_norm_quantize, (None, norm.weight, norm.bias, norm.eps, *grid), (0,))

    def call(x: torch.Tensor) -> torch.Tensor:
        return run(x.float())

    return call
