"""Which 2^b of the 256 integers of an 8-bit grid a tensor of few bits may be, for the least cost.

What a GELU gives lies crowded about 0, most of it within a step of a 4-bit grid that reaches the few large values. Levels that lie
closer there cost no more when the model runs, where integers have 8 bits anyway: each byte is replaced by its level.

Exact for the grid that is given: the levels are found by dynamic programming over its 256 integers.

Sources: S. Lloyd, Least squares quantization in PCM, 1982, of the criterion; Ckmeans.1d.dp (Wang and Song, 2011), of the method.
"""

from __future__ import annotations

import numpy as np
import torch

from ..quantization.ranges import affine_parameters

_GRID = 256
_SHARES = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.12)  # of the upper end, that are tried: a wide grid is coarse about 0


def fit_levels(
    values: torch.Tensor, cost: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(upper end, scalar; table, uint8 [256]) of the grid from `low` to that end on which 2^bits levels cost least.

    Args:
        values: float32, any shape, from low to high.
        cost: of a squared error in each, of the same shape.
        low: scalar, at most 0.
        high: scalar, at least 0.
        bits: 2 to 7.
    """
    flat, weights = values.flatten().double(), cost.flatten().double()
    moments = (weights, weights * flat, weights * flat.square())
    tried = []
    for share in _SHARES:
        scale, zero = (each.double() for each in affine_parameters(low, high * share, 8))
        places = (flat / scale).round_().add_(zero).clamp_(0, _GRID - 1).long()
        sums = torch.stack([torch.bincount(places, each, _GRID) for each in moments])
        grid = (torch.arange(_GRID, dtype=torch.float64, device=flat.device) - zero) * scale
        loss, levels = _best_levels(sums.cpu().numpy(), grid.cpu().numpy(), 1 << bits)
        tried.append((loss, share, levels))
    _, share, levels = min(tried, key=lambda each: each[0])
    return high * share, table_of(levels).to(values.device)


def table_of(levels: torch.Tensor) -> torch.Tensor:
    """uint8 [256]: the nearest of the levels, ascending integers, for each integer; the lower of two as near."""
    between = (levels[1:] + levels[:-1]) // 2
    return levels[torch.bucketize(torch.arange(_GRID), between)].to(torch.uint8)


def is_table(table: torch.Tensor, bits: int) -> bool:
    """Whether it could be a table of 2^bits levels: uint8 [256], nearest to each."""
    if table.dtype != torch.uint8 or table.shape != (_GRID,):
        return False
    levels = table.cpu().unique().long()
    return len(levels) <= 1 << bits and torch.equal(table.cpu(), table_of(levels))


def _best_levels(sums: np.ndarray, grid: np.ndarray, count: int) -> tuple[float, torch.Tensor]:
    """(cost, int64 [count] ascending): of `grid` [256], where `sums` [3, 256] has the moments of what is rounded to each place.

    In NumPy, on one thread: torch's would wait for each other at each of many small steps.
    """
    before = np.pad(sums.cumsum(axis=1), ((0, 0), (1, 0)))  # of the places before each
    places = np.arange(_GRID)

    def cost(first: np.ndarray, end: np.ndarray, level: np.ndarray) -> np.ndarray:
        """Of what lies from place `first` to before `end`, as `level`."""
        weight, mean, square = before[:, end] - before[:, first]
        return square - 2 * level * mean + level**2 * weight

    lower, upper = places[:, None], places[None, :]
    middle = (lower + upper) // 2 + 1  # the first place that goes to the upper of two neighbours
    pair = cost(lower, middle, grid[:, None]) + cost(middle, upper, grid[None, :])
    pair[lower >= upper] = np.inf
    best, came = cost(np.zeros_like(places), places, grid), []
    for _ in range(count - 1):
        reached = best[:, None] + pair
        came.append(reached.argmin(axis=0))
        best = reached.min(axis=0)
    best = best + cost(places, np.full_like(places, _GRID), grid)
    levels = [int(best.argmin())]
    loss = float(best[levels[0]])
    for source in reversed(came):
        levels.append(int(source[levels[-1]]))
    return loss, torch.tensor(levels[::-1])
