"""Heads rotated before their weights are rounded, at no cost when the model runs.

Scores are inner products: turning the queries and the keys of a head by one orthogonal matrix R leaves them, and so the model, as
they were. Values are mixed before they are projected: turning those of a head by R and the projection's columns back leaves its
output. The rows of a turned weight are mixtures of a head's rows, so that their values lie closer to a normal distribution, and
rows that matter much or little to the logits share what rounding costs. R is random.

Sources: rotations of values and of whole streams before rounding, QuIP (arXiv 2307.13304) and QuaRot (arXiv 2404.00456). The
residual stream is not turned here: measured, that loses more than it gains (docs/accuracy.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..models.adapters.scalings import scalings
from ..quantization.layers import QuantLinear
from .fisher import float_weight


@torch.no_grad()
def rotate_heads(qmodel: nn.Module) -> list[str]:
    """Turns the heads of a converted model that still computes in float, in place, wherever that is free.

    Args:
        qmodel: from `calibration.convert`; what its quantizers have seen must not be of queries, keys or values.

    Returns:
        The names of what was turned: "... scores" and "... values".
    """
    places, turned = scalings(qmodel), []
    generator = torch.Generator().manual_seed(0)
    for name in places.scores:
        qkv = qmodel.get_submodule(name)
        if isinstance(qkv, QuantLinear):
            width = qkv.out_features // 3
            for rows, turn in _heads(qmodel, name, width, generator):
                _turn_rows(qkv, rows, turn)
                _turn_rows(qkv, rows + width, turn)
            turned.append(f"{name} scores")
    for name, after in places.values:
        qkv, proj = qmodel.get_submodule(name), qmodel.get_submodule(after)
        if isinstance(qkv, QuantLinear) and isinstance(proj, QuantLinear):
            for rows, turn in _heads(qmodel, name, proj.in_features, generator):
                _turn_rows(qkv, rows + 2 * proj.in_features, turn)
                weight = float_weight(proj)
                weight[:, rows] = (weight[:, rows].double() @ turn.T.to(weight.device)).to(weight.dtype)
            turned.append(f"{name} values")
    return turned


def random_orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    """[size, size] float64, evenly distributed over the orthogonal matrices (Mezzadri, arXiv math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _heads(
    qmodel: nn.Module, qkv: str, width: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(rows [D] of a head among the width rows of its kind, an orthogonal matrix [D, D]) for every head."""
    attention: Any = qmodel.get_submodule(qkv.rpartition(".")[0])
    size = width // attention.num_heads
    for head in range(attention.num_heads):
        yield torch.arange(head * size, (head + 1) * size), random_orthogonal(size, generator)


def _turn_rows(layer: QuantLinear, rows: torch.Tensor, turn: torch.Tensor) -> None:
    """Lets the layer give `turn y` for its outputs y[rows]."""
    weight, bias = float_weight(layer), layer.bias
    turn = turn.to(weight.device)
    weight[rows] = (turn @ weight[rows].double()).to(weight.dtype)
    if bias is not None:
        bias[rows] = (turn @ bias[rows].double()).to(bias.dtype)
