"""quant_attention in plain torch: the oracle of the other backends, and the fallback."""

from __future__ import annotations

import torch


def quant_attention(
    qkv: torch.Tensor,
    heads: int,
    in_scale: torch.Tensor,
    in_zero: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    index: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    out_zero: torch.Tensor | None,
    out_bits: int,
    head_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula of `op.quant_attention`, in the dtype of in_scale; the integers are summed in float64, exactly."""
    batch, image, channels = *qkv.shape[:2], qkv.shape[2] // 3
    windows, tokens = (1, image) if index is None else index.shape
    places = slice(None) if index is None else index.flatten().long()
    whole = qkv.unflatten(2, (3, heads, channels // heads)).double() - in_zero.double().view(3, 1, 1)
    whole = whole[:, places].reshape(batch * windows, tokens, 3, heads, channels // heads)
    q, k, v = whole.permute(2, 0, 3, 1, 4).unbind(0)
    factor = scale * in_scale[0] * in_scale[1]
    if head_scale is not None:
        factor = (factor * head_scale).view(heads, 1, 1)
    scores = (q @ k.mT).to(in_scale.dtype) * factor
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = (scores.unflatten(0, (batch, windows)) + mask[:, None]).flatten(0, 1)
    powers = (scores - scores.amax(dim=-1, keepdim=True)).exp() if scores.numel() else scores
    steps = (255 * powers).round().double()
    y = in_scale[2] * (steps @ v).to(in_scale.dtype) / steps.sum(dim=-1, keepdim=True).to(in_scale.dtype)
    result = y.new_empty(batch, image, channels)
    result[:, places] = y.transpose(1, 2).reshape(batch, image, channels)
    if out_scale is None or out_zero is None:
        return result
    return ((result / out_scale).round() + out_zero).clamp(0, (1 << out_bits) - 1).to(torch.uint8)
