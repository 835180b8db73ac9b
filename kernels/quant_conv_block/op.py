"""The operator `quant_conv_block`: public function, checks, registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import blocks, checks
from ..activations import check_activation
from ..dispatch import Operator
from . import reference

LINEARS = ("fc1", "fc2")  # the order of weights, biases, weight_scales, w_bits
GRIDS = ("fc1 input", "fc2 input")  # the order of scales, zeros, a_bits


def quant_conv_block(
    x: torch.Tensor,
    *,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    weight_scales: Sequence[torch.Tensor],
    w_bits: Sequence[int],
    scales: Sequence[torch.Tensor],
    zeros: Sequence[torch.Tensor],
    a_bits: Sequence[int],
    hidden_scale: torch.Tensor | None = None,
    activation: str | None = "gelu",
    grn_weight: torch.Tensor | None = None,
    grn_bias: torch.Tensor | None = None,
    grn_eps: float = 1e-6,
) -> torch.Tensor:
    """A ConvNeXt block: a depthwise convolution in float32, then an MLP on 8-bit integers; no gradient.

        result = x + fc2(grn(activation(fc1(layer_norm(depthwise(x))))))

    With `grn_weight` there is a global response norm as in ConvNeXt V2, of values h [H, W, channels] of an image:

        grn(h) = h * (1 + grn_weight * n / (mean(n) + grn_eps)) + grn_bias,    n = sqrt(sum of h^2 over H and W)

    computed in float32 and then rounded. The other arithmetic after the convolution is that of `layer_norm_quantize` and
    `quant_linear`. One compiled call on CPUs, torch's convolution and these operators elsewhere. ConvNeXt's factors for the
    channels of the result (`gamma`) belong into the scales and the bias of fc2.

    Args:
        x: float32 [B, H, W, C].
        conv_weight: float32 [C, 1, S, S], S odd; zeros stand around the image.
        conv_bias: float32 [C] or None.
        norm_weight: of the LayerNorm over the channels, float32 [C].
        norm_bias: of it, float32 [C].
        eps: of it.
        weights: of `LINEARS`, in a form that `quant_linear` takes: [H, C], [C, H].
        biases: of `LINEARS`, float32 or None.
        weight_scales: of `LINEARS`, one for each output, not 0.
        w_bits: of `LINEARS`, 2 to 8.
        scales: of `GRIDS`, scalars, positive: the quantizers of what the layers take.
        zeros: of `GRIDS`, scalars, whole numbers.
        a_bits: of `GRIDS`, 2 to 8.
        hidden_scale: [H], float32, or None: the scales that fc1's result is rounded by, where its channels have scales of their
            own; by default that of fc2's input for all.
        activation: None, "gelu", "gelu_tanh", "quick_gelu" or "silu".
        grn_weight: of the response norm, [H], float32; None for no norm.
        grn_bias: of it, [H], float32; given if grn_weight is.
        grn_eps: of it.

    Returns:
        float32 [B, H, W, C].

    Raises:
        TypeError: x is not float32.
        ValueError: lengths, shapes, devices or values do not fit; or a gradient is wanted.

    Source: ConvNeXt, arXiv 2201.03545, and V2, 2301.00808; integer arithmetic of arXiv 1712.05877.
    """
    blocks.check_input(x)
    lists: dict[str, Sequence[Any]] = {
        "weights": weights, "biases": biases, "weight_scales": weight_scales, "w_bits": w_bits, "scales": scales,
        "zeros": zeros, "a_bits": a_bits,
    }  # fmt: skip
    for name, values in lists.items():
        blocks.check_length(name, values, 2)
    blocks.check_tensors(weights=weights, weight_scales=weight_scales, scales=scales, zeros=zeros)
    checks.dense("norm_weight", norm_weight)
    for name, widths in (("w_bits", w_bits), ("a_bits", a_bits)):
        for bits in widths:
            checks.bits(name, bits)
    channels = norm_weight.numel()
    if x.dim() != 4 or x.shape[3] != channels:
        raise ValueError(f"x had shape {tuple(x.shape)}; it must be [B, H, W, {channels}]")
    checks.dense("conv_weight", conv_weight)
    checks.same_device(x=x, conv_weight=conv_weight, conv_bias=conv_bias, norm_weight=norm_weight, norm_bias=norm_bias)
    for name, tensor in (("conv_bias", conv_bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        blocks.check_channels(name, tensor, channels)
    size = conv_weight.shape[-1] if conv_weight.dim() else 0
    if conv_weight.shape != (channels, 1, size, size) or size % 2 == 0 or conv_weight.dtype != torch.float32:
        raise ValueError(
            f"conv_weight was {conv_weight.dtype} {tuple(conv_weight.shape)}; "
            f"it must be float32 [{channels}, 1, S, S] of an odd S"
        )
    hidden = weight_scales[0].numel()
    sizes = ((hidden, channels), (channels, hidden))
    for layer in zip(LINEARS, [x] * 2, weights, biases, weight_scales, w_bits, sizes, strict=True):
        blocks.check_linear(*layer)
    blocks.check_grids(x, GRIDS, scales, zeros, a_bits)
    checks.same_device(x=x, hidden_scale=hidden_scale)
    blocks.check_hidden(hidden_scale, hidden)
    if (grn_weight is None) != (grn_bias is None):
        raise ValueError(f"grn_{'weight' if grn_weight is None else 'bias'} was None; it must be given if the other is")
    checks.same_device(x=x, grn_weight=grn_weight, grn_bias=grn_bias)
    for name, tensor in (("grn_weight", grn_weight), ("grn_bias", grn_bias)):
        blocks.check_channels(name, tensor, hidden)
    check_activation(activation)
    blocks.check_no_gradient("quant_conv_block", (x, conv_weight, conv_bias, norm_weight, norm_bias, *weights, *biases,
                                                  *weight_scales, *scales, *zeros, hidden_scale, grn_weight,
                                                  grn_bias))  # fmt: skip
    return forward(
        x, conv_weight, conv_bias, norm_weight, norm_bias, eps, list(weights), blocks.given(x, biases),
        list(weight_scales), list(w_bits), list(scales), list(zeros), list(a_bits), hidden_scale, activation or "none",
        grn_weight, grn_bias, grn_eps,
    )  # fmt: skip


forward = Operator(
    "quant_conv_block(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor norm_weight, Tensor norm_bias, float eps, "
    "Tensor[] weights, Tensor[] biases, Tensor[] weight_scales, int[] w_bits, Tensor[] scales, Tensor[] zeros, int[] a_bits, "
    "Tensor? hidden_scale, str activation, Tensor? grn_weight=None, Tensor? grn_bias=None, float grn_eps=1e-06) -> Tensor",
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    backends=blocks.backends("quant_conv_block", reference.quant_conv_block),
)
