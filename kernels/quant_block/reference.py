"""`quant_block` as calls of its operators, each on the backend that serves it: the reference's, or Triton's and CUDA's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..gate_quantize.op import forward as gate_quantize
from ..layer_norm_quantize.op import forward as layer_norm_quantize
from ..quant_attention.op import forward as quant_attention
from ..quant_linear.op import forward as quant_linear
from ..quantize_heads.op import forward as quantize_heads


def quant_block(
    x: torch.Tensor,
    norms: Sequence[torch.Tensor],
    eps: Sequence[float],
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    w_bits: Sequence[int],
    scales: Sequence[torch.Tensor],
    zeros: Sequence[torch.Tensor],
    a_bits: Sequence[int],
    heads: int,
    attention_scale: float,
    position_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    index: torch.Tensor | None,
    acm: torch.Tensor | None,
    hidden_scale: torch.Tensor | None,
    activation: str,
    head_scale: torch.Tensor | None = None,
    post_norm: bool = False,
    half: bool = False,
    gate: str = "none",
    rope: torch.Tensor | None = None,
    hidden_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula of `op.quant_block`; a bias of no values is none."""

    def norm(place: int, grid: int, x: torch.Tensor) -> torch.Tensor:
        weight, bias = norms[2 * place : 2 * place + 2]
        if post_norm:
            return x  # which the layer rounds
        return layer_norm_quantize.run(x, weight, bias, eps[place], scales[grid], zeros[grid], a_bits[grid])

    def linear(
        place: int,
        grid: int,
        x: torch.Tensor,
        out: tuple[torch.Tensor, torch.Tensor, int] | None = None,
        residual: torch.Tensor | None = None,
        acm: torch.Tensor | None = None,
        activation: str = "none",
    ) -> torch.Tensor:
        tail: tuple[Any, ...] = (None, None, 8, "float32")
        if out is not None:
            outputs = weight_scales[place].numel()
            spread = [value.reshape(-1).repeat_interleave(outputs // value.numel()) for value in out[:2]]
            tail = (*spread, out[2], "uint8")
        head = (
            x,
            weights[place],
            biases[place] if biases[place].numel() else None,
            acm,
            scales[grid],
            zeros[grid],
            weight_scales[place],
        )
        return quant_linear.run(*head, a_bits[grid], w_bits[place], activation, residual, *tail)

    def add(
        place: int, grid: int, x: torch.Tensor, residual: torch.Tensor, acm: torch.Tensor | None = None
    ) -> torch.Tensor:
        if not post_norm:
            return linear(place, grid, x, residual=residual, acm=acm)
        weight, bias = norms[place - 1 : place + 1]
        return residual + F.layer_norm(linear(place, grid, x), weight.shape, weight, bias, eps[place // 2])

    in_scale, in_zero = torch.stack(list(scales[1:4])), torch.stack(list(zeros[1:4]))
    if head_scale is None and rope is None:
        qkv = linear(0, 0, norm(0, 0, x), (in_scale, in_zero, a_bits[1]))
    else:
        q, k, v = linear(0, 0, norm(0, 0, x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        if head_scale is not None:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        qkv = quantize_heads.run(q, k, v, in_scale, in_zero, a_bits[1], rope, half)
    attended = quant_attention.run(
        qkv, heads, in_scale, in_zero, attention_scale, position_bias, mask, index, scales[4], zeros[4], a_bits[4],
        head_scale,
    )  # fmt: skip
    x = add(1, 4, attended, x)
    rounded = (scales[6] if hidden_scale is None else hidden_scale, zeros[6], a_bits[6])
    if gate == "none":
        hidden = linear(2, 5, norm(1, 5, x), rounded, activation=activation)
    else:
        first, last = linear(2, 5, norm(1, 5, x)).chunk(2, dim=-1)
        halves = (first, last) if gate == "first" else (last, first)
        hidden = gate_quantize.run(*halves, rounded[0].reshape(-1), *rounded[1:], activation)
    if hidden_table is not None:
        hidden = hidden_table[hidden.int()]
    return add(3, 6, hidden, x, acm)
