"""quantize_heads in plain torch: the oracle of the other backends, and the fallback."""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, rope: torch.Tensor, half: bool) -> torch.Tensor:
    """Rotary position embedding of the last tokens: x [..., N, D], rope [..., R, 2 * D] of the last R of them.

    `rope` holds sines, then cosines. `x * cos + partner * sin`, where a pair's partners are (-second, first): channels
    side by side, or with `half` D / 2 apart.
    """
    prefix = x.shape[-2] - rope.shape[-2]
    turned = x[..., prefix:, :]
    sines, cosines = rope.chunk(2, dim=-1)
    if half:
        first, second = turned.chunk(2, dim=-1)
        partner = torch.cat([-second, first], dim=-1)
    else:
        partner = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    turned = (turned * cosines + partner * sines).to(x.dtype)
    return torch.cat([x[..., :prefix, :], turned], dim=-2) if prefix else turned


def quantize_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    in_scale: torch.Tensor,
    in_zero: torch.Tensor,
    bits: int,
    rope: torch.Tensor | None,
    half: bool,
) -> torch.Tensor:
    """The formula of `op.quantize_heads`, in the dtype of in_scale."""
    q, k, v = (part.to(in_scale.dtype) for part in (q, k, v))
    if rope is not None:
        q, k = (rotate(part, rope.to(in_scale.dtype), half) for part in (q, k))
    parts = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4)  # [B, N, 3, heads, D]
    grid = (3, 1, 1)
    integers = (parts / in_scale.view(grid)).round() + in_zero.view(grid)
    return integers.clamp(0, (1 << bits) - 1).to(torch.uint8).flatten(2)
