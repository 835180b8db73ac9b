"""The operator `quantize_heads`: public function, checks, registration."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks
from ..dispatch import Backend, Operator, Verdict, anything, checking, compiled, in_triton, not_float64
from . import reference


def quantize_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    in_scale: torch.Tensor,
    in_zero: torch.Tensor,
    bits: int = 8,
    rope: torch.Tensor | None = None,
    half: bool = False,
) -> torch.Tensor:
    """Q, K and V of an attention as the integers that `quant_attention` takes, Q and K rotated on the way; no gradient.

        x = x * cos + (-second, first) * sin     of q and k, in the tokens that rope is of
        result = clamp(round(x / in_scale) + in_zero, 0, 2^bits - 1)

    Rounding is half to even. All of it in float32 (float64 for float64 scales), every product and sum rounded, so all
    backends give the same integers.

    Args:
        q: [B, heads, N, D], float; any strides.
        k: likewise.
        v: likewise.
        in_scale: [3], positive: of q, k and v.
        in_zero: [3], whole numbers in [0, 2^bits - 1].
        bits: 2 to 8.
        rope: float [R, 2 * D] or [heads, R, 2 * D], sines then cosines, of the last R of the N tokens; None for no rotation.
        half: the partners of a rotation are D / 2 channels apart; by default they are neighbours.

    Returns:
        uint8 [B, N, 3 * heads * D], laid out as timm's qkv layer does.

    Raises:
        TypeError: a tensor is not float.
        ValueError: shapes, devices or values do not fit.

    Source: rotary position embedding of arXiv 2104.09864; integers of arXiv 1712.05877.
    """
    checks.bits("bits", bits)
    for name, value in (("q", q), ("k", k), ("v", v)):
        checks.floating(name, value)
    checks.same_device(q=q, k=k, v=v, rope=rope)
    if q.dim() != 4 or q.shape[3] == 0:
        raise ValueError(f"q had shape {tuple(q.shape)}; it must be [B, heads, N, D]")
    for name, value in (("k", k), ("v", v)):
        if value.shape != q.shape:
            raise ValueError(f"{name} had shape {tuple(value.shape)}; it must be that of q, {list(q.shape)}")
        if value.dtype != q.dtype:
            raise TypeError(f"{name} had dtype {value.dtype}; it must be that of q, {q.dtype}")
    grids = checks.grids_of_heads(in_scale, in_zero, q, (1 << bits) - 1)
    if rope is not None:
        check_rope(rope, *q.shape[1:])
        rope = rope.detach().to(grids[0].dtype)
    return forward(q.detach(), k.detach(), v.detach(), *grids, bits, rope, half)


def check_rope(rope: torch.Tensor, heads: int, tokens: int, depth: int) -> None:
    """TypeError or ValueError unless rope turns heads of so many channels, in at most so many tokens."""
    checks.floating("rope", rope)
    fits = rope.dim() in (2, 3) and rope.shape[-1] == 2 * depth and rope.shape[-2] <= tokens
    if not fits or (rope.dim() == 3 and rope.shape[0] != heads):
        raise ValueError(
            f"rope had shape {tuple(rope.shape)}; it must be [R, {2 * depth}] or [{heads}, R, {2 * depth}], R up to {tokens}"
        )
    if depth % 2:
        raise ValueError(
            f"rope was given and a head had {depth} channels; they are rotated in pairs, so it must be even"
        )


def _check_values(*args: Any) -> None:
    for part in (*args[:3], args[6]):
        if part is not None:
            checks.finite("q, k, v or rope", part)


def _supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, in_scale: torch.Tensor, *_: Any) -> Verdict:
    return not_float64(q if q.dtype == torch.float64 else in_scale)


forward = Operator(
    "quantize_heads(Tensor q, Tensor k, Tensor v, Tensor in_scale, Tensor in_zero, int bits, Tensor? rope, bool half) -> Tensor",
    fake=lambda q, *_: q.new_empty((q.shape[0], q.shape[2], 3 * q.shape[1] * q.shape[3]), dtype=torch.uint8),
    backends=[
        checking(in_triton("quantize_heads", __package__, _supports), _check_values),
        compiled("quantize_heads", "cpu", _supports),
        checking(Backend("reference", reference.quantize_heads, anything), _check_values),
    ],
)
