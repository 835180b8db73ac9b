"""`quant_conv_block` as torch's convolution and calls of its operators, each on the backend that serves it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..gate_quantize.op import forward as gate_quantize
from ..layer_norm_quantize.op import forward as layer_norm_quantize
from ..quant_linear.op import forward as quant_linear


def quant_conv_block(
    x: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    w_bits: Sequence[int],
    scales: Sequence[torch.Tensor],
    zeros: Sequence[torch.Tensor],
    a_bits: Sequence[int],
    hidden_scale: torch.Tensor | None,
    activation: str,
    grn_weight: torch.Tensor | None = None,
    grn_bias: torch.Tensor | None = None,
    grn_eps: float = 1e-6,
) -> torch.Tensor:
    """The formula of `op.quant_conv_block`; a bias of no values is none."""
    channels = x.shape[-1]
    convolved = F.conv2d(
        x.permute(0, 3, 1, 2), conv_weight, conv_bias, padding=conv_weight.shape[-1] // 2, groups=channels
    ).permute(0, 2, 3, 1)
    h = layer_norm_quantize.run(convolved, norm_weight, norm_bias, eps, scales[0], zeros[0], a_bits[0])
    size = weight_scales[0].shape
    hidden = (scales[1] if hidden_scale is None else hidden_scale).expand(size).contiguous()
    first, second = (bias if bias.numel() else None for bias in biases)
    layer = (h, weights[0], first, None, scales[0], zeros[0], weight_scales[0], a_bits[0], w_bits[0], activation, None)
    if grn_weight is None or grn_bias is None:
        h = quant_linear.run(*layer, hidden, zeros[1].expand(size).contiguous(), a_bits[1], "uint8")
    else:
        h = quant_linear.run(*layer, None, None, 8, "float32")
        norms = torch.linalg.vector_norm(h, dim=(1, 2), keepdim=True)
        h = h * (1 + grn_weight * (norms / (norms.mean(-1, keepdim=True) + grn_eps))) + grn_bias
        h = gate_quantize.run(torch.ones_like(h), h, hidden, zeros[1], a_bits[1], "none")
    return quant_linear.run(
        h, weights[1], second, None, scales[1], zeros[1], weight_scales[1], a_bits[1], w_bits[1], "none", x.contiguous(),
        None, None, 8, "float32",
    )  # fmt: skip
