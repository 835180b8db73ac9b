"""A quantized layer as one call of `quant_linear`, with what comes before and after it in a block."""

from __future__ import annotations

import torch
from torch import nn

from ..kernels.layer_norm_quantize.op import forward as layer_norm_quantize
from ..kernels.quant_linear.op import forward as quant_linear
from ..quantization.layers import QuantLinear, check_tokens
from .parts import NORMS, scaled


def product(
    layer: QuantLinear,
    x: torch.Tensor,
    *,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    reader: QuantLinear | None = None,
) -> torch.Tensor:
    """What a frozen layer makes of x, in one pass.

    Args:
        layer: whose product it is.
        x: [..., K], float; or bytes on the grid of the layer's input.
        activation: of the result.
        residual: float32 [..., N], added to it.
        gain: [N], LayerScale of the result; only for a layer without correction.
        reader: the layer that the result is rounded for.

    Returns:
        [..., N], float32, or bytes on the grid of the reader's input.
    """
    check_tokens(layer.acm, x)
    if x.dtype != torch.uint8:
        x = x.float() if layer.factor is None else x.float() / layer.factor
    grid: tuple[torch.Tensor | None, torch.Tensor | None, int, str] = (None, None, 8, "float32")
    if reader is not None:
        scale, size = reader.input.scale, (layer.out_features,)
        scale = scale if reader.factor is None else scale * reader.factor
        zero_point = reader.input.zero_point.expand(size).contiguous()
        grid = (scale.expand(size).contiguous(), zero_point, reader.input.bits, "uint8")
    weight, acm, sums = layer.operands()
    bias = layer.bias if layer.bias is None or gain is None else layer.bias * gain
    w_scale = scaled(layer.weight_scale, gain)
    return quant_linear(
        x, weight, bias, acm, layer.input.scale, layer.input.zero_point, w_scale,
        layer.input.bits, layer.w_bits, activation, residual, *grid, sums,
    )  # fmt: skip


def normed(norm: nn.Module, x: torch.Tensor, reader: QuantLinear | None) -> torch.Tensor:
    """The norm of x, as bytes where it is a LayerNorm that one quantized layer alone reads."""
    if reader is None or type(norm) not in NORMS or reader.factor is not None:
        return norm(x)
    weight, bias = norm.weight, norm.bias
    if weight is None or bias is None or weight.dtype != torch.float32 or bias.dtype != torch.float32:
        return norm(x)
    grid = (reader.input.scale, reader.input.zero_point, reader.input.bits)
    return layer_norm_quantize(x.float(), weight, bias, norm.eps, *grid)
